"""Arrow IPC streams as the bags of each feature, and vectors as such a stream. Nothing in a stream is trusted."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .._batches import Bags
from ..interop.arrow import columns_of
from .serve_limits import MAX_ARROW_BATCHES, check_bags, check_indices

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from .serve_limits import Limits

# Places in Arrow's flatbuffers: Message.header, RecordBatch.compression.
HEADER, COMPRESSION = 2, 3
# How streams said it before, in the metadata of a message: pyarrow still expands buffers for it.
OLD_COMPRESSION = b"ARROW:experimental_compression"


# ---- Requests --------------------------------------------------------------------------------------------------------


def bags_in(body: bytes, features: Collection[str], limits: Limits) -> dict[str, list[Bags]]:
    """The bags of each feature that a stream has a column of.

    Raises
    ------
    ValueError, TypeError
        If it is no such stream, or as the library does for its columns.
    Refused
        If it has more than the limits allow.
    """
    try:
        _check_messages(body)
        with pa.ipc.open_stream(pa.py_buffer(body)) as stream:
            names = stream.schema.names
        places = [place for place, name in enumerate(names) if name in features]
        table = _table(body, places, limits) if places else None
    except (pa.ArrowException, OSError, EOFError, MemoryError, OverflowError, UnicodeError) as error:
        raise ValueError(f"a body must be an Arrow IPC stream: {error}") from error
    if table is None:
        return {}
    columns = columns_of(table, "indices", features)
    check_indices(sum(num_indices(bags) for column in columns.values() for bags in column), limits)
    nothing = [Bags(np.empty(0, np.int64), np.zeros(1, np.int64))]
    return {name: column or nothing for name, column in columns.items()}


def _check_messages(body: bytes) -> None:
    """Refuse a stream that has more than a schema and plain batches: what else there is may expand.

    Types come first: pyarrow's `read_schema` and `read_record_batch` take any message for what they expect, and crash.
    """
    messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    first = _next(messages)
    if first is None or first.type != "schema":
        raise ValueError(f"a body must begin with a schema, got {'nothing' if first is None else f'a {first.type}'}")
    count = 0
    while (message := _next(messages)) is not None:
        if message.type == "dictionary":
            raise ValueError("a body must have no dictionary-encoded columns")
        if message.type != "record batch":
            raise ValueError(f"a body must have one schema and record batches, got a {message.type}")
        if is_compressed(message.metadata):
            raise ValueError("a body must not be compressed: write the stream without IPC compression")
        count += 1
        if count > MAX_ARROW_BATCHES:
            raise ValueError(f"a body must have at most {MAX_ARROW_BATCHES} record batches, got more")


def _next(messages: Any) -> Any:
    try:
        return messages.read_next_message()
    except StopIteration:
        return None


def _table(body: bytes, places: list[int], limits: Limits) -> Any:
    """The columns at these places, whose lengths, offsets and buffers fit each other."""
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=places)
    batches, count = [], 0
    with pa.ipc.open_stream(pa.py_buffer(body), options=options) as stream:
        for batch in stream:
            # Before anything is made of it: a column of nulls has any number of rows in no bytes.
            count += batch.num_rows
            check_bags(count, limits)
            batch.validate(full=True)
            batches.append(batch)
        return pa.Table.from_batches(batches, stream.schema)


def num_indices(bags: Bags) -> int:
    return bags.indices.size if bags.offsets is None else int(bags.offsets[-1]) - int(bags.offsets[0])


def is_compressed(metadata: Any) -> bool:
    """Whether a record batch's message says that its buffers are compressed.

    pyarrow does not tell, and would expand them. It has verified the flatbuffer: places in it are inside it.
    """
    if OLD_COMPRESSION in bytes(metadata):
        return True
    view = memoryview(metadata)
    message = struct.unpack_from("<I", view, 0)[0]
    header = _field(view, message, HEADER)
    if header is None:
        return False
    return _field(view, header + struct.unpack_from("<I", view, header)[0], COMPRESSION) is not None


def _field(view: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None if it is not there."""
    vtable = table - struct.unpack_from("<i", view, table)[0]
    size = struct.unpack_from("<H", view, vtable)[0]
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", view, vtable + place)[0] if place + 2 <= size else 0
    return table + offset if offset else None


# ---- Answers ---------------------------------------------------------------------------------------------------------


def stream_of(vectors: NDArray[Any]) -> bytes:
    """Vectors as a stream of one record batch, with a column `vector` of FixedSizeList."""
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    batch = pa.RecordBatch.from_arrays([column], ["vector"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream
