from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

LEVEL: str
OPENMP: int

# What is wrong: argument, position in it, bag, value, position in the indices.
_Fault: TypeAlias = tuple[str, int, int, int, int]

def embedding_bag(
    rows: object,
    bits: int,
    dim: int,
    mapping: object,
    indices: object,
    offsets: object,
    include_last_offset: bool,
    per_sample_weights: object,
    padding_idx: int,
    mode: int,
    out: object,
    half: bool,
    num_threads: int,
    out_checked: bool = False,
) -> NDArray[Any] | _Fault | None: ...
def embedding(
    rows: object,
    bits: int,
    dim: int,
    mapping: object,
    indices: object,
    dequantize: bool,
    out: object,
    half: bool,
    num_threads: int,
    out_checked: bool = False,
) -> NDArray[Any] | _Fault | None: ...
def quantize(
    weights: NDArray[np.float32],
    bits: int,
    out: NDArray[np.uint8],
    bounds: NDArray[np.float32] | None,
    greedy: bool,
    num_bins: int,
    ratio: float,
    num_threads: int,
) -> tuple[str, int] | None: ...
def max_threads() -> int: ...
