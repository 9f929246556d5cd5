"""Makes tests/golden/*.npz: inputs, and what PyTorch 2.13.0 answers. Run it with torch; `test_golden.py` reads without.
Where fbgemm-gpu-cpu 1.8.0 is installed too, also fbgemm.npz: what its table-batched operator answers.

Each file holds the bytes of all its arrays, one after the other and little-endian (``bytes``), and a JSON list of
``[case, part, dtype, shape]`` in the same order (``index``); an archive member each would weigh more than the arrays.
A case's name says what it holds. The same seeds give the same bytes each time.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from support.floats import rows_of
from support.layouts import LAYOUTS, NAMES

GOLDEN = Path(__file__).parent / "golden"
SMALL_DIMS = {
    8: [*range(1, 34), 39, 40, 47, 48, 49],
    4: [*range(2, 50, 2), 62, 64, 66],
    2: [*range(4, 72, 4), 80, 92],
}
LARGE_DIMS = {
    8: [63, 64, 65, 100, 127, 128, 129, 200, 256, 257, 300, 512],
    4: [98, 100, 126, 128, 130, 200, 256, 258, 300, 512, 514],
    2: [100, 124, 128, 132, 200, 256, 260, 300, 512, 516],
}
VARIANTS = ["plain", "weighted", "half", "pruned", "weighted-pruned", "square", "last"]


def save(name: str, cases: dict[str, dict[str, np.ndarray]], made_by: str = "") -> None:
    index, parts = [], []
    for case, arrays in cases.items():
        for part, array in arrays.items():
            kind = array.dtype.newbyteorder("<")
            index.append([case, part, kind.str, list(array.shape)])
            parts.append(array.astype(kind).tobytes())
    members = {"index": json.dumps(index).encode(), "bytes": b"".join(parts)}
    if made_by:
        members["made_by"] = made_by.encode()
    np.savez_compressed(GOLDEN / name, **{key: np.frombuffer(value, dtype=np.uint8) for key, value in members.items()})


def packed_rows(rng: np.random.Generator, num_rows: int, dim: int, bits: int, extreme: bool) -> np.ndarray:
    kind = np.dtype(LAYOUTS[bits].pair)
    tail = rng.normal(size=(num_rows, 2)).astype(kind)
    if extreme:
        tail[0] = [np.finfo(kind).smallest_subnormal * 5, -np.finfo(kind).tiny / 2]
        tail[1] = [np.finfo(kind).max / 300, -0.0]
        tail[2] = [-0.0, 0.0]
        tail[3, 1] = np.inf
    codes = rng.integers(0, 256, (num_rows, dim * bits // 8), dtype=np.uint8)
    return np.concatenate([codes, tail.view(np.uint8)], axis=1)


def operator(name: str) -> Any:
    return getattr(torch.ops.quantized, name)


def bags(bits: int) -> dict[str, dict[str, np.ndarray]]:
    """Bags of every variant at small dims; at large ones each dim has one variant, in turn."""
    made = {}
    rng = np.random.default_rng(1000 + bits)
    cases = [(dim, variant) for number, dim in enumerate(SMALL_DIMS[bits]) for variant in VARIANTS[number % 3 :: 3]]
    cases += [(dim, VARIANTS[number % len(VARIANTS)]) for number, dim in enumerate(LARGE_DIMS[bits])]
    for number, (dim, variant) in enumerate(cases):
        if variant == "half" and bits == 8:
            continue  # the reference refuses it
        rows = packed_rows(rng, 6, dim, bits, extreme=number % 5 == 4)
        index_type, offset_type = (np.int32, np.int64)[number & 1], (np.int32, np.int64)[number >> 1 & 1]
        pruned = "pruned" in variant
        num_embeddings = 10 if pruned else 6
        case: dict[str, np.ndarray] = {"rows": rows}
        if variant == "square":
            case["indices"] = rng.integers(0, 6, (3, 5)).astype(index_type)
        else:
            ends = np.array([0, 4, 4, 15])
            case["indices"] = rng.integers(0, num_embeddings, 15).astype(index_type)
            case["offsets"] = (ends if variant == "last" else ends[:-1]).astype(offset_type)
        if "weighted" in variant or variant == "half":
            kind = np.float16 if variant == "half" else np.float32
            case["weights"] = rng.normal(size=15).astype(kind)
        if pruned:
            case["mapping"] = rng.integers(-1, 6, 10).astype(np.int32)
        given = {part: torch.from_numpy(array) for part, array in case.items()}
        case["sums"] = operator(f"embedding_bag_{NAMES[bits]}_rowwise_offsets")(
            given["rows"],
            given["indices"],
            given.get("offsets"),
            pruned_weights=pruned,
            per_sample_weights=given.get("weights"),
            compressed_indices_mapping=given.get("mapping"),
            include_last_offset=variant == "last",
        ).numpy()
        if variant == "plain":
            case["unpacked"] = operator(f"embedding_bag_{NAMES[bits]}_unpack")(given["rows"]).numpy()
        made[f"{number}-dim{dim}-{variant}"] = case
    return made


def quantized() -> dict[str, dict[str, np.ndarray]]:
    cases = {}
    rng = np.random.default_rng(77)
    for bits in (8, 4, 2):
        for number, dim in enumerate([4, 8, 12, 16, 20, 32, 36, 64, 100]):
            kind = np.float16 if number % 3 == 1 else np.float32
            weights = rng.normal(size=(6, dim)) * 10.0 ** rng.integers(-3, 3, (6, 1)) + rng.choice([0, 3], (6, 1))
            weights[0], weights[1] = 0.1, rng.choice([-1.0, 2.0], dim)
            weights = weights.astype(kind)
            case = {"weights": weights}
            given = torch.from_numpy(weights)
            stem = f"embedding_bag_{NAMES[bits]}"
            case["minmax"] = operator(f"{stem}_prepack")(given).numpy()
            low, high = weights.min(axis=1), weights.max(axis=1)
            margin = (high - low) * rng.random(6).astype(kind) / 4
            case["bounds"] = np.stack([low - margin, high + margin], axis=1)
            bounds = torch.from_numpy(case["bounds"])
            case["bounded"] = operator(f"{stem}_prepack_with_rowwise_min_max")(given, bounds).numpy()
            if bits != 8:
                case["greedy"] = operator(f"{stem}_prepack")(given, True).numpy()
                case["greedy-37-0.33"] = operator(f"{stem}_prepack")(given, True, 37, 0.33).numpy()
                case["greedy-10-0.5"] = operator(f"{stem}_prepack")(given, True, 10, 0.5).numpy()
            case["unpacked"] = operator(f"{stem}_unpack")(torch.from_numpy(case["minmax"])).numpy()
            cases[f"{bits}-dim{dim}-{np.dtype(kind)}"] = case
    return cases


FLOAT_DIMS = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 47, 48, 65, 129, 257]
FLOAT_VARIANTS = {  # float16 sums alone: torch rounds its means twice
    "float32": ["sum", "weighted", "mean", "max", "padded-mean"],
    "float16": ["sum", "weighted", "max"],
}


def floats() -> dict[str, dict[str, np.ndarray]]:
    """Bags of float rows by torch.nn.functional.embedding_bag; each dim has one variant, in turn, small ones two."""
    made = {}
    rng = np.random.default_rng(3000)
    for kind, variants in FLOAT_VARIANTS.items():
        dims = sorted([*FLOAT_DIMS, *(dim for dim in FLOAT_DIMS if dim < 50)])
        for number, dim in enumerate(dims):
            variant = variants[number % len(variants)]
            rows = rows_of(rng, kind, 6, dim, extremes=number % 7 == 3)
            index_type = (np.int32, np.int64)[number // len(variants) & 1]
            case: dict[str, np.ndarray] = {"rows": rows, "indices": rng.integers(0, 6, 15).astype(index_type)}
            case["offsets"] = np.array([0, 4, 4], index_type)
            if variant == "weighted":
                case["weights"] = rng.normal(size=15).astype(kind)
            given = {part: torch.from_numpy(array) for part, array in case.items()}
            case["bags"] = torch.nn.functional.embedding_bag(
                given["indices"],
                given["rows"],
                given["offsets"],
                mode="sum" if variant == "weighted" else variant.split("-")[-1],
                per_sample_weights=given.get("weights"),
                padding_idx=2 if "padded" in variant else None,
            ).numpy()
            made[f"{kind}-dim{dim}-{number}-{variant}"] = case
    return made


FBGEMM_DIMS = {
    8: [2, 3, 7, 12, 15, 16, 17, 20, 31, 33, 40, 48, 63, 65, 100, 128, 131, 200, 300],
    4: [2, 4, 6, 14, 16, 18, 20, 30, 34, 40, 48, 62, 66, 100, 128, 134, 200, 300],
    2: [4, 8, 12, 16, 20, 28, 32, 36, 40, 48, 60, 68, 100, 128, 140, 200, 300],
}
FBGEMM_VARIANTS = ["sum", "sum-weighted", "mean", "mean-weighted", "sum-pruned", "mean-pruned", "sum-weighted-half"]


def fbgemm() -> dict[str, dict[str, np.ndarray]]:
    """Rows of 16-byte alignment, halves first; each dim has two variants, in turn. A mapping is FBGEMM's own: rows that
    are pruned count in the mean."""
    from support.fbgemm import FbgemmTable  # it imports fbgemm_gpu, which not everybody has

    made = {}
    for bits, dims in FBGEMM_DIMS.items():
        rng = np.random.default_rng(2000 + bits)
        for number, dim in enumerate(np.repeat(dims, 2).tolist()):
            variant = FBGEMM_VARIANTS[number % len(FBGEMM_VARIANTS)]
            mapping = rng.integers(-1, 6, 10).astype(np.int32) if "pruned" in variant else None
            index_type = (np.int32, np.int64)[number >> 1 & 1]
            table = FbgemmTable(
                bits, dim, 6, alignment=16, mode=variant.split("-")[0], index_type=index_type, mapping=mapping,
                dtype=np.float16 if "half" in variant else np.float32,
            )  # fmt: skip
            case = {"rows": table.fill(rng, extremes=number % 5 == 4).copy()}
            case["indices"] = rng.integers(0, 6 if mapping is None else len(mapping), 15).astype(index_type)
            case["offsets"] = np.array([0, 4, 4, 15], index_type)
            if "weighted" in variant:
                case["weights"] = rng.normal(size=15).astype(np.float32)
            if mapping is not None:
                case["mapping"] = mapping
            case["bags"] = table(case["indices"], case["offsets"], case.get("weights"))
            made[f"{bits}-dim{dim}-{number}-{variant}"] = case
    return made


def main() -> None:
    if not torch.__version__.startswith("2.13.0"):
        raise SystemExit(f"the golden files are of torch 2.13.0, not {torch.__version__}")
    GOLDEN.mkdir(exist_ok=True)
    for bits in (8, 4, 2):
        save(f"bags_{NAMES[bits]}.npz", bags(bits))
    save("quantize.npz", quantized())
    save("floats.npz", floats())
    if importlib.util.find_spec("fbgemm_gpu") is not None:
        made_by = f"torch {version('torch')}, fbgemm-gpu-cpu {version('fbgemm-gpu-cpu')}"
        save("fbgemm.npz", fbgemm(), made_by)


if __name__ == "__main__":
    main()
