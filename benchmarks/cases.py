"""What is measured: named cases, one factor varied at a time from two base cases for each number of bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

BITS = (8, 4, 2)
WIDE_TABLE_BYTES = 512 << 20
HUGE_TABLE_BYTES = 2 << 30


@dataclass(frozen=True)
class Case:
    """One measurement: through `qembag.ops`, or where `call` says so through `qembag.embedding_bag`; of torch, always
    through `torch.ops.quantized`."""

    name: str
    rows: int  # stored ones: a pruned table has twice as many logical rows
    dim: int
    bits: int
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
    work: str = "lookup"  # or "prepack", "greedy", "unpack"
    extras: tuple[str, ...] = ()  # contenders beside qembag and its rival

    @property
    def row_bytes(self) -> int:
        return self.dim * self.bits // 8 + (8 if self.bits == 8 else 4)

    @property
    def beyond_torch(self) -> bool:
        """Torch's quantized operators know neither padding nor means, maxima and float16."""
        return self.padding != "none" or self.mode != "sum" or self.half

    @property
    def optional(self) -> bool:
        """Compared with a plain lookup of the same build too, to see what the option costs."""
        return self.beyond_torch or self.pruned

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


def plain(case: Case) -> Case:
    """The case without its options: what they are measured by."""
    return replace(case, padding="none", mode="sum", half=False, pruned=False)


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
    if bits == 4:
        yield varied(base, "one-bag=1000", bags=1, length=1000)
        yield varied(base, "int32", index_dtype="int32")
        yield varied(base, "int32,offsets=int32", index_dtype="int32", offsets_dtype="int32")


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


def all_cases() -> dict[str, Case]:
    groups = [*map(cached, BITS), *map(memory, BITS), pages(), quantizing()]
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
