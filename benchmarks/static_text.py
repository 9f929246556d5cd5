"""Texts to vectors, beside model2vec and sentence-transformers: `python -m benchmarks.static_text --cache FOLDER`.

Models of both libraries are made of two real tables (WordLlama's and MiniLM's word pieces) and saved. qembag loads those
files, as float32 and quantized to 8 and 4 bits. Each contender works in a process of its own, with one thread, on the
same texts: from tokens as lists of numbers to vectors, and from texts to vectors with the same tokenizer. They take turns.
The vectors are compared too. `--write` puts the table into docs/from-model2vec.md. Needs model2vec==0.10.0,
sentence-transformers==6.2.0 and the extra `examples`; downloads 130 MB into FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
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

from . import machine, quality

CONTENDERS = ("model2vec", "sentence-transformers", "float32", "8-bit", "4-bit")
STEPS = ("pool", "encode")
BATCH = 1024
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "from-model2vec.md"
BEGIN = "<!-- written by benchmarks.static_text -->"
# Longer than either library cuts texts to.
MAX_LENGTH = 512


# ---- Models and texts ------------------------------------------------------------------------------------------------


def save_models(folder: Path, weights: np.ndarray, tokenizer: Any) -> None:
    from model2vec import StaticModel
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    StaticModel(weights, tokenizer).save_pretrained(folder / "model2vec")
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save_pretrained(str(folder / "sentence-transformers"))
    table = qembag.load_tables(folder / "model2vec")["embeddings"]
    for bits in (8, 4):
        qembag.quantize(table.data, bits, group_size=32 if bits == 4 else None).save(folder / f"{bits}-bit")


def texts_of(gensim: Path, count: int) -> list[str]:
    """One to four sentences of news each."""
    rng = random.Random(0)
    sentences = quality.sentences_of(gensim)
    return [" ".join(rng.choices(sentences, k=rng.randint(1, 4))) for _ in range(count)]


# ---- Contenders ------------------------------------------------------------------------------------------------------


def batches(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + BATCH] for start in range(0, len(items), BATCH)]


def pool(table: Any, ids: list[list[int]]) -> np.ndarray:
    """The mean of each text's rows, from lists of tokens; as it is written in docs/from-model2vec.md."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    indices = np.fromiter(itertools.chain.from_iterable(ids), np.int64, int(lengths.sum()))
    return qembag.embedding_bag(table, indices, lengths=lengths, mode="mean")


def of_model2vec(folder: Path, texts: list[str], ids: list[list[int]]) -> dict[str, Callable[[], np.ndarray]]:
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(folder / "model2vec")
    plain = model.tokenize

    def pooled() -> np.ndarray:
        waiting = iter(batches(ids))
        model.tokenize = lambda sentences: next(waiting)
        try:
            return model.encode(texts, use_multiprocessing=False, normalize=False)
        finally:
            model.tokenize = plain

    return {"pool": pooled, "encode": lambda: model.encode(texts, use_multiprocessing=False, normalize=False)}


def of_sentence_transformers(folder: Path, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    model = SentenceTransformer(str(folder / "sentence-transformers"), device="cpu")

    @torch.inference_mode()
    def pooled() -> np.ndarray:
        found = []
        for some in batches(ids):
            # As its `preprocess` does.
            offsets = torch.from_numpy(np.cumsum([0] + [len(tokens) for tokens in some[:-1]]))
            tokens = torch.tensor([token for tokens in some for token in tokens], dtype=torch.long)
            found.append(model[0]({"input_ids": tokens, "offsets": offsets})["sentence_embedding"].numpy())
        return np.concatenate(found)

    return {"pool": pooled, "encode": lambda: model.encode(texts, batch_size=BATCH, show_progress_bar=False)}


def of_qembag(folder: Path, name: str, texts: list[str], ids: list[list[int]]) -> dict[str, Callable[[], np.ndarray]]:
    from tokenizers import Tokenizer

    qembag.set_num_threads(1)
    if name == "float32":
        table = qembag.load_tables(folder / "model2vec", mmap=False)["embeddings"]
    else:
        table = qembag.open_table(folder / name, mmap=False)
    tokenizer = Tokenizer.from_file(str(folder / "model2vec" / "tokenizer.json"))
    unknown = tokenizer.token_to_id(tokenizer.model.unk_token)

    def encoded() -> np.ndarray:
        found = []
        for some in batches(texts):
            tokens = [encoding.ids for encoding in tokenizer.encode_batch_fast(some, add_special_tokens=False)]
            found += [[token for token in ids if token != unknown] for ids in tokens]
        return pool(table, found)

    return {"pool": lambda: pool(table, ids), "encode": encoded}


def resident() -> int:
    """The most that was resident so far, in bytes."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["VmHWM"].split()[0]) * 1024


def work(name: str, folder: Path) -> None:
    """A contender: answers each step that it is asked for with seconds, and saves the vectors of its first."""
    texts = json.loads((folder / "texts.json").read_text())
    ids = json.loads((folder / "ids.json").read_text())
    steps = {
        "model2vec": lambda: of_model2vec(folder, texts, ids),
        "sentence-transformers": lambda: of_sentence_transformers(folder, texts, ids),
    }.get(name, lambda: of_qembag(folder, name, texts, ids))()
    saved: set[str] = set()
    for step in map(str.strip, sys.stdin):
        before = time.perf_counter()
        vectors = steps[step]()
        seconds = time.perf_counter() - before
        if step not in saved:
            np.save(folder / f"{name}.{step}.npy", vectors)
            saved.add(step)
        print(json.dumps(seconds), flush=True)


# ---- Rounds ----------------------------------------------------------------------------------------------------------


def start(name: str, folder: Path) -> subprocess.Popen[str]:
    settings = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.static_text", "--worker", name, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=settings,
    )


def ask(worker: subprocess.Popen[str], step: str) -> float:
    assert worker.stdin
    assert worker.stdout
    print(step, file=worker.stdin, flush=True)
    return float(json.loads(worker.stdout.readline()))


def measure(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each step by contender: medians."""
    workers = {name: start(name, folder) for name in CONTENDERS}
    times: dict[str, dict[str, list[float]]] = {name: {step: [] for step in STEPS} for name in CONTENDERS}
    rng = random.Random(0)
    try:
        for number in range(rounds + 1):
            for name in rng.sample(CONTENDERS, len(CONTENDERS)):
                for step in STEPS:
                    seconds = ask(workers[name], step)
                    if number:  # the first round warms up
                        times[name][step].append(seconds)
    finally:
        for worker in workers.values():
            worker.communicate()
    return {name: {step: statistics.median(some) for step, some in steps.items()} for name, steps in times.items()}


def table_bytes(folder: Path, name: str) -> int:
    if name.endswith("-bit"):
        return qembag.open_table(folder / name).nbytes
    return qembag.load_tables(folder / "model2vec")["embeddings"].nbytes


def lines_of(table: str, folder: Path, times: dict[str, dict[str, float]], count: int) -> list[str]:
    lines = []
    for name in CONTENDERS:
        vectors = {step: np.load(folder / f"{name}.{step}.npy") for step in STEPS}
        exact = {step: np.load(folder / f"model2vec.{step}.npy") for step in STEPS}
        if name == "sentence-transformers":
            # Its own rules keep unknown tokens and do not cut texts: only vectors of the same tokens compare.
            vectors.pop("encode")
        cosines = min(float(worst_cosine(vectors[step], exact[step])) for step in vectors)
        same = all(vectors[step].tobytes() == exact[step].tobytes() for step in vectors)
        pooled, encoded = (1e6 * times[name][step] / count for step in STEPS)
        ratio = times["model2vec"]["pool"] / times[name]["pool"]
        who = name if name in CONTENDERS[:2] else f"qembag, {name}"
        lines.append(
            f"| {table} | {who} | {table_bytes(folder, name) / 1e6:.1f} | {pooled:.1f} | {ratio:.1f} | {encoded:.0f} | "
            f"{'the same bits' if same else f'{cosines:.5f}'} |"
        )
    return lines


def worst_cosine(one: np.ndarray, other: np.ndarray) -> np.floating[Any]:
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return ((a * b).sum(axis=1)[norms > 0] / norms[norms > 0]).min()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="keep the downloads in this folder")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    wordllama, gensim = quality.example().fetch(options.cache)
    texts = texts_of(gensim, options.texts)
    plain = quality.example().load_table(wordllama).astype(np.float32)
    tables = {
        "WordLlama": (plain, quality.example().load_tokenizer(wordllama)),
        "MiniLM": quality.minilm(options.cache),
    }
    lines = [
        "| table | by | MB | tokens to vectors, us a text | times as fast | texts to vectors, us a text | vectors, worst cosine |",
        "| --- | --- | --: | --: | --: | --: | --: |",
    ]
    tokens = []
    for name, (weights, tokenizer) in tables.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            save_models(folder, weights, tokenizer)
            from model2vec import StaticModel

            model = StaticModel.from_pretrained(folder / "model2vec")
            longest = MAX_LENGTH * model.median_token_length
            some = [text[:longest] for text in texts]
            ids = model.tokenize(some)
            tokens.append(sum(map(len, ids)) / len(ids))
            (folder / "texts.json").write_text(json.dumps(some))
            (folder / "ids.json").write_text(json.dumps(ids))
            lines += lines_of(name, folder, measure(folder, options.rounds), len(texts))
    where, versions = machine.describe(), ("model2vec", "sentence-transformers", "torch", "numpy", "tokenizers")
    lines += [
        "",
        f"*{len(texts):,} texts of {' and '.join(f'{mean:.0f}' for mean in tokens)} tokens on average; one thread each; "
        f"medians of {options.rounds} rounds in turns; {where['processor']}, {where['level']}; "
        + ", ".join(f"{package} {machine.version(package)}" for package in versions)
        + "; the 4-bit table has groups of 32.*",
    ]
    quality.tell(PAGE, BEGIN, lines, write_page=options.write)


if __name__ == "__main__":
    main()
