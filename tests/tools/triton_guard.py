"""Makes Triton's interpreter a trustworthy device on a machine without a GPU.

    with guard(seed=1) as g: ...        # needs TRITON_INTERPRET=1 before triton is imported

What it adds to the interpreter of Triton 3.6 to 3.9:
  numbers   bfloat16 dots and casts (alone, the interpreter multiplies bit patterns and truncates),
            operands of tf32 and tf32x3 dots rounded as the tensor core sees them; other bfloat16
            arithmetic is refused, as kernels have no reason for it
  memory    every access lies inside an argument tensor (its viewed extent) and is aligned;
            ``torch.empty`` gives NaN between red zones, so overruns and unwritten results show
  races     two programs of a launch that store to the same bytes, or one that reads what another
            writes; float atomics
  schedule  seed: the programs run in a shuffled order
  limits    grid sizes, powers of two of warps, tl.dot's smallest depth

It patches private names of triton.runtime.interpreter: pinned by the versions it is tested with.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from attnpool_kernels.impl.triton import version

RED_ZONE = 4096  # bytes
BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)


class GuardError(RuntimeError):
    """What a kernel did would be wrong, or undefined, on a GPU."""


def is_bf16(dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def to_tf32(values: np.ndarray) -> np.ndarray:
    """Round to 10 bits of mantissa, halves away from zero (cvt.rna.tf32.f32)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def product(a: np.ndarray, b: np.ndarray, precision: str) -> np.ndarray:
    """a @ b of float32 operands as tensor cores compute it: ieee, tf32 or tf32x3."""
    if precision == "tf32":
        return np.matmul(to_tf32(a), to_tf32(b))
    if precision == "tf32x3":
        a_big, b_big = to_tf32(a), to_tf32(b)
        a_small, b_small = to_tf32(a - a_big), to_tf32(b - b_big)
        small = np.matmul(a_big, b_small) + np.matmul(a_small, b_big)
        return np.where(np.isnan(small), 0, small) + np.matmul(a_big, b_big)
    return np.matmul(a, b)


def padded(x: torch.Tensor | None) -> torch.Tensor | None:
    """A copy with the same strides between red zones of NaN (or garbage)."""
    if x is None:
        return None
    span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())) if x.numel() else 0
    zone = RED_ZONE // x.element_size()
    storage = _poisoned(span + 2 * zone, x.dtype, x.device)
    storage[zone : zone + span] = x.as_strided((span,), (1,), x.storage_offset())
    return storage.as_strided(x.shape, x.stride(), zone)


def _poisoned(size: int, dtype: torch.dtype, device=None) -> torch.Tensor:
    value = math.nan if dtype.is_floating_point else -(2**30) - 7
    return torch.full((size,), value, dtype=dtype, device=device)


class Guard:
    def __init__(self, seed: int | None, races: bool):
        self.seed, self.races = seed, races
        self.ranges: list[tuple[int, int]] = []  # bytes of every argument tensor
        self.program = (0, 0, 0)
        self.accesses: dict[str, list] = {"load": [], "store": []}  # (granules, program)
        self.programs = self.launches = 0

    def start_launch(self) -> None:
        self.ranges = []
        self.accesses = {"load": [], "store": []}
        self.launches += 1

    def add_tensors(self, x) -> None:
        """A tensor, or those in a tuple of tuples."""
        if isinstance(x, tuple):
            for member in x:
                self.add_tensors(member)
        elif isinstance(x, torch.Tensor) and x.numel():
            last = sum((n - 1) * abs(step) for n, step in zip(x.shape, x.stride()))
            self.ranges.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))

    def note(self, pointers, mask, what: str) -> None:
        """Checks the addresses of an access and remembers them for ``finish_launch``."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        live = np.broadcast_to(mask.data, np.shape(pointers.data)).astype(bool)
        addresses = np.asarray(pointers.data)[live].astype(np.uint64)
        if addresses.size == 0:
            return
        inside = np.zeros(addresses.shape, bool)
        for low, high in self.ranges:
            inside |= (addresses >= low) & (addresses + np.uint64(size) <= high)
        if not inside.all():
            raise GuardError(
                f"{what} of {(~inside).sum()} of {addresses.size} addresses outside of every "
                f"argument, program {self.program}"
            )
        if (addresses % np.uint64(size)).any():
            raise GuardError(f"misaligned {what} of {size} bytes")
        granules = np.unique(addresses // 2)
        if size > 2:
            granules = (granules[:, None] + np.arange(size // 2, dtype=np.uint64)).ravel()
        if what == "store" and len(np.unique(granules)) < addresses.size * max(1, size // 2):
            raise GuardError(f"one store names an address twice, program {self.program}")
        self.accesses[what].append((granules, self.program))

    def finish_launch(self) -> None:
        """Races between programs: any shared byte that one of them stores to."""
        number = {}
        flat = {}
        for what, entries in self.accesses.items():
            ids = [number.setdefault(program, len(number)) for _, program in entries]
            sizes = [len(granules) for granules, _ in entries]
            where = np.concatenate([g for g, _ in entries] or [np.empty(0, np.uint64)])
            flat[what] = where, np.repeat(np.array(ids, np.int64), sizes)
        self.programs += len(number)
        if not self.races:
            return
        where, who = flat["store"]
        order = np.lexsort((who, where))
        where, who = where[order], who[order]
        if ((where[1:] == where[:-1]) & (who[1:] != who[:-1])).any():
            raise GuardError("race: two programs of a launch store to the same bytes")
        read, reader = flat["load"]
        if where.size and read.size:
            at = np.minimum(np.searchsorted(where, read), where.size - 1)
            if ((where[at] == read) & (who[at] != reader)).any():
                raise GuardError("race: a program reads what another one of its launch stores")


@contextlib.contextmanager
def guard(seed: int | None = None, races: bool = True) -> Iterator[Guard]:
    """races=False where overlapping programs are allowed, as with invalid boundaries."""
    g = Guard(seed, races)
    with contextlib.ExitStack() as undo:

        def patch(owner, name, new):
            old = getattr(owner, name)
            setattr(owner, name, new(old))
            undo.callback(setattr, owner, name, old)

        _patch_numbers(patch)
        _patch_memory(patch, g)
        _patch_launch(patch, g)
        with np.errstate(all="ignore"):
            yield g


def _patch_numbers(patch) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def cast(old):
        def cast_impl(self, source, target, *rest):
            if is_bf16(target) and not is_bf16(source.dtype):
                return handle(f32_to_bf16(source.data.astype(np.float32)), target.scalar)
            if is_bf16(source.dtype) and not is_bf16(target):
                kind = interpreter._get_np_dtype(target)
                return handle(bf16_to_f32(source.data).astype(kind), target.scalar)
            return old(self, source, target, *rest)

        return cast_impl

    def refuse(old):
        def operation(self, x, *rest):
            if is_bf16(x.dtype) and rest[-1] not in BITWISE:
                raise GuardError("bfloat16 arithmetic: convert to float32 first")
            return old(self, x, *rest)

        return operation

    def dot(_):
        def create_dot(self, a, b, acc, input_precision, max_imprecise):
            left, right = (bf16_to_f32(x.data) if is_bf16(x.dtype) else x.data for x in (a, b))
            least = 16 if version() < (3, 9) else 256 // a.dtype.scalar.primitive_bitwidth
            if left.shape[-1] < least:
                raise GuardError(f"tl.dot of depth {left.shape[-1]}: Triton wants {least} here")
            kind = acc.data.dtype
            left, right = left.astype(kind), right.astype(kind)
            names = {"TF32": "tf32", "TF32X3": "tf32x3"}
            precision = names.get(str(input_precision).rsplit(".", 1)[-1].upper(), "ieee")
            precision = precision if a.dtype.scalar == tl.float32 else "ieee"
            return handle(product(left, right, precision) + acc.data, acc.dtype.scalar)

        return create_dot

    patch(builder, "cast_impl", cast)
    patch(builder, "create_fp_to_fp", cast)
    patch(builder, "binary_op", refuse)
    patch(builder, "unary_op", refuse)
    patch(builder, "create_dot", dot)


def _patch_memory(patch, g: Guard) -> None:
    builder = interpreter.InterpreterBuilder

    def load(old):
        def create_masked_load(self, pointers, mask, *rest):
            g.note(pointers, mask, "load")
            return old(self, pointers, mask, *rest)

        return create_masked_load

    def store(old):
        def create_masked_store(self, pointers, value, mask, *rest):
            g.note(pointers, mask, "store")
            return old(self, pointers, value, mask, *rest)

        return create_masked_store

    def atomic(_):
        def create_atomic_rmw(self, *rest):
            raise GuardError("atomics: results would depend on the order of the programs")

        return create_atomic_rmw

    def empty(_):
        def poisoned(*shape, dtype=torch.float32, device=None, **rest):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            size = math.prod(shape)
            zone = RED_ZONE // dtype.itemsize
            return _poisoned(size + 2 * zone, dtype, device)[zone : zone + size].view(shape)

        return poisoned

    patch(builder, "create_masked_load", load)
    patch(builder, "create_masked_store", store)
    patch(builder, "create_atomic_rmw", atomic)
    patch(torch, "empty", empty)


def _patch_launch(patch, g: Guard) -> None:
    def call(old):
        def launch(self, *arguments, **keywords):
            warps = keywords.get("num_warps", 4)
            if warps & (warps - 1) or not 1 <= warps <= 32:
                raise GuardError(f"num_warps={warps}: not a power of two up to 32")
            g.start_launch()
            g.add_tensors((*arguments, *keywords.values()))
            builder, order = interpreter.interpreter_builder, {}
            set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

            def set_grid_dim(nx, ny, nz):
                if nx >= 2**31 or max(ny, nz) > 65535 or 0 in (nx, ny, nz):
                    raise GuardError(f"invalid grid {(nx, ny, nz)}")
                set_dim(nx, ny, nz)
                if g.seed is not None:
                    grid = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
                    order.update(zip(grid, random.Random(g.seed).sample(grid, len(grid))))

            def set_grid_idx(*index):
                g.program = order.get(index, index)
                set_index(*g.program)

            builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
            try:
                old(self, *arguments, **keywords)
            except interpreter.InterpreterError as error:
                raise _cause(error) from None
            finally:
                del builder.set_grid_dim, builder.set_grid_idx
            g.finish_launch()

        return launch

    patch(interpreter.GridExecutor, "__call__", call)


def _cause(error: BaseException) -> BaseException:
    """The GuardError at the bottom of a chain of interpreter errors, or the error itself."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, GuardError):
            return found
        found = found.__cause__
    return error
