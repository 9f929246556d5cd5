"""Any value in the place of any argument: an array comes back, or one of three errors, and nothing else is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import checks
import qembag
from checks import LEVELS, Finding, Out, require
from makers import Maker
from qembag import ops
from source import MOST_DIM, POOL, WILD, Source
from support import levels
from support.arrays import Answers
from support.floats import KINDS
from support.layouts import ALL_MODES, MODES, NAMES
from support.objects import REFUSED

ANYTHING = (
    lambda: None,
    lambda: 5,
    lambda: np.zeros((2, 2)),
    lambda: np.zeros(3, "i8"),
    lambda: np.zeros((2, 12), "u1"),
    lambda: Answers(POOL[:4]),
    lambda: qembag.QuantizedTable(np.zeros((2, 12), np.uint8), 8),
    lambda: qembag.FloatTable(np.zeros((2, 12), np.float16)),
    lambda: np.zeros((2, 12), np.float32),
    *REFUSED.values(),
)


def anything(make: Maker) -> None:
    source, arguments = make.source, right_arguments(make)
    for name in arguments:
        if source.rarely(8):
            arguments[name] = source.pick(ANYTHING)()
    out = Out(None)
    if source.rarely(2):
        shape = source.below(6), max(min(arguments_dim(arguments), MOST_DIM), 1)
        out = make.laid_out(shape, np.dtype(source.pick(["f4", "f2"])), source.pick(["plain", "gaps", "strided"]))
    for call in calls(arguments, out.value):
        for level in LEVELS:
            with levels.use(level):
                attempt_anything(call, out)


def arguments_dim(arguments: dict[str, Any]) -> int:
    return arguments["dim"] if isinstance(arguments["dim"], int) else 1


def right_arguments(make: Maker) -> dict[str, Any]:
    """Of lookups, most of them; the numbers among them are wrong now and then."""
    source: Source = make.source
    bits, (num_rows, dim) = source.pick([8, 4, 2]), source.rows_and_dim(5)
    layout = make.layout(bits)
    shape = source.within((source.below(20),) if source.below(4) else (3, 4), dim)
    arguments: dict[str, Any] = {
        "rows": make.rows(layout, num_rows, layout.row_bytes(dim), dim),
        "mapping": make.mapping(num_rows) if source.rarely(3) else None,
        "indices": make.integers(shape, num_rows),
        "offsets": make.integers((source.below(6),), 21, ordered=True) if source.below(4) else None,
        "weights": make.floats(shape, ["f4", "f2"], [WILD]) if source.rarely(3) else None,
        "bits": bits,
        "dim": source.pick([dim, None]),
        "scale_dtype": np.dtype(layout.pair[1:]),
        "scale_first": layout.first,
        "group_size": layout.group_size,
        "alignment": source.pick([1, 4, 64]),
        "last": make.flag(),
        "mode": source.pick(ALL_MODES),
        "floats": make.float_rows(source.pick(KINDS), num_rows, dim),
        "float_dtype": source.pick([None, *KINDS]),
        "lengths": make.lengths(source.below(6), shape[0]) if source.rarely(4) else None,
        "invalid": make.invalid(),
        "padding": make.padding(num_rows),
        "threads": make.threads(),
        "dtype": make.dtype(),
    }
    if source.rarely(8):
        arguments["bits"] = source.pick([0, 1, 3, 16, -8, 2**31 - 1])
    if source.rarely(8):
        arguments["dim"] = source.pick([0, -1, dim + 1, dim - 1, 2**63 - 1, -(2**63), source.whole()])
    return arguments


def calls(given: dict[str, Any], out: Any) -> list[Callable[[], Any]]:
    """Each public way to look something up; where there is no such table, of the rows themselves."""
    options = {name: given[name] for name in ("scale_dtype", "scale_first", "group_size")}
    try:
        table = qembag.QuantizedTable(
            given["rows"], given["bits"], dim=given["dim"], compressed_indices_mapping=given["mapping"], **options
        )
    except (TypeError, ValueError, IndexError):
        table = given["rows"]
    name = NAMES.get(given["bits"] if isinstance(given["bits"], int) else 8, "byte")
    mode = MODES.index(given["mode"]) if isinstance(given["mode"], str) and given["mode"] in MODES else given["mode"]

    def operator(suffix: str, weight: Any) -> Any:
        return getattr(ops, f"embedding_bag_{name}{suffix}")(
            weight, given["indices"], given["offsets"], False, mode, given["mapping"] is not None, given["weights"],
            given["mapping"], given["last"], out=out,
        )  # fmt: skip

    def bags(one: Any) -> Any:
        return qembag.embedding_bag(
            one, given["indices"], given["offsets"], lengths=given["lengths"], mode=given["mode"],
            per_sample_weights=given["weights"], include_last_offset=given["last"], padding_idx=given["padding"],
            invalid=given["invalid"], out=out, dtype=given["dtype"], num_threads=given["threads"],
        )  # fmt: skip

    def single(one: Any) -> Any:
        return qembag.embedding(
            one, given["indices"], invalid=given["invalid"], out=out, dtype=given["dtype"],
            num_threads=given["threads"],
        )  # fmt: skip

    def floats() -> Any:
        return qembag.FloatTable(
            given["floats"], dtype=given["float_dtype"], compressed_indices_mapping=given["mapping"]
        )

    def quantized() -> Any:
        return qembag.quantize(
            given["floats"], given["bits"], row_alignment=given["alignment"], num_threads=given["threads"], **options
        ).data

    def to_layout() -> Any:
        made = table if isinstance(table, qembag.QuantizedTable) else qembag.quantize(given["floats"], given["bits"])
        return made.to_layout(row_alignment=given["alignment"], **options).data

    return [
        lambda: bags(table),
        lambda: single(table),
        lambda: bags(given["floats"]),
        lambda: single(given["floats"]),
        lambda: bags(floats()),
        lambda: floats().dequantize(),
        lambda: operator("", table),
        lambda: operator("_rowwise_offsets", given["rows"]),
        lambda: getattr(ops, f"embedding_{name}")(table, given["indices"], given["mapping"] is not None),
        lambda: qembag.quantize(given["rows"], given["bits"]).data,
        quantized,
        to_layout,
    ]


def attempt_anything(call: Callable[[], Any], out: Out) -> None:
    checks.calls += 1
    before = None if out.block is None else (out.block.copy(), out.rest())
    try:
        result = call()
    except (TypeError, ValueError, IndexError) as error:
        require(str(error), "an error that says nothing")
        require(before is None or np.array_equal(out.block, before[0]), "an error changed `out`")
    except Exception as error:
        raise Finding(f"{type(error).__name__} in place of an answer or a plain error: {error}") from error
    else:
        require(isinstance(result, np.ndarray), f"an answer that is no array: {result}")
        require(before is None or out.rest() == before[1], "memory around an output was written")
