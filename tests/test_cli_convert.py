"""`qembag convert`, and other commands on files of other libraries."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment
from qembag import cli
from qembag.cli import contents
from qembag.interop import foreign, load, to_file
from support.commands import float_rows
from support.large_torch_files import Sparse
from support.static_text import safetensors, write_model2vec, write_sentence_transformers
from support.torch_files import File, ordered, values_of_every_kind, view

CODES = np.arange(12, dtype=np.uint8).reshape(3, 4)
# What these kinds do not say themselves.
UNSAID = {"TorchRec": {"dims": 8, "bits": 8}, "TorchRec, 4 bits": {"dims": 20}}
# Its groups of 4 are none of ours.
KINDS = [kind for kind in values_of_every_kind(File()) if kind != "torchao"]

# More rows than fit in memory or on a disk, as far as NumPy can count their bytes.
MANY = sys.maxsize >> 9


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target.safetensors"


@pytest.fixture(params=[1, 1 << 22])
def at_once(request, monkeypatch):
    """Blocks of one row, and of all."""
    monkeypatch.setattr(foreign, "AT_ONCE", request.param)


@pytest.fixture
def torchrec(tmp_path):
    """Two tables whose dim the file does not say, and one of floats."""
    file = File()
    rows = np.tile(np.array([0, 60, 0, 0, *range(28)], np.uint8), (5, 1))  # a scale of 1, a bias of 0
    tables = {f"embedding_bags.t{number}.weight": file.tensor(rows[: 3 + number]) for number in (1, 2)}
    path = tmp_path / "torchrec.pt"
    path.write_bytes(file.saved(ordered({**tables, "over.weight": file.tensor(float_rows(6, 4))})))
    return path


@pytest.fixture
def ao(tmp_path):
    """A quantized table whose scales lie apart, and floats."""
    file = File()
    codes = file.qtensor(CODES, "QUInt8", np.float32([0.5, 1, 2]), np.float32([0, 1, 2]), 4)
    path = tmp_path / "ao.pt"
    path.write_bytes(
        file.saved(ordered({"emb._packed_params._packed_weight": codes, "other.weight": file.tensor(float_rows(6, 4))}))
    )
    return path


def saved(path, value, **options):
    file = File(**options)
    path.write_bytes(file.saved(value(file)))
    return path


def options_of(unsaid):
    return [part for name, value in unsaid.items() for part in (f"--{name}", value)]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, table in expected.items():
        other = found[name]
        assert type(other) is type(table)
        assert other.shape == table.shape
        if isinstance(table, qembag.QuantizedTable):
            assert other.layout == table.layout
        assert other.data.tobytes() == table.data.tobytes()
        for part in ("compressed_indices_mapping", "row_weights"):
            ours, theirs = getattr(other, part), getattr(table, part)
            assert (ours is None) == (theirs is None)
            assert ours is None or ours.tobytes() == theirs.tobytes()


# ---- What is converted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_torch_are_those_that_load_tables_has(command, tmp_path, target, kind, at_once):
    path = saved(tmp_path / "model.pt", lambda file: values_of_every_kind(file)[kind])
    unsaid = UNSAID.get(kind, {})
    expected = qembag.load_tables(path, **unsaid)
    printed = command("convert", path, target, *options_of(unsaid))
    assert printed.startswith(f"Converted {len(expected)} table")
    assert " from torch: " in printed
    assert_same(qembag.open_tables(target), expected)


@pytest.mark.parametrize("big_endian", [False, True])
def test_a_checkpoint_of_either_byte_order(command, tmp_path, target, big_endian, at_once):
    def value(file):
        kinds = values_of_every_kind(file)
        return {"models": [kinds["floats"], kinds["halves"], kinds["torch.ao, 8 bits"]]}

    path = saved(tmp_path / "model.pt", value, big_endian=big_endian)
    command("convert", path, target)
    tables = qembag.open_tables(target)
    assert sorted(tables) == ["models.0.emb", "models.1.emb", "models.2.emb"]
    assert_same(tables, qembag.load_tables(path))
    weights = np.random.default_rng(20261127).normal(size=(6, 8)).astype(np.float32)
    assert np.array_equal(tables["models.0.emb"].data, weights)


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32, np.float64])
def test_a_folder_of_model2vec_keeps_its_mapping_and_weights(command, tmp_path, target, dtype, at_once):
    rows = (float_rows(5, 6) * 20).astype(dtype)
    mapping, weights = np.int32([4, 0, 0, 3, 2, 1, 4]), np.linspace(0, 1, 7, dtype=np.float32)
    write_model2vec(tmp_path / "model", embeddings=rows, mapping=mapping, weights=weights)
    assert " from model2vec: " in command("convert", tmp_path / "model", target)
    tables = qembag.open_tables(target)
    assert_same(tables, qembag.load_tables(tmp_path / "model"))
    assert np.array_equal(tables["embeddings"].dequantize(), rows.astype(np.float32)[mapping])
    assert tables["embeddings"].row_weights.tolist() == weights.tolist()


def test_a_folder_of_sentence_transformers(command, tmp_path, target):
    write_sentence_transformers(tmp_path / "model", float_rows(), "0_StaticEmbedding")
    assert " from sentence-transformers: " in command("convert", tmp_path / "model", target)
    assert np.array_equal(qembag.open_table(target).data, float_rows())


def test_files_of_ours_are_copied_with_their_metadata(command, tmp_path, target):
    source = tmp_path / "ours.safetensors"
    padded = qembag.quantize(float_rows(), 4, row_alignment=64)
    tables = {"padded": padded, "pruned": padded.prune([3, 4]), "halves": float_rows().astype(np.float16)}
    qembag.save_tables(source, tables, metadata={"made by": "a test"})
    assert command("convert", source, target).startswith("Converted 3 tables from qembag: ")
    assert target.read_bytes() == source.read_bytes()


def test_an_array(command, tmp_path, target):
    np.save(tmp_path / "words.npy", float_rows())
    command("convert", tmp_path / "words.npy", target)
    assert np.array_equal(qembag.open_table(target, "words").data, float_rows())


def test_an_index_as_target(command, ao, tmp_path):
    command("convert", ao, tmp_path / "model.safetensors.index.json")
    assert_same(qembag.open_tables(tmp_path / "model.safetensors.index.json"), qembag.load_tables(ao))


@pytest.mark.parametrize("name", ["embedding_bags.t1", "t1"])
def test_one_table_needs_only_its_own_dim(command, torchrec, target, name):
    command("convert", torchrec, target, "--table", name, "--dims", f"{name}=20", "--bits", 8)
    tables = qembag.open_tables(target)
    assert list(tables) == ["embedding_bags.t1"]
    assert np.array_equal(tables["embedding_bags.t1"][:], np.tile(np.arange(20, dtype=np.float32), (4, 1)))


@pytest.mark.parametrize("dims", [["t1=20,t2=24"], ["t1=20", "--dims", "embedding_bags.t2=24"]])
def test_dims_by_name(command, torchrec, target, dims):
    command("convert", torchrec, target, "--dims", *dims, "--bits", 8)
    assert {name: table.dim for name, table in qembag.open_tables(target).items()} == {
        "embedding_bags.t1": 20,
        "embedding_bags.t2": 24,
        "over": 4,
    }


def test_progress_counts_rows_and_bytes(command, ao, target, monkeypatch):
    reports = []
    monkeypatch.setattr(foreign, "AT_ONCE", 24)
    monkeypatch.setattr(cli.output, "PATIENCE", 0)
    monkeypatch.setattr(cli.output, "progress_line", lambda *given: str(reports.append(given[:3])))
    monkeypatch.setattr(cli.output, "PAUSE", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert cli.main(["convert", str(ao), str(target)]) == 0
    # Floats come first in the file, two rows at a time here; then codes with their pairs.
    assert reports == [
        (1, 9, 16),
        (2, 9, 32),
        (3, 9, 48),
        (4, 9, 64),
        (5, 9, 80),
        (6, 9, 96),
        (8, 9, 96 + 2 * 12),
        (9, 9, 96 + 3 * 12),
    ]


# ---- What is refused -------------------------------------------------------------------------------------------------


def test_tables_that_need_dims_are_named_with_what_to_give(command, torchrec, target):
    error = command.fails("convert", torchrec, target)
    assert error.startswith(f"{torchrec}: table 'embedding_bags.t1' has rows of 32 bytes")
    assert error.endswith("such as dims={'t1': 28, 't2': 28}, bits={'t1': 8, 't2': 8}")
    assert not target.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dims", "t"], "argument --dims: must be a whole number, or NAME=N,..., got 't'"),
        (["--dims", "=4"], "argument --dims: must be a whole number, or NAME=N,..., got '=4'"),
        (["--dims", "a="], "argument --dims: must be a whole number, or NAME=N,..., got 'a='"),
        (["--bits", "a=8,b"], "argument --bits: must be a whole number, or NAME=N,..., got 'a=8,b'"),
        (["--bits", "1" * 5000], "argument --bits: must be a whole number"),
        (["--bits", "8", "--bits", "a=4"], "--bits must have one number for all tables, or one for each name"),
        (["--dims", "a=4,a=4"], "--dims must have one number for all tables, or one for each name"),
        (["--format", "onnx"], "argument --format: invalid choice: 'onnx'"),
    ],
)
def test_options_that_are_wrong(command, ao, target, options, words):
    assert command.refuses("convert", ao, target, *options).startswith(words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dims", "0"], "dims must be 1 or more, got 0"),
        (["--bits", "3"], "bits must be 8, 4, 2, 16 or 32, got 3"),
        (["--table", "embed"], "names must name tables of "),
        (["--dims", "embed=4"], "dims must name tables of "),
        (["--format", "gguf"], "format must be what the file is, torch, got gguf"),
    ],
)
def test_options_that_do_not_fit_the_file(command, ao, target, options, words):
    assert command.fails("convert", ao, target, *options).startswith(f"{ao}: {words}")
    assert not target.exists()


def test_an_existing_target_stays_without_force(command, ao, target):
    target.write_text("old")
    assert "exists already; --force replaces it" in command.fails("convert", ao, target)
    assert target.read_text() == "old"
    command("convert", ao, target, "--force")
    assert_same(qembag.open_tables(target), qembag.load_tables(ao))


@pytest.mark.parametrize("name", ["target.pt", "target.npy", "target", "target.gguf"])
def test_a_target_of_another_suffix_is_refused(command, ao, tmp_path, name):
    words = f"TARGET must be a .safetensors file or an .index.json, got {tmp_path / name}"
    assert command.refuses("convert", ao, tmp_path / name) == words


def test_the_source_is_not_its_own_target(command, tmp_path):
    source, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    qembag.save_tables(source, float_rows())
    link.symlink_to(source)
    for target in (source, link):
        assert "is SOURCE itself" in command.fails("convert", source, target, "--force")


@pytest.mark.parametrize("name", ["", "__metadata__", "\ud800"])
def test_names_that_our_files_cannot_have(target, name):
    found = load.Found("torch", {name: foreign.Foreign.as_it_is(name, float_rows())}, {}, None)
    with pytest.raises(ValueError, match=r"^tables must"):
        to_file.save_found(found, target, lambda *_: None)
    assert not target.exists()


def test_names_that_would_collide(command, tmp_path, target):
    path = saved(
        tmp_path / "a.pt",
        lambda file: {"a": file.tensor(float_rows(3, 4)), "a.row_weights": file.tensor(float_rows(3, 4))},
    )
    assert "must not have names that collide: 'a' and 'a.row_weights'" in command.fails("convert", path, target)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_rows_that_overlap_in_the_file_are_not_blown_up(command, tmp_path, target):
    path = saved(tmp_path / "a.pt", lambda file: {"a": view(file.storage(np.zeros(64, "f4")), (MANY, 64), (0, 1))})
    error = command.fails("convert", path, target)
    assert error.startswith(f"{path}: table 'a'")
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"")])
def test_sources_that_are_no_files_of_tables(command, tmp_path, target, make):
    source = tmp_path / "source"
    make(source)
    assert command.fails("convert", source, target).startswith(f"{source}: ")
    assert not target.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_refused_at_once(command, tmp_path, target):
    os.mkfifo(tmp_path / "pipe.pt")
    assert command.fails("convert", tmp_path / "pipe.pt", target).endswith("must be a regular file or a folder")


# ---- Interruptions ---------------------------------------------------------------------------------------------------

DYING = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
from qembag import cli
from qembag.interop import foreign, load, to_file

foreign.AT_ONCE = 24
rows, count = foreign.Foreign.rows, [0]

def dying(table, *given):
    count[0] += 1
    if count[0] == {at}:
        {how}
    return rows(table, *given)

foreign.Foreign.rows = dying
sys.exit(cli.main(["convert", *sys.argv[1:], "--force"]))
"""


def dying(at, how, *arguments):
    script = DYING.format(at=at, how=how)
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
@pytest.mark.parametrize("at", [1, 4, 8])
def test_the_old_target_outlives_a_kill(ao, target, at):
    target.write_text("old")
    assert dying(at, "os.kill(os.getpid(), signal.SIGKILL)", ao, target).returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_an_interruption_leaves_nothing_behind(ao, target, tmp_path):
    target.write_text("old")
    done = dying(8, "signal.raise_signal(signal.SIGINT)", ao, target)
    assert (done.returncode, done.stderr) == (1, "qembag convert: interrupted\n")
    assert target.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["ao.pt", "target.safetensors"]


def test_a_full_disk_is_the_targets_fault(ao, target, tmp_path):
    done = dying(4, f"raise OSError({errno.ENOSPC}, 'No space left on device')", ao, target)
    assert (done.returncode, done.stderr) == (1, f"qembag convert: error: {target}: No space left on device\n")
    assert os.listdir(tmp_path) == ["ao.pt"]


# ---- Memory ----------------------------------------------------------------------------------------------------------

# Not getrusage, which also counts what the process was before it became this program.
MEASURED = """
import sys
from qembag import cli

status = cli.main(sys.argv[1:])
with open("/proc/self/status") as file:
    print(status, file.read().split("VmHWM:")[1].split()[0], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.skipif(UNDER_SANITIZER, reason="the sanitizer has memory of its own")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a measure of Linux")
@pytest.mark.parametrize("job", ["convert", "header"])
def test_large_files_are_streamed(tmp_path, target, job):
    """400 MB of codes and scales that lie apart, and as many of TorchRec's rows."""
    file, path = Sparse(), tmp_path / "large.pt"
    tables = {
        "emb._packed_params._packed_weight": file.quantized("QUInt8", (6_000_000, 64)),
        "embedding_bags.t1.weight": file.zeros("Byte", 1, (5_000_000, 80)),
    }
    file.write(path, ordered(tables))
    arguments = {"convert": ["convert", path, target], "header": ["inspect", path, "--header"]}[job]
    command = [sys.executable, "-c", MEASURED, *map(str, arguments), "--dims", "t1=64", "--bits", "8"]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300, check=False)
    status, kilobytes = done.stderr.split()
    assert status == "0"
    assert int(kilobytes) < {"convert": 150_000, "header": 100_000}[job]
    if job == "convert":
        tables = qembag.open_tables(target)
        assert tables["emb"].shape == (6_000_000, 64)
        assert not tables["embedding_bags.t1"][-1].any()


# ---- Other commands --------------------------------------------------------------------------------------------------


def test_inspect_shows_the_format_and_the_tables(command, ao, monkeypatch, at_once):
    printed = command("inspect", ao)
    assert printed.startswith(f"{ao} (torch): 2 tables, 132 B\n")
    whole = json.loads(command("inspect", ao, "--json"))
    assert (whole["format"], whole["refused"]) == ("torch", {})
    codes = whole["tables"]["emb"]
    assert codes["type"] == "8-bit"
    assert codes["scales"] == {"min": 0.5, "median": 1.0, "max": 2.0, "zero": 0.0, "negative": 0.0}
    assert codes["range"] == {"median": 3.0, "max": 6.0}
    assert whole["tables"]["other"]["dim"] == 4
    header = json.loads(command("inspect", ao, "--json", "--header"))
    assert header["tables"]["emb"].keys() <= codes.keys()


def test_inspect_finds_suspicious_rows_of_repacked_tables(command, tmp_path, at_once):
    scales = np.float32([1, 0, 1, 1])
    codes = np.array([[1, 2], [3, 4], [7, 7], [5, 6]], np.uint8)
    path = saved(
        tmp_path / "a.pt",
        lambda file: {
            "e._packed_params._packed_weight": file.qtensor(codes, "QUInt8", scales, np.zeros(4, np.float32), 2)
        },
    )
    found = json.loads(command("inspect", path, "--json"))["tables"]["e"]["suspicious"]
    assert found["scale_zero"] == {"rows": 1, "first": [1]}
    assert found["constant"] == {"rows": 1, "first": [2]}


def test_rows_without_number_that_share_bytes_are_named_and_not_gone_over(command, tmp_path):
    """2**40 rows of a file of a kilobyte: hours for inspect, and a full disk for dequantize."""
    path = saved(
        tmp_path / "model.pt",
        lambda file: {
            "wide.weight": view(file.storage(np.ones(4, np.float32)), (MANY, 4), (0, 1)),
            "emb.weight": file.tensor(float_rows(6, 4)),
        },
    )
    assert list(qembag.load_tables(path)) == ["wide", "emb"]
    printed = command("inspect", path)
    assert "tables that cannot be read\n  wide its rows overlap in the file, and can only be mapped" in printed
    assert "\nemb  " in printed
    why = json.loads(command("inspect", path, "--json"))["refused"]
    assert why == {"wide": "its rows overlap in the file, and can only be mapped"}
    for arguments in (["dequantize", path, tmp_path / "floats.safetensors"], ["lookup", path, "--table", "wide"]):
        assert "table 'wide': its rows overlap" in command.fails(*arguments)
    command("dequantize", path, tmp_path / "floats.npy", "--table", "emb")


@pytest.mark.parametrize("job", [["inspect"], ["convert", "target.safetensors"], ["dequantize", "target.npy"]])
def test_rows_without_number_that_must_be_repacked_are_refused(command, tmp_path, job):
    """Codes, scales and zero points of one row, expanded to 2**40."""
    rows = MANY

    def value(file):
        codes = file.qtensor(CODES, "QUInt8", np.float32([1, 1, 1]), np.float32([0, 0, 0]), 4)
        storage, offset, _, _, (scheme, scales, zeros, axis), *rest = codes.arguments
        shared = [view(tensor.arguments[0], (rows,), (0,)) for tensor in (scales, zeros)]
        place = (storage, offset, (rows, 4), (0, 1), (scheme, *shared, axis))
        return {"emb._packed_params._packed_weight": codes._replace(arguments=(*place, *rest))}

    path = saved(tmp_path / "model.pt", value)
    why = f"must have rows apart in the file, got {rows} rows in {path.stat().st_size} bytes"
    if job == ["inspect"]:
        assert why in command("inspect", path)
        return
    assert why in command.fails(job[0], path, *(tmp_path / name for name in job[1:]))


def test_inspect_of_a_table_with_a_mapping(command, tmp_path):
    rows = np.int8([[1, 2], [5, 5]])
    write_model2vec(tmp_path / "model", embeddings=rows, mapping=np.int32([1, 0, 1]))
    entry = json.loads(command("inspect", tmp_path / "model", "--json"))["tables"]["embeddings"]
    assert (entry["num_embeddings"], entry["num_rows"]) == (3, 2)
    assert entry["suspicious"]["constant"] == {"rows": 2, "first": [0, 2]}


def test_inspect_says_what_to_give(command, torchrec):
    printed = command("inspect", torchrec, "--header")
    assert printed.startswith(f"{torchrec} (torch): 1 table, 96 B\n")
    for name in ("embedding_bags.t1", "embedding_bags.t2"):
        assert f"\n  {name} has rows of 32 bytes, padded to a multiple of 16: a dim of 13 to 28 at 8 bits" in printed
    hint = "such as dims={'t1': 28, 't2': 28}, bits={'t1': 8, 't2': 8} (here: --dims, --bits)\n"
    assert printed.endswith(hint)
    refused = json.loads(command("inspect", torchrec, "--json"))["refused"]
    assert list(refused) == ["embedding_bags.t1", "embedding_bags.t2"]
    whole = json.loads(command("inspect", torchrec, "--json", "--dims", "t1=20,t2=24", "--bits", 8))
    assert whole["refused"] == {}
    assert [table["dim"] for table in whole["tables"].values()] == [20, 24, 4]


def test_a_damaged_file_of_ours_is_told_as_such(command, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors({"embedding.weight": float_rows()})[:-1])
    assert command.fails("inspect", path).startswith(f"{path}: ")


def test_a_table_of_ours_keeps_a_name_that_others_use(command, tmp_path):
    path = tmp_path / "a.safetensors"
    qembag.save_tables(path, {"embedding.weight": float_rows()})
    assert list(json.loads(command("inspect", path, "--json"))["tables"]) == ["embedding.weight"]
    assert list(qembag.load_tables(path)) == ["embedding.weight"]


@pytest.fixture
def rows_1_and_2(tmp_path):
    np.save(tmp_path / "rows.npy", [1, 2])
    return ["--indices", tmp_path / "rows.npy"]


def test_lookup_takes_files_of_others(command, ao, torchrec, rows_1_and_2):
    assert command("lookup", ao, "--table", "emb", *rows_1_and_2) == "3.0 4.0 5.0 6.0\n12.0 14.0 16.0 18.0\n"
    printed = command("lookup", torchrec, "--table", "over", *rows_1_and_2)
    assert np.array_equal(np.loadtxt(printed.splitlines(), np.float32), float_rows(6, 4)[1:3])


def test_lookup_names_convert_where_dims_are_missing(command, torchrec):
    error = command.fails("lookup", torchrec, "--table", "t1")
    assert error.endswith("; `qembag convert` takes --dims and --bits")


def test_dequantize_and_prune_take_files_of_others(command, ao, tmp_path, target):
    command("dequantize", ao, tmp_path / "a.npy", "--table", "emb")
    expected = qembag.load_tables(ao)["emb"].dequantize()
    assert np.array_equal(np.load(tmp_path / "a.npy"), expected)
    command("dequantize", ao, target)
    assert np.array_equal(qembag.open_table(target, "emb").data, expected)
    command("prune", ao, target, "--table", "emb", "--max-rows", 2, "--force")
    tables = qembag.open_tables(target)
    assert (tables["emb"].num_rows, tables["other"].num_rows) == (2, 6)


@pytest.mark.parametrize("job", [["prune", "--max-rows", 2], ["dequantize"]])
def test_another_librarys_file_is_not_replaced(command, tmp_path, job):
    write_model2vec(tmp_path, embeddings=np.int8([[1, 2], [5, 5], [3, 4]]), weights=np.ones(3, np.float32))
    path = tmp_path / "model.safetensors"
    before = path.read_bytes()
    assert "is another library's file" in command.fails(job[0], path, path, "--force", *job[1:])
    assert path.read_bytes() == before


@pytest.mark.parametrize("job", [["compare"], ["demo", "--table"], ["quantize"]])
def test_commands_that_take_floats_only_name_convert(command, ao, tmp_path, job):
    more = [tmp_path / "out.safetensors"] if job == ["quantize"] else []
    assert command.fails(*job, ao, *more).endswith(f"got {ao} (see `qembag convert`)")


def test_samples_are_of_all_rows_or_of_runs_of_them():
    assert contents.spaced(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert contents.spaced(0, 9).tolist() == []
    assert contents.spaced(1000, 5).tolist() == [0, 249, 499, 749, 999]
    some = contents.spaced(10**9, 6400)
    assert (len(some), some[0], some[-1]) == (6400, 0, 10**9 - 1)
    assert np.count_nonzero(np.diff(some) > 1) == contents.NUM_RUNS - 1


def test_a_short_path_is_named_in_errors(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_sentence_transformers(tmp_path / "m", float_rows(), "..")
    assert command.fails("inspect", "m") == "m: must name files in its own folder, got '../model.safetensors'"


def test_safetensors_of_another_suffix(command, tmp_path):
    qembag.save_tables(tmp_path / "a.bin", {"t": qembag.quantize(float_rows(), 4)})
    assert "\nt      4-bit" in command("inspect", tmp_path / "a.bin", "--header")
    assert command.fails("lookup", tmp_path / "a.bin", "--table", "u").endswith("must be one of 't', got 'u'")
