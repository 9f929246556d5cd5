"""The result of a comparison: numbers for each variant, a recommendation in words, a plot and a page."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .measures import EDGES, Cosines
from .text import aligned, human_bytes

if TYPE_CHECKING:
    import os

# The worst pooled cosine that a recommendation accepts by default.
MIN_COSINE = 0.99


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to quantize a table, and its bytes, errors and speed.

    Attributes
    ----------
    bits : int
        Bits of a code: 8, 4 or 2.
    method : str
        As for `quantize`.
    group_size : int or None
        Elements that share a scale and a bias; None if the whole row shares them.
    row_bytes : int
        Bytes of a row.
    nbytes : int
        Bytes of the whole quantized table, including the mapping if it is pruned.
    times_smaller, times_smaller_than_float32 : float
        The bytes of the source, as it is stored and as float32, divided by `nbytes`.
    relative_squared_error : float
        The sum of squared errors over the sum of squares, over all elements of the rows that were quantized.
    relative_error : float
        The square root of `relative_squared_error`.
    rows, bags : Cosines
        Cosines of single rows, and of sums of bags, with their float32 values: `mean`, `first_percentile`, `worst`,
        `num_vectors` and `histogram`.
    worst_rows : tuple of (int, float)
        The number in the source, and the cosine, of the ten rows with the lowest cosines; the worst first.
    ns_per_row : float
        Nanoseconds per looked-up row on this machine, with one thread; the same for all methods with the same bits and
        group size, whose rows differ only in their values.
    """

    bits: int
    method: str
    group_size: int | None
    row_bytes: int
    nbytes: int
    times_smaller: float
    times_smaller_than_float32: float
    relative_squared_error: float
    relative_error: float
    rows: Cosines
    bags: Cosines
    worst_rows: tuple[tuple[int, float], ...]
    ns_per_row: float

    @property
    def layout_label(self) -> str:
        """As in "4 bits in groups of 32"."""
        return f"{self.bits} bits" + ("" if self.group_size is None else f" in groups of {self.group_size}")

    @property
    def label(self) -> str:
        """As in "4 bits in groups of 32, lsq"."""
        return f"{self.layout_label}, {self.method}"

    def cells(self) -> list[str]:
        """Bytes, times smaller, cosines of bags, relative error, cosines of rows, time: as tables show them."""
        return [
            human_bytes(self.nbytes),
            f"{self.times_smaller:.2f}",
            *map(cosine_text, (self.bags.worst, self.bags.first_percentile, self.bags.mean)),
            f"{self.relative_error:.5f}",
            *map(cosine_text, (self.rows.worst, self.rows.first_percentile, self.rows.mean)),
            f"{self.ns_per_row:.1f}",
        ]


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `compare` found. `print` shows it as a table with a recommendation.

    Attributes
    ----------
    name : str
        The table's name.
    num_embeddings, dim : int
        The table's shape.
    dtype : str
        The type of its elements.
    nbytes, nbytes_float32 : int
        The table's bytes, as it is stored and as float32.
    num_rows_quantized : int
        The rows that were quantized and judged: all, or a sample.
    num_bags, num_indices : int
        How many bags were summed, and how many indices they have together.
    own_bags : bool
        Whether the bags were given, as opposed to made.
    seed : int
        Seed of the sample, the bags and the order of timed lookups.
    ns_per_row_float32 : float
        Nanoseconds per looked-up float32 row on this machine.
    num_rounds : int
        The times are medians of this many rounds.
    machine : str
        The qembag version and instruction-set level that the times were measured with.
    variants : tuple of Variant
        In the order of `bits`, `group_sizes` and `methods`.
    """

    name: str
    num_embeddings: int
    dim: int
    dtype: str
    nbytes: int
    nbytes_float32: int
    num_rows_quantized: int
    num_bags: int
    num_indices: int
    own_bags: bool
    seed: int
    ns_per_row_float32: float
    num_rounds: int
    machine: str
    variants: tuple[Variant, ...]

    def __repr__(self) -> str:
        return (
            f"Report(name={self.name!r}, num_embeddings={self.num_embeddings}, dim={self.dim}, "
            f"variants={len(self.variants)})"
        )

    def __str__(self) -> str:
        bags, rows = (["bags: worst", "1st pct", "mean"], ["rows: worst", "1st pct", "mean"])
        lines = [["variant", "bytes", "smaller", *bags, "error", *rows, "ns a row"]]
        lines += [[variant.label, *variant.cells()] for variant in self.variants]
        return "\n\n".join([aligned(lines), f"{self.recommendation()}\n\n{self.caption()}"])

    def caption(self) -> str:
        """What was measured, and how, in words."""
        few = self.num_rows_quantized < self.num_embeddings
        judged = f"{self.num_rows_quantized:,} of them, a random sample," if few else "all of them"
        bags = "the given bags" if self.own_bags else "bags with Zipf-like traffic"
        if few:
            bags += " of the sampled rows" if not self.own_bags else ", whose rows are all in the sample"
        return (
            f"{self.name}: {self.num_embeddings:,} x {self.dim}, {self.dtype}, {human_bytes(self.nbytes)}; "
            f"{judged} were quantized and compared with their float32 values.\n"
            f"Pooled: {self.num_bags:,} sums of {self.num_indices / self.num_bags:,.1f} rows on average, {bags}.\n"
            f"Time: one thread, among the quantized rows, median of {self.num_rounds} rounds; float32 rows take "
            f"{self.ns_per_row_float32:.1f} ns. {self.machine}. Seed {self.seed}."
        )

    def smallest(self, min_cosine: float = MIN_COSINE) -> Variant | None:
        """The variant with the fewest bytes whose worst pooled cosine is at least `min_cosine`; None if there is none.

        Among variants of the same bytes, the one with the highest worst pooled cosine.
        """
        good = [variant for variant in self.variants if variant.bags.worst >= min_cosine]
        return min(good, key=lambda variant: (variant.nbytes, -variant.bags.worst), default=None)

    def closest(self) -> Variant:
        """The variant with the highest worst pooled cosine."""
        return max(self.variants, key=lambda variant: np.nan_to_num(variant.bags.worst, nan=-2))

    def recommendation(self, min_cosine: float = MIN_COSINE) -> str:
        """The smallest variant whose worst pooled cosine is at least `min_cosine`, in words, or that there is none.

        The worst bag counts, not a percentile, because each bag is someone's request. The more bags, the worse the
        worst one, so compare with bags as many and as long as in your traffic.

        Parameters
        ----------
        min_cosine : float
            The lowest acceptable cosine of a bag.

        Returns
        -------
        str
            One sentence, such as ``'4 bits (lsq): 7.1 times smaller, worst cosine .993'``.
        """
        chosen = self.smallest(min_cosine)
        if chosen is not None:
            return f"{chosen.layout_label} ({chosen.method}): {_smaller(chosen)}, worst cosine {_short(chosen)}"
        best = self.closest()
        return (
            f"None of these keeps the cosine of each pooled bag at {min_cosine:.9g} or more. The closest, "
            f"{best.label}, is {_smaller(best)}, worst cosine {_short(best)}. Keep the floats, or try smaller groups"
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as dicts, lists, strings and numbers for JSON; None in place of nan and infinities.

        In a histogram, ``edges`` of ``1 - cosine`` and ``counts`` cover the bins from the first to the last that is not
        empty.
        """
        found: dict[str, Any] = _plain(dataclasses.asdict(self))
        for variant, plain in zip(self.variants, found["variants"], strict=True):
            for part in ("rows", "bags"):
                cosines: Cosines = getattr(variant, part)
                plain[part] = _plain(cosines._asdict()) | {"histogram": _histogram(cosines.histogram)}
            plain["worst_rows"] = [{"row": row, "cosine": cosine} for row, cosine in variant.worst_rows]
        return found | {"recommendation": self.recommendation()}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw error against bytes, and histograms of cosines.

        Parameters
        ----------
        path : str or path
            The file to write; its name ends in .svg, .png or .pdf. An existing file is replaced in one step.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install 'qembag[plot]'``.
        OSError, ValueError
            If the file cannot be written, or its name has another ending.
        """
        from . import plots

        plots.save(self, path)

    def to_html(self, path: str | os.PathLike[str], *, min_cosine: float = MIN_COSINE) -> None:
        """Write one page that needs no other file and no network: recommendation, table, plots.

        Parameters
        ----------
        path : str or path
            The file to write. An existing file is replaced in one step.
        min_cosine : float
            As for `recommendation`.

        Raises
        ------
        ImportError
            If matplotlib is not installed: ``pip install 'qembag[plot]'``.
        OSError
            If the file cannot be written.
        """
        from . import page

        page.save(self, path, min_cosine)


def cosine_text(cosine: float, decimals: int = 5) -> str:
    """The cosine as text, rounded down so that none looks better than it is: ".99612", "-.12346", "1.00000"."""
    if math.isnan(cosine):
        return "-"
    units = math.floor(cosine * 10**decimals)
    # The product may be rounded up or down across an integer: .29 * 100 is 28.999999999999996.
    units += (units + 1) / 10**decimals <= cosine
    units -= units / 10**decimals > cosine
    whole, part = divmod(abs(units), 10**decimals)
    return f"{'-' if units < 0 else ''}{whole or ''}.{part:0{decimals}d}"


def _short(variant: Variant) -> str:
    """The worst pooled cosine with three decimals, or with enough that two digits differ from 1, at most 9."""
    worst = variant.bags.worst
    if math.isnan(worst):
        return "unknown"
    return cosine_text(worst, 3 if worst < 0.999 or worst == 1 else min(1 - math.floor(math.log10(1 - worst)), 9))


def _smaller(variant: Variant) -> str:
    return f"{variant.times_smaller:.1f} times smaller"


def _histogram(counts: tuple[int, ...]) -> dict[str, Any]:
    used = np.flatnonzero(counts)
    if not len(used):
        return {"edges": [], "counts": []}
    first, end = int(used[0]), int(used[-1]) + 1
    return {"edges": EDGES[first : end + 1].tolist(), "counts": list(counts[first:end])}


def _plain(value: Any) -> Any:
    """The value with lists for tuples, and None for nan and infinities."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
