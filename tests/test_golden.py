"""What PyTorch 2.13.0 and FBGEMM 1.8.0 answered, read from files: bits without them, on any machine. `make_golden.py`
made the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import qembag
import reference
from qembag import ops
from support.arrays import same_rows
from support.layouts import NAMES

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent / "golden"
# Enough elements in a call for the kernels to take a second thread.
PARALLEL_WORK = 1 << 20


def read_cases(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each case, in the host's byte order."""
    with np.load(GOLDEN / name) as file:
        index = json.loads(file["index"].tobytes())
        data = file["bytes"].tobytes()
    cases: dict[str, dict[str, np.ndarray]] = {}
    place = 0
    for case, part, kind, shape in index:
        dtype = np.dtype(kind)
        size = dtype.itemsize * int(np.prod(shape))
        array = np.frombuffer(data[place : place + size], dtype=dtype).reshape(shape)
        cases.setdefault(case, {})[part] = array.astype(dtype.newbyteorder("="))
        place += size
    assert place == len(data)
    return cases


@pytest.fixture(scope="module", params=[8, 4, 2])
def golden_bags(request: pytest.FixtureRequest) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    return request.param, read_cases(f"bags_{NAMES[request.param]}.npz")


@pytest.fixture(scope="module")
def golden_rows() -> dict[str, dict[str, np.ndarray]]:
    return read_cases("quantize.npz")


def test_the_files_hold_what_they_should(
    golden_bags: tuple[int, dict[str, dict[str, np.ndarray]]], golden_rows: dict[str, dict[str, np.ndarray]]
) -> None:
    bits, cases = golden_bags
    kinds = {name.split("-", 2)[2] for name in cases}
    assert {"plain", "weighted", "pruned", "weighted-pruned", "square", "last"} <= kinds
    assert ("half" in kinds) == (bits != 8)
    assert len(cases) > 50
    assert len(golden_rows) == 27
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 350_000


def test_sums_are_those_that_torch_gave(
    level: str, golden_bags: tuple[int, dict[str, dict[str, np.ndarray]]], same_bits: Callable[..., None]
) -> None:
    bits, cases = golden_bags
    operator = getattr(ops, f"embedding_bag_{NAMES[bits]}_rowwise_offsets")
    for name, case in cases.items():
        options = {
            "pruned_weights": "mapping" in case,
            "per_sample_weights": case.get("weights"),
            "compressed_indices_mapping": case.get("mapping"),
            "include_last_offset": name.endswith("-last"),
        }
        same_bits(operator(case["rows"], case["indices"], case.get("offsets"), **options), case["sums"])
        out = np.full(case["sums"].shape, np.float32(np.nan))
        operator(case["rows"], case["indices"], case.get("offsets"), **options, out=out)
        same_bits(out, case["sums"])


def test_sums_of_many_bags_at_every_thread_count_are_those_that_torch_gave(
    level: str, threads: int, golden_bags: tuple[int, dict[str, dict[str, np.ndarray]]], same_bits: Callable[..., None]
) -> None:
    """Each case's bags over and over, until the call is worth several threads."""
    bits, cases = golden_bags
    for case in list(cases.values())[::5]:
        table = qembag.QuantizedTable(case["rows"], bits, compressed_indices_mapping=case.get("mapping"))
        indices, sums = case["indices"], case["sums"]
        times = PARALLEL_WORK // (indices.size * (table.dim + 64)) + 1
        many = {"per_sample_weights": None, "offsets": None}
        if "weights" in case:
            many["per_sample_weights"] = np.concatenate([case["weights"]] * times)
        if "offsets" in case:
            starts = case["offsets"][: len(sums)]
            many["offsets"] = (starts[None, :] + np.arange(times)[:, None] * indices.size).reshape(-1)
        result = qembag.embedding_bag(table, np.concatenate([indices] * times), **many)
        same_bits(result.reshape(times, *sums.shape), np.broadcast_to(sums, (times, *sums.shape)).copy())


def test_values_are_those_that_torch_unpacked(
    level: str, golden_bags: tuple[int, dict[str, dict[str, np.ndarray]]], same_bits: Callable[..., None]
) -> None:
    bits, cases = golden_bags
    unpacked = 0
    for case in cases.values():
        if "unpacked" in case:
            same_bits(getattr(ops, f"embedding_bag_{NAMES[bits]}_unpack")(case["rows"]), case["unpacked"])
            same_bits(qembag.QuantizedTable(case["rows"], bits).dequantize(), case["unpacked"])
            unpacked += 1
    assert unpacked >= 5


def test_rows_are_quantized_to_the_bytes_that_torch_gave(
    level: str, threads: int, golden_rows: dict[str, dict[str, np.ndarray]], same_bits: Callable[..., None]
) -> None:
    for name, case in golden_rows.items():
        bits = int(name[0])
        stem = f"embedding_bag_{NAMES[bits]}"
        prepack = getattr(ops, f"{stem}_prepack")
        weights = case["weights"]
        same_rows(prepack(weights), case["minmax"], bits)
        same_rows(qembag.quantize(weights, bits).data, case["minmax"], bits)
        bounded = getattr(ops, f"{stem}_prepack_with_rowwise_min_max")(weights, case["bounds"])
        same_rows(bounded, case["bounded"], bits)
        if bits != 8:
            same_rows(prepack(weights, True), case["greedy"], bits)
            same_rows(qembag.quantize(weights, bits, method="greedy").data, case["greedy"], bits)
            same_rows(prepack(weights, optimized_qparams=True, nbins=37, ratio=0.33), case["greedy-37-0.33"], bits)
            same_rows(prepack(weights, True, 10, 0.5), case["greedy-10-0.5"], bits)
        same_bits(getattr(ops, f"{stem}_unpack")(case["minmax"]), case["unpacked"])


def test_many_rows_at_every_thread_count_are_quantized_to_the_bytes_that_torch_gave(
    level: str, threads: int, golden_rows: dict[str, dict[str, np.ndarray]]
) -> None:
    for name, case in golden_rows.items():
        bits, weights = int(name[0]), case["weights"]
        times = PARALLEL_WORK // weights.size + 1 if "dim100" in name else 3
        ours = qembag.quantize(np.concatenate([weights] * times), bits).data
        same_rows(ours, np.concatenate([case["minmax"]] * times), bits)


# ---- Of rows of floats -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_floats() -> dict[str, dict[str, np.ndarray]]:
    return read_cases("floats.npz")


def options_of(name: str) -> dict[str, object]:
    """What a case's name says."""
    variant = name.split("-", 3)[3]
    mode = "sum" if variant == "weighted" else variant.split("-")[-1]
    return {"mode": mode, "padding_idx": 2 if "padded" in variant else None}


def test_the_file_of_floats_holds_what_it_should(golden_floats: dict[str, dict[str, np.ndarray]]) -> None:
    assert len(golden_floats) > 80
    kinds = {(name.split("-")[0], name.split("-", 3)[3]) for name in golden_floats}
    assert {kind for kind in kinds if kind[0] == "float16"} == {
        ("float16", kind) for kind in ("sum", "weighted", "max")
    }
    assert {kind for _, kind in kinds} == {"sum", "weighted", "mean", "max", "padded-mean"}
    for name, case in golden_floats.items():
        assert case["rows"].dtype == case["bags"].dtype == name.split("-")[0]
    assert (GOLDEN / "floats.npz").stat().st_size < 70_000


def test_the_oracle_says_what_torch_gave_of_floats(
    golden_floats: dict[str, dict[str, np.ndarray]], same_bits: Callable[..., None]
) -> None:
    for name, case in golden_floats.items():
        says = reference.float_embedding_bag(
            case["rows"], case["indices"], case["offsets"], weights=case.get("weights"),
            half=case["bags"].dtype == np.float16, **options_of(name),
        )  # fmt: skip
        same_bits(says, case["bags"])


def test_bags_of_floats_are_those_that_torch_gave(
    level: str, golden_floats: dict[str, dict[str, np.ndarray]], same_bits: Callable[..., None]
) -> None:
    for name, case in golden_floats.items():
        for table in (qembag.FloatTable(case["rows"]), case["rows"]):
            bags = qembag.embedding_bag(
                table, case["indices"], case["offsets"], per_sample_weights=case.get("weights"),
                dtype=case["bags"].dtype, **options_of(name),
            )  # fmt: skip
            same_bits(bags, case["bags"])


# ---- Of FBGEMM's table-batched operator ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_of_fbgemm() -> dict[str, dict[str, np.ndarray]]:
    return read_cases("fbgemm.npz")


def test_the_file_of_fbgemm_holds_what_it_should(golden_of_fbgemm: dict[str, dict[str, np.ndarray]]) -> None:
    assert len(golden_of_fbgemm) > 100
    kinds = {name.split("-", 3)[3] for name in golden_of_fbgemm}
    assert kinds >= {"sum", "sum-weighted", "mean", "mean-weighted", "sum-pruned", "mean-pruned", "sum-weighted-half"}
    for case in golden_of_fbgemm.values():
        assert case["rows"].shape[1] % 16 == 0
    assert (GOLDEN / "fbgemm.npz").stat().st_size < 100_000
    with np.load(GOLDEN / "fbgemm.npz") as file:
        assert file["made_by"].tobytes().startswith(b"torch 2.13.0")
        assert file["made_by"].tobytes().endswith(b"fbgemm-gpu-cpu 1.8.0")


def test_the_oracle_says_what_fbgemm_gave(
    golden_of_fbgemm: dict[str, dict[str, np.ndarray]], same_bits: Callable[..., None]
) -> None:
    for name, case in golden_of_fbgemm.items():
        bits, dim, _, variant = name.split("-", 3)
        says = reference.embedding_bag(
            case["rows"], int(bits), int(dim[3:]), case["indices"], case["offsets"], mode=variant.split("-")[0],
            weights=case.get("weights"), mapping=case.get("mapping"), include_last_offset=True,
            half=case["bags"].dtype == np.float16, pair="<f2", first=True,
        )  # fmt: skip
        same_bits(says, case["bags"])


def test_bags_of_fbgemms_rows_are_what_it_gave(
    level: str, golden_of_fbgemm: dict[str, dict[str, np.ndarray]], same_bits: Callable[..., None]
) -> None:
    for name, case in golden_of_fbgemm.items():
        bits, dim, _, variant = name.split("-", 3)
        table = qembag.QuantizedTable(
            case["rows"], int(bits), dim=int(dim[3:]), scale_dtype=np.float16, scale_first=True,
            compressed_indices_mapping=case.get("mapping"),
        )  # fmt: skip
        bags = qembag.embedding_bag(
            table, case["indices"], case["offsets"], mode=variant.split("-")[0], include_last_offset=True,
            per_sample_weights=case.get("weights"), dtype=case["bags"].dtype,
        )  # fmt: skip
        same_bits(bags, case["bags"])
