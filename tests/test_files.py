"""Tables in files: what is saved is opened again, by us and by others; mapped tables, pickles, shards."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import runpy
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment
from qembag.formats import saving, table_file
from qembag.formats.safetensors_file import header_bytes
from qembag.layout import RowLayout
from support.files import bits_of, rewritten, same_tables, tables_of_every_kind

WEIGHTS = np.random.default_rng(20261127).normal(size=(12, 32)).astype(np.float32)
POSIX = os.name == "posix"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tables.safetensors"


@pytest.fixture(params=[True, False], ids=["mapped", "read"])
def mmap(request: pytest.FixtureRequest) -> bool:
    return request.param


def raw_header(path: Path) -> tuple[dict, int]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


# ---- Saved and opened ------------------------------------------------------------------------------------------------


def test_every_table_comes_back_as_it_was(path, mmap):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables, metadata={"ä": "ö\n", "format": "pt"})
    opened = qembag.open_tables(path, mmap=mmap)
    assert list(opened) == sorted(tables)
    assert opened.metadata == {"ä": "ö\n", "format": "pt"}
    for name, table in tables.items():
        same_tables(opened[name], table)
        same_tables(qembag.open_table(path, name, mmap=mmap), table)
        # A big-endian host has converted copies of floats.
        is_copy = not mmap or (sys.byteorder == "big" and isinstance(table, qembag.FloatTable))
        assert opened[name].data.flags.writeable == is_copy or table.data.size == 0


def test_a_table_from_a_file_gives_the_bits_of_the_one_in_memory(path, mmap):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    for name, table in qembag.open_tables(path, mmap=mmap).items():
        if len(table):
            numbers = np.arange(2 * len(table)).reshape(-1, 2) % len(table)
            expected = qembag.embedding_bag(tables[name], numbers)
            assert qembag.embedding_bag(table, numbers).tobytes() == expected.tobytes()


def test_data_begin_at_a_multiple_of_64_and_each_tensor_at_one_of_its_element(path):
    qembag.save_tables(path, tables_of_every_kind())
    header, start = raw_header(path)
    assert start % 64 == 0
    size = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4}
    metadata = header.pop("__metadata__")
    assert set(metadata) == {"qembag.version", "qembag.tables"}
    places = {name: entry["data_offsets"][0] for name, entry in header.items()}
    assert all(places[name] % size[header[name]["dtype"]] == 0 for name in header)
    assert sorted(header, key=lambda name: (-size[header[name]["dtype"]], name)) == list(header)
    assert sorted(places.values()) == list(places.values())


def test_the_same_tables_give_the_same_bytes_in_any_order(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables, metadata={"a": "1", "b": "2"})
    first = path.read_bytes()
    qembag.save_tables(path, dict(reversed(tables.items())), metadata={"b": "2", "a": "1"})
    assert path.read_bytes() == first


@pytest.mark.parametrize("made", ["strided", "backwards", "read-only", "padded", "alone"])
def test_rows_of_any_strides_are_saved(path, made):
    rows = qembag.quantize(WEIGHTS, 4).data
    wide = np.full((24, 100), 0xAA, np.uint8)
    views = {
        "strided": wide[::2, 7 : 7 + rows.shape[1]],
        "backwards": wide[23::-2, : rows.shape[1]],
        "padded": wide[::2, : rows.shape[1] + 30],
        "alone": wide[:12, : rows.shape[1]],
    }
    view = views.get(made, rows.copy())
    view[:, : rows.shape[1]] = rows
    view.setflags(write=made != "read-only")
    table = qembag.QuantizedTable(view, 4, dim=32)
    table.save(path, name="x", metadata={"k": "v"})
    opened = qembag.open_table(path)
    assert np.array_equal(opened.data[:, : rows.shape[1]], rows)
    # Padding is never read: it is not what lay there, but zeros.
    assert not opened.data[:, rows.shape[1] :].any()
    assert opened.row_bytes == view.shape[1]
    assert qembag.open_tables(path).metadata == {"k": "v"}


def test_large_tables_are_written_in_pieces(path, monkeypatch):
    monkeypatch.setattr(saving, "WRITTEN_AT_ONCE", 100)
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    for name, table in qembag.open_tables(path).items():
        same_tables(table, tables[name])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_plain_array_is_a_table_of_floats(path, dtype):
    qembag.save_tables(path, WEIGHTS.astype(dtype)[::-1, :9])
    assert np.array_equal(qembag.open_table(path, "table").data, WEIGHTS.astype(dtype)[::-1, :9])


def test_bfloat16_comes_back_as_its_bits(path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = WEIGHTS.astype(ml_dtypes.bfloat16)
    qembag.save_tables(path, {"b": array})
    opened = qembag.open_table(path)
    assert opened.dtype == "bfloat16"
    assert np.array_equal(opened.data, array.view(np.uint16))
    assert np.array_equal(np.asarray(opened), array.astype(np.float32))


def test_tables_are_saved_to_the_file_that_they_are_mapped_from(path):
    if not POSIX:
        pytest.skip("Windows replaces no mapped file")
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    old = qembag.open_tables(path)
    qembag.save_tables(path, {"new": WEIGHTS, **old})
    for name, table in qembag.open_tables(path).items():
        if name != "new":
            same_tables(table, tables[name])
            same_tables(old[name], tables[name])


def test_a_path_may_be_of_any_kind_and_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = qembag.quantize(WEIGHTS)
    names = ["a.safetensors", "b.safetensors", "ohne Endung ä", "ü" * 120 + ".safetensor"]  # 251 bytes
    for path in (np.str_(names[0]), Path(names[1]), tmp_path / names[2], names[3]):
        qembag.save_tables(path, {np.str_("x"): table}, metadata={np.str_("a"): np.str_("b")})
        same_tables(qembag.open_table(path, np.str_("x")), table)
    assert sorted(os.listdir()) == names


def test_the_file_has_the_permissions_of_any_new_file_or_of_the_old_one(path):
    if not POSIX:
        pytest.skip("no permissions here")
    table = qembag.quantize(WEIGHTS)
    table.save(path)
    other = path.with_name("other")
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)
    path.chmod(0o640)
    table.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_link_is_followed(path):
    if not POSIX:
        pytest.skip("no links here")
    path.symlink_to("target")
    for _ in range(2):
        qembag.quantize(WEIGHTS).save(path)
        assert path.is_symlink()
        same_tables(qembag.open_table(path.with_name("target")), qembag.quantize(WEIGHTS))


def test_no_descriptor_is_left_open(path, mmap):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("descriptors are not listed here")
    qembag.save_tables(path, tables_of_every_kind())

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    tables = qembag.open_tables(path, mmap=mmap)
    # Before 3.13 Python keeps one for each file that is mapped.
    assert descriptors() - before <= (1 if mmap and sys.version_info < (3, 13) else 0)
    del tables
    with pytest.raises(ValueError, match="name must be one of the tables of"):
        qembag.open_table(path, "x", mmap=mmap)
    assert descriptors() == before


def test_a_table_keeps_its_mapping_alive(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    table = qembag.open_tables(path)["8 bits"]
    if POSIX:
        path.unlink()
    same_tables(table, tables["8 bits"])


def test_nobody_closes_the_memory_of_a_table(path):
    qembag.save_tables(path, {"a": WEIGHTS, "b": qembag.quantize(WEIGHTS)})
    for name, table in qembag.open_tables(path).items():
        if name == "a" and sys.byteorder == "big":
            continue  # a converted copy
        owner = table.data
        while not hasattr(owner, "close"):
            owner = owner.obj if isinstance(owner, memoryview) else owner.base
        with pytest.raises(BufferError):
            owner.close()


# ---- Other libraries -------------------------------------------------------------------------------------------------


def test_the_official_library_reads_what_we_save(path):
    library = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("ml_dtypes")
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables, metadata={"who": "me"})
    theirs = library.load_file(path)
    for name, table in tables.items():
        if isinstance(table, qembag.QuantizedTable):
            assert np.array_equal(theirs.pop(f"{name}.rows"), table.data)
        else:
            assert np.array_equal(theirs.pop(name).view(f"u{table.data.itemsize}"), bits_of(table))
        if table.compressed_indices_mapping is not None:
            found = theirs.pop(f"{name}.compressed_indices_mapping")
            assert np.array_equal(found, table.compressed_indices_mapping)
            assert found.dtype == np.int32
    assert theirs == {}


def test_float_tables_of_the_official_library_are_opened(path, mmap):
    library = pytest.importorskip("safetensors.numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {
        # One byte first: nothing else is aligned.
        "a": np.zeros(1, np.int8),
        "f32": WEIGHTS,
        "f16": WEIGHTS.astype(np.float16),
        "bf16": WEIGHTS.astype(ml_dtypes.bfloat16),
        "no rows": WEIGHTS[:0],
        "no dim": WEIGHTS[:, :0],
        "double": WEIGHTS.astype(np.float64),
        "flat": WEIGHTS.ravel(),
        "cube": WEIGHTS.reshape(3, 4, 32),
    }
    library.save_file(arrays, path, metadata={"format": "np"})
    opened = qembag.open_tables(path, mmap=mmap)
    assert opened.metadata == {"format": "np"}
    assert {name: table.dtype for name, table in opened.items()} == {
        "f32": "float32", "f16": "float16", "bf16": "bfloat16", "no rows": "float32",
    }  # fmt: skip
    for name, table in opened.items():
        assert np.array_equal(np.asarray(table), arrays[name].astype(np.float32)), name


def test_entries_may_come_in_any_order_and_data_at_odd_places(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)

    def backwards_behind_one_byte(header):
        entries = dict(reversed(header.items()))
        for name, entry in entries.items():
            if name != "__metadata__":
                entry["data_offsets"] = [place + 1 for place in entry["data_offsets"]]
        header.clear()
        header |= entries | {"odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}

    rewritten(path, backwards_behind_one_byte, lambda data: b"x" + data)
    for name, table in qembag.open_tables(path).items():
        same_tables(table, tables[name])
        assert len(table) == 0 or np.array_equal(table[0], tables[name][0])


FORMAT = Path(__file__).parents[1] / "docs" / "format.md"


@pytest.mark.skipif(not FORMAT.exists(), reason="the documentation is not beside the tests")
def test_the_reader_in_the_documentation_reads_our_files(path):
    (code,) = re.findall(r"(?s)```python\n(.*?)```", FORMAT.read_text())
    (path.parent / "reader.py").write_text(code)
    read = runpy.run_path(str(path.parent / "reader.py"))["read"]
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables, metadata={"a": "b"})
    found = read(path)
    assert set(found) == set(tables)
    for name, table in tables.items():
        expected = table.dequantize()
        assert found[name].shape == expected.shape
        # It rounds twice, in theory.
        np.testing.assert_array_max_ulp(found[name], expected, 1)


# ---- Pickles and copies ----------------------------------------------------------------------------------------------


def test_a_mapped_table_pickles_as_its_path(path):
    rows = np.tile(qembag.quantize(WEIGHTS, 4).data, (5000, 1))
    qembag.save_tables(path, {"large": qembag.QuantizedTable(rows, 4), "small": WEIGHTS})
    table = qembag.open_tables(path)["large"]
    pickled = pickle.dumps(table)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    same_tables(again, table)
    assert not again.data.flags.writeable
    assert pickle.dumps(again) == pickled


def test_every_mapped_table_pickles_and_copies(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables, metadata={"a": "b"})
    opened = qembag.open_tables(path)
    together = pickle.loads(pickle.dumps(opened))
    assert type(together) is type(opened)
    assert together.metadata == {"a": "b"}
    for name, table in opened.items():
        for again in (together[name], copy.copy(table), copy.deepcopy(table), pickle.loads(pickle.dumps(table, 2))):
            same_tables(again, tables[name])


def test_a_pickle_of_many_tables_names_the_file_once(path):
    qembag.save_tables(path, {f"table {number}": WEIGHTS for number in range(50)})
    assert pickle.dumps(qembag.open_tables(path)).count(path.name.encode()) == 1


def test_another_process_maps_it_too(path):
    qembag.save_tables(path, tables_of_every_kind())
    table = qembag.open_table(path, "4 bits, groups")
    code = (
        "import pickle, sys; table = pickle.load(sys.stdin.buffer); "
        "print(table.data.flags.writeable, table[3].tobytes().hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(table),
        capture_output=True,
        env=child_environment(),
        check=True,
    )
    assert done.stdout.split() == [b"False", table[3].tobytes().hex().encode()]


class Child(qembag.QuantizedTable):
    pass


def test_a_subclass_stays_one_and_what_is_made_of_a_mapped_table_is_an_ordinary_one(path):
    qembag.save_tables(path, {"a": qembag.quantize(WEIGHTS, 4)})
    table = qembag.open_table(path)
    pruned, converted = table.prune([1, 2]), table.to_layout(row_alignment=64)
    path.unlink() if POSIX else None
    for one in (pruned, converted):
        assert one.data.flags.writeable
        same_tables(pickle.loads(pickle.dumps(one)), one)
    qembag.save_tables(path.with_name("b"), {"a": table})
    _, arguments = qembag.open_table(path.with_name("b")).__reduce__()
    child = table_file._table_of_file(Child, *arguments[1:])
    assert type(pickle.loads(pickle.dumps(child))) is Child


def test_a_table_that_is_initialized_anew_is_no_longer_the_files(path):
    qembag.save_tables(path, {"a": qembag.quantize(WEIGHTS, 4)})
    table = qembag.open_table(path)
    other = qembag.quantize(WEIGHTS[::-1])
    table.__init__(other.data, 8)
    same_tables(pickle.loads(pickle.dumps(table)), other)


@pytest.mark.parametrize("change", ["row", "last byte", "header", "longer", "mapping", "table gone"])
def test_a_file_that_changed_since_is_noticed(path, change):
    rows = np.tile(qembag.quantize(WEIGHTS, 4).data, (20, 1))
    tables = {"a": qembag.QuantizedTable(rows, 4).prune(np.arange(200)), "b": WEIGHTS}
    qembag.save_tables(path, tables)
    pickled = pickle.dumps(qembag.open_table(path, "a"))
    changed = {
        "row": {"a": qembag.QuantizedTable(rows ^ 1, 4).prune(np.arange(200)), "b": WEIGHTS},
        "last byte": tables,
        "header": {"a": tables["a"], "c": WEIGHTS},
        "longer": {**tables, "z": WEIGHTS},
        "mapping": {"a": qembag.QuantizedTable(rows, 4).prune(np.arange(1, 201)), "b": WEIGHTS},
        "table gone": {"b": WEIGHTS},
    }
    path.unlink()
    qembag.save_tables(path, changed[change])
    if change == "last byte":
        raw = path.read_bytes()
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"changed since") as caught:
        pickle.loads(pickled)
    assert str(caught.value).startswith(str(path))


def test_a_file_that_is_gone_is_named(path):
    qembag.save_tables(path, WEIGHTS)
    pickled = pickle.dumps(qembag.open_table(path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        pickle.loads(pickled)


def test_a_file_that_is_the_same_again_is_taken(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    pickled = pickle.dumps(qembag.open_tables(path))
    path.unlink()
    qembag.save_tables(path, tables)
    for name, table in pickle.loads(pickled).items():
        same_tables(table, tables[name])


def test_a_copy_outlives_a_new_file(path):
    if not POSIX:
        pytest.skip("Windows replaces no mapped file")
    qembag.save_tables(path, WEIGHTS)
    table = qembag.open_table(path)
    qembag.save_tables(path, WEIGHTS * 2)
    for again in (copy.copy(table), copy.deepcopy(table)):
        assert np.array_equal(again.data, WEIGHTS)


# ---- Reading through -------------------------------------------------------------------------------------------------


def test_prefault_reports_rows_and_bytes_and_changes_nothing(path, monkeypatch):
    prefault = sys.modules["qembag.formats.prefault"]
    monkeypatch.setattr(prefault, "TOUCHED_AT_ONCE", 200)
    qembag.save_tables(path, tables_of_every_kind())
    for table in qembag.open_tables(path).values():
        seen = []
        table.prefault(progress=lambda *numbers, seen=seen: seen.append(numbers))
        rows = table.data.nbytes
        assert (seen[-1] if seen else (0, 0, 0)) == (table.num_rows, table.num_rows, rows)
        assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})


def test_prefault_takes_rows_of_any_strides():
    rows = np.zeros((40, 30000), np.uint8)
    for view in (rows, rows[::2], rows[::-3, 1:20000], rows[:, 5:20], rows[:0], np.broadcast_to(rows[:1], rows.shape)):
        seen = []
        qembag.QuantizedTable(view, 8, dim=1).prefault(progress=lambda *numbers, seen=seen: seen.append(numbers))
        assert seen[-1:] == [(len(view), len(view), view.nbytes)][: len(view)]


def test_populate_reads_all_tables_through(path):
    tables = tables_of_every_kind()
    qembag.save_tables(path, tables)
    seen = []
    qembag.open_tables(path, populate=True, progress=lambda *numbers: seen.append(numbers))
    total = sum(table.num_rows for table in tables.values())
    assert seen[-1] == (total, total, sum(table.data.nbytes for table in tables.values()))
    same_tables(qembag.open_table(path, "4 bits", populate=True), tables["4 bits"])


def resident(path: Path) -> int:
    """Bytes of the file that this process has mapped and read."""
    blocks = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1:]
    return sum(int(block.split("Rss:")[1].split()[0]) << 10 for block in blocks)


@pytest.mark.parametrize("row_bytes", [64, 4160, 100_000])
def test_every_page_is_read_through(path, row_bytes):
    if not Path("/proc/self/smaps").exists() or UNDER_SANITIZER:
        pytest.skip("memory is not listed here")
    rows = np.zeros((8_000_000 // row_bytes, row_bytes), np.uint8)
    qembag.QuantizedTable(rows, 8, dim=10).save(path)
    table = qembag.open_table(path)
    if str(path) not in Path("/proc/self/smaps").read_text():
        pytest.skip("memory is not listed here by file")
    assert resident(path) < rows.nbytes // 2
    table.prefault()
    assert resident(path) >= rows.nbytes


LOOKUP = """
import sys
import numpy as np, qembag
table = qembag.open_table(sys.argv[1])
answer = qembag.embedding_bag(table, [[0, len(table) // 2, len(table) - 1]])
status = open("/proc/self/status").read()
print(answer.tobytes().hex(), status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux" or UNDER_SANITIZER, reason="memory is listed by Linux")
def test_a_lookup_in_a_file_larger_than_memory_takes_little_of_it(path):
    layout = qembag.quantize(WEIGHTS, 4).layout
    num_rows = 2**30 // layout.row_bytes
    rows = qembag.quantize(WEIGHTS, 4).data[:3]
    header = header_bytes([("t.rows", "U8", (num_rows, layout.row_bytes))], saving.describe({"t": layout}, None))
    with path.open("wb") as file:
        # Most of it are holes, which take no room on the disk.
        file.truncate(len(header) + num_rows * layout.row_bytes)
        file.write(header)
        for row, number in zip(rows, (0, num_rows // 2, num_rows - 1), strict=True):
            file.seek(len(header) + number * layout.row_bytes)
            file.write(row.tobytes())
    command = [sys.executable, "-W", "ignore", "-c", LOOKUP, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=True)
    answer, kilobytes = done.stdout.split()
    assert answer == qembag.embedding_bag(qembag.QuantizedTable(rows, 4), [[0, 1, 2]]).tobytes().hex()
    assert int(kilobytes) < 100_000


def test_one_table_of_many_is_made_alone(path, monkeypatch):
    qembag.save_tables(path, {f"{number:03}": WEIGHTS[:1] + number for number in range(1000)})
    made = []
    make = table_file.TableFile.table
    monkeypatch.setattr(
        table_file.TableFile, "table", lambda file, name, *kind: made.append(name) or make(file, name, *kind)
    )
    table = qembag.open_table(path, "456")
    again = pickle.loads(pickle.dumps(table))
    assert np.array_equal(again.data, WEIGHTS[:1] + 456)
    assert made == ["456", "456"]


# ---- Several files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors.index.json"


def shards(folder: Path) -> list[str]:
    return sorted(name.name for name in folder.glob("*.safetensors"))


@pytest.mark.parametrize("limit", [1, 1000, 3000, 10**9, None])
def test_tables_go_to_several_files_and_come_back(index, mmap, limit):
    tables = tables_of_every_kind()
    qembag.save_tables(index, tables, metadata={"who": "me"}, max_shard_bytes=limit)
    opened = qembag.open_tables(index, mmap=mmap)
    assert opened.metadata == {"who": "me"}
    assert list(opened) == sorted(tables)
    for name, table in tables.items():
        same_tables(opened[name], table)
        same_tables(qembag.open_table(index, name, mmap=mmap), table)
    together = [qembag.open_tables(index.parent / name) for name in shards(index.parent)]
    assert sorted(name for one in together for name in one) == sorted(tables)
    if limit is not None:
        for one in together:
            assert len(one) == 1 or sum(table.nbytes for table in one.values()) <= limit
    numbers = [name.split("-")[2:] for name in shards(index.parent)]
    assert numbers == [[f"{n + 1:05}", "of", f"{len(together):05}.safetensors"] for n in range(len(together))]
    named = json.loads(index.read_text())
    assert named["metadata"] == {"who": "me", "total_size": sum(table.nbytes for table in tables.values())}


def test_a_mapped_table_of_an_index_pickles_as_its_own_file(index):
    qembag.save_tables(index, {"a": WEIGHTS, "b": WEIGHTS * 2}, max_shard_bytes=1)
    tables = qembag.open_tables(index)
    index.unlink()
    for name, table in pickle.loads(pickle.dumps(tables)).items():
        assert np.array_equal(table.data, tables[name].data)


def test_a_new_index_takes_the_old_ones_files_along_and_no_others(index):
    others = [
        "model-00001-of-00002.safetensors",
        "model-0123abcd-00001-of-00001.safetensors",
        "x-0123abcd-1.safetensors",
    ]
    qembag.save_tables(index, {"a": WEIGHTS, "b": WEIGHTS}, max_shard_bytes=1)
    first = shards(index.parent)
    for other in others:
        (index.parent / other).touch()
    qembag.save_tables(index, {"a": WEIGHTS * 2}, max_shard_bytes=1)
    second = set(shards(index.parent)) - set(others)
    assert len(first) == 2
    assert len(second) == 1
    assert not second & set(first)
    assert all((index.parent / other).exists() for other in others)
    assert np.array_equal(qembag.open_table(index).data, WEIGHTS * 2)
    # Nor what an index names in folders below, whatever its name.
    (index.parent / "below").mkdir()
    below = index.parent / "below" / second.pop()
    (index.parent / below.name).rename(below)
    index.write_text(json.dumps({"weight_map": {"a": f"below/{below.name}"}}))
    qembag.save_tables(index, WEIGHTS)
    assert below.exists()


def test_an_index_of_others_keeps_its_files(index):
    library = pytest.importorskip("safetensors.numpy")
    theirs = "model-00001-of-00001.safetensors"
    library.save_file({"a": WEIGHTS}, index.parent / theirs)
    index.write_text(json.dumps({"metadata": {"total_size": 1, "x": "y"}, "weight_map": {"a": theirs}}))
    assert np.array_equal(qembag.open_table(index).data, WEIGHTS)
    assert qembag.open_tables(index).metadata == {"x": "y"}
    qembag.save_tables(index, WEIGHTS)
    assert (index.parent / theirs).exists()


def test_the_description_has_each_field_of_a_layout():
    layout = RowLayout(4, 100, scale_dtype="float32", scale_first=True, group_size=32, row_bytes=128)
    found = saving.describe({"b": layout, "a": RowLayout(8, 3)}, {"k": "v"})
    assert found == {
        "qembag.version": "1",
        "qembag.tables": (
            '{"a":{"bits":8,"dim":3,"scale_dtype":"float32","scale_first":false,"group_size":null},'
            '"b":{"bits":4,"dim":100,"scale_dtype":"float32","scale_first":true,"group_size":32}}'
        ),
        "k": "v",
    }


@pytest.mark.skipif(not POSIX, reason="links need rights on Windows")
def test_a_link_to_an_index_stands_for_the_index(tmp_path):
    for name in ("real", "link"):
        (tmp_path / name).mkdir()
    index, link = (tmp_path / name / "m.index.json" for name in ("real", "link"))
    qembag.save_tables(index, {"a": WEIGHTS, "b": WEIGHTS}, max_shard_bytes=1)
    link.symlink_to(index)
    assert list(qembag.open_tables(link)) == ["a", "b"]
    qembag.save_tables(link, {"c": WEIGHTS}, max_shard_bytes=1)
    assert link.is_symlink()
    assert list(qembag.open_tables(index)) == list(qembag.open_tables(link)) == ["c"]
    assert os.listdir(tmp_path / "link") == ["m.index.json"]
    assert len(os.listdir(tmp_path / "real")) == 2
