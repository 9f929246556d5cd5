"""Which tensors of a .pt file are tables, what they are called, and what is refused. No torch is needed."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import qembag
from qembag.interop.torch_file import names_of
from support.torch_files import Entry, File, Name, Persistent, archive_of, coded, entries_of, pickled, view

# The byte order of files whose rows can be mapped here.
BIG = sys.byteorder == "big"
GOLDEN = Path(__file__).parent / "golden" / "torch"
ROWS = np.arange(24, dtype=np.float32).reshape(6, 4)
SCALES, ZEROS = np.linspace(0.5, 3, 6, dtype=np.float32), np.linspace(0, 7.25, 6, dtype=np.float32)
CODES = np.arange(0, 240, 10, dtype=np.uint8).reshape(6, 4)
INTS = CODES.view(np.int8) >> 4
AO = "emb._packed_params._packed_weight"
INTX = ("torchao.quantization", "IntxUnpackedToInt8Tensor")


@pytest.fixture
def load(tmp_path):
    """Saves a value with a file's tensors, and loads its tables."""

    def load(file: File, value: object, **options: object) -> dict:
        path = tmp_path / "model.pt"
        path.write_bytes(file.saved(value))
        return qembag.load_tables(path, **options)

    return load


def refusal(load, *arguments, **options) -> str:
    with pytest.raises(ValueError, match=r"model\.pt: ") as caught:
        load(*arguments, **options)
    text = str(caught.value)
    assert text.count("model.pt") == 1
    return text.partition("model.pt: ")[2]


def qtensor(
    file: File, kind: str = "QUInt8", codes: np.ndarray = CODES, scales=SCALES, zeros=ZEROS, dim: int = 4
) -> object:
    return file.qtensor(codes, kind, scales, zeros, dim)


def intx(file: File, codes=INTS, scale=None, zero_point=None, *, state: dict | None = None) -> object:
    groups = np.ones((len(codes), 1), np.float32)
    whole = {
        "qdata": file.tensor(codes),
        "scale": file.tensor(groups if scale is None else scale),
        "zero_point": file.tensor(np.zeros((len(codes), 1), np.int8) if zero_point is None else zero_point),
        "target_dtype": Name("torch", "int4"),
        "block_size": (1, codes.shape[1]),
    }
    return file.wrapped(*INTX, codes.shape, whole | (state or {}))


# ---- Names and which tensors ------------------------------------------------------------------------------------------


def test_names_are_less_the_suffix_of_a_parameter_unless_two_would_be_one():
    assert names_of(["a.weight", "b._packed_params._packed_weight", "weight", "c.bias", "table"]) == {
        "a.weight": "a",
        "b._packed_params._packed_weight": "b",
        "weight": "weight",
        "c.bias": "c.bias",
        "table": "table",
    }
    assert names_of(["a", "a.weight", "b.weight"]) == {"a": "a", "a.weight": "a.weight", "b.weight": "b"}
    assert names_of([".weight"]) == {".weight": ".weight"}
    # The whole key that one of them keeps is a third one's short name.
    chain = ["a", "a.weight", "a.weight.weight"]
    assert names_of(chain) == dict(zip(chain, chain, strict=True))
    assert names_of(["a.weight.weight", "a.weight"]) == {"a.weight.weight": "a.weight", "a.weight": "a"}


def test_float_tensors_of_two_dimensions_are_tables_as_they_lie(load):
    file = File(big_endian=BIG)
    storage = file.storage(ROWS)
    value = {
        "emb.weight": view(storage, (6, 4)),
        "columns": view(storage, (6, 2), (4, 1), 1),
        "turned": view(storage, (4, 6), (1, 4)),
        "again": view(storage, (1000, 4), (0, 1)),
        "nothing": view(storage, (0, 4)),
        "flat": view(storage, (24,)),
        "empty": view(storage, (6, 0)),
        "deep": view(storage, (2, 3, 4)),
        "ids": file.tensor(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "double": file.tensor(ROWS.astype(np.float64)),
    }
    tables = load(file, value)
    assert list(tables) == ["emb", "columns", "turned", "again", "nothing"]
    for name, rows in (("emb", ROWS), ("columns", ROWS[:, 1:3]), ("turned", ROWS.T), ("nothing", ROWS[:0])):
        np.testing.assert_array_equal(tables[name].data, rows)
    np.testing.assert_array_equal(tables["again"][[0, 999]], ROWS[[0, 0]])


def test_a_file_without_tables_is_refused_with_what_it_has(load):
    file = File()
    value = {"bias": file.tensor(ROWS[0]), "double": file.tensor(ROWS.astype(np.float64))}
    assert refusal(load, file, value) == (
        "has no table: no float tensor of 2 dimensions, no quantized one with a scale a row, no rows of TorchRec; it "
        "has 'bias' (float32 (4,)), 'double' (float64 (6, 4)); save tensor.float() for float64"
    )
    assert refusal(load, File(), {}).endswith("it has no tensor at all")
    many = {f"b{number}": file.tensor(ROWS[0]) for number in range(25)}
    assert refusal(load, file, many).endswith("'b19' (float32 (4,)) and 5 more")


def test_a_table_that_is_not_asked_for_may_be_wrong(load):
    file = File()
    value = {"bad": qtensor(file, "QInt8"), "good.weight": file.tensor(ROWS)}
    assert list(load(file, value, names="good")) == ["good"]
    assert refusal(load, file, value).startswith("table 'bad' must be quint8 or quint4x2, got qint8")


def test_what_cannot_be_read_takes_no_more_memory_than_what_can(load):
    """Five thousand tables whose dim the file does not say: the error of each would keep its frames."""
    file = File()
    rows = file.tensor(np.zeros((2, 32), np.uint8))
    value = {f"embedding_bags.t{number}.weight": rows for number in range(5_000)}
    load(file, value, dims=16, bits=8)
    tracemalloc.start()
    try:
        load(file, value, dims=16, bits=8)
        _, opened = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert "table 'embedding_bags.t4' has" in (text := refusal(load, file, value))
        assert "; and 4995 more; the file does not say which: give it, such as dims={'t0': 28, 't1': 28," in text
        _, refused = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert refused < opened + 2**20


def test_one_tensor_of_many_names_is_refused_beyond_some_memory(tmp_path):
    file = File()
    rows = coded(file.tensor(ROWS))

    def written(count: int) -> Path:
        # Kept once, and then used by its number.
        keys = [coded(f"t{number}") for number in range(count)]
        raw = b"\x80\2}(" + keys[0] + rows + b"q\0" + b"".join(key + b"h\0" for key in keys[1:]) + b"u."
        path = tmp_path / "model.pt"
        path.write_bytes(archive_of(entries_of(raw, file.storages)))
        return path

    assert len(qembag.load_tables(written(5000))) == 5000
    with pytest.raises(ValueError, match=r"is too large: what it builds must not need more than \d+ bytes"):
        qembag.load_tables(written(20_000))


def test_tables_that_share_bytes_and_need_copies_are_refused_beyond_some_memory(load):
    file = File(big_endian=BIG)
    many = file.storage(np.zeros(4096, np.float32))
    value = {f"t{number}": view(many, (64, 64), (1, 64)) for number in range(4)}
    assert len(load(file, value)) == 4
    value = {f"t{number}": view(many, (64, 63), (1, 64)) for number in range(2500)}
    assert "must be copied" in refusal(load, file, value)
    file = File(big_endian=BIG)
    many = file.storage(np.zeros(4096, np.float32))
    value = {f"t{number}": view(many, (64, 64)) for number in range(2500)}
    assert len(load(file, value)) == 2500
    assert "choose some by names=" in refusal(load, file, value, mmap=False)
    overlapping = {"t": view(many, (2048, 2049), (1, 1))}
    np.testing.assert_array_equal(load(file, overlapping)["t"].data[[0, -1]], np.zeros((2, 2049)))
    wide = file.storage(np.zeros(20000, np.float32))
    value = {"t": view(wide, (9000, 9001), (1, 1)), "u": view(wide, (9000, 9001), (2, 0))}
    assert "table 'u' must have rows apart in the file, got 9000 rows in" in refusal(load, file, value)


# ---- torch.ao --------------------------------------------------------------------------------------------------------


def test_quantized_rows_have_the_bias_that_torch_computes(load):
    file = File()
    table = load(file, {AO: qtensor(file)})["emb"]
    np.testing.assert_array_equal(table.scales, SCALES)
    np.testing.assert_array_equal(table.biases, -(ZEROS * SCALES))
    np.testing.assert_array_equal(table.data[:, :4], CODES)
    assert table.layout == qembag.QuantizedTable(np.zeros((1, 12), np.uint8), 8).layout
    file = File()
    narrow = load(file, {AO: qtensor(file, "QUInt4x2", CODES, dim=8)})["emb"]
    np.testing.assert_array_equal(narrow.biases, (-(ZEROS * SCALES)).astype(np.float16))
    np.testing.assert_array_equal(narrow.data[:, :4], CODES)


@pytest.mark.parametrize("dims", [7, {"emb": 7}])
def test_dims_cut_the_column_that_torch_adds_at_4_bits(load, dims):
    file = File()
    value = {AO: qtensor(file, "QUInt4x2", CODES | np.uint8(0xF0), dim=8)}
    table = load(file, value, dims=dims)["emb"]
    assert table.shape == (6, 7)
    # What was never written is not kept.
    np.testing.assert_array_equal(table.data[:, 3], CODES[:, 3] & 15)
    np.testing.assert_array_equal(table[:], load(file, value)["emb"][:][:, :7])


def test_the_class_of_the_storage_tells_the_bits(load):
    file = File()
    value = {"emb._packed_params.dtype": Name("torch", "quint8"), AO: qtensor(file, "QUInt4x2", CODES, dim=8)}
    assert load(file, value)["emb"].bits == 4


def test_a_dim_or_bits_that_are_not_the_files_are_refused_where_the_table_is_named(load):
    file = File()
    value = {AO: qtensor(file), "f.weight": file.tensor(ROWS)}
    assert set(load(file, value, dims=64, bits=4)) == {"emb", "f"}
    assert refusal(load, file, value, dims={"emb": 3}) == "table 'emb' must have dims of 4, as in the file, got 3"
    assert refusal(load, file, value, bits={"emb": 4}) == "table 'emb' must have bits of 8, as in the file, got 4"
    assert refusal(load, file, value, bits={"f": 16}) == "table 'f' must have bits of 32, as in the file, got 16"


# A small integer as a float, and the upper half of a pointer: what freed memory holds.
GARBAGE = [np.nan, np.inf, -np.inf, *np.array([3, 0x7F3A], np.uint32).view(np.float32)]


@pytest.mark.parametrize("what", ["scale", "zero point"])
@pytest.mark.parametrize("value", GARBAGE)
def test_scales_of_freed_memory_are_refused(load, what, value):
    file = File()
    wrong = (SCALES if what == "scale" else ZEROS).copy()
    wrong[2] = value
    tensor = qtensor(file, scales=wrong) if what == "scale" else qtensor(file, zeros=wrong)
    text = refusal(load, file, {AO: tensor})
    assert text.startswith(f"table 'emb': row 2 has a {what} of ")
    assert text.endswith("save it while the module is still there")


@pytest.mark.parametrize(
    ("scale", "zero"), [(0.0, 0.0), (1e-30, 0.0), (-2.0, 5.0), (1e30, -3.0), (1.0, -0.0), (1.0, -1e-40)]
)
def test_unusual_scales_are_not_refused(load, scale, zero):
    file = File()
    scales, zeros = np.full(6, scale, np.float32), np.full(6, zero, np.float32)
    table = load(file, {AO: qtensor(file, scales=scales, zeros=zeros)})["emb"]
    np.testing.assert_array_equal(table.scales, scales)
    np.testing.assert_array_equal(table.biases, -(zeros * scales))


def test_what_torch_quantizes_otherwise_is_refused_by_name(load):
    file = File()
    integers = qtensor(file, scales=SCALES.astype(np.float64), zeros=ZEROS.astype(np.int64))
    text = refusal(load, file, {AO: integers})
    assert text.startswith("table 'emb' must have scales and zero points of float32")
    assert "got float64" in text
    columns = qtensor(file, scales=SCALES[:4], zeros=ZEROS[:4])
    place = list(columns.arguments)
    place[4] = (*place[4][:3], 1)
    text = refusal(load, file, {AO: columns._replace(arguments=tuple(place))})
    assert text == "table 'emb' must have its scales along axis 0, got axis 1"
    assert "got quint2x4" in refusal(load, file, {AO: qtensor(file, "QUInt2x4", CODES, dim=16)})


def test_the_weights_of_linear_layers_are_passed_over(load):
    file = File()
    per_tensor = qtensor(file, "QInt8")._replace()
    place = list(per_tensor.arguments)
    place[4] = (Name("torch", "per_tensor_affine"), 0.5, 0)
    value = {
        "fc1._packed_params._packed_params": (per_tensor._replace(arguments=tuple(place)), None),
        "fc2._packed_params._packed_params": (qtensor(file, "QInt8"), file.tensor(ROWS[0])),
        AO: qtensor(file),
    }
    assert list(load(file, value)) == ["emb"]


# ---- TorchRec --------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(15)
HALVES = RNG.normal(size=(6, 2)).astype("<f2")
PADDED = np.concatenate([HALVES.view(np.uint8), RNG.integers(0, 256, (6, 10), np.uint8), np.zeros((6, 2), np.uint8)], 1)
T1 = "m.ebc.embedding_bags.t1.weight"


def test_rows_of_torchrec_are_mapped_as_they_lie(load):
    file = File()
    storage = file.storage(np.concatenate([PADDED, PADDED[::-1]]))
    value = {T1: view(storage, (6, 16)), T1.replace("1", "2"): view(storage, (6, 16), offset=96)}
    tables = load(file, value, dims={"t1": 10, "m.ebc.embedding_bags.t2": 9}, bits=8)
    assert list(tables) == ["m.ebc.embedding_bags.t1", "m.ebc.embedding_bags.t2"]
    first, second = tables.values()
    np.testing.assert_array_equal(first.data, PADDED)
    np.testing.assert_array_equal(second.data, PADDED[::-1])
    assert (first.dim, second.dim, first.layout.scale_first) == (10, 9, True)
    np.testing.assert_array_equal(first.scales, HALVES[:, 0])
    assert not first.data.flags.writeable


def test_what_the_file_does_not_say_is_asked_for(load):
    file = File()
    four = file.wrapped("torchrec.tensor_types", "UInt4Tensor", (6, 32), {"N": 2, "elem": file.tensor(PADDED)})
    value = {T1: file.tensor(PADDED), "embeddings.t2.weight": four}
    assert refusal(load, file, value) == (
        "table 'm.ebc.embedding_bags.t1' has rows of 16 bytes, padded to a multiple of 16: a dim of 1 to 12 at 8 bits, "
        "or 1 to 8 at 16 bits, or 1 to 4 at 32 bits; table 'embeddings.t2' has rows of 16 bytes, padded to a multiple "
        "of 16: a dim of 1 to 24 at 4 bits; the file does not say which: give it, such as "
        "dims={'t1': 12, 't2': 24}, bits={'t1': 8}"
    )
    assert list(load(file, value, names="t2", dims=20)) == ["embeddings.t2"]
    assert "bits={'t1': 8}" in refusal(load, file, value, dims=8)
    # Floats of this dim would be longer: these are codes.
    assert load(file, value, dims=9)["m.ebc.embedding_bags.t1"].bits == 8
    assert "hold a dim of at most 24 at 4 bits, got 25" in refusal(load, file, value, names="t2", dims=25)
    assert "hold a dim of at most 12, got 13" in refusal(load, file, value, names="t1", dims=13)
    assert "hold a dim of at most 4 as float32, got 5" in refusal(load, file, value, names="t1", dims=5, bits=32)


def test_a_row_with_more_padding_than_usual_does_not_tell_its_bits(load):
    file = File()
    wide = np.zeros((6, 64), np.uint8)
    value = {T1: file.tensor(wide)}
    assert "bits={'t1': 8}" in refusal(load, file, value, dims=40)
    assert load(file, value, dims=40, bits=8)["m.ebc.embedding_bags.t1"].row_bytes == 64


def test_split_tables_say_all(load):
    file = File()
    parts = {
        T1: view(file.storage(PADDED), (6, 10), (16, 1), 4),
        f"{T1}_qscale": file.tensor(HALVES[:, :1].copy()),
        f"{T1}_qbias": file.tensor(HALVES[:, 1:].copy()),
        "tbes.0.weights": file.tensor(ROWS),
    }
    ((name, table),) = load(file, parts).items()
    assert (name, table.dim, table.bits) == ("m.ebc.embedding_bags.t1", 10, 8)
    np.testing.assert_array_equal(table.data, PADDED[:, :14])
    del parts[f"{T1}_qbias"]
    assert "must have a weight_qbias of float16, shape (6, 1), got none" in refusal(load, file, parts)
    parts[f"{T1}_qbias"] = file.tensor(ROWS[:, :1].copy())
    assert "weight_qbias of float16, shape (6, 1), got float32 (6, 1)" in refusal(load, file, parts)


def test_bytes_of_rows_must_lie_side_by_side(load):
    file = File()
    turned = view(file.storage(PADDED), (16, 6), (1, 16))
    assert "must have the bytes of a row side by side" in refusal(load, file, {T1: turned}, dims=1, bits=8)
    assert "must have the bytes of a row side by side" in refusal(load, file, {"rows": turned}, bits=8)


def test_rows_with_halves_in_bytes_are_refused_from_big_endian_machines(load):
    file = File(big_endian=True)
    assert "little-endian" in refusal(load, file, {T1: file.tensor(PADDED)}, dims=10, bits=8)
    assert "little-endian" in refusal(load, file, {"packed": file.tensor(PADDED)}, bits=8)


# ---- Rows of torch's prepack operators -------------------------------------------------------------------------------


def test_bytes_are_torchs_rows_where_their_bits_are_said(load):
    file = File()
    packed = qembag.quantize(ROWS, bits=4)
    value = {"rows": file.tensor(packed.data), "f": file.tensor(ROWS)}
    assert list(load(file, value)) == ["f"]
    table = load(file, value, bits={"rows": 4})["rows"]
    np.testing.assert_array_equal(table[:], packed[:])
    assert "codes, scale and bias" in refusal(load, file, value, bits={"rows": 8})
    assert "got 6 bytes for a dim of 3 at 4 bits" not in refusal(load, file, value, bits={"rows": 4}, dims={"rows": 1})
    floats = {"rows": file.tensor(ROWS.astype("<f4").view(np.uint8))}
    np.testing.assert_array_equal(load(file, floats, bits=32)["rows"].data, ROWS)
    assert "rows of torch's prepack operators need bits=" in refusal(load, file, floats)


# ---- torchao ---------------------------------------------------------------------------------------------------------


def test_codes_of_torchao_are_exact_with_symmetric_scales(load):
    file = File()
    codes = np.arange(-8, 16, dtype=np.int8).reshape(6, 4) % 8
    scale = RNG.normal(size=(6, 1)).astype(np.float32)
    table = load(file, {"emb.weight": intx(file, codes, scale)})["emb"]
    assert (table.bits, table.layout.scale_dtype) == (4, np.float32)
    np.testing.assert_array_equal(table[:], codes * scale)


@pytest.mark.parametrize(
    ("kind", "bits"), [("int1", 2), ("int2", 2), ("int3", 4), ("int5", 8), ("int7", 8), ("int8", 8)]
)
def test_each_width_of_torchao_is_exact_at_the_next_of_ours(load, kind, bits):
    file = File()
    top = 2 ** (int(kind[3]) - 1)
    codes = RNG.integers(-top, top, (6, 32)).astype(np.int8)
    scale = RNG.normal(size=(6, 2)).astype(np.float16)
    value = {
        "emb.weight": intx(
            file,
            codes,
            scale,
            np.zeros((6, 2), np.int8),
            state={"target_dtype": Name("torch", kind), "block_size": (1, 16)},
        )
    }
    table = load(file, value)["emb"]
    assert (table.bits, table.layout.group_size, table.layout.scale_dtype) == (bits, 16, np.float16)
    np.testing.assert_array_equal(table[:], codes * np.repeat(scale.astype(np.float32), 16, axis=1))


def test_halves_are_kept_only_where_they_hold_each_bias(load):
    file = File()
    codes = INTS
    scale = np.full((6, 1), 0.1, np.float16)
    zero_point = np.arange(6, dtype=np.int8)[:, None]
    asymmetric = load(file, {"a": intx(file, codes, scale, zero_point)})["a"]
    assert asymmetric.layout.scale_dtype == np.float32
    np.testing.assert_array_equal(asymmetric[:], (codes - zero_point).astype(np.float32) * scale.astype(np.float32))
    # 8 times this is beyond float16.
    scale[3] = 60000
    large = load(file, {"a": intx(file, codes, scale)})["a"]
    assert large.layout.scale_dtype == np.float32
    np.testing.assert_array_equal(large[:], codes * scale.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_scales_of_torchao_may_be_anything(load, kind):
    file = File()
    bits = np.dtype(kind).itemsize * 8
    scale = np.array([[np.nan], [np.inf], [-np.inf], [0], [1], [1]], kind)
    # A NaN that signals: converting it is an invalid operation.
    scale[5] = np.array({16: 0x7D00, 32: 0x7FA00000}[bits], f"u{bits // 8}").view(kind)
    table = load(file, {"a": intx(file, scale=scale)})["a"]
    np.testing.assert_array_equal(table.scales, scale[:, 0])


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"target_dtype": Name("torch", "float32")}, "target_dtype of int1 to int8, got 'float32'"),
        ({"target_dtype": None}, "target_dtype of int1 to int8, got None"),
        ({"block_size": (1, 3)}, "divide a dim of 4, got blocks of (1, 3)"),
        ({"block_size": (2, 4)}, "groups of elements of one row"),
        ({"block_size": (1, 0)}, "groups of elements of one row"),
        ({"block_size": (1, 2)}, "shape (6, 2), got ((6, 1), (6, 1))"),
        ({"block_size": 4}, "a block_size of two whole numbers, got 4"),
        ({"scale": None}, "must have a tensor 'scale'"),
        ({"qdata": None}, "must have a tensor 'qdata'"),
    ],
)
def test_torchao_tensors_that_are_no_tables_are_refused(load, more, text):
    file = File()
    assert text in refusal(load, file, {"a": intx(file, state=more)})


def test_small_groups_of_torchao_are_refused_with_what_to_do(load):
    file = File()
    ones = np.ones((6, 4), np.float32)
    value = {"a": intx(file, np.zeros((6, 32), np.int8), ones, np.zeros((6, 4), np.int8), state={"block_size": (1, 8)})}
    assert "groups of a multiple of 16 elements, or of whole rows, got groups of 8" in refusal(load, file, value)


def test_rows_that_share_their_scales_are_refused_however_many_there_are(load):
    """Each scale is looked at when the file is opened: a file of a kilobyte must not have any number of them."""
    file = File()
    halves, codes = file.storage(np.ones(1, np.float16)), file.storage(np.zeros(4, np.int8))
    rows = sys.maxsize >> 9  # NumPy has a limit
    state = {
        "qdata": view(codes, (rows, 4), (0, 1)),
        "scale": view(halves, (rows, 1), (0, 1)),
        "zero_point": view(codes, (rows, 1), (0, 1)),
        "target_dtype": Name("torch", "int4"),
        "block_size": (1, 4),
    }
    text = refusal(load, file, {"a": file.wrapped(*INTX, (rows, 4), state)})
    assert text == f"table 'a' must have scales for each row in the file, got ({rows}, 1) that share bytes"


def test_codes_beyond_their_width_are_refused(load):
    file = File()
    text = refusal(load, file, {"a": intx(file, np.full((6, 4), 9, np.int8))})
    assert text == "table 'a': rows 0 to 5 must have codes from -8 to 7, got 9 to 9"


# ---- Large files -----------------------------------------------------------------------------------------------------

OPENS = """
import sys, numpy as np, qembag
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
path, dims = sys.argv[1], int(sys.argv[2])
(table,) = qembag.load_tables(path, **({"dims": dims, "bits": 8} if dims else {})).values()
last = table.num_embeddings - 1
qembag.embedding_bag(table, [0, last // 2, last], [0])
print(table.nbytes, peak())
"""


def write_sparse(path: Path, tensor: object, nbytes: int) -> None:
    """A file with one storage of zeros, which take no place on the disk."""
    entries = entries_of(pickled({"embedding_bags.t1.weight": tensor}), {})
    sizes = {"packed": 0xFFFFFFFF, "size": 0xFFFFFFFF}
    extra = struct.pack("<HHQQ", 1, 16, nbytes, nbytes)
    entries.append(Entry(b"archive/data/0", b"", sizes | {"extra": len(extra)}, sizes, extra))
    begin = archive_of(entries, descriptors=False).index(b"PK\1\2")
    size = len(archive_of(entries, descriptors=False)[begin:].partition(b"PK\6\6")[0])
    whole = archive_of(entries, descriptors=False, start=begin + nbytes, at=begin + nbytes + size)
    with path.open("wb") as file:
        file.write(whole[:begin])
        file.seek(begin + nbytes)
        file.write(whole[begin:])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or sys.maxsize < 2**32, reason="reads /proc, maps 10 GB")
@pytest.mark.parametrize(("kind", "dims"), [("Float", 0), ("Byte", 64)])
def test_ten_gigabytes_open_in_little_memory(tmp_path, kind, dims):
    columns = 80 if dims else 64
    num_rows = 10**10 // (columns * (1 if dims else 4))
    count = num_rows * columns
    storage = Persistent(("storage", Name("torch", f"{kind}Storage"), "0", "cpu", count))
    path = tmp_path / "large.pt"
    write_sparse(path, view(storage, (num_rows, columns), (columns, 1)), count * (1 if dims else 4))
    ran = subprocess.run(
        [sys.executable, "-c", OPENS, str(path), str(dims)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    nbytes, kilobytes = map(int, ran.stdout.split())
    assert nbytes >= 10**10 - 400
    assert kilobytes < 100_000
