"""Arrays of other libraries, in and out: by DLPack alone here, and as torch, JAX (in dlpack_of_jax.py) and the array API's
own test library have them where those are installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qembag
from conftest import child_environment

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4) - 3
INDICES, OFFSETS, LENGTHS = np.array([1, 9, 0, 3]), np.array([0, 3]), np.array([3, 1])
WEIGHTS = np.array([0.5, 2, -1, 1], np.float32)


class Exported:
    """Speaks DLPack and nothing else, from whatever device it says."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device_pair, self.calls = array, device, 0

    def __dlpack__(self, *arguments: Any, **more: Any) -> Any:
        self.calls += 1
        return self.array.__dlpack__(*arguments, **more)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device_pair


# Older versions of NumPy take everything read-only.
IMPORTS_WRITEABLE = np.from_dlpack(Exported(np.zeros(1))).flags.writeable


@pytest.fixture
def table(bits):
    return qembag.quantize(ROWS, bits)


@pytest.fixture
def expected(table):
    return qembag.embedding_bag(table, INDICES, OFFSETS, per_sample_weights=WEIGHTS)


def call(table, make, **more):
    """A lookup of which each argument is another library's array."""
    return qembag.embedding_bag(table, make(INDICES), make(OFFSETS), per_sample_weights=make(WEIGHTS), **more)


# ---- DLPack alone ----------------------------------------------------------------------------------------------------


def test_each_argument_may_speak_dlpack_alone(table, expected, same_bits):
    same_bits(call(table, Exported), expected)
    by_lengths = qembag.embedding_bag(
        table, Exported(INDICES), lengths=Exported(LENGTHS), per_sample_weights=Exported(WEIGHTS)
    )
    same_bits(by_lengths, expected)
    same_bits(qembag.embedding(table, Exported(INDICES.reshape(2, 2))), qembag.embedding(table, INDICES.reshape(2, 2)))
    same_bits(qembag.quantize(Exported(ROWS), table.bits).data, table.data)


def test_a_table_of_floats_may_speak_dlpack_alone(same_bits):
    expected = qembag.embedding_bag(ROWS, INDICES, OFFSETS)
    same_bits(qembag.embedding_bag(Exported(ROWS), INDICES, OFFSETS), expected)
    table = qembag.FloatTable(Exported(ROWS))
    assert np.shares_memory(table.data, ROWS)
    same_bits(qembag.embedding_bag(table, INDICES, OFFSETS), expected)


def test_it_is_no_list_whose_type_may_be_chosen(table):
    with pytest.raises(TypeError, match=r"^indices must be an array of integers, got a float64 array of shape \(0,\)$"):
        qembag.embedding_bag(table, Exported(np.empty(0)), OFFSETS[:1])
    with pytest.raises(
        TypeError, match=r"^per_sample_weights must be an array of float32, float16 or float64, got an int64"
    ):
        qembag.embedding_bag(table, INDICES, OFFSETS, per_sample_weights=Exported(INDICES.astype(np.int64)))


def test_memory_is_kept_while_a_table_uses_it():
    table = qembag.FloatTable(Exported(ROWS.copy()))
    assert np.array_equal(table[9], ROWS[9])


@pytest.mark.parametrize("device", [(2, 0), (8, 0), (10, 3)])
@pytest.mark.parametrize("name", ["indices", "offsets", "per_sample_weights", "out", "table"])
def test_memory_of_another_device_is_never_asked_for(table, name, device):
    away = Exported(
        {"indices": INDICES, "offsets": OFFSETS, "out": np.empty((2, 4), np.float32)}.get(name, ROWS), device
    )
    given = {"table": table, "indices": INDICES, "offsets": OFFSETS} | {name: away}
    with pytest.raises(TypeError, match=rf"^{name} must be an array, got a Exported on device {device[0]}:{device[1]}"):
        qembag.embedding_bag(**given)
    assert away.calls == 0


def test_errors_of_an_export_name_the_argument(table):
    class Broken(Exported):
        def __dlpack__(self, *arguments: Any, **more: Any) -> Any:
            raise BufferError("in use")

    with pytest.raises(TypeError, match=r"^offsets must be an array, got Broken: in use$"):
        qembag.embedding_bag(table, INDICES, Broken(OFFSETS))
    with pytest.raises(TypeError, match=r"^out must be an array, got Broken: in use$"):
        qembag.embedding_bag(table, INDICES, OFFSETS, out=Broken(np.empty((2, 4), np.float32)))


@pytest.mark.skipif(not IMPORTS_WRITEABLE, reason="this NumPy's imports are read-only")
def test_an_output_that_speaks_dlpack_alone_is_written_in_place(table, expected, same_bits):
    memory = np.empty((2, 4), np.float32)
    out = Exported(memory)
    assert call(table, Exported, out=out) is out
    same_bits(memory, expected)
    rows = Exported(np.empty((4, 4), np.float16))
    assert qembag.embedding(table, INDICES, out=rows) is rows
    same_bits(rows.array, qembag.embedding(table, INDICES, dtype=np.float16))


@pytest.mark.skipif(IMPORTS_WRITEABLE, reason="this NumPy's imports are writeable")
def test_an_output_that_this_numpy_cannot_write_to_is_refused(table):
    with pytest.raises(ValueError, match=r"^out must be writeable, got a read-only array$"):
        call(table, Exported, out=Exported(np.empty((2, 4), np.float32)))


def test_an_output_that_numpy_would_copy_is_refused(table):
    class Copied(Exported):
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return self.array.copy()

    out = Copied(np.full((2, 4), 7, np.float32))
    with pytest.raises(ValueError, match=r"^out must be an array, got Copied: NumPy makes a copy of it$"):
        call(table, Exported, out=out)
    assert (out.array == 7).all()


def test_an_output_that_speaks_no_dlpack_is_refused(table):
    with pytest.raises(TypeError, match=r"^out must be an array of float32, got bytearray$"):
        qembag.embedding_bag(table, INDICES, OFFSETS, out=bytearray(32))


def test_results_are_exported(table, expected, same_bits):
    same_bits(np.from_dlpack(call(table, Exported)).copy(), expected)


# ---- Other libraries -------------------------------------------------------------------------------------------------

OTHERS = [pytest.param("torch", marks=pytest.mark.torch), "array_api_strict"]


def imported(name):
    pytest.importorskip(name.partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs
        return importlib.import_module(name)


@pytest.fixture(params=OTHERS)
def other(request):
    return imported(request.param)


def test_arguments_may_be_arrays_of_another_library(table, other, expected, same_bits):
    same_bits(call(table, other.asarray), expected)
    by_lengths = qembag.embedding_bag(table, other.asarray(INDICES), lengths=other.asarray(LENGTHS))
    same_bits(by_lengths, qembag.embedding_bag(table, INDICES, OFFSETS))
    same_bits(qembag.embedding(table, other.asarray(INDICES)), qembag.embedding(table, INDICES))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_table_of_floats_may_be_an_array_of_another_library(other, dtype, same_bits):
    if not hasattr(other, dtype):
        pytest.skip("it has no such type")
    rows = ROWS.astype(dtype)
    expected = qembag.embedding_bag(rows, INDICES, OFFSETS)
    given = other.asarray(rows)
    same_bits(qembag.embedding_bag(given, INDICES, OFFSETS), expected)
    same_bits(qembag.embedding_bag(qembag.FloatTable(given), INDICES, OFFSETS), expected)


def test_a_table_in_the_memory_of_another_library_is_no_copy(other):
    given = other.asarray(ROWS)
    table = qembag.FloatTable(given)
    assert table.data.__array_interface__["data"][0] == np.asarray(given).__array_interface__["data"][0]


def test_an_output_of_another_library_is_written_in_place_and_returned(table, other, expected, same_bits):
    out = other.zeros((2, 4), dtype=other.float32)
    assert call(table, other.asarray, out=out) is out
    same_bits(np.asarray(out).copy(), expected)
    rows = other.zeros((4, 4), dtype=other.float32)
    assert qembag.embedding(table, INDICES, out=rows) is rows
    same_bits(np.asarray(rows).copy(), qembag.embedding(table, INDICES))
    with pytest.raises(
        ValueError, match=r"^out must be a float32 array of shape \(2, 4\), got a float32 array of shape"
    ):
        call(table, other.asarray, out=rows)


def test_an_output_that_shares_memory_with_an_input_is_refused(other):
    memory = other.asarray(np.zeros((10, 4), np.float32))
    with pytest.raises(ValueError, match=r"^out must share no memory with the table"):
        qembag.embedding_bag(memory, INDICES, OFFSETS, out=memory[:2, :])


def test_arrays_of_jax_in_a_process_of_their_own():
    if importlib.util.find_spec("jax") is None:
        pytest.skip("could not import 'jax'")
    file = Path(__file__).with_name("dlpack_of_jax.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=child_environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^10 passed in ", done.stdout, re.MULTILINE), done.stdout


def test_an_array_of_another_device_is_an_error_that_names_it(table):
    xp = imported("array_api_strict")
    with pytest.raises(TypeError, match=r"^indices must be an array, got .*device1"):
        qembag.embedding_bag(table, xp.asarray(INDICES, device=xp.Device("device1")), OFFSETS)


# ---- torch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.torch
def test_results_become_tensors_of_the_same_memory(table, torch, expected, same_bits):
    result = call(table, torch.from_numpy)
    tensor = torch.from_dlpack(result)
    assert tensor.data_ptr() == result.__array_interface__["data"][0]
    same_bits(tensor.numpy(), expected)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_tensors_are_written_in_place(table, torch, kind, same_bits):
    out = torch.zeros(2, 8, dtype=getattr(torch, kind))[:, 2:6]
    assert qembag.embedding_bag(table, torch.from_numpy(INDICES), OFFSETS, out=out) is out
    expected = torch.from_numpy(qembag.embedding_bag(table, INDICES, OFFSETS)).to(out.dtype)
    assert torch.equal(out, expected)
    rows = torch.zeros(4, 4, dtype=out.dtype)
    assert qembag.embedding(table, INDICES, out=rows, dtype=kind) is rows
    assert torch.equal(rows, torch.from_numpy(qembag.embedding(table, INDICES)).to(out.dtype))


@pytest.mark.torch
def test_a_table_may_be_a_tensor_of_bfloat16(torch, same_bits):
    rows = torch.from_numpy(ROWS).bfloat16()
    table = qembag.FloatTable(rows)
    assert table.dtype == "bfloat16"
    assert table.data.__array_interface__["data"][0] == rows.data_ptr()
    same_bits(qembag.embedding_bag(rows, INDICES, OFFSETS), qembag.embedding_bag(table, INDICES, OFFSETS))
    assert qembag.FloatTable(torch.nn.Parameter(rows, requires_grad=False), dtype="bfloat16").dtype == "bfloat16"


@pytest.mark.torch
def test_bits_of_bfloat16_are_no_integers(table, torch):
    with pytest.raises(TypeError, match=r"^indices must be an array, got Tensor"):
        qembag.embedding_bag(table, torch.ones(4, dtype=torch.bfloat16), OFFSETS)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.requires_grad_(), r"a Tensor that requires grad: pass {name}\.detach\(\)$"),
        (lambda tensor: tensor.to("meta"), r"a Tensor on device meta: copy it to the CPU first$"),
        (lambda tensor: tensor.to_sparse(), r"Tensor: "),
    ],
)
def test_tensors_that_numpy_cannot_have_are_errors_that_name_the_argument(table, torch, kind, change, message):
    dtype = getattr(torch, kind)
    with pytest.raises(TypeError, match="^out must be an array, got " + message.format(name="out")):
        qembag.embedding_bag(table, INDICES, OFFSETS, out=change(torch.zeros(2, 4, dtype=dtype)))
    with pytest.raises(TypeError, match="^data must be an array, got " + message.format(name="data")):
        qembag.FloatTable(change(torch.zeros(2, 4, dtype=dtype)))


@pytest.mark.torch
def test_a_tensor_that_torch_has_yet_to_negate_is_refused(table, torch):
    lazily = torch.zeros(2, 4, 2).to(torch.complex64).conj().imag[..., 0]
    assert lazily.is_neg()
    with pytest.raises(TypeError, match=r"^out must be an array, got Tensor: .*negative bit"):
        qembag.embedding_bag(table, INDICES, OFFSETS, out=lazily)


@pytest.mark.torch
def test_a_tensor_whose_rows_lie_on_each_other_is_refused(table, torch):
    with pytest.raises(ValueError, match=r"^out must have rows that lie apart"):
        qembag.embedding_bag(table, INDICES, OFFSETS, out=torch.zeros(1, 4).expand(2, 4))
