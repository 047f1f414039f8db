"""The tile table: block sizes, precision and compiler options per (capability, dtype, D, pass).

Chosen for molecules of 15 to 64 atoms: 32 x 32 tiles where registers allow (a molecule whose
queries fit one tile needs one gradient kernel instead of two), `mma.sync` everywhere, so that what
ships can be executed in CI (tests/ptx), and no spills to speak of. Nothing here was measured on a
GPU yet: an entry is the first of a list of candidates (32 x 32, then fewer keys, then fewer
queries) that compiled well for sm_80 and sm_90. tests/backends/aot.py compiles every entry for
every architecture, tests/backends/triton_resources.json is the result, PREDICTED.md what follows.
"""

from __future__ import annotations

import functools
import warnings

import torch

PASSES = (
    "forward",
    "backward_query",
    "backward_key",
    "double_backward_query",
    "double_backward_key",
)
WIDTHS = (16, 32, 64, 128, 256)  # D or D_v, whichever is larger, padded
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))  # compiled for in CI

# BLOCK_M queries, BLOCK_N keys, SLICE of D, num_warps, num_stages; a column per pass
_HALF = {
    16: ((32, 32, 64, 2, 2), (32, 32, 64, 4, 1), (32, 32, 64, 2, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 2, 1)),
    32: ((32, 32, 64, 2, 2), (32, 32, 64, 4, 1), (32, 32, 64, 2, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 2, 1)),
    64: ((32, 32, 64, 2, 2), (32, 32, 64, 4, 1), (32, 32, 64, 4, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 4, 1)),
    128: ((32, 32, 64, 4, 2), (32, 32, 64, 8, 1), (32, 32, 64, 4, 1), (32, 32, 64, 8, 1),
          (32, 16, 16, 4, 1)),
    256: ((32, 32, 64, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1),
          (32, 32, 32, 8, 1)),
}  # fmt: skip
_FLOAT32 = {
    16: ((32, 32, 32, 2, 2), (32, 32, 32, 4, 1), (32, 16, 32, 4, 1), (32, 16, 16, 8, 1),
         (32, 16, 32, 4, 1)),
    32: ((32, 32, 32, 2, 2), (32, 32, 32, 4, 1), (32, 16, 32, 4, 1), (32, 16, 16, 8, 1),
         (32, 16, 32, 4, 1)),
    64: ((32, 32, 32, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 4, 1), (32, 16, 16, 8, 1),
         (32, 32, 32, 8, 1)),
    128: ((32, 32, 32, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 8, 1), (16, 16, 16, 8, 1),
          (32, 16, 16, 8, 1)),
    256: ((32, 32, 32, 8, 1), (16, 16, 16, 8, 1), (32, 16, 16, 8, 1), (16, 16, 16, 8, 1),
          (16, 16, 16, 8, 1)),
}  # fmt: skip
_FLOAT64 = {width: ((16, 16, 16, 4, 1), *((16, 16, 16, 8, 1),) * 4) for width in WIDTHS}
_MMA = {
    "fp16": _HALF, "bf16": _HALF, "fp32": _FLOAT32, "tf32": _FLOAT32, "fp64": _FLOAT64,
}  # fmt: skip
_TABLES = {capability: _MMA for capability in CAPABILITIES}

_ROWS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_PRECISION = {"fp32": "tf32x3", "tf32": "tf32"}  # of tl.dot; float32 accuracy from three products


def precision(dtype: torch.dtype) -> str:
    """Row of the table: the dtype, and for float32 whether torch allows plain TF32."""
    if dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "fp32"
    return _ROWS[dtype]


@functools.cache
def tile(pass_name: str, capability: tuple[int, int] | None, row: str, width: int) -> dict:
    """Launch arguments of a kernel. capability None: a CPU, that is, Triton's interpreter."""
    table = _TABLES[_known(capability or CAPABILITIES[0])]
    block_m, block_n, part, warps, stages = table[row][width][PASSES.index(pass_name)]
    return dict(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SLICE=part,
        PRECISION=_PRECISION.get(row, "ieee"),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
    )


@functools.cache
def _known(capability: tuple[int, int]) -> tuple[int, int]:
    """The capability, or the newest older one in the table, with one warning."""
    if capability in _TABLES:
        return capability
    older = max(known for known in CAPABILITIES if known <= max(capability, CAPABILITIES[0]))
    warnings.warn(
        f"attnpool_kernels: no Triton tiles for sm_{capability[0]}{capability[1]}, "
        f"using those of sm_{older[0]}{older[1]}",
        stacklevel=2,
    )
    return older
