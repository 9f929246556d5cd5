"""quantize_to_file: the bytes of save_tables from every source, whatever interrupts it; nothing else is left behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from conftest import UNDER_SANITIZER, child_environment
from qembag.formats import sources, to_file, unfinished
from qembag.formats.unfinished import FRONT, SLOT, SLOTS, TEXT
from test_sources import bits_of, every_source, write_safetensors

NUM_ROWS, DIM = 300, 24
BLOCK_ROWS = 7


@pytest.fixture
def weights(rng: np.random.Generator) -> np.ndarray:
    """Exact in each type of floats."""
    return rng.integers(-100, 100, size=(NUM_ROWS, DIM)).astype(np.float32) / 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, and a slot after each of them; rows go to the file at once."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", BLOCK_ROWS * DIM * 4)
    monkeypatch.setattr(unfinished, "SECONDS_BETWEEN_SLOTS", 0)
    monkeypatch.setattr(to_file, "CHECKED_ROWS", 10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    return folder / "table.safetensors"


def part_of(path: Path) -> Path:
    return Path(f"{path}.part")


def saved(path: Path, tables: Any, **more: Any) -> bytes:
    """The bytes that `save_tables` writes."""
    other = path.parent.parent / "saved"
    qembag.save_tables(other, tables, **more)
    return other.read_bytes()


def made_of(*arguments: Any, **more: Any) -> bytes:
    """The bytes that `quantize_to_file` writes, alone in their folder."""
    qembag.quantize_to_file(*arguments, **more)
    path = Path(arguments[1])
    assert os.listdir(path.parent) == [path.name]
    return path.read_bytes()


def data_of(content: bytes) -> bytes:
    return content[8 + int.from_bytes(content[:8], "little") :]


class Interruption(Exception):
    """Raised by a callback."""


def stop_after(rows: int) -> Any:
    """A callback that interrupts when so many rows are done."""

    def callback(done: int, total: int | None, size: int) -> None:
        if done >= rows:
            raise Interruption

    return callback


def interrupt(*arguments: Any, after: int, **more: Any) -> None:
    with pytest.raises(Interruption):
        qembag.quantize_to_file(*arguments, progress=stop_after(after), **more)
    path = Path(arguments[1])
    assert os.listdir(path.parent) == [part_of(path).name]


def odd_blocks(weights: np.ndarray, seed: int = 0) -> Any:
    """The rows as an iterable of blocks of all sizes, none among them."""
    rng = np.random.default_rng(seed)
    borders = np.sort(rng.integers(0, len(weights) + 1, size=20))
    return iter(np.split(weights, borders))


# ---- The same bytes --------------------------------------------------------------------------------------------------

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"scale_dtype": "float16"},
    {"scale_dtype": "float32", "scale_first": True, "group_size": 16},
    {"row_alignment": 64},
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
@pytest.mark.parametrize(("bits", "method"), [(8, "minmax"), (4, "minmax"), (2, "minmax"), (4, "greedy")])
def test_every_source_gives_the_bytes_of_save_tables(weights, tmp_path, path, bits, method, options):
    expected = saved(path, qembag.quantize(weights, bits, method=method, **options))
    for name, source in every_source(weights, tmp_path).items():
        assert made_of(source, path, bits, method=method, **options) == expected, name


def test_an_iterable_gives_the_same_tables_with_a_longer_header(weights, path):
    expected = saved(path, qembag.quantize(weights, 4), metadata={"a": "b"})
    contents = [made_of(odd_blocks(weights, seed), path, 4, metadata={"a": "b"}) for seed in range(5)]
    assert len(set(contents)) == 1
    assert data_of(contents[0]) == data_of(expected)
    start = len(contents[0]) - len(data_of(contents[0]))
    assert start % 64 == 0
    assert contents[0][8:start].rstrip(b" ") == expected[8 : len(expected) - len(data_of(expected))].rstrip(b" ")
    tables = qembag.open_tables(path)
    assert (list(tables), tables.metadata) == (["table"], {"a": "b"})


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows_are_a_table_too(weights, path, num_rows):
    rows = weights[:num_rows]
    expected = saved(path, qembag.quantize(rows, 4))
    assert made_of(rows, path, 4) == expected
    assert data_of(made_of([rows, rows[:0]], path, 4)) == data_of(expected)


def test_threads_and_sizes_of_blocks_change_no_byte(weights, path, monkeypatch, threads):
    expected = saved(path, qembag.quantize(weights, 4, method="greedy"))
    for size in (1, 1000, 1 << 24):
        monkeypatch.setattr(sources, "BLOCK_BYTES", size)
        assert made_of(weights, path, 4, method="greedy") == expected
        assert made_of(weights, path, 4, method="greedy", num_threads=2) == expected


def test_a_file_that_is_there_is_replaced_and_keeps_its_permissions(weights, path):
    path.write_bytes(b"old")
    path.chmod(0o640)
    made_of(weights, path, 4)
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o640


def test_a_link_is_followed(weights, path):
    target = path.with_name("target")
    try:
        path.symlink_to(target)
    except OSError:
        pytest.skip("no links here")
    qembag.quantize_to_file(weights, path, 4)
    assert path.is_symlink()
    assert target.read_bytes() == saved(path, qembag.quantize(weights, 4))


# ---- Several tables --------------------------------------------------------------------------------------------------


@pytest.fixture
def model(weights: np.ndarray, tmp_path: Path) -> Path:
    """Three tables of different dims and types, and two tensors that are none."""
    tensors = {
        "layer.b": ("F32", weights.astype("<f4")),
        "layer.a": ("F16", weights[:100, :20].astype("<f2")),
        "head[0]": ("BF16", bits_of(weights[:50, :17])),
        "norm": ("F32", np.ones(4, "<f4")),
        "mask": ("U8", np.ones((4, 4), np.uint8)),
    }
    return write_safetensors(tmp_path / "model.safetensors", tensors)


def tables_of(weights: np.ndarray, *names: str, **options: Any) -> dict[str, qembag.QuantizedTable]:
    parts = {"layer.b": weights, "layer.a": weights[:100, :20], "head[0]": weights[:50, :17]}
    return {name: qembag.quantize(parts[name], **options) for name in names}


@pytest.mark.parametrize(
    ("tensors", "names"),
    [
        ("layer.a", ["layer.a"]),
        ("*", ["head[0]", "layer.a", "layer.b"]),
        ("layer.?", ["layer.a", "layer.b"]),
        (["layer.b", "layer.*"], ["layer.a", "layer.b"]),
        ("head[0]", ["head[0]"]),  # as a pattern it would be head0
        (("h*", "layer.a"), ["head[0]", "layer.a"]),
    ],
)
def test_tensors_become_tables_of_their_names(weights, model, path, tensors, names):
    expected = saved(path, tables_of(weights, *names, bits=4), metadata={"from": "a model"})
    assert made_of(model, path, 4, tensors=tensors, metadata={"from": "a model"}) == expected


def test_one_table_gets_the_name_asked_for(weights, model, path):
    table = qembag.quantize(weights, 4)
    assert made_of(weights, path, 4, name="é ") == saved(path, {"é ": table})
    assert made_of(model, path, 4, tensors="layer.b", name="b") == saved(path, {"b": table})


@pytest.mark.parametrize(
    ("more", "error", "text"),
    [
        ({}, ValueError, "must hold one 2-D tensor of floats where none is named; there are: 'head"),
        (
            {"tensors": "x*"},
            ValueError,
            r"^tensors must match 2-D tensors of floats, got 'x\*'; in .* there are: 'head",
        ),
        ({"tensors": "mask"}, ValueError, "^tensors must match 2-D tensors of floats, got 'mask'"),
        ({"tensors": []}, ValueError, "^tensors must name at least one tensor, got none"),
        ({"tensors": 5}, TypeError, "^tensors must be a string or a list of strings, got int 5"),
        ({"tensors": [5]}, TypeError, "^tensors must be a string or a list of strings, got list"),
        ({"tensors": "*", "name": "a"}, ValueError, "^name must be None for several tables, got 'a' for 3"),
        ({"tensors": "layer.a", "name": ""}, ValueError, "^name must be a text other than ''"),
        ({"tensors": "layer.a", "name": "\ud800"}, ValueError, "^name must be a text other than ''"),
        ({"tensors": "layer.a", "name": 5}, TypeError, "^name must be a str or None, got int 5"),
        ({"tensors": "layer.a", "metadata": {"qembag.x": ""}}, ValueError, "^metadata must not have keys that begin"),
        ({"tensors": "layer.a", "bits": 3}, ValueError, "^bits must be 8, 4 or 2, got 3"),
        ({"tensors": "layer.a", "method": "best"}, ValueError, "^method must be"),
        ({"tensors": "layer.a", "num_threads": 0}, ValueError, "^num_threads must be at least 1"),
        ({"tensors": "layer.a", "progress": 5}, TypeError, "^progress must be True, False or a function, got int 5"),
        ({"tensors": "layer.a", "resume": None}, TypeError, "^resume must be True or False, got NoneType"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(model, path, more, error, text):
    with pytest.raises(error, match=text):
        qembag.quantize_to_file(model, path, **more)
    assert os.listdir(path.parent) == []


def test_a_wrong_argument_leaves_unfinished_work_alone(weights, path):
    interrupt(weights, path, 4, after=50)
    before = part_of(path).read_bytes()
    with pytest.raises(ValueError, match=r"^bits must be"):
        qembag.quantize_to_file(weights, path, 5)
    assert part_of(path).read_bytes() == before


def test_arrays_have_no_tensors(weights, path):
    with pytest.raises(ValueError, match=r"^tensors must be None for a source that is no file, got 'a'"):
        qembag.quantize_to_file(weights, path, tensors="a")


@pytest.mark.parametrize("wrong", [5, None, b"a", "", "a\0b", "a.index.json"])
def test_what_is_no_path_of_a_file_is_refused(weights, wrong):
    with pytest.raises((TypeError, ValueError), match=r"^path must"):
        qembag.quantize_to_file(weights, wrong)


def test_a_folder_is_refused_before_the_work(weights, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        qembag.quantize_to_file(weights, tmp_path / "folder", progress=stop_after(0))
    assert os.listdir(tmp_path) == ["folder"]


# ---- Interrupted and resumed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f4littleC", "f2bigF", "F64", "BF16", "index", "array", "FloatTable", "blocks"])
def test_an_interruption_at_every_block_costs_no_byte(weights, tmp_path, path, name):
    weights = weights[:100]
    made = every_source(weights, tmp_path)
    source = (lambda: odd_blocks(weights)) if name == "blocks" else (lambda: made[name])
    expected = made_of(source(), path, 4)
    path.unlink()
    stops: list[int] = []
    qembag.quantize_to_file(source(), path, 4, progress=lambda done, *_: stops.append(done))
    path.unlink()
    assert len(stops) >= 8
    for rows in stops:
        interrupt(source(), path, 4, after=rows)
        assert made_of(source(), path, 4, resume=True) == expected
        path.unlink()
    # All in one file, each run a block further.
    runs = 0
    while not path.exists():
        runs += 1
        with contextlib.suppress(Interruption):
            qembag.quantize_to_file(source(), path, 4, progress=stop_after(0), resume=True)
    assert runs >= 8
    assert made_of(source(), path, 4, resume=True) == expected


def test_several_tables_resume_at_every_block(weights, model, path):
    expected = saved(path, tables_of(weights, "layer.a", "layer.b", "head[0]", bits=4))
    stops: list[int] = []
    qembag.quantize_to_file(model, path, 4, tensors="*", progress=lambda done, *_: stops.append(done))
    path.unlink()
    assert {50, 150, 450} <= set(stops)
    for rows in [*stops[::4], 50, 150, 450]:
        interrupt(model, path, 4, tensors="*", after=rows)
        assert made_of(model, path, 4, tensors="*", resume=True) == expected
        path.unlink()


def test_resuming_makes_no_row_again_but_the_last(weights, path, monkeypatch):
    counted: list[int] = []
    whole = to_file.quantize_part

    def counting(block: np.ndarray, **options: Any) -> Any:
        counted.append(len(block))
        return whole(block, **options)

    monkeypatch.setattr(to_file, "quantize_part", counting)
    interrupt(weights, path, 4, after=210)
    counted.clear()
    made_of(weights, path, 4, resume=True)
    assert sum(counted) == NUM_ROWS - 210 + to_file.CHECKED_ROWS


def test_blocks_of_other_borders_resume(weights, path):
    expected = made_of(odd_blocks(weights), path, 4)
    for after in range(1, NUM_ROWS, 40):
        path.unlink()
        interrupt(odd_blocks(weights, 1), path, 4, after=after)
        assert made_of(odd_blocks(weights, 2), path, 4, resume=True) == expected


def test_resume_without_unfinished_work_begins(weights, path):
    expected = made_of(weights, path, 4)
    assert made_of(weights, path, 4, resume=True) == expected
    for nothing in (b"", bytes(10), bytes(4000)):  # of a run that was killed before it began
        part_of(path).write_bytes(nothing)
        assert made_of(weights, path, 4, resume=True) == expected


def test_without_resume_unfinished_work_is_begun_anew(weights, path):
    interrupt(weights + 1, path, 8, after=100)
    assert made_of(weights, path, 4) == saved(path, qembag.quantize(weights, 4))
    # Even a complete one, which could not take its name.
    part_of(path).write_bytes(saved(path, qembag.quantize(weights + 1, 8)))
    assert made_of(weights, path, 4) == saved(path, qembag.quantize(weights, 4))


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, OSError, ValueError])
def test_what_a_source_raises_leaves_work_to_go_on_with(weights, path, interruption):
    def broken():
        yield weights[:150]
        raise interruption("of the source")

    expected = made_of([weights], path, 4)
    path.unlink()
    with pytest.raises(interruption, match=r"^of the source$"):
        qembag.quantize_to_file(broken(), path, 4)
    done: list[int] = []
    assert made_of([weights], path, 4, resume=True, progress=lambda rows, *_: done.append(rows)) == expected
    assert min(done) > 150


def test_a_file_that_cannot_be_read_leaves_work_to_go_on_with(weights, tmp_path, path):
    source = tmp_path / "table.npy"
    np.save(source, weights)
    expected = made_of(source, path, 4)
    path.unlink()
    status = source.stat()

    def cut(done: int, *_: Any) -> None:
        if done > 100 and source.stat().st_size == status.st_size:
            os.truncate(source, 1000)

    with pytest.raises(OSError, match="was cut short while it was being read"):
        qembag.quantize_to_file(source, path, 4, progress=cut)
    np.save(source, weights)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert made_of(source, path, 4, resume=True) == expected


# ---- Other work ------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "bits": 4,
    "method": "minmax",
    "scale_dtype": "float16",
    "scale_first": False,
    "group_size": None,
    "row_alignment": 1,
    "metadata": None,
}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"bits": 2}, "bits was 4, got 2"),
        ({"bits": 2, "method": "greedy"}, "bits was 4, got 2"),
        ({"method": "greedy"}, "method was 'minmax', got 'greedy'"),
        ({"scale_dtype": np.float32}, "scale_dtype was 'float16', got 'float32'"),
        ({"scale_first": True}, "scale_first was False, got True"),
        ({"group_size": 16}, "group_size was None, got 16"),
        ({"row_alignment": 64}, "row_alignment was 1, got 64"),
        ({"metadata": {"a": "b"}}, "metadata was {}, got {'a': 'b'}"),
        ({"name": "other"}, r"the names of tables was \['table'\], got \['other'\]"),
    ],
)
@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_other_options_do_not_go_on(weights, path, kind, more, text):
    source = (lambda: [weights]) if kind == "blocks" else (lambda: weights)
    interrupt(source(), path, **OPTIONS, after=100)
    before = part_of(path).read_bytes()
    with pytest.raises(ValueError, match=f"^resume must go on with what .*part was begun with: {text}"):
        qembag.quantize_to_file(source(), path, **(OPTIONS | more), resume=True)
    assert part_of(path).read_bytes() == before
    made_of(source(), path, **OPTIONS, resume=True, num_threads=2)  # on which no byte depends


def test_another_source_does_not_go_on(weights, tmp_path, path):
    source = tmp_path / "table.npy"
    np.save(source, weights.astype("<f4"))
    interrupt(source, path, 4, after=100)
    before = part_of(path).read_bytes()
    status = source.stat()
    for other, text in (
        (weights[:-1], "table's rows was 300, got 299"),
        (weights[:, :-1], "table's dim was 24, got 23"),
        ([weights], "table's rows was 300, got None"),
        (weights.astype(np.float64), "table's dtype was '<f4', got 'float64'"),
    ):
        with pytest.raises(ValueError, match=f"^resume must go on with what .* begun with: {text}"):
            qembag.quantize_to_file(other, path, 4, resume=True)
    os.utime(source, ns=(5, 5))
    with pytest.raises(ValueError, match=r"table's file's time was [0-9]+, got 5$"):
        qembag.quantize_to_file(source, path, 4, resume=True)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with open(source, "ab") as file:
        file.write(b"more")
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match=r"table's file's size was [0-9]+, got [0-9]+$"):
        qembag.quantize_to_file(source, path, 4, resume=True)
    assert part_of(path).read_bytes() == before


@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_changed_rows_are_found(weights, path, kind):
    source = (lambda rows: [rows]) if kind == "blocks" else (lambda rows: rows)
    interrupt(source(weights), path, 4, after=100)
    changed = weights.copy()
    changed[95] = weights[0]  # of the 105 that were done
    with pytest.raises(
        ValueError, match=r"^resume must go on with the rows that .* was begun with, got others from row"
    ):
        qembag.quantize_to_file(source(changed), path, 4, resume=True)
    assert made_of(source(weights), path, 4, resume=True)


def test_fewer_blocks_than_before_are_found(weights, path):
    interrupt([weights], path, 4, after=100)
    for rows in (0, 50, 104):
        with pytest.raises(ValueError, match=r"^source must have the 105 rows that .* has already, got"):
            qembag.quantize_to_file([weights[:rows]], path, 4, resume=True)
    assert data_of(made_of([weights[:105]], path, 4, resume=True)) == qembag.quantize(weights[:105], 4).data.tobytes()


# ---- Damaged journals ------------------------------------------------------------------------------------------------


def slots_at(part: Path) -> int:
    return FRONT.unpack_from(part.read_bytes())[1] + TEXT.size


def overwrite(part: Path, position: int, data: bytes) -> None:
    with open(part, "r+b") as file:
        file.seek(position)
        file.write(data)


def rows_in_slots(part: Path) -> list[int]:
    content, at = part.read_bytes(), slots_at(part)
    return [SLOT.unpack_from(content, at + number * SLOT.size)[0] for number in range(SLOTS)]


@pytest.mark.parametrize("kind", ["array", "blocks"])
@pytest.mark.parametrize("torn", [b"\xff" * SLOT.size, bytes(SLOT.size), b"\x01" * 5])
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_torn_slots_cost_work_and_no_byte(weights, path, kind, torn, which):
    source = (lambda: [weights]) if kind == "blocks" else (lambda: weights)
    expected = made_of(source(), path, 4)
    path.unlink()
    interrupt(source(), path, 4, after=100)
    rows = rows_in_slots(part_of(path))
    assert max(rows) == 105
    for number in which:
        overwrite(part_of(path), slots_at(part_of(path)) + number * SLOT.size, torn)
    left = [count for number, count in enumerate(rows) if number not in which]
    done: list[int] = []
    assert made_of(source(), path, 4, resume=True, progress=lambda count, *_: done.append(count)) == expected
    assert min(done) > max(left, default=0)


def test_a_slot_of_another_journal_does_not_count(weights, path):
    """The check is over the journal's text too."""
    interrupt(weights, path, 8, after=280)
    slots = part_of(path).read_bytes()[slots_at(part_of(path)) :][: SLOTS * SLOT.size]
    interrupt(weights, path, 4, after=100)
    overwrite(part_of(path), slots_at(part_of(path)), slots)
    assert made_of(weights, path, 4, resume=True) == saved(path, qembag.quantize(weights, 4))


@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_unfinished_files_that_are_cut_are_refused_or_finished_right(weights, path, kind):
    source = (lambda: [weights]) if kind == "blocks" else (lambda: weights)
    expected = made_of(source(), path, 4)
    path.unlink()
    interrupt(source(), path, 4, after=100)
    content = part_of(path).read_bytes()
    refused = 0
    for length in [*range(0, len(content), 61), len(content) - 1]:
        part_of(path).write_bytes(content[:length])
        try:
            qembag.quantize_to_file(source(), path, 4, resume=True)
        except ValueError as error:
            assert str(error).startswith("resume must ")  # noqa: PT017
            assert part_of(path).read_bytes()[:16] == content[:length][:16]
            refused += 1
        else:
            assert path.read_bytes() == expected
            path.unlink()
    assert refused > 5


def test_flipped_bytes_of_a_journal_are_found(weights, path, rng):
    interrupt(weights, path, 4, after=100)
    content = part_of(path).read_bytes()
    expected = saved(path, qembag.quantize(weights, 4))
    journal = slots_at(part_of(path)) - TEXT.size
    places = [*range(FRONT.size), *rng.integers(journal, len(content), size=100).tolist()]
    for place in places:
        part_of(path).write_bytes(content)
        overwrite(part_of(path), place, bytes([content[place] ^ 1 << place % 8]))
        try:
            qembag.quantize_to_file(weights, path, 4, resume=True)
        except ValueError as error:
            assert str(error).startswith("resume must ")  # noqa: PT017
        else:
            assert path.read_bytes() == expected


def test_nobody_takes_an_unfinished_file_for_a_table(weights, path):
    interrupt(weights, path, 4, after=100)
    with pytest.raises(ValueError, match=r"\.part"):
        qembag.open_table(part_of(path))


# ---- The last moments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_an_end_at_every_step_of_finishing_costs_no_byte(weights, path, kind, monkeypatch):
    """The file at each moment is kept, as a kill would leave it, and gone on from: halfway through each write too, but
    for the front, which lies in one sector."""
    source = (lambda: [weights]) if kind == "blocks" else (lambda: weights)
    moments: list[bytes] = []
    put, replace = unfinished.Unfinished._put, os.replace

    def noted(self: Any, position: int, data: bytes) -> None:
        for part in [data] if position == 0 else [data[: len(data) // 2], data]:
            put(self, position, part)
            moments.append(part_of(path).read_bytes())

    monkeypatch.setattr(unfinished.Unfinished, "_put", noted)
    monkeypatch.setattr(os, "replace", lambda a, b: (moments.append(Path(a).read_bytes()), replace(a, b))[1])
    expected = made_of(source(), path, 4)
    monkeypatch.undo()
    assert moments[-1] == expected
    for content in moments[2:12] + moments[-12:]:
        path.unlink()
        part_of(path).write_bytes(content)
        assert made_of(source(), path, 4, resume=True) == expected


@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_an_interruption_at_every_step_of_finishing_costs_no_byte(weights, path, kind, monkeypatch):
    source = (lambda: [weights]) if kind == "blocks" else (lambda: weights)
    expected = made_of(source(), path, 4)
    finish, put = unfinished.Unfinished.finish, unfinished.Unfinished._put
    steps = 0
    for stop in range(20):
        left = stop

        def stopping(*arguments: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            put(*arguments)

        def finishing(*arguments: Any) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(unfinished.Unfinished, "_put", stopping)
                finish(*arguments)

        path.unlink()
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(unfinished.Unfinished, "finish", finishing)
            qembag.quantize_to_file(source(), path, 4)
        if path.exists():
            break
        steps += 1
        assert made_of(source(), path, 4, resume=True) == expected
    assert steps == 4  # a slot, the header in two parts, spaces


def test_an_interruption_of_the_last_flush_costs_no_byte(weights, path, monkeypatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    expected = made_of([weights], path, 4)
    path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qembag.quantize_to_file([weights], path, 4)
    assert part_of(path).read_bytes() == expected
    assert made_of([weights], path, 4, resume=True) == expected


def test_an_interruption_before_there_is_a_journal_leaves_nothing(weights, path, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished.Unfinished, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qembag.quantize_to_file(weights, path, 4)
    assert os.listdir(path.parent) == []


def test_a_slot_replaces_the_older_one(path):
    """So that the newer one is still there if this write is torn."""
    part = unfinished.Unfinished(path)
    part.begin(b"{}", FRONT.size)
    for rows in (5, 9):
        part.rows_done = rows
        part.note(now=True)
    part.close()
    for rows in (12, 20, 21):
        before = max(rows_in_slots(part_of(path)))
        part = unfinished.Unfinished(path)
        assert part.resume(b"{}")
        assert part.rows_done == before
        part.rows_done = rows
        part.note(now=True)
        part.close()
        assert set(rows_in_slots(part_of(path))) == {before, rows}


@pytest.mark.parametrize("kind", ["array", "blocks"])
def test_a_whole_part_of_another_source_is_refused(weights, path, kind):
    source = (lambda rows: [rows]) if kind == "blocks" else (lambda rows: rows)
    whole = made_of(source(weights), path, 4)
    path.unlink()
    part_of(path).write_bytes(whole)
    changed = weights.copy()
    changed[-1] = weights[0]
    with pytest.raises(ValueError, match=r"^resume must"):
        qembag.quantize_to_file(source(changed), path, 4, resume=True)
    longer = np.concatenate([weights, weights])
    with pytest.raises(ValueError, match=r"^resume must"):
        qembag.quantize_to_file(source(longer), path, 4, resume=True)
    assert part_of(path).read_bytes() == whole


# ---- Failures that leave nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "file", "blocks"])
@pytest.mark.parametrize("row", [0, 123, NUM_ROWS - 1])
def test_a_bad_row_is_named_by_its_number_in_the_whole_source(weights, tmp_path, path, kind, row):
    weights[row, 3] = np.nan
    np.save(tmp_path / "table.npy", weights)
    source = {"array": weights, "file": tmp_path / "table.npy", "blocks": odd_blocks(weights)}[kind]
    with pytest.raises(
        ValueError, match=rf"^source\[{row}\] must be finite to be quantized, got a NaN or an infinity$"
    ):
        qembag.quantize_to_file(source, path, 4)
    assert os.listdir(path.parent) == []


def test_a_bad_row_of_a_tensor_is_named_with_it(weights, tmp_path, path):
    bad = weights.copy()
    bad[5, 20] = np.inf
    model = write_safetensors(
        tmp_path / "a.safetensors", {"a": ("F32", weights.astype("<f4")), "b": ("F32", bad.astype("<f4"))}
    )
    with pytest.raises(ValueError, match=r"^b\[5\] \(group 1, elements 16 to 23\) must be finite"):
        qembag.quantize_to_file(model, path, 4, tensors="*", group_size=16)
    assert os.listdir(path.parent) == []


def test_a_bad_row_is_found_by_a_resumed_run_too(weights, path):
    bad = weights.copy()
    bad[222] = np.inf
    interrupt(bad, path, 4, after=100)
    with pytest.raises(ValueError, match=r"^source\[222\] must be finite"):
        qembag.quantize_to_file(bad, path, 4, resume=True)
    assert os.listdir(path.parent) == []


def test_a_bad_block_leaves_nothing(weights, path):
    with pytest.raises(ValueError, match=r"^source's block 1 must have 2 dimensions"):
        qembag.quantize_to_file([weights, weights[:, 1:]], path, 4)
    assert os.listdir(path.parent) == []


class FullDisk(io.FileIO):
    """A file on a disk with room for so many bytes."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("room", [0, 20, 1000, 4100])
def test_a_full_disk_is_one_error_and_leaves_nothing(weights, path, room, monkeypatch):
    monkeypatch.setattr(FullDisk, "room", room)
    monkeypatch.setattr(unfinished, "BUFFER_BYTES", 1)
    opened = open

    def full(name: Any, mode: str, **more: Any) -> Any:
        opened(name, "ab").close()
        return io.BufferedRandom(FullDisk(name, "r+"))

    monkeypatch.setattr(unfinished, "open", full, raising=False)
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"No space left on device: .*part") as caught:
        qembag.quantize_to_file(weights, path, 4)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", ["_sync", "os.fsync"])
def test_a_failed_flush_leaves_nothing(weights, path, name, monkeypatch):
    def fails(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    module, _, function = name.rpartition(".")
    monkeypatch.setattr(os if module else unfinished, function, fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        qembag.quantize_to_file(weights, path, 4)
    assert os.listdir(path.parent) == []


def test_a_whole_file_that_may_not_take_its_name_waits(weights, path, monkeypatch):
    """As on Windows, while the file that is there is mapped."""

    def refused(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    expected = made_of(weights, path, 4)
    path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refused)
        with pytest.raises(PermissionError):
            qembag.quantize_to_file(weights, path, 4)
    assert part_of(path).read_bytes() == expected
    assert made_of(weights, path, 4, resume=True) == expected


@pytest.mark.skipif(UNDER_SANITIZER or not hasattr(signal, "SIGXFSZ"), reason="limits a process")
def test_a_file_that_may_not_grow_is_one_error(path):
    """The system's own error, which comes from the kernel."""
    code = (
        "import resource, signal, sys, numpy as np, qembag\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    qembag.quantize_to_file(np.ones((100_000, 8), np.float32), sys.argv[1], 4)\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stderr, done.stdout) == ("", f"[Errno {errno.EFBIG}] {os.strerror(errno.EFBIG)}: '{path}.part'\n")
    assert os.listdir(path.parent) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_one_error(weights, path):
    path.parent.chmod(0o500)
    with pytest.raises(PermissionError):
        qembag.quantize_to_file(weights, path, 4)
    path.parent.chmod(0o700)
    assert os.listdir(path.parent) == []


def test_a_folder_that_is_not_there_is_one_error(weights, tmp_path):
    with pytest.raises(FileNotFoundError):
        qembag.quantize_to_file(weights, tmp_path / "no" / "table", 4)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        qembag.quantize_to_file(weights, tmp_path / "file" / "table", 4)


# ---- Two at once -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not unfinished.HAS_LOCKS, reason="no locks here")
@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_on_the_same_path_is_refused(weights, path, resume):
    errors = []

    def again(done: int, *_: Any) -> None:
        if 0 < done < 50:
            with pytest.raises(OSError, match=r"another process is writing it: .*part") as caught:
                qembag.quantize_to_file(weights, path, 4, resume=resume)
            errors.append(caught.value)

    assert made_of(weights, path, 4, progress=again) == saved(path, qembag.quantize(weights, 4))
    assert errors


@pytest.mark.skipif(not unfinished.HAS_LOCKS, reason="no locks here")
def test_a_file_that_another_run_finished_meanwhile_is_not_written_to(weights, path, monkeypatch):
    """The other one renames it after we have opened it, and before we have locked it."""
    import fcntl

    flock = fcntl.flock
    others: list[bytes] = []

    def late(file: Any, how: int) -> None:
        if not others:
            others.append(b"finished by another")
            part_of(path).write_bytes(others[0])
            os.replace(part_of(path), path.with_name("finished"))
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    qembag.quantize_to_file(weights, path, 4)
    assert path.with_name("finished").read_bytes() == others[0]
    assert path.read_bytes() == saved(path, qembag.quantize(weights, 4))


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_a_callback_hears_of_rows_and_bytes(weights, tmp_path, path):
    heard: list[Any] = []
    qembag.quantize_to_file(weights, path, 4, progress=lambda *now: heard.append(now))
    assert heard == [(min(end, 300), 300, min(end, 300) * DIM * 4) for end in range(7, 307, 7)]
    heard.clear()
    qembag.quantize_to_file([weights.astype(np.float16)], path, 4, progress=lambda *now: heard.append(now))
    assert {total for _, total, _ in heard} == {None}
    assert heard[-1] == (300, None, 300 * DIM * 2)
    heard.clear()
    path.unlink()
    interrupt(weights, path, 4, after=140)
    qembag.quantize_to_file(weights, path, 4, resume=True, progress=lambda *now: heard.append(now))
    assert heard[0] == (144, 300, 144 * DIM * 4)  # the blocks begin with the rows that are checked


def test_a_bar_shows_rows_bytes_and_time(weights, path, monkeypatch):
    pytest.importorskip("tqdm")
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    qembag.quantize_to_file(weights, path, 4, progress=True)
    last = shown.getvalue().rstrip().split("\r")[-1]
    assert last.startswith("100%")
    assert "28.8k/28.8k" in last
    assert "B/s, 300 of 300 rows]" in last
    shown.truncate(0)
    qembag.quantize_to_file([weights], path, 4, progress=True)
    assert "300 rows]" in shown.getvalue()


def test_a_resumed_bar_begins_where_the_run_does(weights, path, monkeypatch):
    pytest.importorskip("tqdm")
    interrupt(weights, path, 4, after=140)
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    qembag.quantize_to_file(weights, path, 4, progress=True, resume=True)
    first = next(text for text in shown.getvalue().split("\r") if text.strip())
    assert first.lstrip().startswith("47%")


def test_a_bar_starts_no_thread_that_stays(weights, path, monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    before = (tqdm.tqdm.monitor, tqdm.tqdm.__dict__.get("_lock"))
    qembag.quantize_to_file(weights, path, 4, progress=True)
    assert (tqdm.tqdm.monitor, tqdm.tqdm.__dict__.get("_lock")) == before


def test_a_bar_needs_its_extra(weights, path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"^progress=True needs the tqdm package: pip install 'qembag\[progress\]'$"):
        qembag.quantize_to_file(weights, path, 4, progress=True)
    assert os.listdir(path.parent) == []


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_source(path, monkeypatch):
    monkeypatch.undo()  # blocks of their own size
    block = np.ones((4096, 64), np.float32)
    tracemalloc.start()
    qembag.quantize_to_file((block for _ in range(200)), path, 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert qembag.open_table(path).num_rows == 200 * 4096
    assert peak < 4 << 20


def test_memory_of_a_file_is_two_blocks(tmp_path, path, monkeypatch):
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 20)
    np.save(tmp_path / "table.npy", np.ones((1 << 16, 64), np.float32))
    tracemalloc.start()
    qembag.quantize_to_file(tmp_path / "table.npy", path, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20


# ---- Kills -----------------------------------------------------------------------------------------------------------

CHILD = """
import sys
import numpy as np, qembag
from qembag.formats import sources, unfinished

sources.BLOCK_BYTES, unfinished.SECONDS_BETWEEN_SLOTS = 4096, 0.002

def blocks(weights):
    for start in range(0, len(weights), 50):
        yield weights[start : start + 50]

source = sys.argv[1] if sys.argv[3] == "file" else blocks(np.load(sys.argv[1]))
print("begins", flush=True)
qembag.quantize_to_file(source, sys.argv[2], 4, method="greedy", resume=True)
print("ends", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(UNDER_SANITIZER or not hasattr(signal, "SIGKILL"), reason="starts and kills processes")
@pytest.mark.parametrize("kind", ["file", "blocks"])
def test_kills_at_random_moments_cost_no_byte(tmp_path, path, rng, kind):
    weights = rng.normal(size=(40_000, 64)).astype(np.float32)
    np.save(tmp_path / "table.npy", weights)
    expected = qembag.quantize(weights, 4, method="greedy").data.tobytes()
    command = [sys.executable, "-c", CHILD, str(tmp_path / "table.npy"), str(path), kind]
    kills = 0
    for _ in range(40):
        child = subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "begins\n"
        try:
            child.wait(float(rng.uniform(0, 0.15)))
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
        if path.exists():
            break
        kills += 1
        assert set(os.listdir(path.parent)) <= {part_of(path).name}
    else:
        subprocess.run(command, env=child_environment(), check=True, stdout=subprocess.PIPE)
    assert kills
    assert data_of(path.read_bytes()) == expected
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(UNDER_SANITIZER or os.name == "nt", reason="sends a signal to a process")
def test_ctrl_c_leaves_work_to_go_on_with(tmp_path, path, weights):
    """In a process of its own."""
    code = (
        "import os, signal, sys, numpy as np, qembag\n"
        # Python has no handler of its own where the signal was ignored at its start, as in a shell's background.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def blocks():\n"
        "    yield np.load(sys.argv[1])[:100]\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    yield np.load(sys.argv[1])[100:]\n"
        "try:\n"
        "    qembag.quantize_to_file(blocks(), sys.argv[2], 4)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    np.save(tmp_path / "table.npy", weights)
    command = [sys.executable, "-c", code, str(tmp_path / "table.npy"), str(path)]
    done = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
    assert os.listdir(path.parent) == [part_of(path).name]
    heard: list[int] = []
    made_of([weights], path, 4, resume=True, progress=lambda rows, *_: heard.append(rows))
    assert min(heard) > 100


# ---- Files of others -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"half of a download", b"\x00" * 8 + b"{}"])
def test_a_part_of_somebody_elses_is_left_alone(path, weights, content):
    part_of(path).write_bytes(content)
    for resume in (False, True):
        with pytest.raises((FileExistsError, ValueError), match="part"):
            qembag.quantize_to_file(weights, path, 4, resume=resume)
        assert part_of(path).read_bytes() == content
        assert not path.exists()


def interrupting(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are followed there")
def test_a_part_that_is_a_link_is_not_followed(path, weights):
    victim = path.parent / "victim"
    victim.write_bytes(b"kept")
    part_of(path).symlink_to(victim)
    with pytest.raises(OSError, match="part"):
        qembag.quantize_to_file(weights, path, 4)
    assert victim.read_bytes() == b"kept"


def test_a_source_is_not_replaced_by_its_codes(path, weights):
    qembag.save_tables(path, weights)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^path must be another file than source, got "):
        qembag.quantize_to_file(path, path.parent / "." / path.name, 4)
    assert path.read_bytes() == before


def test_a_complete_part_of_other_rows_is_not_taken(tmp_path, path, weights, monkeypatch):
    """It has no journal any more: all of its rows are compared."""
    np.save(tmp_path / "a.npy", weights)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupting)
        with pytest.raises(KeyboardInterrupt):
            qembag.quantize_to_file(tmp_path / "a.npy", path, 4)
    changed = weights.copy()
    changed[0] += 1
    np.save(tmp_path / "a.npy", changed)
    with pytest.raises(ValueError, match=r"^resume must go on with the rows that .* was begun with"):
        qembag.quantize_to_file(tmp_path / "a.npy", path, 4, resume=True)
    np.save(tmp_path / "a.npy", weights)
    assert made_of(tmp_path / "a.npy", path, 4, resume=True) == saved(path, qembag.quantize(weights, 4))


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_a_part_is_as_private_as_the_file_that_it_replaces(path, weights):
    qembag.save_tables(path, weights)
    path.chmod(0o600)
    with pytest.raises(KeyboardInterrupt):
        qembag.quantize_to_file(weights, path, 4, progress=interrupting)
    assert part_of(path).stat().st_mode & 0o777 == 0o600
