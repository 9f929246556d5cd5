"""What is measured: named cases, one factor varied at a time from two base cases for each number of bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

BITS = (8, 4, 2)
ELEMENT_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}
WIDE_TABLE_BYTES = 512 << 20
HUGE_TABLE_BYTES = 2 << 30


@dataclass(frozen=True)
class Layout:
    """How a row's codes and pairs of a scale and a bias are stored; the names are those of `qembag.quantize`."""

    scale_dtype: str | None = None  # torch's: float32 at 8 bits, float16 at 4 and 2
    scale_first: bool = False
    group_size: int | None = None
    row_alignment: int = 1

    def pair_type(self, bits: int) -> str:
        """Of a scale, and of a bias."""
        return self.scale_dtype or ("float32" if bits == 8 else "float16")


LAYOUTS = {
    "torch": Layout(),
    "half-first": Layout("float16", scale_first=True),
    "float-first": Layout("float32", scale_first=True),
    "half-behind": Layout("float16"),
    "float-behind": Layout("float32"),
    "fbgemm": Layout("float16", scale_first=True, row_alignment=16),
    "groups=32": Layout("float16", group_size=32),
    "groups=64": Layout("float16", group_size=64),
}


def layouts_of(bits: int, dim: int) -> list[str]:
    """The layouts that are not torch's, nor one another, at so many bits."""
    own = ("float-first", "half-behind") if bits == 8 else ("float-behind",)
    # A row of 64 is one group of 64: half pairs behind at 8 bits, and torch's layout at 4 and 2.
    groups = [name for name in ("groups=32", "groups=64") if int(name.removeprefix("groups=")) < dim]
    return ["half-first", *own, "fbgemm", *groups]


@dataclass(frozen=True)
class Case:
    """One measurement: through `qembag.ops`, or where `call` says so through `qembag.embedding_bag`; of torch, through
    `torch.ops.quantized`, or for rows of floats through `torch.nn.functional.embedding_bag`."""

    name: str
    rows: int  # stored ones: a pruned table has twice as many logical rows
    dim: int
    bits: int  # of a code, or of an element
    bags: int = 256  # in one call
    length: int | str = 40  # rows a bag; "mixed": from 0 to 80 at random
    traffic: str = "uniform"  # or "zipf"
    index_dtype: str = "int64"
    offsets_dtype: str = "int64"
    weighted: bool = False
    pruned: bool = False
    padding: str = "none"  # or "unused": a padding_idx that never occurs; "30%": of each bag, at its end
    mode: str = "sum"  # or "mean", "max"
    half: bool = False  # float16 output
    call: str = "ops"  # or "public": qembag.embedding_bag on a QuantizedTable
    threads: int = 1
    level: str | None = None  # of our kernels; None is the best one here
    pages: str = "numpy"  # what holds the table: NumPy's allocator, "4k" pages or a mapped "file"
    work: str = "lookup"  # or "prepack", "greedy", "lsq" (beside torch's greedy), "unpack", "dequantize"
    layout: str = "torch"  # of rows of codes: a name of LAYOUTS
    element: str = "code"  # or of rows of floats "float32", "float16", "bfloat16", which is the output's type too
    extras: tuple[str, ...] = ()  # contenders beside qembag and its rival

    @property
    def codes_bytes(self) -> int:
        return self.dim * self.bits // 8

    @property
    def pair_type(self) -> str:
        return LAYOUTS[self.layout].pair_type(self.bits)

    @property
    def groups(self) -> int:
        return -(-self.dim // (LAYOUTS[self.layout].group_size or self.dim))

    @property
    def pairs_bytes(self) -> int:
        return self.groups * 2 * ELEMENT_BITS[self.pair_type] // 8

    @property
    def row_bytes(self) -> int:
        if self.of_floats:
            return self.codes_bytes
        multiple = LAYOUTS[self.layout].row_alignment
        return -(-(self.codes_bytes + self.pairs_bytes) // multiple) * multiple

    @property
    def of_floats(self) -> bool:
        return self.element != "code"

    @property
    def other_layout(self) -> bool:
        return self.layout != "torch"

    @property
    def needs_layouts(self) -> bool:
        """Rows of other layouts, or of floats: older builds of qembag have neither."""
        return self.of_floats or self.other_layout

    @property
    def beyond_torch(self) -> bool:
        """Torch's quantized operators know neither padding nor means, maxima and float16, only one layout of rows, and no
        output to unpack to."""
        if self.of_floats:
            return False
        has_option = self.padding != "none" or self.mode != "sum" or self.half
        return has_option or self.other_layout or self.work == "dequantize"

    @property
    def optional(self) -> bool:
        """Compared with a plain lookup of the same build too, to see what the option or the layout costs."""
        return self.other_layout or self.pruned or (self.beyond_torch and self.work == "lookup")

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]


def varied(base: Case, factor: str, **changes: object) -> Case:
    """A case that differs from its base in one factor; the extra contenders belong to the base alone."""
    return replace(base, name=f"{base.name}/{factor}", **{"extras": (), **changes})


def of_lengths(base: Case, *lengths: int) -> Iterator[Case]:
    """As many rows a call as the base has, in bags of other lengths."""
    for length in lengths:
        yield varied(base, f"length={length}", length=length, bags=max(base.bags * 40 // length, 1))
    yield varied(base, "length=mixed", length="mixed")


def of_options(base: Case) -> Iterator[Case]:
    """What a lookup can do beside plain sums, at 128 elements and at 64. Through the public function: not all of it is
    in `ops`."""
    for factor, changes in {
        "padding=unused": {"padding": "unused"},
        "padding=30%": {"padding": "30%"},
        "mean": {"mode": "mean"},
        "max": {"mode": "max"},
        "float16": {"half": True},
    }.items():
        yield varied(base, factor, call="public", **changes)
        yield varied(base, f"dim=64,{factor}", dim=64, call="public", **changes)


def of_small_calls(base: Case) -> Iterator[Case]:
    """What a call costs, whatever it looks up."""
    for call, suffix in (("ops", ""), ("public", ",public")):
        yield varied(base, f"one-bag=10{suffix}", bags=1, length=10, call=call)
        yield varied(base, f"two-bags=2{suffix}", bags=2, length=2, call=call)


def of_layouts(base: Case) -> Iterator[Case]:
    """Rows that are not laid out as torch's, at the dim of the base and at 64, with as many rows as torch's cases have."""
    for dim, prefix in ((base.dim, ""), (64, "dim=64,")):
        rows = base.rows if dim == base.dim or base.group == "cached" else 2 * base.rows
        for layout in layouts_of(base.bits, dim):
            factor = f"{prefix}layout={layout}"
            yield varied(base, factor, rows=rows, dim=dim, layout=layout, call="public")


def plain(case: Case) -> Case:
    """The case without its options and in torch's layout: what they are measured by."""
    return replace(case, padding="none", mode="sum", half=False, pruned=False, layout="torch")


def cached(bits: int) -> Iterator[Case]:
    base = Case(f"cached/{bits}bit", 2_000, 128, bits, extras=("numpy", "floor"))
    yield base
    # The odd ones are of those that torch takes: a whole number of bytes of codes.
    for dim in (8, 16, 32, {8: 33, 4: 34, 2: 36}[bits], 64, 100, 192, 256, 300, 512, 768, 1024):
        yield varied(base, f"dim={dim}", dim=dim, extras=base.extras if dim == 64 else ())
    yield varied(base, "rows=100000", rows=100_000)  # the edge of the caches
    yield from of_lengths(base, 1, 10, 200)
    yield from of_small_calls(base)
    yield varied(base, "one-bag=1000", bags=1, length=1000)
    yield varied(base, "zipf", traffic="zipf")
    yield varied(base, "weighted", weighted=True)
    yield varied(base, "pruned", pruned=True)
    yield varied(base, "dim=64,pruned", dim=64, pruned=True)
    yield from of_options(base)
    yield from of_layouts(base)
    yield varied(base, "int32", index_dtype="int32")
    yield varied(base, "threads=2", threads=2)
    yield varied(base, "level=avx2", level="avx2")
    yield varied(base, "level=baseline,torch=unrestricted", level="baseline")


def memory(bits: int) -> Iterator[Case]:
    base = Case(f"memory/{bits}bit", 4_000_000, 128, bits, bags=1024, extras=("numpy", "floor"))
    yield base
    yield varied(base, "dim=64", rows=8_000_000, dim=64, extras=base.extras)
    for dim in (32, 256, 1024):
        wide = varied(base, f"dim={dim}", dim=dim)
        yield replace(wide, rows=WIDE_TABLE_BYTES // wide.row_bytes)
    yield from of_lengths(base, 1, 10)
    yield varied(base, "zipf", traffic="zipf")
    yield varied(base, "weighted", weighted=True)
    yield varied(base, "pruned", pruned=True)
    yield varied(base, "threads=2", threads=2)
    yield varied(base, "level=avx2", level="avx2")
    yield from of_layouts(base)
    if bits == 4:
        yield varied(base, "one-bag=1000", bags=1, length=1000)
        yield varied(base, "int32", index_dtype="int32")
        yield varied(base, "int32,offsets=int32", index_dtype="int32", offsets_dtype="int32")


def floats() -> Iterator[Case]:
    """Rows of floats, which torch.nn.functional.embedding_bag sums too."""
    for element, bits in ELEMENT_BITS.items():
        rows, modes = (1_000_000, ("sum", "mean")) if element == "float32" else (2_000_000, ("sum",))
        in_cache = Case(f"cached/element={element}", 2_000, 128, bits, call="public", element=element)
        from_memory = replace(in_cache, name=f"memory/element={element}", rows=rows, bags=1024)
        for base, dim in ((in_cache, 128), (in_cache, 64), (from_memory, 128)):
            for mode, threads in itertools.product(modes, (1, 2)):
                factors = {"dim=64": dim == 64, mode: mode != "sum", "threads=2": threads == 2}
                factor = ",".join(name for name, varies in factors.items() if varies)
                yield varied(base, factor, dim=dim, mode=mode, threads=threads) if factor else base


def dequantizing() -> Iterator[Case]:
    """Whole tables to float32, beside a copy of as many floats."""
    for bits in BITS:
        base = Case(f"dequantize/{bits}bit", 500_000, 64, bits, call="public", work="dequantize", extras=("copy",))
        yield base
        for layout in layouts_of(bits, base.dim):
            yield varied(base, f"layout={layout}", layout=layout, extras=base.extras)


def pages() -> Iterator[Case]:
    """One table of 2 GiB in memory of three kinds."""
    base = Case("pages", 0, 64, 8, bags=1024, extras=("floor",))
    for kind in ("numpy", "4k", "file"):
        yield replace(base, name=f"pages/{kind}", pages=kind, rows=HUGE_TABLE_BYTES // base.row_bytes)


def quantizing() -> Iterator[Case]:
    for threads in (1, 2):
        for work in ("prepack", "greedy", "unpack"):
            for bits in BITS:
                if work == "greedy" and bits == 8:
                    continue  # there is no such thing
                rows = 5_000 if work == "greedy" else 500_000
                yield Case(f"quantize/{work}/{bits}bit/threads={threads}", rows, 64, bits, threads=threads, work=work)
        for bits in (4, 2):
            for dim in (64, 256):
                name = f"quantize/lsq/{bits}bit/dim={dim}/threads={threads}"
                yield Case(name, 5_000, dim, bits, threads=threads, work="lsq")


def all_cases() -> dict[str, Case]:
    groups = [*map(cached, BITS), *map(memory, BITS), floats(), pages(), quantizing(), dequantizing()]
    return {case.name: case for group in groups for case in group}


CASES = all_cases()

# What the first table of the report answers: a title, and the cases at 8, 4 and 2 bits.
TARGETS = {
    title: [name.format(bits=bits) for bits in BITS]
    for title, name in {
        "one thread, cached, dim 128": "cached/{bits}bit",
        "one thread, cached, dim 64": "cached/{bits}bit/dim=64",
        "one thread, memory, 4,000,000 rows, dim 128": "memory/{bits}bit",
        "one thread, memory, 8,000,000 rows, dim 64": "memory/{bits}bit/dim=64",
        "one thread, one bag of 10, cached, dim 128": "cached/{bits}bit/one-bag=10",
        "one thread, weighted, cached, dim 128": "cached/{bits}bit/weighted",
        "two threads each, cached, dim 128": "cached/{bits}bit/threads=2",
        "two threads each, memory, 4,000,000 rows, dim 128": "memory/{bits}bit/threads=2",
    }.items()
}
