"""The tile table: block sizes, precision and compiler options per (capability, dtype, D, pass)."""

from __future__ import annotations

import torch

PASSES = (
    "forward",
    "backward_query",
    "backward_key",
    "double_backward_query",
    "double_backward_key",
)
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


def tile(pass_name: str, capability: tuple[int, int] | None, precision: str, width: int) -> dict:
    return dict(
        BLOCK_M=32,
        BLOCK_N=32,
        SLICE=32 if precision == "fp32" else 64,
        PRECISION="tf32x3" if precision == "fp32" else "ieee",
        num_warps=4,
        num_stages=2,
        enable_fp_fusion=True,
    )


def precision(dtype: torch.dtype) -> str:
    return _NAMES[dtype]
