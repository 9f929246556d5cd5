"""Quantizing, packing and unpacking, and the operators that tell shapes."""

from __future__ import annotations

import numpy as np

from checks import at_each_level, attempt, is_same, require
from makers import Maker
from qembag import ops
from source import FLOATS, POOL, WIDE, WILD
from support import rules
from support.layouts import LAYOUTS, NAMES
from support.packing import Packing, PerChannel, Unpacking


def quantizing(make: Maker) -> None:
    """`quantize`, and the reference's operators that pack and unpack."""
    family = make.source.pick(["public", "prepack", "bounds", "unpack", "per channel"])
    bits = make.source.pick([8, 4, 2])
    if family == "unpack":
        unpack(make, bits)
    elif family == "per channel":
        per_channel(make, bits)
    else:
        pack(make, family, bits)


def pack(make: Maker, family: str, bits: int) -> None:
    source, per_byte = make.source, LAYOUTS[bits].per_byte
    num_rows, dim = source.rows_and_dim(6)
    if family != "public" and not source.rarely():
        dim = -(-dim // per_byte) * per_byte
    shape: tuple[int, ...] = (num_rows, dim)
    if source.rarely():
        shape = source.shape()
    pools = [FLOATS, FLOATS, FLOATS, WIDE] + ([WILD] if source.rarely(4) else [])
    weights = make.floats(shape, ["f4", "f4", "f2", "f8" if source.rarely(3) else "f4"], pools)
    call = Packing(family, weights, bits)
    if family == "public":
        if dim <= 24 and source.rarely(24):
            call.method = "greedy"
        elif source.rarely(32):
            call.method = source.pick(["Greedy", "LSQ", "", None, 1, b"minmax", ["minmax"]])
        elif dim <= 64 and source.rarely(12):
            call.method = "lsq"
            if not source.below(2):
                call.importance = make.floats(
                    (dim,) if not source.rarely(8) else source.shape(), ["f4", "f8"], [np.abs(FLOATS)]
                )
        call.num_threads, call.layout = make.threads(), make.row_arguments(bits)
    elif bits != 8:
        # The oracle searches for seconds where rows are wide.
        call.optimized = False if source.below(4) or dim > 400 else make.flag()
        call.nbins, call.ratio = (
            1 + source.below(12),
            source.pick([0.16, 0, 1, 0.5, np.float32(0.25), np.float64(0.75)]),
        )
        if source.rarely(24):
            call.nbins = source.pick([0, -1, 2**31, 2**70, 1.5, True, "2", None, 1_000_001])
        if source.rarely(24):
            call.ratio = source.pick([-0.1, 1.5, np.nan, np.inf, "0.5", None, True, 1j, np.array([0.5])])
    if family == "bounds":
        num_rows = int(np.prod(shape[:-1]))
        bounds_shape = (num_rows, 2) if not source.rarely() else source.shape()
        call.bounds = make.floats(bounds_shape, ["f4", "f4", "f2", "f4"], [FLOATS, WIDE])
    at_each_level(call, call.judge())


def unpack(make: Maker, bits: int) -> None:
    source = make.source
    row_bytes = source.below(40)
    if source.rarely(4):
        shape = (*source.shape(), row_bytes)
        ways = ["plain", "strided", "reversed", "columns", "subclass", "method", "buffer", "broadcast"]
        weight = make.place(source.values(POOL, int(np.prod(shape))).reshape(shape), ways)
    else:
        weight = make.rows(LAYOUTS[bits], source.below(9), row_bytes)
    call = Unpacking(weight, bits)
    verdict = call.judge()
    at_each_level(call, verdict)
    meta, _ = attempt(lambda: getattr(ops, f"embedding_bag_{NAMES[bits]}_unpack_meta")(weight), verdict.faults)
    if meta is not None:
        require(meta == (verdict.shape, np.float32), f"the shape of unpack is told as {meta}")


def per_channel(make: Maker, bits: int) -> None:
    source = make.source
    num_rows, dim = source.rows_and_dim(5)
    top = 256 if source.rarely() else 2**bits
    values = source.values(POOL, num_rows * dim).astype(np.uint16) % top
    codes = make.place(
        values.astype(np.uint8).reshape(num_rows, dim),
        ["plain", "plain", "strided", "reversed", "columns", "list", "subclass"],
    )
    scales = make.floats((num_rows,), ["f4", "f8", "f2"], [FLOATS, FLOATS, WILD])
    zeros = make.floats((num_rows,) if not source.rarely() else source.shape(), ["f4", "f8", "f2"], [FLOATS])
    call = PerChannel(codes, scales, zeros, bits)
    verdict = call.judge()
    packed, _ = attempt(call, verdict.faults)
    if packed is None:
        return
    back, _ = attempt(lambda: ops.embedding_bag_unpack(packed), set())
    codes = np.asarray(codes, np.uint8)
    require(is_same(back[0], codes), "the codes that come back")
    for came, given in zip(back[1:], (scales, zeros), strict=True):
        with np.errstate(all="ignore"):
            require(is_same(came, np.asarray(given).astype(np.float32)), "the scales that come back")
    require(is_same(packed.codes(), codes), "the packed codes")
    pairs = LAYOUTS[bits].pairs(packed.data).reshape(-1, 2)
    require(pairs.tobytes() == verdict.expected().tobytes(), "the packed scales and biases")


def shapes(make: Maker) -> None:
    """The operators that tell the shape of an answer."""
    source = make.source
    bits = source.pick([8, 4, 2])
    stem, layout = f"embedding_bag_{NAMES[bits]}", LAYOUTS[bits]
    if source.rarely(3):
        weights = make.floats(source.shape(), ["f4", "f2", "f4", "f8"], [FLOATS])
        held, faults = Packing("prepack", weights, bits).judge_weights(bits)
        told, _ = attempt(lambda: getattr(ops, f"{stem}_prepack_meta")(weights), faults)
        if told is not None:
            packed = (*held.shape[:-1], layout.row_bytes(held.shape[-1]))
            require(told == (packed, np.uint8), f"the shape of prepack is told as {told}")
        return
    rows = make.rows(LAYOUTS[bits], source.below(5), source.below(14))
    given = make.integers(source.shape(), 9), make.integers(source.shape(), 9) if source.below(3) else None
    last = make.flag()
    shape, faults = rules.shape_of_bags(rows, bits, *given, last)
    told, _ = attempt(
        lambda: getattr(ops, f"{stem}_rowwise_offsets_meta")(rows, *given, include_last_offset=last), faults
    )
    if told is not None:
        require(told == (shape, np.float32), f"the shape of bags is told as {told}")
