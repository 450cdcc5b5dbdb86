"""Numbers of operations of matrix products, convolutions and attention kernels."""

import math
import re

from easy_jax.ahead_of_time.hlo import Instruction, Shape

SPLASH = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")  # the parts of JAX's splash attention
# The number of matrix products in each part; "fused" is the whole backward pass in one kernel.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused": 5}


def dot_flops(instruction: Instruction, lhs: tuple[int, ...], out: tuple[int, ...]) -> float:
    """Returns two operations for every pair that is multiplied and added."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
    axes = [int(axis) for axis in found.group(1).split(",") if axis] if found else []
    return 2.0 * math.prod(out) * math.prod(lhs[axis] for axis in axes)


def convolution_flops(
    instruction: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...], out: tuple[int, ...]
) -> float:
    """Counts only products in range; TPU programs also write batched products as convolutions."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if not labels:
        return 0.0
    of_lhs, of_rhs, of_out = labels.groups()
    found = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", found.group(1))) if found else {}

    def setting(name: str, axis: int, default: int) -> int:
        values = window[name].split("x") if name in window else []
        return int(values[axis].split("_")[0]) if values else default

    valid = 1.0
    for axis in range(sum(label.isdigit() for label in of_lhs)):
        size, steps = lhs[of_lhs.index(str(axis))], out[of_out.index(str(axis))]
        stride, pad = setting("stride", axis, 1), setting("pad", axis, 0)
        dilate, spread = setting("lhs_dilate", axis, 1), setting("rhs_dilate", axis, 1)
        places = (
            step * stride + tap * spread - pad
            for step in range(steps)
            for tap in range(setting("size", axis, 1))
        )
        valid *= sum(p >= 0 and p % dilate == 0 and p // dilate < size for p in places)
    features = out[of_out.index("b")] * out[of_out.index("f")]
    return 2.0 * features * valid * rhs[of_rhs.index("i")]


def splash_flops(part: str, instruction: Instruction, operands: list[Shape]) -> float:
    """Counts products over the blocks of queries and keys that the causal mask leaves."""
    query = max(
        (s for s in operands if len(s.dims) >= 3 and s.dtype in ("bf16", "f32")),
        key=lambda shape: math.prod(shape.dims),
    )
    length = query.dims[-2]
    block = instruction.number(r"block_q\W+(\d+)") or 512
    blocks = max(1, length // block)
    if part == "dkv" and re.search(r"use_fused_bwd_kernel\W+true", instruction.attributes):
        part = "fused"
    share = (blocks + 1) / (2 * blocks)
    return 2.0 * _SPLASH_PRODUCTS[part] * math.prod(query.dims) * length * share
