"""The tile table: block sizes, precision and compiler options per (capability, dtype, D, pass).

Chosen for molecules of 15 to 64 atoms: 32 x 32 tiles where registers allow (a molecule whose
queries fit one tile needs one gradient kernel instead of two). Nothing here was measured on a GPU
yet. On sm_90 the tiles of calls without options are those that issue the fewest instructions, as
counted from their machine code (``_HOPPER``); elsewhere an entry is the first of a list of
candidates (32 x 32, more warps, then fewer keys, then fewer queries, then slices of the width) that
compiled without spills at first, on `mma.sync`, which CI can execute (tests/tools/ptx).
tests/tools/aot.py compiles every entry, tests/tools/triton_resources.csv and triton_executed.csv
sum up the result, PREDICTED.md says what follows.
"""

from __future__ import annotations

import functools
import warnings

import torch

from . import version

PASSES = (
    "forward",
    "backward_query",
    "backward_key",
    "double_backward_query",
    "double_backward_key",
)
WIDTHS = (16, 32, 64, 128, 256)  # D or D_v, whichever is larger, padded
CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))  # compiled for in CI
GFX942 = (9, 4)  # as torch for ROCm counts: compiled for, never run

LONG = 256  # rows from which a molecule has the tiles of long sets, where there are such
LONG_PASSES = ("forward_long", "backward_query_long", "backward_key_long")
MEDIUM = 33  # rows from which it has those of medium ones: one tile has all queries of up to 64
MEDIUM_PASSES = ("forward_medium", "backward_query_medium", "backward_key_medium")

FEW = 16  # seeds up to which a molecule's queries are one small tile, with kernels of their own
SPLIT = 512  # keys of a molecule that one program of those walks
FEW_PASSES = ("few_seeds_forward", "few_seeds_backward", "few_seeds_double_backward")

# BLOCK_M queries, BLOCK_N keys, SLICE of D, num_warps, num_stages[, most registers]; a column per
# pass. Most registers: ptxas may give a kernel fewer of them for the sake of more warps, and spill;
# 255 forbids that where it did.
_HALF = {
    16: ((32, 32, 64, 2, 2), (32, 32, 64, 4, 1), (32, 32, 64, 2, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 4, 1, 255)),
    32: ((32, 32, 64, 2, 2), (32, 32, 64, 4, 1), (32, 32, 64, 2, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 2, 1)),
    64: ((32, 32, 64, 2, 2, 255), (32, 32, 64, 4, 1), (32, 32, 64, 4, 1), (32, 32, 64, 4, 1),
         (32, 32, 64, 4, 1)),
    128: ((32, 32, 64, 4, 2), (32, 32, 64, 8, 1, 255), (32, 32, 64, 4, 1), (32, 16, 64, 8, 1, 255),
          (32, 16, 16, 8, 1, 255)),
    256: ((32, 32, 64, 4, 2), (32, 32, 32, 8, 1, 255), (32, 32, 32, 8, 1), (16, 16, 16, 8, 1, 255),
          (16, 16, 16, 8, 1, 255)),
}  # fmt: skip
_HALF_OPTIONS = {  # where bias and dropout need other tiles
    (16, "forward"): (32, 32, 64, 2, 2, 255),
    (16, "backward_query"): (32, 32, 64, 4, 1, 255),
    (16, "double_backward_query"): (32, 16, 64, 8, 1, 255),
    (32, "forward"): (32, 32, 64, 2, 2, 255),
    (32, "double_backward_query"): (32, 32, 16, 8, 1, 255),
    (32, "double_backward_key"): (32, 32, 64, 8, 1, 255),
    (64, "backward_query"): (32, 32, 64, 8, 1, 255),
    (64, "backward_key"): (32, 32, 64, 4, 1, 255),
    (64, "double_backward_query"): (32, 32, 32, 8, 1, 255),
    (64, "double_backward_key"): (32, 32, 64, 8, 1, 255),
    (128, "backward_query"): (32, 32, 64, 8, 1),
}
_FLOAT32 = {
    16: ((32, 32, 32, 2, 2), (32, 32, 32, 4, 1), (32, 16, 32, 4, 1, 255), (32, 16, 16, 8, 1),
         (16, 16, 16, 8, 1, 255)),
    32: ((32, 32, 32, 2, 2), (32, 32, 16, 4, 1, 255), (32, 16, 32, 4, 1, 255), (32, 16, 16, 8, 1),
         (32, 16, 32, 4, 1)),
    64: ((32, 32, 32, 4, 2), (32, 32, 32, 8, 1), (32, 32, 32, 4, 1, 255), (32, 16, 16, 8, 1),
         (32, 16, 32, 8, 1, 255)),
    128: ((32, 32, 32, 4, 2, 255), (32, 16, 32, 8, 1, 255), (32, 32, 32, 8, 1, 255),
          (16, 16, 8, 8, 1, 255), (32, 16, 16, 8, 1, 255)),
    256: ((32, 32, 32, 8, 1, 255), (16, 16, 16, 8, 1, 255), (32, 16, 16, 8, 1),
          (16, 8, 16, 8, 1, 255), (16, 16, 16, 8, 1)),
}  # fmt: skip
_FLOAT32_OPTIONS = {
    (16, "forward"): (32, 16, 32, 8, 1, 255),
    (16, "backward_query"): (32, 32, 32, 8, 1, 255),
    (16, "backward_key"): (32, 32, 16, 4, 1, 255),
    (32, "forward"): (32, 16, 32, 8, 1, 255),
    (32, "backward_query"): (32, 32, 32, 8, 1, 255),
    (32, "double_backward_query"): (16, 16, 16, 8, 1, 255),
    (64, "forward"): (32, 32, 32, 4, 2, 255),
    (64, "backward_key"): (32, 32, 32, 8, 1, 255),
    (64, "double_backward_query"): (16, 16, 16, 8, 1, 255),
    (64, "double_backward_key"): (16, 16, 16, 8, 1, 255),
    (128, "backward_query"): (16, 16, 32, 8, 1, 255),
    (128, "backward_key"): (32, 16, 32, 8, 1, 255),
    (128, "double_backward_query"): (16, 16, 16, 8, 1, 255),
}
_FLOAT64 = {
    16: ((16, 16, 16, 4, 1, 255), (16, 16, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255),
         (16, 8, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
    32: ((16, 16, 16, 4, 1, 255), *((16, 16, 16, 8, 1, 255),) * 4),
    64: ((16, 16, 16, 4, 1, 255), *((16, 16, 16, 8, 1, 255),) * 4),
    128: ((16, 16, 16, 4, 1, 255), (16, 16, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255),
          (16, 8, 8, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
    256: ((16, 16, 16, 4, 1, 255), (16, 16, 16, 8, 1, 255), (16, 8, 16, 8, 1, 255),
          (16, 8, 16, 8, 1, 255), (8, 8, 16, 8, 1, 255)),
}  # fmt: skip
_FLOAT64_OPTIONS = {
    (16, "double_backward_query"): (16, 8, 8, 8, 1, 255),
    (64, "double_backward_query"): (16, 8, 16, 8, 1, 255),
    (128, "double_backward_query"): (16, 8, 16, 8, 1, 255),
    (256, "double_backward_query"): (8, 4, 8, 8, 1, 255),
}

# long sets: a program keeps more queries, so k and v are read less often; mma.sync here too, which
# needs fewer than 64 rows of the product or fewer than 4 warps (then Hopper's compiler takes wgmma)
_LONG_HALF = {
    32: ((64, 32, 64, 2, 3), (32, 64, 64, 4, 2), (32, 32, 64, 4, 2)),
    64: ((64, 32, 64, 2, 3), (32, 64, 64, 4, 2, 255), (32, 32, 64, 4, 2)),
    128: ((32, 64, 64, 4, 2), (32, 32, 64, 8, 2, 255), (32, 32, 64, 4, 2)),
}
_LONG_FLOAT32 = {
    32: ((32, 64, 32, 4, 2), (32, 32, 16, 4, 2, 255), (32, 32, 32, 4, 2)),
    64: ((32, 32, 32, 4, 2), (32, 32, 32, 8, 2), (32, 32, 32, 4, 2, 255)),
}

# few seeds: one row of tensor-core tiles
_FEW_HALF = {
    16: ((16, 32, 64, 1, 2), (16, 16, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
    32: ((16, 32, 64, 1, 2), (16, 16, 32, 4, 1, 255), (16, 16, 16, 8, 1, 255)),
    64: ((16, 32, 64, 2, 2, 255), (16, 32, 64, 8, 1, 255), (16, 16, 32, 8, 1, 255)),
    128: ((16, 32, 64, 4, 1, 255), (16, 32, 64, 4, 1), (16, 16, 64, 8, 1, 255)),
    256: ((16, 32, 64, 4, 1), (16, 32, 64, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
}
_FEW_FLOAT32 = {
    16: ((16, 32, 32, 2, 1, 255), (16, 16, 16, 4, 1, 255), (16, 8, 8, 8, 1, 255)),
    32: ((16, 32, 32, 2, 1, 255), (16, 16, 32, 4, 1, 255), (16, 16, 16, 8, 1, 255)),
    64: ((16, 32, 32, 4, 1, 255), (16, 32, 32, 8, 1, 255), (16, 8, 16, 8, 1, 255)),
    128: ((16, 32, 32, 4, 1), (16, 32, 32, 8, 1, 255), (16, 16, 8, 8, 1, 255)),
    256: ((16, 16, 16, 8, 1), (16, 32, 32, 8, 1, 255), (16, 8, 32, 8, 1, 255)),
}
_FEW_FLOAT64 = {
    16: ((16, 16, 16, 4, 1), (16, 16, 16, 8, 1, 255), (16, 16, 8, 8, 1, 255)),
    32: ((16, 16, 16, 4, 1), (16, 16, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
    64: ((16, 16, 16, 4, 1), (16, 8, 8, 8, 1, 255), (16, 16, 16, 8, 1, 255)),
    128: ((16, 16, 16, 4, 1), (16, 16, 16, 8, 1, 255), (16, 8, 8, 8, 1, 255)),
    256: ((16, 16, 16, 8, 1, 255), (16, 16, 16, 8, 1, 255), (16, 8, 8, 8, 1, 255)),
}

# (capability, row, width, pass): where the tiles above would spill, or miss gfx942's tensor core.
# None: no tile that was tried does not, and the kernels of other queries serve few seeds too.
_CHIPS = {
    ((8, 0), "fp32", 256, "few_seeds_double_backward"): (16, 8, 16, 8, 1, 255),
    ((8, 0), "fp64", 256, "few_seeds_double_backward"): (16, 4, 8, 8, 1, 255),
    ((8, 6), "fp32", 16, "few_seeds_double_backward"): (16, 16, 8, 8, 1, 255),
    ((8, 6), "fp32", 256, "few_seeds_double_backward"): None,
    ((8, 6), "fp64", 256, "few_seeds_double_backward"): None,
    ((8, 9), "fp32", 16, "few_seeds_double_backward"): (16, 16, 8, 8, 1, 255),
    ((8, 9), "fp32", 256, "few_seeds_double_backward"): None,
    ((8, 9), "fp64", 256, "few_seeds_double_backward"): None,
    ((9, 0), "bf16", 128, "few_seeds_double_backward"): (16, 32, 64, 4, 1, 255),
    ((9, 0), "fp16", 128, "few_seeds_double_backward"): (16, 32, 64, 4, 1, 255),
    ((9, 0), "fp32", 256, "few_seeds_double_backward"): None,
    ((9, 0), "fp64", 256, "few_seeds_double_backward"): None,
    (GFX942, "bf16", 128, "double_backward_query"): (32, 16, 32, 8, 1),
    (GFX942, "fp32", 128, "backward_key"): (32, 16, 32, 8, 1),
    (GFX942, "fp64", 16, "double_backward_query"): (16, 16, 16, 8, 1),
    (GFX942, "fp64", 256, "backward_key"): (16, 16, 16, 8, 1),
    (GFX942, "fp64", 256, "double_backward_key"): (16, 16, 16, 8, 1),
    ((10, 0), "fp32", 256, "few_seeds_double_backward"): None,
    ((10, 0), "fp64", 256, "few_seeds_double_backward"): None,
    ((12, 0), "fp32", 16, "few_seeds_double_backward"): (16, 16, 8, 8, 1, 255),
    ((12, 0), "tf32", 16, "few_seeds_backward"): (16, 16, 16, 8, 1, 255),
}

# where a key bias needs other tiles still: its sums over queries take registers too
_KEY_BIAS_HALF = {
    (16, "backward_key"): (32, 32, 64, 2, 1, 255),
    (16, "double_backward_key"): (32, 16, 64, 4, 1, 255),
    (32, "double_backward_query"): (32, 16, 16, 8, 1, 255),
    (64, "double_backward_query"): (32, 16, 32, 8, 1, 255),
    (128, "few_seeds_backward"): (16, 32, 64, 8, 1, 255),
    (128, "few_seeds_double_backward"): (16, 16, 32, 8, 1, 255),
}
_KEY_BIAS_FLOAT32 = {
    (16, "backward_query"): (32, 16, 32, 8, 1, 255),
    (16, "few_seeds_backward"): (16, 8, 16, 4, 1, 255),
    (16, "few_seeds_double_backward"): (16, 8, 8, 4, 1, 255),
    (32, "backward_query"): (32, 16, 16, 8, 1, 255),
    (32, "few_seeds_backward"): (16, 16, 16, 4, 1, 255),
    (128, "double_backward_query"): (16, 8, 16, 8, 1, 255),
    (128, "double_backward_key"): (32, 16, 8, 8, 1, 255),
    (256, "double_backward_query"): (16, 8, 8, 8, 1, 255),
}
_OPTIONS_CHIPS = {  # before _CHIPS
    ((12, 0), "bf16", 16, "backward_query"): (32, 16, 64, 4, 1, 255),
    ((12, 0), "bf16", 32, "backward_query"): (32, 16, 64, 4, 1, 255),
    ((12, 0), "bf16", 64, "backward_query"): (32, 32, 32, 8, 1, 255),
    ((12, 0), "fp16", 16, "backward_query"): (32, 16, 64, 4, 1, 255),
    ((12, 0), "fp16", 32, "backward_query"): (32, 16, 64, 4, 1, 255),
    ((12, 0), "fp16", 64, "backward_query"): (32, 32, 32, 8, 1, 255),
}
_KEY_BIAS_CHIPS = {  # before those
    ((8, 0), "bf16", 256, "few_seeds_double_backward"): None,
    ((8, 0), "fp16", 256, "few_seeds_double_backward"): None,
    ((8, 0), "fp32", 256, "few_seeds_double_backward"): None,
    ((8, 6), "fp32", 16, "few_seeds_double_backward"): (16, 8, 8, 2, 1, 255),
    ((8, 6), "fp64", 32, "few_seeds_double_backward"): (16, 16, 8, 8, 1, 255),
    ((8, 9), "fp32", 16, "few_seeds_double_backward"): (16, 8, 8, 2, 1, 255),
    ((8, 9), "fp64", 32, "few_seeds_double_backward"): (16, 16, 8, 8, 1, 255),
    ((10, 0), "fp32", 32, "few_seeds_double_backward"): (16, 8, 16, 8, 1, 255),
    ((12, 0), "bf16", 32, "few_seeds_backward"): (16, 16, 16, 4, 1, 255),
    ((12, 0), "bf16", 64, "few_seeds_backward"): (16, 32, 32, 8, 1, 255),
    ((12, 0), "fp16", 32, "few_seeds_backward"): (16, 16, 16, 4, 1, 255),
    ((12, 0), "fp16", 64, "few_seeds_backward"): (16, 32, 32, 8, 1, 255),
    ((12, 0), "fp32", 16, "double_backward_query"): (32, 16, 8, 8, 1, 255),
    ((12, 0), "fp32", 16, "few_seeds_double_backward"): (16, 8, 8, 4, 1, 255),
    ((12, 0), "fp32", 32, "double_backward_query"): (16, 16, 8, 8, 1, 255),
    ((12, 0), "fp32", 32, "few_seeds_double_backward"): (16, 8, 16, 8, 1, 255),
    ((12, 0), "fp32", 64, "backward_query"): (32, 32, 32, 8, 1, 255),
    ((12, 0), "fp32", 64, "double_backward_query"): (16, 16, 8, 8, 1, 255),
    ((12, 0), "fp32", 256, "double_backward_query"): (8, 8, 8, 8, 1, 255),
}


# sm_90 without options: chosen by counted instructions (tests/tools/executed_triton.py), one or two
# warps a tile where they repeat no product, some spilled registers where they cost less than they
# save. Medium and long sets have warp group products, which CI executes as mma.sync of other chips.
_HOPPER_HALF = {
    (16, "forward"): (32, 32, 64, 1, 1, 255),
    (32, "forward"): (32, 32, 64, 1, 1, 255),
    (64, "forward"): (32, 32, 64, 1, 1, 255),
    (128, "forward"): (32, 32, 64, 2, 1, 255),
    (16, "backward_query"): (32, 32, 64, 1, 1, 255),
    (32, "backward_query"): (32, 32, 64, 1, 1, 255),
    (64, "backward_query"): (32, 32, 64, 2, 1, 255),
    (128, "backward_query"): (32, 32, 64, 2, 1, 255),
    (64, "backward_key"): (32, 32, 64, 2, 1, 255),
    (16, "double_backward_query"): (32, 32, 64, 2, 1, 255),
    (32, "double_backward_query"): (32, 32, 64, 2, 1, 255),
    (64, "double_backward_query"): (32, 32, 64, 2, 1, 255),
    (64, "double_backward_key"): (32, 32, 64, 2, 1, 255),
    (16, "few_seeds_forward"): (16, 32, 64, 1, 1, 255),
    (32, "few_seeds_forward"): (16, 32, 64, 1, 1, 255),
    (64, "few_seeds_forward"): (16, 32, 64, 1, 1, 255),
    (16, "few_seeds_backward"): (16, 32, 64, 1, 1, 255),
    (32, "few_seeds_backward"): (16, 32, 64, 1, 1, 255),
    (64, "few_seeds_backward"): (16, 32, 64, 1, 1, 255),
    (16, "forward_medium"): (64, 64, 64, 2, 1, 255),
    (32, "forward_medium"): (64, 64, 64, 2, 1, 255),
    (64, "forward_medium"): (64, 64, 64, 4, 1, 255),
    (16, "backward_query_medium"): (64, 64, 64, 2, 1, 255),
    (32, "backward_query_medium"): (64, 64, 64, 4, 1, 255),
    (64, "backward_query_medium"): (64, 64, 64, 4, 1, 255),
    (16, "backward_key_medium"): (64, 32, 64, 2, 1, 255),
    (32, "backward_key_medium"): (64, 32, 64, 2, 1, 255),
    (64, "backward_key_medium"): (64, 32, 64, 2, 1, 255),
    (32, "forward_long"): (128, 128, 64, 8, 3),
    (64, "forward_long"): (128, 128, 64, 8, 3),
    (32, "backward_query_long"): (128, 64, 64, 8, 3),
    (64, "backward_query_long"): (128, 64, 64, 8, 3),
    (32, "backward_key_long"): (32, 128, 64, 8, 2),
    (64, "backward_key_long"): (32, 128, 64, 8, 2),
}
_HOPPER_FLOAT32 = {
    (16, "forward"): (32, 32, 32, 1, 1, 255),
    (32, "forward"): (32, 32, 32, 1, 1, 255),
    (64, "forward"): (32, 32, 64, 2, 1, 255),
    (16, "backward_query"): (32, 32, 32, 2, 1, 255),
    (32, "backward_query"): (32, 32, 16, 2, 1, 255),
    (64, "backward_query"): (32, 32, 16, 2, 1, 255),
    (64, "double_backward_query"): (32, 32, 16, 4, 1, 255),
}
_HOPPER: dict[str, dict] = {
    "fp16": _HOPPER_HALF,
    "bf16": _HOPPER_HALF,
    "fp32": _HOPPER_FLOAT32,
    "tf32": _HOPPER_FLOAT32,
    "fp64": {},
}


def _by_pass(columns: dict, few: dict, long: dict) -> dict:
    named = (PASSES, columns), (FEW_PASSES, few), (LONG_PASSES, long)
    return {
        (width, name): entry
        for names, table in named
        for width in table
        for name, entry in zip(names, table[width])
    }


_HALF_TABLE = _by_pass(_HALF, _FEW_HALF, _LONG_HALF)
_FLOAT32_TABLE = _by_pass(_FLOAT32, _FEW_FLOAT32, _LONG_FLOAT32)
_TABLES = {
    "fp16": _HALF_TABLE,
    "bf16": _HALF_TABLE,
    "fp32": _FLOAT32_TABLE,
    "tf32": _FLOAT32_TABLE,
    "fp64": _by_pass(_FLOAT64, _FEW_FLOAT64, {}),
}
_OPTIONS: dict[str, dict] = {
    "fp16": _HALF_OPTIONS,
    "bf16": _HALF_OPTIONS,
    "fp32": _FLOAT32_OPTIONS,
    "tf32": _FLOAT32_OPTIONS,
    "fp64": _FLOAT64_OPTIONS,
}
_KEY_BIAS: dict[str, dict] = {
    "fp16": _KEY_BIAS_HALF,
    "bf16": _KEY_BIAS_HALF,
    "fp32": _KEY_BIAS_FLOAT32,
    "tf32": _KEY_BIAS_FLOAT32,
    "fp64": {},
}

_ROWS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
_PRECISION = {"fp32": "tf32x3", "tf32": "tf32"}  # of tl.dot; float32 accuracy from three products


def precision(dtype: torch.dtype) -> str:
    """Row of the table: the dtype, and for float32 whether torch allows plain TF32."""
    if dtype == torch.float32:
        # follows allow_tf32 too, which raises when it is read after this one was written
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"
    return _ROWS[dtype]


@functools.cache
def tile(
    pass_name: str,
    capability: tuple[int, int] | None,
    row: str,
    width: int,
    options: bool,
    key_bias: bool = False,
) -> dict | None:
    """Launch arguments of a kernel; None where the table has no such entry.

    capability None: a CPU, that is, Triton's interpreter. options: with a bias, a key bias or
    dropout, which take registers.
    """
    entry = _TABLES[row].get((width, pass_name))
    if options:
        entry = _OPTIONS[row].get((width, pass_name), entry)
    if key_bias:
        entry = _KEY_BIAS[row].get((width, pass_name), entry)
    place = _known(capability or CAPABILITIES[0]), row, width, pass_name
    if place[0] == (9, 0) and not options:
        entry = _HOPPER[row].get((width, pass_name), entry)
    entry = _CHIPS.get(place, entry)
    if options:
        entry = _OPTIONS_CHIPS.get(place, entry)
    if key_bias:
        entry = _KEY_BIAS_CHIPS.get(place, entry)
    if entry is None:
        return None
    block_m, block_n, part, warps, stages, *most = entry
    if version() < (3, 9):  # there a tl.dot of any type has a depth of 16 or more
        block_n, part = max(block_n, 16), max(part, 16)
    return dict(
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SLICE=part,
        PRECISION=_PRECISION.get(row, "ieee"),
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=True,
        maxnreg=most[0] if most else None,
    )


@functools.cache
def _known(capability: tuple[int, int]) -> tuple[int, int]:
    """The capability, or the newest older one in the table, with one warning."""
    if capability in (*CAPABILITIES, GFX942):
        return capability
    older = max(known for known in CAPABILITIES if known <= max(capability, CAPABILITIES[0]))
    warnings.warn(
        f"attnpool_kernels: no Triton tiles for sm_{capability[0]}{capability[1]}, "
        f"using those of sm_{older[0]}{older[1]}",
        stacklevel=2,
    )
    return older
