"""Files that lie, arguments that are wrong, disks that are full, and processes that are killed."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
import save_and_die
from conftest import UNDER_SANITIZER, child_environment
from qembag import _arguments
from qembag.formats import replace, safetensors_file, table_file
from support.files import describing, rewritten, same_tables

WEIGHTS = np.random.default_rng(20261127).normal(size=(12, 32)).astype(np.float32)
CODES = qembag.quantize(WEIGHTS, 4, group_size=16)
MAPPING = ".compressed_indices_mapping"
FUZZ = Path(__file__).parents[1] / "fuzz"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tables.safetensors"


def entry_of(header: dict[str, Any], name: str, **changes: Any) -> None:
    header[name] |= changes


def setting(**changes: Any) -> Any:
    return describing(lambda tables: tables["a"].update(changes))


def renaming(old: str, new: str) -> Any:
    return lambda header: header.update({new: header.pop(old)})


# ---- Tables that are not as described --------------------------------------------------------------------------------

WRONG = {
    "newer version": (
        lambda header: header["__metadata__"].update({"qembag.version": "2"}),
        "qembag.version must be '1', got '2', a newer one: update qembag",
    ),
    "other version": (lambda header: header["__metadata__"].update({"qembag.version": "v1"}), "must be '1', got 'v1'"),
    "no version": (lambda header: header["__metadata__"].pop("qembag.version"), "must have both qembag.version and"),
    "no tables": (lambda header: header["__metadata__"].pop("qembag.tables"), "must have both qembag.version and"),
    "no JSON": (lambda header: header["__metadata__"].update({"qembag.tables": "{"}), "qembag.tables is not JSON"),
    "list": (lambda header: header["__metadata__"].update({"qembag.tables": "[]"}), "qembag.tables must be an object"),
    "deep": (lambda header: header["__metadata__"].update({"qembag.tables": "[" * 10**5}), "qembag.tables nests too"),
    "table twice": (
        lambda header: header["__metadata__"].update({"qembag.tables": '{"a":{},"a":{}}'}),
        "qembag.tables has the name 'a' twice",
    ),
    "key twice": (
        lambda header: header["__metadata__"].update({"qembag.tables": '{"a":{"bits":4,"bits":4}}'}),
        "qembag.tables has the name 'bits' twice",
    ),
    "no rows": (renaming("a.rows", "b.rows"), "table 'a' has no tensor 'a.rows'"),
    "a table more": (describing(lambda tables: tables.update(b=tables["a"])), "table 'b' has no tensor 'b.rows'"),
    "codes and floats": (renaming("f", "a"), "has two tables 'a', one of codes and one of floats"),
    "rows of I8": (lambda header: entry_of(header, "a.rows", dtype="I8"), "'a.rows' must be U8 of 2 dimensions, got I8"),
    "flat rows": (lambda header: entry_of(header, "a.rows", shape=[288]), "'a.rows' must be U8 of 2 dimensions, got U8"),
    "short rows": (lambda header: entry_of(header, "a.rows", shape=[24, 12]), "dim must be from 1 to"),
    "shorter rows": (lambda header: entry_of(header, "a.rows", shape=[72, 4]), "must have rows of at least 5 bytes"),
    "no dim": (describing(lambda tables: tables["a"].pop("dim")), "its description must have bits, dim, group_size, scale"),
    "one key more": (setting(x=1), "its description must have bits, dim"),
    "description of a list": (describing(lambda tables: tables.update(a=[4, 32])), "its description must have bits"),
    "3 bits": (setting(bits=3), "bits must be 8, 4 or 2, got 3"),
    "true bits": (setting(bits=True), "bits must be a whole number, got True"),
    "bits of a text": (setting(bits="4"), "bits must be a whole number, got '4'"),
    "bits of a float": (setting(bits=4.0), "has the number 4.0"),
    "dim of 0": (setting(dim=0), "dim must be from 1 to"),
    "dim too large": (setting(dim=33), "dim must be from 1 to 32"),
    "dim far too large": (setting(dim=2**63 - 1), "dim must be from 1 to 32"),
    "dim beyond": (setting(dim=2**63), "has the number 9223372036854775808"),
    "true dim": (setting(dim=True), "dim must be a whole number, got True"),
    "null dim": (setting(dim=None), "dim must be a whole number, got None"),
    "group of 8": (setting(group_size=8), "group_size must be a multiple of 16, at least 16, got 8"),
    "true group": (setting(group_size=True), "group_size must be a whole number or null, got True"),
    "one group": (setting(group_size=None, bits=8), "dim must be from 1 to"),
    "scale_dtype": (setting(scale_dtype="float64"), "scale_dtype must be float32 or float16, got 'float64'"),
    "scale_dtype of a list": (setting(scale_dtype=["float16"]), "scale_dtype must be float32 or float16, got ['float16']"),
    "wider scale": (setting(scale_dtype="float32"), "dim must be from 1 to"),
    "scale_first": (setting(scale_first=0), "scale_first must be true or false, got 0"),
    "mapping of floats": (lambda header: entry_of(header, "p" + MAPPING, dtype="F32"), "must be I32 of 1 dimension, got F32"),
    "mapping of two dimensions": (
        lambda header: entry_of(header, "p" + MAPPING, shape=[12, 1]), "must be I32 of 1 dimension, got I32 of (12, 1)",
    ),
    "fewer rows": (
        lambda header: entry_of(header, "p", shape=[2, 64]),
        "table 'p': compressed_indices_mapping[7] is 2: must be -1 or the number of a row, in a table of 2 rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_a_table_that_is_not_as_described_is_refused(path, wrong, mmap):
    change, words = WRONG[wrong]
    qembag.save_tables(path, {"a": CODES, "f": WEIGHTS[:2], "p": qembag.FloatTable(WEIGHTS).prune([1, 4, 7, 9])})
    rewritten(path, change)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        qembag.open_tables(path, mmap=mmap)
    assert type(caught.value) is ValueError
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize("row", [-2, 4, 2**31 - 1, -(2**31)])
def test_a_mapping_that_names_a_row_that_is_not_there_is_refused(path, row):
    table = CODES.prune([1, 4, 7, 9])
    table.save(path, name="x")
    mapping = table.compressed_indices_mapping.copy()
    place = path.read_bytes().index(mapping.astype("<i4").tobytes())
    mapping[5] = row
    raw = bytearray(path.read_bytes())
    raw[place : place + mapping.nbytes] = mapping.astype("<i4").tobytes()
    path.write_bytes(raw)
    with pytest.raises(
        ValueError, match=rf"table 'x': compressed_indices_mapping\[5\] is {row}: must be -1 or the num"
    ):
        qembag.open_table(path)


def test_a_file_without_tables_is_refused_and_says_what_it_has(path):
    raw = safetensors_file.header_bytes([("a", "U8", (3, 2)), ("b", "F32", (5,)), ("c", "F64", (1, 1))], {})
    path.write_bytes(raw + bytes(6 + 20 + 8))
    with pytest.raises(ValueError, match=re.escape("it has 'a' (U8, (3, 2)), 'b' (F32, (5,)), 'c' (F64, (1, 1))")):
        qembag.open_tables(path)
    path.write_bytes(safetensors_file.header_bytes([], {}))
    with pytest.raises(ValueError, match="it has no tensor at all"):
        qembag.open_table(path)
    path.write_bytes(safetensors_file.header_bytes([(f"{n:04}", "U8", (0,)) for n in range(1000)], {}))
    with pytest.raises(ValueError, match=r"'0019' \(U8, \(0,\)\) and 980 more$"):
        qembag.open_tables(path)


def test_a_file_that_shrinks_or_grows_while_it_is_opened_is_refused(path, monkeypatch):
    qembag.save_tables(path, WEIGHTS)
    read = table_file.read_header

    def read_and_change(file, name):
        header = read(file, name)
        path.write_bytes(path.read_bytes() + b"x")
        return header

    monkeypatch.setattr(table_file, "read_header", read_and_change)
    with pytest.raises(ValueError, match="changed while it was opened"):
        qembag.open_tables(path)

    def read_and_cut(file, name):
        header = read(file, name)
        os.truncate(path, header.data_start + 100)
        return header

    # More than Python reads ahead.
    qembag.save_tables(path, np.zeros((10_000, 32), np.float32))
    monkeypatch.setattr(table_file, "read_header", read_and_cut)
    with pytest.raises(ValueError, match="the file was cut short while it was read") as caught:
        qembag.open_tables(path, mmap=False)
    assert str(caught.value).startswith(f"{path}: table 'table': ")


def test_what_is_no_file_is_an_oserror_that_names_it(tmp_path):
    for name in (tmp_path, tmp_path / "missing", tmp_path / "missing.index.json"):
        with pytest.raises(OSError, match=re.escape(str(name))):
            qembag.open_tables(name)


# ---- Indices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors.index.json"
    qembag.save_tables(tmp_path / "1.safetensors", {"a": CODES, "f": WEIGHTS})
    qembag.save_tables(tmp_path / "2.safetensors", {"b": CODES})
    return path


def refusal_of(index: Path, weight_map: dict[str, str]) -> str:
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"^/") as caught:
        qembag.open_tables(index)
    assert str(caught.value).startswith(str(index.parent))
    return str(caught.value)


def test_an_index_that_lies_is_refused(index):
    one, two = "1.safetensors", "2.safetensors"
    whole = {"a.rows": one, "f": one, "b.rows": two}
    index.write_text(json.dumps({"weight_map": whole}))
    assert list(qembag.open_tables(index)) == ["a", "b", "f"]
    assert "names tensor 'b.rows' in 1.safetensors, which does not have it" in refusal_of(
        index, whole | {"b.rows": one}
    )
    assert "names tensor 'x' in 2.safetensors, which does not have it" in refusal_of(index, whole | {"x": two})
    assert "names '3.safetensors', which cannot be read: No such file" in refusal_of(
        index, whole | {"x": "3.safetensors"}
    )
    assert "has no table" in refusal_of(index, {})
    assert "must name files in its own folder" in refusal_of(index, whole | {"x": "../2.safetensors"})
    qembag.save_tables(index.parent / two, {"b": CODES, "f": WEIGHTS})
    assert "tensor 'f' is both in 1.safetensors and in 2.safetensors" in refusal_of(index, whole)
    qembag.save_tables(index.parent / two, {"f": CODES})
    assert "table 'f' is both in 1.safetensors and in 2.safetensors" in refusal_of(index, {"f": one, "f.rows": two})
    raw = safetensors_file.header_bytes([("f" + MAPPING, "I32", (1,))], {})
    (index.parent / two).write_bytes(raw + b"\xff" * 4)
    assert "table 'f', its mapping and its row weights must be in one file" in refusal_of(
        index, {"f": one, "f" + MAPPING: two}
    )
    (index.parent / two).write_bytes(raw)
    assert "2.safetensors: is cut short" in refusal_of(index, {"f": one, "f" + MAPPING: two})


# ---- Arguments -------------------------------------------------------------------------------------------------------

SAVES: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "path of a number": (TypeError, {"path": 3}, "path must be a str or a path, got int 3"),
    "path of bytes": (TypeError, {"path": b"a"}, "path must be a str or a path, got bytes"),
    "empty path": (ValueError, {"path": ""}, "path must name a file, got ''"),
    "path with a zero": (ValueError, {"path": "a\0b"}, "path must name a file"),
    "no tables": (ValueError, {"tables": {}}, "tables must have at least one table, got none"),
    "list": (TypeError, {"tables": [CODES]}, "tables must be a table or a dict of tables by name, got list"),
    "table of a list": (TypeError, {"tables": {"a": [[1.0]]}}, "tables['a'] must be a QuantizedTable, a FloatTable or"),
    "table of bytes": (TypeError, {"tables": {"a": CODES.data}}, "tables['a'] must be a QuantizedTable, a FloatTable or"),
    "table of doubles": (TypeError, {"tables": WEIGHTS.astype(float)}, "tables must be a QuantizedTable, a FloatTable"),
    "flat table": (ValueError, {"tables": {"a": WEIGHTS[0]}}, "tables['a'] must have 2 dimensions"),
    "table of no dim": (ValueError, {"tables": {"a": WEIGHTS[:, :0]}}, "tables['a'] must have a dim of 1 or more"),
    "name of a number": (TypeError, {"tables": {1: CODES}}, "tables must be a dict by name; its keys must be str, got int 1"),
    "empty name": (ValueError, {"tables": {"": CODES}}, "tables must have names other than '' and '__metadata__', got ''"),
    "name of metadata": (ValueError, {"tables": {"__metadata__": WEIGHTS}}, "tables must have names other than"),
    "name of surrogates": (ValueError, {"tables": {"\ud800": WEIGHTS}}, "its keys must be text without lone surrogates"),
    "rows collide": (
        ValueError, {"tables": {"a": CODES, "a.rows": WEIGHTS}},
        "tables must not have names that collide: 'a' and 'a.rows' would both need 'a.rows'",
    ),
    "mappings collide": (ValueError, {"tables": {"b" + MAPPING: WEIGHTS, "b": WEIGHTS}}, "tables must not have names that"),
    "metadata of a list": (TypeError, {"metadata": [1]}, "metadata must be a dict of str, got list"),
    "metadata of numbers": (TypeError, {"metadata": {"a": 1}}, "metadata['a'] must be str, got int 1"),
    "key of a number": (TypeError, {"metadata": {1: "a"}}, "metadata must be a dict of str; its keys must be str, got int 1"),
    "key of ours": (ValueError, {"metadata": {"qembag.x": "a"}}, "metadata must not have keys that begin with qembag., got"),
    "metadata of surrogates": (ValueError, {"metadata": {"a": "\udcff"}}, "metadata['a'] must be text without lone"),
    "shards of nothing": (ValueError, {"max_shard_bytes": 0, "path": "a.index.json"}, "max_shard_bytes must be at least 1"),
    "shards of a float": (TypeError, {"max_shard_bytes": 1.5, "path": "a.index.json"}, "max_shard_bytes must be"),
    "shards without an index": (ValueError, {"max_shard_bytes": 9}, "max_shard_bytes must come with a path that ends in"),
    "size of an index": (ValueError, {"metadata": {"total_size": "1"}, "path": "a.index.json"}, "metadata must not have the key"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", SAVES)
def test_a_wrong_argument_is_refused_and_nothing_is_written(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    kind, given, words = SAVES[wrong]
    given = {"path": "a.safetensors", "tables": {"a": CODES}} | given
    with pytest.raises(kind, match=re.escape(words)) as caught:
        qembag.save_tables(given.pop("path"), given.pop("tables"), **given)
    assert str(caught.value).startswith(words.split()[0].split("[")[0]) or words.startswith("its keys")
    assert os.listdir() == []


def test_what_opening_does_not_take_is_refused(path):
    qembag.save_tables(path, {"a": CODES, "b": WEIGHTS})
    for name in (None, "c", "a.rows", ""):
        with pytest.raises(
            ValueError, match=re.escape(f"name must be one of the tables of {path}: 'a', 'b'; got {name!r}")
        ):
            qembag.open_table(path, name)
    for call, given, words in (
        (qembag.open_table, {"name": 3}, "name must be str, got int 3"),
        (qembag.open_table, {"mmap": "r"}, "mmap must be"),
        (qembag.open_table, {"name": "a", "populate": 2}, "populate must be"),
        (qembag.open_tables, {"progress": 3.5}, "progress must be True, False or a function, got float 3.5"),
        (CODES.save, {"name": 3}, "name must be str, got int 3"),
    ):
        with pytest.raises(TypeError, match=words):
            call(path, **given)
    with pytest.raises(TypeError, match="progress must be True, False or a function"):
        CODES.prefault(progress="yes")


def test_a_mapping_that_was_changed_since_is_not_saved(path):
    mapping = np.array([0, 1, -1], np.int32)
    table = qembag.QuantizedTable(CODES.data, 4, dim=32, group_size=16, compressed_indices_mapping=mapping)
    mapping[1] = 99
    with pytest.raises(IndexError, match=r"compressed_indices_mapping\[1\] is 99"):
        table.save(path)
    assert os.listdir(path.parent) == []


# ---- Saves that fail -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one file", "an index"])
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file, or an index of several, that is there already."""
    path = tmp_path / ("old.safetensors" if request.param == "one file" else "old.index.json")
    qembag.save_tables(path, {"a": WEIGHTS, "b": CODES}, max_shard_bytes=1 if request.param == "an index" else None)
    return path


def assert_still_old(path: Path, before: set[str]) -> None:
    assert set(os.listdir(path.parent)) == before
    tables = qembag.open_tables(path)
    assert np.array_equal(tables["a"].data, WEIGHTS)
    same_tables(tables["b"], CODES)


def save_over(path: Path) -> None:
    limit = 1 if path.suffix == ".json" else None
    qembag.save_tables(
        path, {"a": WEIGHTS[::-1], "b": CODES, "c": np.zeros((3000, 32), np.float32)}, max_shard_bytes=limit
    )


class Full:
    """A file on a disk that is full after so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 500, 2000, 100_000])
def test_a_full_disk_is_one_error_and_nothing_is_left_behind(old, monkeypatch, room):
    before = set(os.listdir(old.parent))

    def open_on_it(*given: Any, **named: Any) -> Full:
        return Full(open(*given, **named), room)

    monkeypatch.setattr(replace, "open", open_on_it, raising=False)
    with pytest.raises(OSError, match=r"old.*(safetensors|json)'$") as caught:
        save_over(old)
    assert caught.value.errno == errno.ENOSPC
    assert ".tmp" not in str(caught.value)
    assert_still_old(old, before)


STEPS = ["os.fsync", "os.replace", "os.chmod", "os.urandom", "qembag.formats.saving.header_bytes"]
ERRORS = [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), MemoryError()]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_each_step_may_fail_each_time_that_it_is_taken(old, monkeypatch, step, error):
    before = set(os.listdir(old.parent))
    module, _, name = step.rpartition(".")
    whole = getattr(sys.modules[module], name)
    taken = 0
    for failing in range(20):
        calls = []

        def fail(*given: Any, calls: list[Any] = calls, failing: int = failing, **named: Any) -> Any:
            calls.append(given)
            if len(calls) > failing:
                raise error
            return whole(*given, **named)

        monkeypatch.setattr(step, fail)
        try:
            save_over(old)
            break
        except type(error):
            taken += 1
        monkeypatch.undo()
        if step == "os.fsync" and failing == (7 if old.suffix == ".json" else 1):
            break  # the folder's, when the last file has its name: see the next test
        assert_still_old(old, before)
    assert taken


def test_the_last_steps_failing_leaves_the_new_tables(old, monkeypatch):
    """When all is renamed, there is no way back."""
    calls = []

    def fail_for(path: Any) -> None:
        calls.append(path)
        if old.suffix != ".json" or len(calls) == 4:  # three shards, then the index
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(replace, "flush_folder", fail_for)
    with pytest.raises(OSError, match="broken"):
        save_over(old)
    assert np.array_equal(qembag.open_tables(old)["a"].data, WEIGHTS[::-1])


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np, qembag
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    qembag.save_tables(sys.argv[1], {"a": np.zeros((3000, 32), np.float32)})
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are Linux's")
def test_a_disk_that_the_system_says_is_full(tmp_path):
    path = tmp_path / "a.safetensors"
    qembag.save_tables(path, {"a": WEIGHTS, "b": CODES})
    command = [sys.executable, "-c", LIMITED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=True)
    assert done.stdout == f"[Errno {errno.EFBIG}] File too large: '{path}'\n"
    assert done.stderr == ""
    assert_still_old(path, {"a.safetensors"})


def test_a_folder_that_is_not_there_or_is_none_is_one_error(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "a.safetensors", tmp_path / "file" / "a.safetensors", tmp_path):
        with pytest.raises(OSError, match=re.escape(f"'{path}'")):
            CODES.save(path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_nobody_else_reads_a_private_file_while_it_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    CODES.save(path)
    path.chmod(0o600)
    modes = []
    monkeypatch.setattr(os, "chmod", lambda name, mode: modes.append((Path(name).stat().st_mode & 0o777, mode)))
    CODES.save(path)
    assert modes == [(0o600, 0o600)]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only_is_one_error(old):
    before = set(os.listdir(old.parent))
    old.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"old.*(safetensors|json)'$"):
            save_over(old)
    finally:
        old.parent.chmod(0o700)
    assert_still_old(old, before)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_file_system_that_is_read_only_is_one_error_for_root_too():
    with pytest.raises(OSError, match=r"'/proc/self/qembag.safetensors'$"):
        CODES.save("/proc/self/qembag.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="pipes have paths on POSIX")
def test_only_a_regular_file_is_replaced(tmp_path):
    """A pipe stands for devices: were /dev/null named here, a package without the check would replace it for root."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match="must be a regular file, to be replaced"):
            CODES.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]
    assert (tmp_path / "pipe").is_fifo()


# ---- Processes that are killed ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix" or UNDER_SANITIZER, reason="needs SIGKILL, and a process of its own")
@pytest.mark.parametrize("name", save_and_die.NAMES)
def test_a_killed_save_leaves_the_old_file_or_the_new_one(tmp_path, name):
    """`python tests/save_and_die.py kill 200` kills more."""
    assert len(set(save_and_die.kill(tmp_path / name, 10))) > 1


# ---- Damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def mutate_files():
    if not FUZZ.is_dir():
        pytest.skip("the fuzzer is not beside these tests")
    sys.path.insert(0, str(FUZZ))
    try:
        yield importlib.import_module("mutate_files")
    finally:
        sys.path.remove(str(FUZZ))


def test_damaged_files_are_opened_right_or_refused(mutate_files):
    outcomes = mutate_files.run(2000)
    assert outcomes["opened"] > 100
    assert len(outcomes) > 100


def test_undamaged_files_are_opened(mutate_files, tmp_path, monkeypatch):
    monkeypatch.setattr(mutate_files, "damaged", lambda files, rng: files)
    assert mutate_files.run(50) == {"opened": 50}


def without_order(tensors: list[Any], start: int, size: int) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in tensors}


DEFECTS = {
    "gaps and overlaps": (safetensors_file, "_in_order", without_order),
    "mappings": (_arguments, "checked_mapping", lambda mapping, num_rows: mapping),
    "names twice": (safetensors_file, "_unique", dict),
    "true": (safetensors_file, "_are_numbers", lambda value: type(value) is list),
    "memory": (safetensors_file, "read_json", lambda text: bytes(60_000_000) and json.loads(text)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_check_that_is_left_out_is_found(mutate_files, monkeypatch, defect):
    if defect == "gaps and overlaps":
        pytest.importorskip("safetensors")  # which tells that such a file should have been refused
    monkeypatch.setattr(*DEFECTS[defect])
    with pytest.raises(mutate_files.Finding, match=rf"^case \d+ of seed {mutate_files.SEED}: "):
        mutate_files.run(5000)
