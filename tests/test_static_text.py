"""Tables of static text models: model2vec, sentence-transformers' StaticEmbedding, WordLlama."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from qembag.formats import safetensors_file
from qembag.interop import foreign, static_text
from support.documents import blocks
from support.static_text import TEXTS, bags_of, safetensors, tokenizer_of, write_model2vec, write_sentence_transformers

FUZZ = Path(__file__).parents[1] / "fuzz"
ROWS = np.random.default_rng(15).normal(size=(7, 5)).astype(np.float32)
CODES = np.random.default_rng(16).integers(-128, 128, (7, 5)).astype(np.int8)
MAPPING = np.array([6, 6, 0, 3, 1, 2, 0, 5, 4], np.int32)
WEIGHTS = np.linspace(0.25, 3, len(MAPPING)).astype(np.float32)


def only(tables: dict[str, Any], name: str) -> Any:
    assert list(tables) == [name]
    return tables[name]


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# ---- Files and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("kind", ["float32", "float16", "float64"])
def test_rows_of_floats_are_those_of_the_file(tmp_path, kind, mmap):
    rows = ROWS.astype(kind)
    write_model2vec(tmp_path, embeddings=rows)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        table = only(qembag.load_tables(path, mmap=mmap), "embeddings")
        assert isinstance(table, qembag.FloatTable)
        # float64 is rounded once.
        expected = rows if kind != "float64" else rows.astype(np.float32)
        assert same(np.ascontiguousarray(table.data), expected)
        assert table.row_weights is None


def test_int8_rows_are_exact_at_a_byte_a_code_and_a_pair_of_halves(tmp_path):
    write_model2vec(tmp_path, embeddings=CODES)
    table = only(qembag.load_tables(tmp_path), "embeddings")
    assert same(table[:], CODES.astype(np.float32))
    assert (table.bits, table.layout.scale_dtype, table.row_bytes) == (8, np.float16, 5 + 4)


@pytest.mark.parametrize("values", [ROWS, CODES, ROWS.astype(np.float16)], ids=lambda values: values.dtype.name)
@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("weight", ["float32", "float16", "float64", None])
def test_mapping_and_weights_are_kept_apart_from_the_rows(tmp_path, values, kind, weight):
    others = {} if weight is None else {"weights": WEIGHTS.astype(weight)}
    write_model2vec(tmp_path, embeddings=values, mapping=MAPPING.astype(kind), **others)
    table = only(qembag.load_tables(tmp_path), "embeddings")
    assert (table.num_rows, table.num_embeddings) == (7, 9)
    assert same(table[:], values.astype(np.float32)[MAPPING])
    if weight is None:
        assert table.row_weights is None
        return
    assert same(table.row_weights, WEIGHTS.astype(weight).astype(np.float32))
    weighted = values[MAPPING].astype(np.float32) * table.row_weights[:, None]
    assert same(table.apply_row_weights()[:], weighted)


@pytest.mark.parametrize("order", [["embeddings", "mapping"], ["mapping", "embeddings"], ["pad", "embeddings"]])
def test_tensors_may_stand_at_any_byte(tmp_path, order):
    # int8 rows of odd length before int32; weights of an odd number of halves before rows of float32.
    tensors = {"mapping": MAPPING[:7] % 7, "embeddings": CODES if "mapping" in order else ROWS}
    if "pad" in order:
        tensors = {"weights": WEIGHTS[:7].astype(np.float16), "embeddings": ROWS}
        order = ["weights", "embeddings"]
    raw = safetensors({name: tensors[name] for name in order})
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    table = only(qembag.load_tables(path), "embeddings")
    rows = tensors["embeddings"].astype(np.float32)
    assert same(table[:], rows[tensors["mapping"]] if "mapping" in order else rows)


def test_a_mapping_of_just_0_maps_one_token_to_the_first_row(tmp_path):
    """On a table, that mapping stands for none at all."""
    write_model2vec(tmp_path, embeddings=ROWS, mapping=np.array([0], np.int32))
    assert same(only(qembag.load_tables(tmp_path), "embeddings")[:], ROWS[:1])


@pytest.mark.parametrize("last", [999, 1000])
def test_a_long_mapping_takes_no_more_memory_than_the_file(tmp_path, last):
    mapping = np.full(2_000_000, last, np.int32)
    write_model2vec(tmp_path, embeddings=np.zeros((1000, 2), np.float32), mapping=mapping)
    tracemalloc.start()
    try:
        if last < 1000:
            assert len(only(qembag.load_tables(tmp_path), "embeddings").compressed_indices_mapping) == len(mapping)
        else:
            with pytest.raises(ValueError, match=r"mapping\[0\] must be from 0 to 999, got 1000"):
                qembag.load_tables(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < mapping.nbytes + (6 << 20)


def test_weights_are_in_memory_of_their_own_without_mmap(tmp_path):
    write_model2vec(tmp_path, weights=WEIGHTS[:7].astype(np.float32), embeddings=ROWS)
    (mapped,) = qembag.load_tables(tmp_path).values()
    (table,) = qembag.load_tables(tmp_path, mmap=False).values()
    assert same(mapped.row_weights, table.row_weights)
    base = table.row_weights
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base, np.ndarray)


@pytest.mark.parametrize("place", ["", ".", "0_StaticEmbedding"])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_a_folder_of_sentence_transformers_names_where_the_rows_are(tmp_path, place, kind):
    rows = ROWS.astype(kind)
    write_sentence_transformers(tmp_path, rows, place)
    table = only(qembag.load_tables(tmp_path, format="sentence-transformers"), "embedding")
    assert same(np.ascontiguousarray(table.data), rows)


def test_wordllamas_file(tmp_path):
    path = tmp_path / "l2_supercat_256.safetensors"
    path.write_bytes(safetensors({"embedding.weight": ROWS.astype(np.float16)}))
    table = only(qembag.load_tables(path, format="wordllama"), "embedding")
    assert same(np.ascontiguousarray(table.data), ROWS.astype(np.float16))


def test_bfloat16_rows(tmp_path):
    bits = (ROWS.view(np.uint32) >> 16).astype(np.uint16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"embedding.weight": bits}, {"embedding.weight": "BF16"}))
    table = only(qembag.load_tables(path), "embedding")
    assert table.dtype == "bfloat16"
    assert same(table[:], (bits.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_a_snapshot_in_the_cache_of_hugging_face(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_model2vec(blobs, embeddings=ROWS)
    for number, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert same(only(qembag.load_tables(snapshot), "embeddings")[:], ROWS)


def test_rows_are_mapped(tmp_path):
    write_model2vec(tmp_path, embeddings=ROWS)
    table = only(qembag.load_tables(tmp_path), "embeddings")
    if np.dtype("<f4").isnative:
        assert not table.data.flags.writeable
        assert not table.data.flags.owndata


def test_other_safetensors_files_are_no_static_text(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({"embedding.weight": ROWS, "linear.weight": ROWS}))
    assert set(qembag.load_tables(path)) == {"embedding", "linear"}
    with pytest.raises(ValueError, match=r"model\.safetensors: has no table of a static text model"):
        qembag.load_tables(tmp_path)


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mapping": np.array([0, 7], np.int32)}, r"mapping\[1\] must be from 0 to 6, got 7"),
        ({"mapping": np.array([0, -1], np.int32)}, r"mapping\[1\] must be from 0 to 6, got -1"),
        ({"mapping": np.array([2**40], np.int64)}, r"mapping\[0\] must be from 0 to 6, got 1099511627776"),
        ({"mapping": np.zeros((2, 2), np.int32)}, r"mapping must be I32 or I64 of 1 dimension, got I32 of \[?\(?2"),
        ({"mapping": np.zeros(2, np.float32)}, r"mapping must be I32 or I64 of 1 dimension, got F32"),
        ({"weights": WEIGHTS}, r"weights must be F32, F16 or F64 of shape \(7,\), one for each token, got F32 of \(9"),
        ({"weights": WEIGHTS[:7].astype(np.int32)}, r"weights must be F32, F16 or F64 of shape \(7,\).* got I32"),
        ({"mapping": MAPPING, "weights": WEIGHTS[:7]}, r"weights must be F32, F16 or F64 of shape \(9,\)"),
    ],
)
def test_tensors_that_do_not_belong_to_the_rows_are_refused(tmp_path, tensors, message):
    write_model2vec(tmp_path, embeddings=ROWS, **tensors)
    with pytest.raises(ValueError, match=message) as raised:
        qembag.load_tables(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: model.safetensors: ")


@pytest.mark.parametrize("shape", [[0, 5], [0, 2**40], [0, 2**62], [2**62, 0], [0, 0]])
def test_a_table_of_nothing_is_no_model(tmp_path, shape):
    path = tmp_path / "a.safetensors"
    text = json.dumps({"embeddings": {"dtype": "I8", "shape": shape, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: has no table"):
        qembag.load_tables(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "modules.json: is not JSON"),
        ("{}", "modules.json: must be a list of objects with a type and a path"),
        ("[1]", "modules.json: must be a list of objects with a type and a path"),
        ('[{"type": "a.StaticEmbedding"}]', "modules.json: must be a list of objects with a type and a path"),
        ("[" * 100_000, "modules.json: nests too deeply"),
        ("[" + "0," * 600_000 + "0]", "modules.json: is longer than 1048576 bytes"),
        ('[{"type": "m.Transformer", "path": ""}]', "must name a StaticEmbedding, .* got .*'Transformer'"),
        ('[{"type": "m.StaticEmbedding", "path": "../other"}]', "must name files in its own folder"),
        ('[{"type": "m.StaticEmbedding", "path": "/etc"}]', "must name files in its own folder"),
        ('[{"type": "m.StaticEmbedding", "path": "a\\u0000b"}]', "must name files in its own folder"),
        ('[{"type": "m.StaticEmbedding", "path": "0_S"}]', "'0_S' must hold model.safetensors"),
        ('[{"type": "m.StaticEmbedding", "path": "%s"}]' % ("x" * 5000), "must"),
    ],
)
def test_a_modules_file_that_leads_nowhere_is_refused(tmp_path, text, message):
    folder = tmp_path / "model"
    write_sentence_transformers(folder, ROWS, "")
    write_sentence_transformers(tmp_path / "other", ROWS, "")
    (folder / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        qembag.load_tables(folder)
    assert str(raised.value).startswith(f"{folder}: ")
    assert len(str(raised.value)) < 1000


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "other"
    write_model2vec(other, embeddings=ROWS)
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(other / "model.safetensors")
    with pytest.raises(ValueError, match=r"must name files in its own folder, got .*, a link to"):
        qembag.load_tables(folder)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"is no folder of a static text model: .* must hold model\.safetensors"):
        qembag.load_tables(tmp_path)


def test_a_long_header_is_not_read_as_static_text(tmp_path):
    """JSON takes a multiple of its length in memory; these models have three tensors."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"embeddings": ROWS}, metadata={"a": "x" * static_text.MAX_JSON}))
    assert static_text.read_safetensors(foreign.Memory(path), foreign.Wanted()) is None


# ---- Damaged in every way --------------------------------------------------------------------------------------------


@pytest.fixture
def mutate_static_text():
    if not FUZZ.is_dir():
        pytest.skip("the fuzzer is not beside these tests")
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("mutate_static_text")
    finally:
        sys.path.remove(str(FUZZ))


def test_damaged_models_are_loaded_right_or_refused(mutate_static_text):
    """`python fuzz/mutate_static_text.py 20000` tries more."""
    outcomes = mutate_static_text.run(600)
    assert outcomes["opened"] > 50
    assert len(outcomes) > 50


def test_undamaged_models_are_loaded(mutate_static_text, monkeypatch):
    monkeypatch.setattr(mutate_static_text, "damaged", lambda files, rng: files)
    assert mutate_static_text.run(50) == {"opened": 50}


def unchecked(memory, tensor, num_rows):
    return static_text._array(memory, tensor).astype(np.int32) % num_rows


DEFECTS = {
    "mappings": ("_mapping", unchecked),
    "codes": (
        "_array",
        lambda memory, tensor: np.zeros(tensor.shape, (static_text.KINDS | {"I32": "i4"})[tensor.dtype]),
    ),
    "memory": ("header_of", lambda file: bytes(60_000_000) and safetensors_file.header_of(file)),
    "paths": ("inside", lambda folder, name: folder / name),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_check_that_is_left_out_is_found(mutate_static_text, monkeypatch, defect):
    pytest.importorskip("safetensors")  # which tells what the values are
    monkeypatch.setattr(static_text, *DEFECTS[defect])
    with pytest.raises(mutate_static_text.Finding, match=r"^case \d+ of seed \d+: "):
        mutate_static_text.run(1500)


# ---- The libraries themselves ----------------------------------------------------------------------------------------


def pooled(table: Any, ids: list[list[int]], **options: Any) -> np.ndarray:
    return qembag.embedding_bag(table, *bags_of(ids), include_last_offset=True, **options)


@pytest.mark.parametrize("dim", [1, 3, 32, 257])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("parts", ["", "weights", "mapping", "mapping and weights"])
def test_model2vecs_own_encoder_gives_the_same_bits(tmp_path, rng, dim, kind, parts):
    model2vec = pytest.importorskip("model2vec")
    tokenizer = tokenizer_of(pytest.importorskip("tokenizers"))
    count = tokenizer.get_vocab_size()
    num_rows = 11 if "mapping" in parts else count
    values = rng.normal(size=(num_rows, dim)).astype(np.float32)
    vectors = rng.integers(-127, 128, values.shape).astype(np.int8) if kind == "int8" else values.astype(kind)
    weights = rng.uniform(0.1, 3, count).astype(np.float32) if "weights" in parts else None
    mapping = rng.integers(0, num_rows, count).astype(np.int32) if "mapping" in parts else None
    model = model2vec.StaticModel(vectors, tokenizer, weights=weights, token_mapping=mapping)
    model.save_pretrained(tmp_path)
    table = only(qembag.load_tables(tmp_path, format="model2vec"), "embeddings")
    theirs = model2vec.StaticModel.from_pretrained(tmp_path)
    ids = theirs.tokenize(TEXTS)
    assert [] in ids
    expected = theirs.encode(TEXTS)
    if weights is not None:
        table = table.apply_row_weights()
    if kind == "int8" and weights is None:
        # Sums of codes are whole numbers, and exact; the mean of a table of codes multiplies, and would not be.
        counts = np.maximum([len(some) for some in ids], 1).astype(np.float32)
        ours = pooled(table, ids, mode="sum") / counts[:, None]
    else:
        ours = pooled(table, ids, mode="mean", dtype=expected.dtype)
    # NumPy adds neighbours in pairs, in another order, where rows have one element.
    if dim > 1 or (kind == "int8" and weights is None):
        assert same(ours, expected)
    np.testing.assert_allclose(ours, expected, rtol=2e-3 if kind == "float16" else 1e-5, atol=1e-6)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.torch
def test_sentence_transformers_own_encoder_gives_the_same_bits(tmp_path, rng, safe):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = tokenizer_of(pytest.importorskip("tokenizers"))
    values = rng.normal(size=(tokenizer.get_vocab_size(), 33)).astype(np.float32)
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=values)], device="cpu")
    model.save_pretrained(str(tmp_path), safe_serialization=safe)
    table = only(qembag.load_tables(tmp_path, format="sentence-transformers"), "embedding")
    ids = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    assert same(pooled(table, ids, mode="mean"), SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS))


@pytest.mark.real
def test_wordllamas_own_table(request):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    example = Path(__file__).parents[1] / "examples" / "static_text.py"
    spec = importlib.util.spec_from_file_location("static_text", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cache = request.config.cache.mkdir("static_text")
    wheel, _ = module.fetch(cache)
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(module.TABLE, cache))
    table = only(qembag.load_tables(path, format="wordllama"), "embedding")
    assert same(np.ascontiguousarray(table.data), module.load_table(wheel))


@pytest.mark.parametrize("max_length", [2, 5, 512])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_encoder_in_the_documents_is_model2vecs(tmp_path, rng, max_length, normalize, monkeypatch):
    model2vec = pytest.importorskip("model2vec")
    page = Path(__file__).parents[1] / "docs" / "from-model2vec.md"
    if not page.exists():
        pytest.skip("the documents are not beside the tests")
    tokenizer = tokenizer_of(pytest.importorskip("tokenizers"))
    vectors = rng.normal(size=(tokenizer.get_vocab_size(), 20)).astype(np.float32)
    model = model2vec.StaticModel(vectors, tokenizer, normalize=normalize, max_length=max_length)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code, _ in blocks(page.read_text(), "python")[:2]:
        exec(compile(code, str(page), "exec"), names)  # noqa: S102 (our own documents)
    table = only(qembag.load_tables(tmp_path / "saved"), "embeddings")
    assert same(names["Encoder"](tmp_path / "saved", table).encode(TEXTS), model.encode(TEXTS))


def test_the_numbers_in_the_documents_hold_what_is_promised():
    page = Path(__file__).parents[1] / "docs" / "from-model2vec.md"
    if not page.exists():
        pytest.skip("the documents are not beside the tests")
    rows = [
        line.strip("| ").split(" | ") for line in page.read_text().splitlines() if re.match(r"\| (Word|Mini)", line)
    ]
    shown = {(row[0], row[1]): row[2:] for row in rows if len(row) == 7}
    for table in ("WordLlama", "MiniLM"):
        for name in ("sentence-transformers", "qembag, float32"):
            assert shown[table, name][4] == "the same bits"
        megabytes, _, times, _, cosine = shown[table, "qembag, 8-bit"]
        assert float(cosine) >= 0.9999
        assert float(times) >= 5
        assert float(megabytes) < 0.26 * float(shown[table, "model2vec"][0])
