"""TextEmbedder beside its tokenizer and model2vec: `python -m benchmarks.text_embedder --cache FOLDER`.

The models are those of `benchmarks.static_text`. Each contender works in a process of its own, and they take turns, on
one thread and on all. "Whole" is from texts to vectors; the tokenizer alone is the same `encode_batch_fast`, in the same
batches, with nothing after it. "Pool" is from lists of tokens to vectors. "One" is a text a call; "sentence" the same
with the first sentence of each. Vectors are compared with model2vec's. `--write` puts the table into docs/text.md. Needs
what `benchmarks.static_text` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import qembag

from . import machine, quality, static_text

CONTENDERS = ("tokenizer", "model2vec", "float32", "8-bit")
STEPS = ("whole", "pool", "one", "sentence")
# Texts that are encoded one at a time.
ONE_BY_ONE = 1000
PAGE = static_text.ROOT / "docs" / "text.md"
BEGIN = "<!-- written by benchmarks.text_embedder -->"


def sentence_of(text: str) -> str:
    return re.split(r"(?<=[.!?]) +", text)[0]


def each(call: Callable[[Any], Any], texts: list[str]) -> None:
    for text in texts:
        call(text)


def steps_of(name: str, folder: Path, threads: int) -> dict[str, Callable[[], Any]]:
    texts = json.loads((folder / "texts.json").read_text())
    ids = json.loads((folder / "ids.json").read_text())
    sentences = list(map(sentence_of, texts))[:ONE_BY_ONE]
    qembag.set_num_threads(threads)
    if name == "model2vec":
        found = static_text.of_model2vec(folder, texts, ids)
        from model2vec import StaticModel

        one: Any = StaticModel.from_pretrained(folder / "model2vec").encode
        whole, pool = found["encode"], found["pool"]
    else:
        from qembag.text import TextEmbedder

        embedder: Any = TextEmbedder.load(folder / "model2vec", mmap=False)
        if name == "8-bit":
            embedder = TextEmbedder.load(folder / "model2vec", table=qembag.open_table(folder / name, mmap=False))
        tokenizer = embedder.tokenizer
        size = static_text.BATCH

        def tokens(texts: list[str]) -> None:
            for some in static_text.batches(texts):
                tokenizer.encode_batch_fast(some, add_special_tokens=False)

        def pool() -> np.ndarray:
            out = np.empty((len(ids), embedder.dim), np.float32)
            for start in range(0, len(ids), size):
                embedder._pool(ids[start : start + size], out[start : start + size], start, threads)
            return out

        one, whole = embedder, lambda: embedder(texts)
        if name == "tokenizer":
            one, whole = lambda text: tokens([text]), lambda: tokens(texts)
    return {
        "whole": whole,
        "pool": pool,
        "one": lambda: each(one, texts[:ONE_BY_ONE]),
        "sentence": lambda: each(one, sentences),
    }


def work(name: str, folder: Path, threads: int) -> None:
    """A contender: answers each step that it is asked for with seconds, and saves the vectors of its first."""
    steps, saved = steps_of(name, folder, threads), set()
    for step in map(str.strip, sys.stdin):
        before = time.perf_counter()
        vectors = steps[step]()
        seconds = time.perf_counter() - before
        if vectors is not None and step not in saved:
            np.save(folder / f"{name}.{step}.npy", vectors)
            saved.add(step)
        print(json.dumps(seconds), flush=True)


def start(name: str, folder: Path, threads: int) -> subprocess.Popen[str]:
    settings = {"TOKENIZERS_PARALLELISM": str(threads > 1).lower(), "RAYON_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.text_embedder", "--worker", name, str(folder), str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=static_text.ROOT,
        env=os.environ | settings,
    )


def measure(folder: Path, rounds: int, threads: int) -> dict[tuple[str, str], float]:
    """Seconds by contender and step: medians."""
    workers = {name: start(name, folder, threads) for name in CONTENDERS}
    asked = [(name, step) for name in CONTENDERS for step in STEPS if (name, step) != ("tokenizer", "pool")]
    times: dict[tuple[str, str], list[float]] = {pair: [] for pair in asked}
    rng = random.Random(0)
    try:
        for number in range(rounds + 1):
            for name, step in rng.sample(asked, len(asked)):
                seconds = static_text.ask(workers[name], step)
                if number:  # the first round warms up
                    times[name, step].append(seconds)
    finally:
        for worker in workers.values():
            worker.communicate()
    return {pair: statistics.median(some) for pair, some in times.items()}


def lines_of(table: str, folder: Path, threads: int, times: dict[tuple[str, str], float], count: int) -> list[str]:
    lines = []
    counts = {"whole": count, "pool": count, "one": min(count, ONE_BY_ONE), "sentence": min(count, ONE_BY_ONE)}
    for name in CONTENDERS:
        cells = []
        for step in STEPS:
            base = times["tokenizer" if step == "whole" else "model2vec", step]
            seconds = times.get((name, step))
            if seconds is None:
                cells += ["", ""]
                continue
            ratio = seconds / base if step == "whole" else base / seconds
            cells += [f"{1e6 * seconds / counts[step]:.1f}", f"{ratio:.2f}"]
        verdict = ""
        if name != "tokenizer":
            exact, found = (np.load(folder / f"{who}.whole.npy") for who in ("model2vec", name))
            same = exact.tobytes() == found.tobytes()
            verdict = "the same bits" if same else f"{static_text.worst_cosine(exact, found):.5f}"
        who = f"qembag, {name}" if name in CONTENDERS[2:] else name
        lines.append(f"| {table} | {threads} | {who} | {' | '.join(cells)} | {verdict} |")
    return lines


def options_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="keep the downloads in this folder")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--write", action="store_true", help="put the table into docs/text.md")
    return parser.parse_args()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
        return
    options = options_of()
    options.cache.mkdir(parents=True, exist_ok=True)
    wordllama, gensim = quality.example().fetch(options.cache)
    texts = static_text.texts_of(gensim, options.texts)
    plain = quality.example().load_table(wordllama).astype(np.float32)
    tables = {
        "WordLlama": (plain, quality.example().load_tokenizer(wordllama)),
        "MiniLM": quality.minilm(options.cache),
    }
    titles = (
        "| table | threads | by | whole, us a text | times the tokenizer | pool, us a text | times as fast | "
        "one text a call, us | times as fast | one sentence a call, us | times as fast | vectors |"
    )
    lines = [
        titles,
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for name, (weights, tokenizer) in tables.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            static_text.save_models(folder, weights, tokenizer)
            from model2vec import StaticModel

            model = StaticModel.from_pretrained(folder / "model2vec")
            some = [text[: static_text.MAX_LENGTH * model.median_token_length] for text in texts]
            (folder / "texts.json").write_text(json.dumps(some))
            (folder / "ids.json").write_text(json.dumps(model.tokenize(some)))
            for threads in options.threads:
                lines += lines_of(name, folder, threads, measure(folder, options.rounds, threads), len(some))
    where, versions = machine.describe(), ("model2vec", "numpy", "tokenizers")
    lines += [
        "",
        f"*{len(texts):,} texts; {ONE_BY_ONE:,} of them one at a time; medians of {options.rounds} rounds in turns; "
        f"{where['processor']}, {where['level']}; "
        + ", ".join(f"{package} {machine.version(package)}" for package in versions)
        + '; "times as fast" as model2vec.*',
    ]
    quality.tell(PAGE, BEGIN, lines, write_page=options.write)


if __name__ == "__main__":
    main()
