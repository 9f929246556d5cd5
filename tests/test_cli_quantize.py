"""`qembag quantize`, `dequantize` and `prune`."""

from __future__ import annotations

import numpy as np
import pytest

import qembag
from qembag import cli
from qembag.cli import contents
from support.commands import float_rows
from support.static_text import write_model2vec


@pytest.fixture
def source(tmp_path):
    np.save(tmp_path / "words.npy", float_rows())
    return tmp_path / "words.npy"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture
def tables(tmp_path):
    """A file of a table of each kind, one of them pruned."""
    rows = float_rows()
    path = tmp_path / "tables.safetensors"
    codes = qembag.quantize(rows, 4, group_size=16)
    given = {"codes": codes, "pruned": codes.prune(np.arange(100, 200)), "floats": rows[:50].astype(np.float16)}
    qembag.save_tables(path, given, metadata={"from": "a test"})
    return path


def save_tensors(path, tensors):
    pytest.importorskip("safetensors.numpy").save_file(tensors, path)
    return path


# ---- quantize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ([], {"bits": 4, "method": "lsq"}),
        (["--bits", 8, "--method", "minmax"], {"bits": 8, "method": "minmax"}),
        (["--bits", 2, "--method", "greedy"], {"bits": 2, "method": "greedy"}),
        (["--group-size", 16, "--threads", 2], {"bits": 4, "method": "lsq", "group_size": 16}),
        (["--scale-dtype", "float32", "--scale-first"], {"scale_dtype": "float32", "scale_first": True}),
        (["--row-alignment", 64], {"row_alignment": 64}),
    ],
)
def test_options_are_those_of_the_function(command, source, target, tmp_path, options, arguments):
    assert command("quantize", source, target, *options) == ""
    expected = qembag.quantize(float_rows(), **({"bits": 4, "method": "lsq"} | arguments))
    expected.save(tmp_path / "expected.safetensors")
    assert target.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_names_metadata_and_importance(command, source, target, tmp_path):
    importance = np.arange(1, 33, dtype=np.float32)
    np.save(tmp_path / "importance.npy", importance)
    more = ["--importance", tmp_path / "importance.npy", "--metadata", "a=b=c", "--metadata", "d="]
    command("quantize", source, target, "--name", "words", *more)
    opened = qembag.open_tables(target)
    assert opened.metadata == {"a": "b=c", "d": ""}
    expected = qembag.quantize(float_rows(), 4, method="lsq", importance=importance)
    assert np.array_equal(opened["words"].data, expected.data)


def test_tensors_by_name_pattern_and_all(command, target, tmp_path):
    rows = float_rows()
    tensors = {"a.embed": rows, "b.embed": rows[:9].astype(float), "c.head": rows[:5], "ids": np.arange(4)}
    path = save_tensors(tmp_path / "model.safetensors", tensors)
    assert "'a.embed', 'b.embed', 'c.head'" in command.fails("quantize", path, target)
    assert not target.exists()
    for options, names in (
        (["--tensor", "*.embed"], {"a.embed", "b.embed"}),
        (["--tensor", "a.*", "--tensor", "c.head"], {"a.embed", "c.head"}),
        (["--all"], {"a.embed", "b.embed", "c.head"}),
    ):
        command("quantize", path, target, *options, "--force")
        opened = qembag.open_tables(target)
        assert opened.keys() == names
        assert opened["a.embed"].shape == rows.shape
    assert "'x'" in command.fails("quantize", path, target, "--tensor", "x", "--force")
    assert "not allowed with argument" in command.refuses("quantize", path, target, "--all", "--tensor", "x")


def test_what_belongs_to_the_rows_of_a_model_is_not_lost(command, target, tmp_path):
    rows, mapping = float_rows(5), np.array([1, 1, 4], np.int32)
    write_model2vec(tmp_path / "model", embeddings=rows, mapping=mapping, weights=np.ones(3, np.float32))
    model = tmp_path / "model" / "model.safetensors"
    said = command.fails("quantize", model, target, "--bits", 4, "-q")
    assert said.startswith(f"{model}: is a model2vec file, whose mapping or weights would be lost")
    command("convert", tmp_path / "model", tmp_path / "mine.safetensors", "-q")
    command("quantize", tmp_path / "mine.safetensors", target, "--bits", 4, "--method", "minmax", "-q")
    table = qembag.open_table(target)
    assert table.row_weights.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(table[:], qembag.quantize(rows, 4)[mapping])


def test_what_is_there_is_replaced_by_force_only(command, source, target):
    target.write_text("mine")
    assert command.fails("quantize", source, target) == f"{target}: exists already; --force replaces it"
    assert target.read_text() == "mine"
    assert command("quantize", source, target, "--force", "--quiet") == ""
    assert qembag.open_table(target).shape == (300, 32)


def test_an_interrupted_run_goes_on(command, source, target, capsys, monkeypatch):
    from contextlib import contextmanager

    from qembag import cli
    from qembag.cli import quantize
    from qembag.formats import sources

    @contextmanager
    def interrupting(quiet):
        def interrupt(rows, total, nbytes):
            raise KeyboardInterrupt

        yield interrupt

    monkeypatch.setattr(sources, "BLOCK_BYTES", 5000)
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "progress", interrupting)
        assert cli.main(["quantize", str(source), str(target)]) == 1
    assert capsys.readouterr() == ("", "qembag quantize: interrupted: --resume goes on from here\n")
    part = target.with_name(f"{target.name}.part")
    assert part.exists()
    message = command.fails("quantize", source, target, "--resume", "--bits", 2)
    assert message.startswith(str(part)) or "resume" in message
    assert command("quantize", source, target, "--resume") == ""
    assert np.array_equal(qembag.open_table(target).data, qembag.quantize(float_rows(), 4, method="lsq").data)
    assert not part.exists()


def test_sources_that_cannot_be_quantized(command, target, tmp_path):
    path = tmp_path / "bad.npy"
    rows = float_rows()
    rows[200, 3] = np.nan
    for array, fault in (
        (rows, "[200] must be finite"),
        (np.arange(6).reshape(2, 3), "must hold float16, float32 or float64, got int64"),
        (np.zeros(3), "must have 2 dimensions"),
    ):
        np.save(path, array.astype("<i8") if array.dtype.kind == "i" else array)
        message = command.fails("quantize", path, target)
        assert message.startswith(f"{path}: ")
        assert fault in message
    assert [*tmp_path.iterdir()] == [path]
    for name, content in (("a.npy", b"PK"), ("a.safetensors", b"x" * 50), ("a.txt", b""), ("b.index.json", b"[]")):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in command.fails("quantize", tmp_path / name, target)
    assert command.fails("quantize", tmp_path / "no.npy", target) == f"{tmp_path / 'no.npy'}: No such file or directory"


def test_targets_that_cannot_be_written(command, source, tmp_path):
    assert "no/out.safetensors" in command.fails("quantize", source, tmp_path / "no/out.safetensors").replace("\\", "/")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in command.fails("quantize", source, tmp_path / "file" / "out.safetensors")
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert "exists already" in command.fails("quantize", source, folder)
    assert str(folder) in command.fails("quantize", source, folder, "--force")


def test_a_full_disk_is_the_targets_fault(command, source, target, monkeypatch):
    import os

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = command.fails("quantize", source, target)
    assert message.endswith("No space left on device")
    assert message.startswith(str(target))
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "3"], "argument --bits: invalid choice"),
        (["--group-size", "0"], "argument --group-size: must be a whole number of at least 1, got '0'"),
        (["--metadata", "a"], "argument --metadata: must be KEY=VALUE, got 'a'"),
        (["--metadata", "=a"], "argument --metadata: must be KEY=VALUE, got '=a'"),
        (["--method", "minmax", "--importance", "i.npy"], "--importance must come with --method lsq"),
        (["--resum"], "unrecognized arguments: --resum"),
    ],
)
def test_arguments_that_cannot_be(command, options, message):
    assert message in command.refuses("quantize", "a.npy", "b.safetensors", *options)


def test_options_that_the_table_refuses(command, source, target):
    assert "group_size must be" in command.fails("quantize", source, target, "--group-size", 7)
    assert "qembag." in command.fails("quantize", source, target, "--metadata", "qembag.version=2")


# ---- dequantize ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 1000, 8 << 20])
def at_once(request, monkeypatch):
    monkeypatch.setattr(contents, "AT_ONCE", request.param)


@pytest.mark.parametrize("name", ["codes", "pruned", "floats"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_table_to_npy(command, tables, tmp_path, at_once, name, dtype):
    out = tmp_path / "out.npy"
    assert command("dequantize", tables, out, "--table", name, "--dtype", dtype, "--quiet") == ""
    expected = qembag.open_table(tables, name).dequantize().astype(np.dtype(dtype).newbyteorder("<"))
    np.save(tmp_path / "expected.npy", expected)
    assert out.read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_all_tables_to_tensors(command, tables, target, at_once):
    assert command("dequantize", tables, target) == ""
    opened, given = qembag.open_tables(target), qembag.open_tables(tables)
    assert opened.keys() == given.keys()
    assert opened.metadata == {"from": "a test"}
    for name, table in opened.items():
        assert table.dtype == "float32"
        assert np.array_equal(table.data, given[name].dequantize())
    command("dequantize", tables, target, "--force", "--table", "codes", "--dtype", "float16")
    assert qembag.open_table(target).dtype == "float16"


def test_what_cannot_be_dequantized(command, tables, target, tmp_path):
    assert "--table must be one of 'codes', 'floats', 'pruned'" in command.fails(
        "dequantize", tables, tmp_path / "a.npy"
    )
    assert "got 'x'" in command.fails("dequantize", tables, target, "--table", "x")
    assert "TARGET must be" in command.refuses("dequantize", tables, tmp_path / "a.txt")
    target.write_text("mine")
    assert "exists already" in command.fails("dequantize", tables, target)
    large = tmp_path / "large.safetensors"
    qembag.quantize(np.array([[0, 1], [0, 1e6]], np.float32)).save(large)
    message = command.fails("dequantize", large, tmp_path / "a.npy", "--dtype", "float16")
    assert "beyond float16: row 1 of table 'table' has 1e+06" in message
    assert not (tmp_path / "a.npy").exists()
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 99)
    assert command.fails("dequantize", tmp_path / "bad.safetensors", target, "--force").startswith(str(tmp_path))
    assert target.read_text() == "mine"


# ---- prune -----------------------------------------------------------------------------------------------------------


def test_conditions_are_those_of_choose_rows(command, tables, target, tmp_path):
    counts = np.arange(300)
    np.save(tmp_path / "counts.npy", counts)
    table = qembag.open_table(tables, "codes")
    for options, conditions in (
        (["--min-norm", "5.5"], {"min_norm": 5.5}),
        (["--max-rows", "10"], {"max_rows": 10}),
        (["--max-bytes", "4000"], {"max_bytes": 4000}),
        (["--max-rows", "10", "--counts", tmp_path / "counts.npy"], {"max_rows": 10, "counts": counts}),
        (["--min-count", "200", "--counts", tmp_path / "counts.npy"], {"min_count": 200, "counts": counts}),
    ):
        printed = command("prune", tables, target, "--table", "codes", "--force", *options)
        choice = qembag.choose_rows(table, **conditions)
        assert printed == f"{choice}\n"
        opened = qembag.open_tables(target)
        assert np.array_equal(opened["codes"].data, table.prune(choice.keep).data)
        # The others, and the metadata, are as they were.
        assert np.array_equal(opened["floats"].data, qembag.open_table(tables, "floats").data)
        assert opened["pruned"].num_rows == 100
        assert opened.metadata == {"from": "a test"}


@pytest.mark.parametrize("keep", [np.arange(300) % 3 == 0, np.array([5, 7, 299])])
def test_rows_to_keep(command, tables, target, tmp_path, keep):
    np.save(tmp_path / "keep.npy", keep)
    printed = command("prune", tables, target, "--table", "codes", "--keep", tmp_path / "keep.npy")
    expected = qembag.open_table(tables, "codes").prune(keep)
    assert printed == f"Keeps {expected.num_rows} rows of 300.\n"
    assert np.array_equal(qembag.open_table(target, "codes").data, expected.data)


def test_a_file_is_pruned_onto_itself(command, tables):
    table = qembag.open_table(tables, "codes", mmap=False)
    command("prune", tables, tables, "--table", "codes", "--max-rows", 7, "--force")
    pruned = qembag.open_table(tables, "codes")
    assert pruned.num_rows == 7
    kept = np.flatnonzero(pruned.compressed_indices_mapping >= 0)
    assert np.array_equal(pruned[kept], table[kept])


def test_what_cannot_be_pruned(command, tables, target, tmp_path):
    base = ["prune", tables, target]
    assert "give either --keep" in command.refuses(*base)
    assert "give either --keep" in command.refuses(*base, "--keep", "k.npy", "--max-rows", 3)
    assert "--counts must come with" in command.refuses(*base, "--min-count", 3)
    assert "--counts must come with" in command.refuses(*base, "--keep", "k.npy", "--counts", "c.npy")
    assert "must be a number above 0" in command.refuses(*base, "--min-norm", "nan")
    assert "--table must be one of" in command.fails(*base, "--max-rows", 3)
    np.save(tmp_path / "wrong.npy", np.ones(7, bool))
    wrong = tmp_path / "wrong.npy"
    message = command.fails(*base, "--table", "codes", "--keep", wrong)
    assert message.startswith(f"{wrong}: keep must have shape (300,)")
    counts = command.fails(*base, "--table", "codes", "--max-rows", 3, "--counts", wrong)
    assert counts == f"{tables}: counts must be an array of integers, got a bool array of shape (7,)"
    assert "max_bytes must be at least 1200" in command.fails(*base, "--table", "codes", "--max-bytes", 9)
    target.write_text("mine")
    assert "exists already" in command.fails(*base, "--table", "codes", "--max-rows", 3)
    missing = tmp_path / "no.npy"
    options = ["--force", "--table", "codes", "--keep", missing]
    assert command.fails(*base, *options) == f"{missing}: No such file or directory"
    assert target.read_text() == "mine"


# ---- What would be lost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [["prune", "--max-rows", "10"], ["dequantize"]])
def test_tensors_that_are_no_tables_are_named_when_they_are_left_out(tmp_path, target, capsys, job):
    tensors = {"table": float_rows(), "ids": np.arange(6), "wide": float_rows().astype(np.float64)}
    source = save_tensors(tmp_path / "mixed.safetensors", tensors)
    assert cli.main([job[0], str(source), str(target), *job[1:]]) == 0
    expected = f"qembag {job[0]}: leaves out tensors that are no tables: 'ids', 'wide'\n"
    assert capsys.readouterr().err == expected
    assert list(qembag.open_tables(target)) == ["table"]


def test_pruning_in_place_loses_no_other_tensor(command, tmp_path):
    source = save_tensors(tmp_path / "mixed.safetensors", {"table": float_rows(), "ids": np.arange(6)})
    before = source.read_bytes()
    error = command.fails("prune", source, source, "--max-rows", "10", "--force")
    assert "has tensors that are no tables, and would lose them: 'ids'" in error
    assert source.read_bytes() == before


@pytest.mark.parametrize("job", [["quantize"], ["prune", "--max-rows", "10"]])
def test_a_target_of_another_suffix_is_refused(command, tmp_path, tables, job):
    assert "TARGET must be a .safetensors file" in command.refuses(job[0], tables, tmp_path / "out.npy", *job[1:])
    assert not (tmp_path / "out.npy").exists()
