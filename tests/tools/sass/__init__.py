"""Machine code of NVIDIA GPUs (SASS) executed as far as its control flow needs, to be counted.

    code = Program(text_of_nvdisasm, "part_of_the_kernel_name")
    count = execute(code, grid=(x,), threads=64, parameters=bytes, buffers=[ptr, ...])
    count.instructions, count.requested       warp-instructions and bytes of global memory

A warp runs instruction by instruction: what integers, predicates and branches do is done, with the
contents of the given buffers; whatever follows from other memory, from tensor cores or from shared
memory that holds such values is *unknown*, and stays so. An unknown value that decides a branch
raises ``SassError``, unless the caller says which way to go. Guessed is only that a float which is
unknown equals no other one, and that its division takes no slow path. So every instruction on the
executed path is counted once for each warp that issues it, loops as often as they run, those whose
guard is off included (they take an issue slot, too).

Covered: what nvcc 13.0 and Triton 3.6 to 3.9 emit on sm_90 for the integer part of these kernels;
another instruction makes its result unknown.
"""

from . import floats, instructions, memory  # noqa: F401  (they register their handlers)
from .machine import Count, execute
from .parser import Program, SassError

__all__ = ["Count", "Program", "SassError", "execute"]
