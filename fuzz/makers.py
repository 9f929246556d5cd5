"""Arguments of all kinds, right and wrong. Which of them are right is the rules' to say, in `tests/support/rules.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import checks
import qembag
from checks import NO_OUT, Finding, Out, attempt, is_same, require
from source import FLOATS, INTEGERS, POOL, WILD, Source
from support.arrays import Placed, Sub, empty, exact_block, place
from support.floats import KINDS, STORED, stored_as
from support.layouts import GROUP_SIZES, LAYOUTS, Layout
from support.lookups import Floats, Table, Verdict
from support.objects import NO_DTYPES, NO_FLOATS, NO_INTEGERS

COMMON = ["plain"] * 8
COPIED = ["strided", "reversed", "misaligned", "swapped", "read-only", "subclass", "method", "buffer", "list"]
ANY_WAY = [*COMMON, *COPIED, "broadcast", "columns", "apart"]
OF_ROWS = ["plain"] * 6 + ["gaps", "odd gaps", "far", "reversed", "read-only", "subclass", "method", "buffer"]
OF_ROWS += ["broadcast", "misaligned", "columns", "strided", "list"]
OF_FLOATS = ["plain"] * 6 + ["gaps", "odd gaps", "far", "reversed", "read-only", "subclass", "misaligned"]
OF_OUTPUTS = ["plain"] * 6 + ["gaps", "odd gaps", "far", "reversed", "misaligned", "subclass"]
OF_OUTPUTS += ["read-only", "strided", "swapped", "columns", "zero", "masked", "entangled"]


def lying(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """An array that says that it is of that shape, over memory that ends a byte before."""
    whole = np.lib.stride_tricks.as_strided(missing, (values.nbytes,), (1,))
    return whole.view(values.dtype).reshape(values.shape)


@dataclass
class Maker:
    """Arguments from the bytes of an input, and what their memory held, which no call may change."""

    source: Source
    blocks: list[tuple[np.ndarray, bytes]] = field(default_factory=list)

    # ---- Memory -----------------------------------------------------------------------------------------------------

    def keep(self, placed: Placed) -> Any:
        self.blocks.append((placed.block, placed.block.tobytes()))
        return placed.value

    def place(self, values: np.ndarray, ways: list[str]) -> Any:
        return self.keep(place(values, self.source.pick(ways)))

    def flip(self) -> None:
        """Other bytes in the memory of some argument: no call remembers what stood there at another one's time."""
        source = self.source
        numbers = [number for number, (block, _) in enumerate(self.blocks) if len(block) and block.flags.writeable]
        if numbers:
            number = source.pick(numbers)
            block, _ = self.blocks[number]
            for _ in range(1 + source.below(2)):
                block[source.below(len(block))] = source.byte()
            self.blocks[number] = block, block.tobytes()

    def check_inputs(self) -> None:
        for block, before in self.blocks:
            if block.tobytes() != before:
                raise Finding("an input was changed")

    # ---- Arrays -----------------------------------------------------------------------------------------------------

    def wrong(self, objects: dict[str, Any]) -> Any:
        return self.source.pick(list(objects.values()))()

    def integers(self, shape: tuple[int, ...], limit: int, *, ordered: bool = False) -> Any:
        """Whole numbers below a limit, some perhaps beyond; of any type and way that a lookup takes, or none."""
        source = self.source
        if source.rarely(24):
            return self.wrong(NO_INTEGERS)
        dtype = np.dtype(source.pick(["i8", "i4", "i8", "i4", "u8", "i2", "u4", "u1"]))
        count = int(np.prod(shape))
        values = source.values(POOL, 2 * count).view("u2") % max(limit, 1)
        if ordered:
            values.sort()
        values = values.astype(dtype).reshape(shape)
        bounds = np.iinfo(dtype)
        for _ in range(source.below(4) if count and source.rarely(5) else 0):
            odd = source.pick([*INTEGERS, limit, limit - 1, -limit, source.whole()])
            values.flat[source.below(count)] = min(max(odd, int(bounds.min)), int(bounds.max))
        return self.place(values, ANY_WAY)

    def floats(self, shape: tuple[int, ...], dtypes: list[str], pools: list[np.ndarray]) -> Any:
        source = self.source
        if source.rarely(24):
            return self.wrong(NO_FLOATS)
        values = source.values(source.pick(pools), int(np.prod(shape)))
        with np.errstate(all="ignore"):
            values = values.astype(source.pick(dtypes)).reshape(shape)
        return self.place(values, [*ANY_WAY, "gaps"])

    def rows(self, layout: Layout, num_rows: int, row_bytes: int, dim: int | None = None) -> Any:
        """Packed rows, of the most elements that they can hold or of `dim`."""
        source = self.source
        values = source.values(POOL, num_rows * row_bytes).reshape(num_rows, row_bytes)
        dim = layout.dim(row_bytes) if dim is None else dim
        if dim > 0 and layout.used_bytes(dim) <= row_bytes and num_rows and source.below(4) < 3:
            pairs = source.values(WILD if source.rarely(2) else FLOATS, 2 * num_rows * layout.num_groups(dim))
            layout.set_pairs(values, pairs.reshape(num_rows, -1), dim)
        if checks.PLANTED == "overread" and values.size:
            missing = exact_block(values.size - 1)
            missing[...] = values.reshape(-1)[:-1]
            return self.keep(Placed(lying(values, missing), values, missing))
        return self.place(values, OF_ROWS)

    def float_rows(self, kind: str, num_rows: int, dim: int) -> Any:
        """Of any bits, or of numbers of which some are odd."""
        source = self.source
        if source.below(4):
            values = stored_as(source.values(WILD if source.rarely(2) else FLOATS, num_rows * dim), kind)
        else:
            values = source.values(POOL, num_rows * dim * STORED[kind].itemsize).view(STORED[kind])
        values = values.reshape(num_rows, dim)
        if checks.PLANTED == "overread" and values.size:
            missing = exact_block(values.nbytes - 1)
            missing[...] = values.reshape(-1).view(np.uint8)[:-1]
            return self.keep(Placed(lying(values, missing), values, missing))
        return self.place(values, OF_ROWS if source.rarely(4) else OF_FLOATS)

    def lengths(self, num_bags: int, total: int) -> Any:
        """Mostly of this sum."""
        source = self.source
        if source.rarely(24):
            return self.wrong(NO_INTEGERS)
        ends = np.sort(source.values(POOL, max(num_bags - 1, 0)).astype(np.int64) % (total + 1))
        values = np.diff(ends, prepend=0, append=total) if num_bags else ends
        if source.rarely(12) and num_bags:
            values[source.below(num_bags)] = source.pick([*INTEGERS[:8], 2**62, -2, total, source.whole()])
        if source.rarely(24) and num_bags > 1:
            values[:2] = 2**62
        dtype = np.dtype(source.pick(["i8", "i4", "i8", "i4", "u8", "i2", "u4", "u1"]))
        return self.place(values.astype(dtype), ANY_WAY)

    def mapping(self, num_rows: int) -> Any:
        source = self.source
        if source.rarely(32):
            return self.wrong(NO_INTEGERS)
        count = source.below(20)
        values = (source.values(POOL, 2 * count).view("u2") % (num_rows + 1)).astype(np.int32) - 1
        if count and source.rarely(12):
            values[source.below(count)] = source.pick([-2, num_rows, 2**31 - 1, -(2**31), 2**30, num_rows - 1])
        if source.rarely(24):
            values = values.astype(source.pick(["i8", "u4", "i2"]))
        if source.rarely(24):
            values = values.reshape(1, -1)
        return self.place(values, ["plain"] * 6 + COPIED + ["broadcast"])

    # ---- Numbers ----------------------------------------------------------------------------------------------------

    def flag(self) -> Any:
        source = self.source
        if source.rarely():
            return source.pick(["no", 2, 1.0, None, -1, np.array([0, 1]), [True]])
        return source.pick([False, True, False, True, 0, 1, np.False_, np.True_, np.int8(1)])

    def threads(self) -> Any:
        source = self.source
        if source.rarely():
            return source.pick([0, -1, "2", 2.0, True, -(2**70), [1], np.float32(1)])
        return source.pick([None, 1, 2, 3, 2**31, 2**70, np.int64(2), np.uint8(1)])

    def dtype(self) -> Any:
        source = self.source
        if source.rarely():
            return source.pick([*NO_DTYPES, object()])
        return source.pick([None, np.float32, np.float16, None, "float32", "f2", np.dtype("f4"), "bfloat16"])

    def invalid(self) -> Any:
        source = self.source
        if source.rarely(32):
            return source.pick(["Skip", "", None, 1, True, b"skip", ["skip"], np.str_("no"), object()])
        return source.pick(["raise", "skip", "raise", "skip", np.str_("skip")])

    def mode(self, number: int, name: str | None) -> Any:
        """By its name, or by its number where it has none."""
        source = self.source
        if source.rarely(32):
            return source.pick(["Sum", 3, -1, None, 1.0, b"sum", 2**70, ["sum"], np.str_("no"), True])
        return name or source.pick([number, number, np.int64(number)])

    def padding(self, count: int) -> Any:
        source = self.source
        if not source.rarely(4):
            return None
        if source.rarely(12):
            return source.pick(["1", 1.0, True, [0], np.array([1]), np.float32(0)])
        number = source.pick([*INTEGERS, count, -count - 1, source.whole()]) if source.rarely(8) else 0
        if number == 0 and count:
            number = source.below(2 * count) - count
        return source.pick([int, int, np.int64])(number) if -(2**63) <= number < 2**63 else number

    # ---- Outputs ----------------------------------------------------------------------------------------------------

    def out(self, verdict: Verdict) -> Out:
        """An output for a call, half of the time."""
        source = self.source
        if not source.rarely(2):
            return NO_OUT
        shape, dtype = verdict.shape, np.dtype(source.pick(verdict.kinds))
        if source.rarely(32):
            return Out(source.pick([[], "out", 1.5, b"", object(), np.float32(1), memoryview(bytearray(64)), [[0.0]]]))
        if source.rarely(24):
            dtype = np.dtype(source.pick(["f8", "i4", "u2", "f2", "f4", "?", "O", "c8"]))
        if source.rarely(24):
            others = [(*shape, 1), shape[1:], (1, *shape), tuple(reversed(shape)), (*shape[:-1], shape[-1] + 1)]
            shape = source.pick(others)
        if dtype.kind == "O":
            return Out(np.full(shape, None))
        num_bytes = int(np.prod(shape)) * dtype.itemsize
        if source.rarely(20):
            large_enough = [block for block, _ in self.blocks if len(block) >= max(num_bytes, 1)]
            if large_enough:
                return self.shared_out(shape, dtype, source.pick(large_enough))
        if checks.PLANTED == "overwrite" and num_bytes and not verdict.with_out(np.empty(shape, dtype)):
            missing = exact_block(num_bytes - 1)
            value = lying(np.empty(shape, dtype), missing)
            return Out(value, value[:0], missing)
        return self.laid_out(shape, dtype, source.pick(OF_OUTPUTS))

    @staticmethod
    def laid_out(shape: tuple[int, ...], dtype: np.dtype[Any], way: str) -> Out:
        array, block = empty(shape, dtype, way)
        if array.size and way in ("zero", "entangled") and len(shape) > 1:
            first = array.strides[0] - dtype.itemsize if way == "entangled" else 0
            array = np.ndarray(shape, dtype, block, 0, (first, *array.strides[1:]))
        value: Any = array
        if way == "subclass":
            value = array.view(Sub)
        elif way == "masked":
            value = np.ma.MaskedArray(array)
        elif way == "read-only":
            array.flags.writeable = False
        return Out(value, array, block)

    def shared_out(self, shape: tuple[int, ...], dtype: np.dtype[Any], block: np.ndarray) -> Out:
        """An output in the memory of an input: refused, unless its elements lie between those of the input."""
        offset = len(block) - int(np.prod(shape)) * dtype.itemsize if self.source.rarely(2) else 0
        array = np.ndarray(shape, dtype, block, offset)
        return Out(array, array, block)

    # ---- Tables -----------------------------------------------------------------------------------------------------

    def layout(self, bits: int) -> Layout:
        """The reference's, or half of the time any."""
        source = self.source
        if not source.rarely(2):
            return LAYOUTS[bits]
        padding = source.below(40) if source.rarely(2) else 0
        return Layout(bits, source.pick(["<f2", "<f4"]), source.pick([True, False]), source.pick(GROUP_SIZES), padding)

    def layout_arguments(self, layout: Layout) -> dict[str, Any]:
        """Those of a `QuantizedTable`, in each way to write them; those of a default may be left out."""
        source = self.source
        given: dict[str, Any] = {}
        if layout.pair != LAYOUTS[layout.bits].pair or source.rarely(4):
            kind = np.dtype(layout.pair[1:])
            given["scale_dtype"] = source.pick([kind.type, kind, kind.name, kind.char])
        elif source.rarely(8):
            given["scale_dtype"] = None
        if layout.first or source.rarely(8):
            given["scale_first"] = source.pick([bool, int, np.bool_, np.int8])(layout.first)
        if layout.group_size or source.rarely(8):
            whole = source.pick([int, np.int64, np.uint16])
            given["group_size"] = layout.group_size and whole(layout.group_size)
        if source.rarely(24):
            given["scale_dtype"] = source.pick([*NO_DTYPES, object()])
        if source.rarely(24):
            given["scale_first"] = source.pick(["no", 2, 1.0, None, -1, np.array([0, 1]), [True]])
        if source.rarely(24):
            given["group_size"] = source.pick([0, -16, 8, 17, 2**70, True, 16.0, "16", [16], source.whole()])
        return given

    def row_arguments(self, bits: int) -> dict[str, Any]:
        """Those of `quantize` and `to_layout`, which make rows of any layout."""
        source = self.source
        given = self.layout_arguments(self.layout(bits))
        if source.rarely(2):
            whole = source.pick([int, np.int64, np.uint8])
            given["row_alignment"] = whole(source.pick([1, 2, 4, 8, 16, 64, 7]))
        if source.rarely(24):
            given["row_alignment"] = source.pick([0, -1, 2**63, 2**70, True, 1.0, "8", [8], None])
        return given

    def any_table(self) -> Table | Floats | None:
        return self.float_table() if self.source.rarely(3) else self.table()

    def float_table(self) -> Floats | None:
        """A table of floats, or an array in its place; where its arguments are right."""
        source = self.source
        kind, (num_rows, dim) = source.pick(KINDS), source.rows_and_dim(12)
        if source.rarely(40):
            rows = source.pick([*NO_FLOATS.values(), lambda: np.zeros((2, 20)), lambda: FLOATS[:6]])()
        else:
            rows = self.float_rows(kind, num_rows, 0 if source.rarely(40) else dim)
        table = Floats(rows, source.pick([None, kind, STORED[kind].char]) if kind != "bfloat16" else kind)
        if source.rarely(24):
            table.dtype = source.pick([*NO_DTYPES, *KINDS, object()])
        if kind != "bfloat16" and source.rarely(3):
            table.is_plain = True
            (_, faults) = table.judge()
            return table if not faults else attempt(lambda: qembag.embedding(table.rows, []), faults)[0]
        table.mapping = self.mapping(num_rows) if source.rarely(3) else None
        (stored, _, _), faults = table.judge()
        made, _ = attempt(table.make, faults)
        if made is None:
            return None
        table.made, table.dtype = made, made.dtype
        require(made.num_rows == len(stored) and made.dim == stored.shape[1], "a table's attributes")
        require(checks.PLANTED == "overread" or is_same(np.array(made.data), np.array(stored)), "a table's rows")
        self.write_to_mapping(table, len(stored))
        return table

    def write_to_mapping(self, table: Table | Floats, num_rows: int) -> None:
        """The owner of a mapping may write to it after the table was made."""
        source = self.source
        if table.map is not None and table.map.size and table.map.flags.writeable and source.rarely(12):
            # Not [0], which would unprune a copy of the table and not the table.
            table.map[source.below(table.map.size)] = source.pick([-2, max(num_rows, 1), 2**31 - 1, -(2**31), -1])
            self.blocks = [(block, block.tobytes()) for block, _ in self.blocks]

    def table(self) -> Table | None:
        """A table, where its arguments are right."""
        source = self.source
        bits, (num_rows, dim) = source.pick([8, 4, 2]), source.rows_and_dim(12)
        layout = self.layout(bits)
        row_bytes = source.below(14) if source.rarely(24) else layout.row_bytes(dim)
        if source.rarely(40):
            rows = source.pick([*NO_INTEGERS.values(), lambda: np.zeros((2, 20), np.int8)])()
        else:
            rows = self.rows(layout, num_rows, row_bytes, dim)
        most = layout.dim(row_bytes)
        given_dim: Any = dim if dim <= most and not source.rarely(8) else None
        if source.rarely(24):
            given_dim = source.pick([0, -1, most + 1, most - 1, 2**70, True, 1.0, "4", source.whole()])
        given_bits: Any = source.pick([bits, bits, bits, np.int8(bits), np.uint64(bits)])
        if source.rarely(40):
            given_bits = source.pick([0, 1, 3, -8, 16, 2**70, "8", True, 8.0, None, np.float32(4)])
        mapping = self.mapping(num_rows) if source.rarely(3) else None
        table = Table(rows, given_bits, given_dim, mapping, layout=self.layout_arguments(layout))
        (stored, right_dim, _), faults = table.judge()
        table.made, _ = attempt(table.make, faults)
        if table.made is None:
            return None
        made, table.bits, table.dim = table.made, bits, right_dim
        require(made.bits == bits and made.dim == right_dim and made.num_rows == num_rows, "a table's attributes")
        # A planted overread is the kernels' to find.
        require(checks.PLANTED == "overread" or is_same(made.data, stored), "a table's rows")
        self.write_to_mapping(table, num_rows)
        return table
