"""A PTX simulator in numpy: executes what nvcc or Triton compiled, without a GPU, with checks.

    kernel = Kernel(ptx_text, "part_of_the_entry_name")
    launch(kernel, grid=(x,), threads=128, arguments=[...], buffers=[...], schedule="warp", seed=3)

It reports accesses outside of the given buffers, misaligned ones, divergent or missing lanes in
warp-wide instructions, barriers that not all threads reach, registers that nobody wrote, invalid
grids. Shared memory starts as NaN, cp.async lands only at its wait, and random warp orders make a
missing barrier visible (not every one: a warp runs undisturbed until its next barrier).
Covered: what nvcc 13.0 and Triton 3.6 to 3.9 emit for kernels of mma.sync on sm_80 to sm_120;
anything else raises PtxError("not implemented: ..."). No wgmma, TMA, tcgen05.
"""

from . import instructions, matrix  # noqa: F401  (they register their handlers)
from .machine import launch
from .parser import Kernel, PtxError

__all__ = ["Kernel", "PtxError", "launch"]
