"""TextEmbedder: strings in, vectors out."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from qembag.text import TextEmbedder, tokenizer
from support.static_text import TEXTS, WORDS, safetensors, tokenizer_of, write_model2vec, write_sentence_transformers

tokenizers = pytest.importorskip("tokenizers", minversion="0.20")
NUM_TOKENS = len(WORDS) + 1
ROWS = np.random.default_rng(16).normal(size=(NUM_TOKENS, 33)).astype(np.float32)
MANY = [f"{text} {WORDS[number % len(WORDS)]}" for number, text in enumerate(TEXTS * 20)] + [""]


def words() -> Any:
    """A word a token; number 0 is unknown."""
    return tokenizer_of(tokenizers)


def pieces() -> Any:
    """Word pieces, with a start and an end that are special."""
    vocabulary = ["[UNK]", "[CLS]", "[SEP]", *WORDS[:12], "##s", "##g", "##d"]
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: number for number, piece in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def oracle(
    rows: np.ndarray,
    made: Any,
    texts: list[str],
    *,
    mode: str = "mean",
    normalize: bool = False,
    max_length: int | None = None,
    max_characters: int | None = None,
    unknown: int | None = None,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """A text at a time, a token at a time."""
    found = np.zeros((len(texts), rows.shape[1]), np.float32)
    for vector, text in zip(found, texts, strict=True):
        ids = made.encode(text[:max_characters], add_special_tokens=False).ids[:max_length]
        ids = [number for number in ids if number != unknown]
        for number in ids:
            vector += rows[number] if weights is None else rows[number] * weights[number]
        if mode == "mean" and ids:
            vector /= np.float32(len(ids))
    if normalize:
        found /= np.linalg.norm(found, axis=1, keepdims=True) + np.float32(1e-32)
    return found


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def write_tokenizer(folder: Path, made: Any = None, **config: Any) -> None:
    (folder / "tokenizer.json").write_text((made or words()).to_str())
    if config:
        (folder / "config.json").write_text(json.dumps(config))


# ---- Vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [words, pieces])
@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("max_length", [None, 1, 4])
@pytest.mark.parametrize("drop", [True, False])
def test_a_vector_is_the_pool_of_the_tokens_rows(made, mode, normalize, max_length, drop):
    options = {"mode": mode, "normalize": normalize, "max_length": max_length, "max_characters": 30}
    embedder = TextEmbedder(ROWS, made(), drop_unknown=drop, **options)
    expected = oracle(ROWS, made(), MANY, unknown=0 if drop else None, **options)
    assert same(embedder(MANY), expected)
    assert same(np.stack([embedder(text) for text in MANY]), expected)


@pytest.mark.parametrize("batch_size", [None, 1, 7, 141, 1000])
@pytest.mark.parametrize("num_threads", [None, 1, 2, 3])
def test_batches_and_threads_change_no_bit(batch_size, num_threads):
    embedder = TextEmbedder(ROWS, words(), drop_unknown=True)
    expected = oracle(ROWS, words(), MANY, unknown=0)
    assert same(embedder(MANY, batch_size=batch_size, num_threads=num_threads), expected)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_means_of_quantized_rows_are_divided_too(bits):
    table = qembag.quantize(ROWS, bits)
    lists = [words().encode(text).ids for text in MANY]
    flat, lengths = np.concatenate([np.array(ids, np.int64) for ids in lists]), np.array([len(ids) for ids in lists])
    sums = qembag.embedding_bag(table, flat, lengths=lengths)
    expected = sums / np.maximum(lengths, 1).astype(np.float32)[:, None]
    assert same(TextEmbedder(table, words())(MANY), expected)


def test_row_weights_weight_the_rows():
    weights = np.linspace(0.25, 3, NUM_TOKENS).astype(np.float32)
    expected = oracle(ROWS, words(), MANY, weights=weights)
    codes = qembag.QuantizedTable(qembag.quantize(ROWS).data, 8, row_weights=weights)
    for table in (qembag.FloatTable(ROWS, row_weights=weights), codes):
        found = TextEmbedder(table, words())(MANY)
        np.testing.assert_allclose(found, expected, atol=1e-5 if isinstance(table, qembag.FloatTable) else 0.1)


def test_max_takes_the_largest():
    found = TextEmbedder(ROWS, words(), mode="max")("the quick dog")
    ids = words().encode("the quick dog").ids
    assert same(found, ROWS[ids].max(axis=0))


def test_unknown_tokens_of_a_unigram_model_are_dropped():
    model = tokenizers.models.Unigram([("<unk>", -9.0), ("a", -1.0), ("b", -2.0)], unk_id=0)
    embedder = TextEmbedder(np.eye(3, dtype=np.float32), tokenizers.Tokenizer(model), drop_unknown=True)
    assert embedder("a!b").tolist() == [0, 0.5, 0.5]


def test_huge_values_are_normalized_without_a_warning():
    embedder = TextEmbedder(np.full((NUM_TOKENS, 4), 3e38, np.float32), words(), normalize=True, mode="sum")
    with np.errstate(all="raise"):
        assert embedder(["a cat", "a"]).shape == (2, 4)


# ---- What holds texts ------------------------------------------------------------------------------------------------


class Column:
    """As Arrow's: iterated, it gives no strings."""

    def __iter__(self):
        return iter([1, 2, 3])

    def to_pylist(self):
        return ["a cat", "", "the dog"]


class Text(str):
    __slots__ = ()

    def __getitem__(self, item: Any) -> str:
        return "b"


@pytest.mark.parametrize(
    "texts",
    [
        ["a cat", "", "the dog"],
        ("a cat", "", "the dog"),
        iter(["a cat", "", "the dog"]),
        np.array(["a cat", "", "the dog"]),
        np.array(["a cat", "", "the dog"], object),
        Column(),
        [Text("a cat"), "", np.str_("the dog")],
    ],
    ids=lambda texts: type(texts).__name__,
)
def test_texts_come_in_any_iterable(texts):
    expected = oracle(ROWS, words(), ["a cat", "", "the dog"])
    assert same(TextEmbedder(ROWS, words(), max_characters=100)(texts), expected)


@pytest.mark.parametrize("package", ["pandas", "polars", "pyarrow"])
def test_texts_come_in_columns(package):
    module = pytest.importorskip(package)
    column = (module.array if package == "pyarrow" else module.Series)(["a cat", "", "the dog"])
    assert same(TextEmbedder(ROWS, words())(column), oracle(ROWS, words(), ["a cat", "", "the dog"]))


def test_no_texts_make_no_vectors():
    embedder = TextEmbedder(ROWS, words())
    for texts in ([], (), np.array([], object)):
        assert embedder(texts).shape == (0, 33)


def test_a_text_of_its_own_gives_one_vector():
    embedder = TextEmbedder(ROWS, words())
    for text in ("a cat", np.str_("a cat")):
        assert same(embedder(text), embedder(["a cat"])[0])
    assert same(embedder(""), np.zeros(33, np.float32))


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["a", None], TypeError, r"^texts\[1\] must be a string, got NoneType"),
        (["a", "b", b"c"], TypeError, r"^texts\[2\] must be a string, got bytes"),
        ([["a"]], TypeError, r"^texts\[0\] must be a string, got list"),
        ([("a", "b")], TypeError, r"^texts\[0\] must be a string, got tuple"),
        (np.array(["a", np.nan], object), TypeError, r"^texts\[1\] must be a string, got float nan"),
        (np.ma.masked_array(["a", "b"], [True, False]), TypeError, r"^texts\[0\] must be a string, got NoneType"),
        (np.array([["a"]]), ValueError, r"^texts must have 1 dimension, got"),
        (np.array("a"), ValueError, r"^texts must have 1 dimension, got"),
        (None, TypeError, r"^texts must be a string or strings, got NoneType"),
        (5, TypeError, r"^texts must be a string or strings, got int 5"),
        (b"a", TypeError, r"^texts must be a string or strings, got bytes"),
        ({"a": 1}, TypeError, r"^texts must be a string or strings, got dict"),
    ],
)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_is_no_text_is_named(texts, error, message, num_threads):
    with pytest.raises(error, match=message):
        TextEmbedder(ROWS, words())(texts, batch_size=7, num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_text_that_is_not_valid_unicode_is_named(num_threads):
    try:
        words().encode("\ud800")
    except TypeError:
        pass
    else:
        pytest.skip("this version of tokenizers replaces lone surrogates")
    embedder = TextEmbedder(ROWS, words())
    with pytest.raises(ValueError, match=r"^texts\[50\] must be valid Unicode, got a lone surrogate at character 2$"):
        embedder(["a"] * 50 + ["b \ud800"], batch_size=7, num_threads=num_threads)
    with pytest.raises(ValueError, match=r"^texts\[0\] must be valid Unicode, got a lone surrogate at character 0$"):
        embedder("\udfff", num_threads=num_threads)


# ---- Tokens beyond the table -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, np.ones(5, np.float32)])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_token_beyond_the_table_names_the_text(weights, num_threads):
    embedder = TextEmbedder(qembag.FloatTable(ROWS[:5], row_weights=weights), words())
    texts = ["a bag", "", "", "b cat", "a"]
    with pytest.raises(IndexError, match=r"^texts\[3\] has token 5, 'cat': out of range for a table of 5 rows$"):
        embedder(texts, batch_size=2, num_threads=num_threads)
    with pytest.raises(IndexError, match=r"^texts\[0\] has token 20, 'word': out of range for a table of 5 rows$"):
        embedder("a word")


def test_tokens_beyond_the_table_are_clipped_if_asked_for():
    embedder = TextEmbedder(ROWS[:5], words(), invalid="clip")
    clipped = np.concatenate([ROWS[:5], np.repeat(ROWS[4:5], NUM_TOKENS - 5, axis=0)])
    assert same(embedder(MANY), oracle(clipped, words(), MANY))
    assert same(embedder("a word"), oracle(clipped, words(), ["a word"])[0])


# ---- Arguments -------------------------------------------------------------------------------------------------------


def test_out_is_written_and_returned():
    embedder = TextEmbedder(ROWS, words(), normalize=True)
    expected = embedder(MANY)
    wide = np.full((len(MANY), 40), 7, np.float32)
    out = wide[:, 3:36]
    assert embedder(MANY, out=out, batch_size=9) is out
    assert same(np.ascontiguousarray(out), expected)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 36:] == 7).all()
    row = np.empty(33, np.float32)
    assert embedder(MANY[0], out=row) is row
    assert same(row, expected[0])


@pytest.mark.parametrize(
    ("out", "error"),
    [
        (np.empty((2, 33), np.float64), ValueError),
        (np.empty((3, 33), np.float32), ValueError),
        (np.empty(33, np.float32), ValueError),
        (np.broadcast_to(np.zeros(33, np.float32), (2, 33)), ValueError),
        ([[0.0] * 33] * 2, TypeError),
    ],
)
def test_an_out_that_does_not_fit_is_refused(out, error):
    with pytest.raises(error, match=r"^out must"):
        TextEmbedder(ROWS, words())(["a", "b"], out=out)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "median"}, ValueError, "mode must be"),
        ({"normalize": "yes"}, TypeError, "normalize must be True or False"),
        ({"drop_unknown": None}, TypeError, "drop_unknown must be True or False"),
        ({"max_length": 0}, ValueError, "max_length must be at least 1, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length must be a whole number"),
        ({"max_characters": -1}, ValueError, "max_characters must be at least 1, got -1"),
        ({"invalid": "skip"}, ValueError, "invalid must be 'raise' or 'clip', got 'skip'"),
        ({"invalid": ["raise"]}, ValueError, "invalid must be 'raise' or 'clip', got"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        TextEmbedder(ROWS, words(), **options)


def test_calls_are_checked():
    embedder = TextEmbedder(ROWS, words())
    for value, error in ((0, ValueError), ("1", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^batch_size must be"):
            embedder(["a"], batch_size=value)
        with pytest.raises(error, match=r"^num_threads must be"):
            embedder(["a"], num_threads=value)


def test_tables_and_tokenizers_are_checked():
    with pytest.raises(TypeError, match=r"^table must be a table or an array of floats, got list"):
        TextEmbedder([[1.0]], words())
    for wrong in ("tokenizer.json", None, 5):
        with pytest.raises(TypeError, match=r"^tokenizer must be a tokenizers\.Tokenizer, got"):
            TextEmbedder(ROWS, wrong)
    special = words()
    special.encode_special_tokens = True
    with pytest.raises(ValueError, match=r"^tokenizer must not have encode_special_tokens"):
        TextEmbedder(ROWS, special)


def test_a_tokenizer_without_json_is_refused():
    class Custom:
        def normalize(self, text: Any) -> None:
            pass

    made = words()
    made.normalizer = tokenizers.normalizers.Normalizer.custom(Custom())
    with pytest.raises(ValueError, match=r"^tokenizer must be one that can be written as JSON: "):
        TextEmbedder(ROWS, made)


def test_a_mode_that_takes_no_weights_is_refused_at_once():
    with pytest.raises(ValueError, match="weights"):
        TextEmbedder(qembag.FloatTable(ROWS, row_weights=np.ones(NUM_TOKENS)), words(), mode="max")


def test_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"^qembag\.text needs tokenizers: pip install 'qembag\[text\]'$"):
        TextEmbedder(ROWS, None)


# ---- Whose tokenizer -------------------------------------------------------------------------------------------------


def test_the_callers_tokenizer_is_left_alone():
    made = words()
    made.enable_padding(length=9)
    made.enable_truncation(7)
    before = made.to_str()
    embedder = TextEmbedder(ROWS, made, max_length=2)
    expected = embedder(MANY)
    assert made.to_str() == before
    made.enable_truncation(1)
    embedder.tokenizer.enable_truncation(1)
    assert same(embedder(MANY), expected)
    assert same(expected, oracle(ROWS, words(), MANY, max_length=2))


def test_a_tokenizers_own_truncation_stays_without_max_length():
    made = words()
    made.enable_truncation(2, direction="left")
    ids = words().encode("the quick dog").ids[-2:]
    assert same(TextEmbedder(ROWS, made, mode="sum")("the quick dog"), ROWS[ids[0]] + ROWS[ids[1]])


def test_a_tokenizer_of_transformers_is_taken():
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words())
    assert same(TextEmbedder(ROWS, fast)(MANY), oracle(ROWS, words(), MANY))


# ---- Threads, processes, pickles -------------------------------------------------------------------------------------


def test_many_threads_use_one_embedder():
    embedder = TextEmbedder(ROWS, words(), drop_unknown=True, normalize=True)
    expected = embedder(MANY)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: embedder(MANY, batch_size=10, num_threads=2), range(40)):
            assert same(found, expected)


def test_no_thread_outlives_a_call_and_the_environment_stays():
    embedder, before = TextEmbedder(ROWS[:20], words()), dict(os.environ)
    for texts in (["a cat"] * 100, ["a cat", *["word"] * 99]):
        try:
            embedder(texts, batch_size=10, num_threads=2)
        except IndexError:
            assert "word" in texts
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("qembag")] == []
    assert dict(os.environ) == before


def in_child(embedder: TextEmbedder, queue: Any) -> None:
    queue.put(embedder(MANY, batch_size=10, num_threads=2).tobytes())


@pytest.mark.slow
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_uses_the_embedder(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    embedder = TextEmbedder(ROWS, words())
    expected = embedder(MANY, batch_size=10, num_threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_child, args=(embedder, queue))
    child.start()
    found = queue.get(timeout=120)
    child.join()
    assert found == expected.tobytes()


@pytest.mark.parametrize("made", [words, pieces])
def test_a_copy_gives_the_same_vectors(made):
    embedder = TextEmbedder(qembag.quantize(ROWS, 4), made(), max_length=5, drop_unknown=True, normalize=True)
    for other in (pickle.loads(pickle.dumps(embedder)), copy.copy(embedder), copy.deepcopy(embedder)):
        assert other.options == embedder.options
        assert same(other(MANY), embedder(MANY))


# ---- Folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_save_wrote_load_reads(tmp_path, bits, mmap):
    table = qembag.FloatTable(ROWS) if bits is None else qembag.quantize(ROWS, bits)
    embedder = TextEmbedder(table, words(), max_length=5, max_characters=40, drop_unknown=True, normalize=True)
    folder = tmp_path / "a" / "model"
    for _ in range(2):  # made, then replaced
        embedder.save(folder)
        loaded = TextEmbedder.load(folder, mmap=mmap)
        assert repr(loaded) == repr(embedder)
        assert same(loaded(MANY), embedder(MANY))
    assert sorted(path.name for path in folder.iterdir()) == ["table.safetensors", "tokenizer.json"]
    plain = TextEmbedder.load(folder, normalize=False)
    assert plain.options == embedder.options | {"normalize": False}


def test_a_model2vec_model_has_its_rules(tmp_path):
    write_model2vec(tmp_path, embeddings=ROWS)
    write_tokenizer(tmp_path, normalize=True, max_length=4)
    embedder = TextEmbedder.load(tmp_path)
    most = 4 * int(np.median([len(word) for word in words().get_vocab()]))
    options = {"normalize": True, "max_length": 4, "max_characters": most}
    assert embedder.options == {"mode": "mean", "drop_unknown": True, "invalid": "raise", **options}
    assert same(embedder(MANY), oracle(ROWS, words(), MANY, unknown=0, **options))
    write_tokenizer(tmp_path, max_length=None)
    assert TextEmbedder.load(tmp_path).options["max_characters"] is None
    write_tokenizer(tmp_path, normalize=False)
    assert TextEmbedder.load(tmp_path).options["max_length"] == 512


def test_weights_and_mapping_of_a_model2vec_model_are_applied(tmp_path):
    mapping = np.arange(NUM_TOKENS, dtype=np.int32) % 7
    weights = np.linspace(0.25, 3, NUM_TOKENS).astype(np.float32)
    write_model2vec(tmp_path, embeddings=ROWS[:7], mapping=mapping, weights=weights)
    write_tokenizer(tmp_path, normalize=False)
    embedder = TextEmbedder.load(tmp_path)
    assert same(embedder(MANY), oracle(ROWS[mapping], words(), MANY, unknown=0, weights=weights))
    (small,) = qembag.load_tables(tmp_path).values()
    other = TextEmbedder.load(tmp_path, table=small)
    assert other.table is small
    np.testing.assert_allclose(other(MANY), embedder(MANY), atol=1e-5)


@pytest.mark.parametrize("place", ["", "0_StaticEmbedding"])
def test_a_sentence_transformers_model_has_its_rules(tmp_path, place):
    write_sentence_transformers(tmp_path, ROWS, place)
    write_tokenizer(tmp_path / place)
    assert same(TextEmbedder.load(tmp_path)(MANY), oracle(ROWS, words(), MANY, normalize=True))
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.StaticEmbedding", "path": place}]))
    assert same(TextEmbedder.load(tmp_path)(MANY), oracle(ROWS, words(), MANY))
    assert same(TextEmbedder.load(tmp_path, normalize=True)(MANY), oracle(ROWS, words(), MANY, normalize=True))


def test_wordllamas_files_are_found_where_it_keeps_them(tmp_path):
    made = words()
    made.enable_truncation(2)
    made.enable_padding()
    (tmp_path / "weights").mkdir()
    (tmp_path / "tokenizers").mkdir()
    path = tmp_path / "weights" / "l2_supercat_33.safetensors"
    path.write_bytes(safetensors({"embedding.weight": ROWS.astype(np.float16)}))
    own = tmp_path / "tokenizers" / "l2_supercat_tokenizer_config.json"
    own.write_text(made.to_str())
    expected = oracle(ROWS.astype(np.float16).astype(np.float32), words(), MANY)
    assert same(TextEmbedder.load(path)(MANY), expected)
    own.rename(tmp_path / "other.json")
    assert same(TextEmbedder.load(path, tokenizer=tmp_path / "other.json")(MANY), expected)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TextEmbedder.load(path)


def test_quantized_rows_take_the_place_of_a_models(tmp_path):
    write_model2vec(tmp_path / "model", embeddings=ROWS)
    write_tokenizer(tmp_path / "model", normalize=True)
    qembag.quantize(ROWS, 8).save(tmp_path / "small.safetensors")
    embedder = TextEmbedder.load(tmp_path / "model", table=qembag.open_table(tmp_path / "small.safetensors"))
    embedder.save(tmp_path / "small")
    loaded = TextEmbedder.load(tmp_path / "small")
    assert same(loaded(MANY), embedder(MANY))
    exact = TextEmbedder.load(tmp_path / "model")(MANY)
    np.testing.assert_allclose(loaded(MANY), exact, atol=0.02)


def test_another_table_in_a_models_folder_is_not_the_models(tmp_path):
    write_model2vec(tmp_path, embeddings=ROWS)
    write_tokenizer(tmp_path, normalize=False)
    qembag.quantize(ROWS, 2).save(tmp_path / "table.safetensors")
    assert same(TextEmbedder.load(tmp_path)(MANY), oracle(ROWS, words(), MANY, unknown=0))


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
@pytest.mark.parametrize("place", ["", "0_StaticEmbedding"])
def test_a_snapshot_in_the_cache_of_hugging_face(tmp_path, place):
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    blobs.mkdir()
    write_sentence_transformers(snapshot, ROWS, place)
    write_tokenizer(snapshot / place)
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert same(TextEmbedder.load(snapshot)(MANY), oracle(ROWS, words(), MANY, normalize=True))


# ---- Damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", "", "tokenizer.json: is no tokenizer: "),
        ("tokenizer.json", "{}", "tokenizer.json: is no tokenizer: "),
        ("tokenizer.json", "[" * 100_000, "tokenizer.json: is no tokenizer: "),
        ("config.json", "", "config.json: is not JSON"),
        ("config.json", "[]", "config.json: must be an object"),
        ("config.json", '{"max_length": 0}', "config.json: max_length must be a number from 1 on or null, got 0"),
        ("config.json", '{"max_length": true}', "config.json: max_length must be a number"),
        ("config.json", '{"max_length": 1e3}', "config.json: max_length must be a number"),
        ("config.json", '{"normalize": "no"}', "config.json: normalize must be true or false, got 'no'"),
        ("config.json", "[" + "0," * 600_000 + "0]", "config.json: is longer than 1048576 bytes"),
        ("modules.json", "{}", "modules.json: must be a list"),
    ],
)
def test_a_damaged_model_is_refused(tmp_path, name, text, message):
    write_model2vec(tmp_path, embeddings=ROWS)
    write_tokenizer(tmp_path, normalize=True)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        TextEmbedder.load(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: ")
    assert len(str(raised.value)) < 1000


def test_a_long_tokenizer_is_not_read(tmp_path, monkeypatch):
    write_model2vec(tmp_path, embeddings=ROWS)
    write_tokenizer(tmp_path, normalize=True)
    monkeypatch.setattr(tokenizer, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match=r"tokenizer\.json: is longer than 100 bytes"):
        TextEmbedder.load(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_tokenizer_that_makes_tokenizers_panic_is_refused(tmp_path, capfd):
    damaged = json.loads(words().to_str())
    damaged["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match=r"^tokenizer\.json: is no tokenizer: "):
        tokenizer.read(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("modules", "config", "message"),
    [
        (["StaticEmbedding", "Dense"], {}, r"modules\.json: must name a StaticEmbedding, and a Normalize"),
        (["StaticEmbedding", "Normalize", "Normalize"], {}, r"modules\.json: must name a StaticEmbedding, and"),
        (["Normalize", "StaticEmbedding"], {}, r"modules\.json: must name a StaticEmbedding, and a Normalize"),
        (["StaticEmbedding"], {"default_prompt_name": "query"}, "without default_prompt_name"),
        (["StaticEmbedding"], {"truncate_dim": 16}, "without truncate_dim"),
        (["StaticEmbedding"], [], "must be an object"),
    ],
)
def test_parts_of_a_model_that_are_not_known_are_refused(tmp_path, modules, config, message):
    write_sentence_transformers(tmp_path, ROWS, "")
    write_tokenizer(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"a.{kind}", "path": ""} for kind in modules]))
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        TextEmbedder.load(tmp_path)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    write_model2vec(tmp_path, embeddings=ROWS)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        TextEmbedder.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        TextEmbedder.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must be the folder of a model, or the weights of WordLlama"):
        TextEmbedder.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("options", ["", "[]", '{"mode": "mean", "more": 1}', "{"])
def test_a_saved_table_without_our_options_is_refused(tmp_path, options):
    write_tokenizer(tmp_path)
    qembag.FloatTable(ROWS).save(tmp_path / "table.safetensors", metadata={"text_embedder": options})
    with pytest.raises(ValueError, match=r"table\.safetensors: must hold a table and options that TextEmbedder\.save"):
        TextEmbedder.load(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege")
def test_links_out_of_the_folder_are_not_followed(tmp_path):
    write_model2vec(tmp_path / "model", embeddings=ROWS)
    write_tokenizer(tmp_path, normalize=True)
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / "model" / name).unlink(missing_ok=True)
        (tmp_path / "model" / name).symlink_to(tmp_path / name)
        with pytest.raises(ValueError, match=r"must name files in its own folder, got .*, a link to"):
            TextEmbedder.load(tmp_path / "model")
        (tmp_path / "model" / name).unlink()
        (tmp_path / "model" / name).write_text((tmp_path / name).read_text())


# ---- The libraries themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [words, pieces])
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("parts", ["", "weights", "mapping", "mapping and weights"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("max_length", [None, 3, 512])
def test_model2vecs_own_vectors(tmp_path, rng, made, kind, parts, normalize, max_length):
    model2vec = pytest.importorskip("model2vec")
    count = made().get_vocab_size()
    num_rows = 11 if "mapping" in parts else count
    values = rng.normal(size=(num_rows, 33)).astype(np.float32)
    vectors = rng.integers(-127, 128, values.shape).astype(np.int8) if kind == "int8" else values.astype(kind)
    weights = rng.uniform(0.1, 3, count).astype(np.float32) if "weights" in parts else None
    mapping = rng.integers(0, num_rows, count).astype(np.int32) if "mapping" in parts else None
    options = {"normalize": normalize, "max_length": max_length}
    model = model2vec.StaticModel(vectors, made(), weights=weights, token_mapping=mapping, **options)
    model.save_pretrained(tmp_path)
    embedder = TextEmbedder.load(tmp_path)
    expected, found = model.encode(MANY), embedder(MANY)
    if kind == "float16" and normalize:
        # model2vec rounds to float16 before it divides by the norm, and once more.
        np.testing.assert_allclose(found, expected, atol=2e-3)
    else:
        assert same(found.astype(expected.dtype), expected)
        assert same(embedder(MANY[3]).astype(expected.dtype), model.encode(MANY[3]))


@pytest.mark.torch
@pytest.mark.parametrize("made", [words, pieces])
def test_sentence_transformers_own_vectors(tmp_path, rng, made):
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    values = rng.normal(size=(made().get_vocab_size(), 33)).astype(np.float32)
    cut = made()
    cut.enable_truncation(4)
    model = SentenceTransformer(modules=[StaticEmbedding(cut, embedding_weights=values)], device="cpu")
    model.save_pretrained(str(tmp_path))
    assert same(TextEmbedder.load(tmp_path)(MANY), model.encode(MANY))
    # torch adds squares in an order of its own, which depends on the processor.
    found, expected = TextEmbedder.load(tmp_path, normalize=True)(MANY), model.encode(MANY, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("norm", [True, False])
def test_wordllamas_own_vectors(tmp_path, norm):
    wordllama = pytest.importorskip("wordllama")
    rows = ROWS[:15].astype(np.float16)  # tokens beyond them are clipped
    path = tmp_path / "l2_supercat_33.safetensors"
    path.write_bytes(safetensors({"embedding.weight": rows}))
    write_tokenizer(tmp_path)
    model = wordllama.WordLlamaInference(rows, words())
    texts = [text for text in MANY if text or not norm]
    assert same(TextEmbedder.load(path, normalize=norm)(texts), model.embed(texts, norm=norm))
