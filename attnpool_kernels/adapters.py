"""What adapters to other libraries share: which package is there, and their layout.

The libraries know no shared queries, no rows of nobody, few widths, and have a history of bugs with
empty sequences. So they get only molecules that have queries and keys, packed without gaps, and
everything else is 0 with gradient exactly 0 by construction, whatever a library leaves unwritten.
``pack`` reads sizes on the host: one synchronisation a call, or one for all layers that share a
``Ragged`` on the device of the rows. Under ``torch.compile`` an adapter breaks the graph and runs
as it does without; ``fullgraph=True`` raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module, util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import autograd, ragged

if TYPE_CHECKING:
    from .dispatch import Problem

DEVICES = ("cuda",)  # where the libraries have kernels
HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements: 16 bytes of a half type
GRID = 65_535  # the libraries put molecules on a grid axis with this limit


@cache
def find(module: str, attribute: str) -> tuple[Any, str]:
    """An attribute of an optional module and "", or None and the reason why it is missing."""
    try:
        return getattr(import_module(module), attribute), ""
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None, f"{error.name} is not installed"
        return None, f"{module} cannot be imported: {error}"
    except Exception as error:  # a binary for another torch raises anything
        return None, f"{module}.{attribute} cannot be imported: {type(error).__name__}: {error}"


def missing(package: str) -> str:
    """Why a package cannot be there, seen without importing it; "" where it may be."""
    try:
        there = package in sys.modules or util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = False
    return "" if there else f"{package} is not installed"


def reasons(problem: Problem, capability: tuple[int, int] = (8, 0)) -> list[str]:
    """Reasons that hold for every ragged half-precision attention of another library."""
    found = []
    if problem.device not in DEVICES:
        found.append(f"tensors on {problem.device}: needs {' or '.join(DEVICES)}")
    if problem.capability is not None and problem.capability < capability:
        found.append(
            f"device is sm_{problem.capability[0]}{problem.capability[1]}: "
            f"needs sm_{capability[0]}{capability[1]} or newer"
        )
    if problem.dtype not in HALF:
        found.append(f"{str(problem.dtype).removeprefix('torch.')}: needs float16 or bfloat16")
    for name, dim in (("head", problem.head_dim), ("value", problem.value_dim)):
        if dim > 256:
            found.append(f"{name} dimension {dim}: needs at most 256")
    if problem.bias:
        found.append("bias: none in its attention of packed rows")
    return found + first_derivative_reasons(problem)


def attention(
    call: Callable[..., tuple[Tensor, Tensor | None]], name: str, *arguments: Any
) -> tuple[Tensor, Tensor | None]:
    """``autograd.first_order``, which a compiler must not look into: sizes are read on the host,
    and the guard against silently wrong second derivatives has to stand outside of its graphs.
    """
    return _run(call, name, *arguments)


_run: Callable[..., tuple[Tensor, Tensor | None]] = autograd.first_order


def _keep_compilers_out() -> None:
    """Done where a backend is chosen, which runs while a compiler traces; the import of the
    compiler itself is nothing that a program without one should pay for.
    """
    global _run
    if "torch._dynamo" in sys.modules and _run is autograd.first_order:
        _run = torch.compiler.disable(_run, reason="adapters read sizes on the host")


def first_derivative_reasons(problem: Problem) -> list[str]:
    """Reasons of every library whose backward is opaque and whose dropout is its own."""
    _keep_compilers_out()
    found = []
    if problem.dropout:
        found.append("dropout: its mask is not the stateless one of this package")
    if problem.grad_order > 1:
        found.append(
            f"first derivative only, inputs require grad (grad_order={problem.grad_order})"
        )
    return found


@dataclass
class Layout:
    """What the boundaries of a call say, for any q, k and v with so many rows."""

    q_ptr: Tensor  # [b + 1] int32, of the molecules that have queries and keys
    k_ptr: Tensor
    longest_q: int
    longest_k: int
    shape: tuple[int, ...]  # of all query rows: (N_q,) or (B, S)
    rows_q: int  # of any molecule
    rows_k: int
    index: Tensor | None  # places of the live molecules' query rows, or of the molecules themselves
    own: Tensor | None  # places of their key rows; None: the first rows_k
    live: Tensor | None  # index of the molecules among all; None: all
    kept: dict = field(default_factory=dict)  # what an adapter makes of it
    source: tuple = ()  # keeps the boundaries alive


@dataclass
class Packed:
    """Molecules that have queries and keys, without gaps, and the way back to all rows.

    q: rows of the live molecules; or, where ``shared``, the seeds as they were given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_ptr: Tensor  # [b + 1] int32
    k_ptr: Tensor
    longest_q: int
    longest_k: int
    shape: tuple[int, ...]  # of all rows: (N_q,) or (B, S)
    index: Tensor | None  # places of q's rows, or of the molecules, among them; None: the first
    live: Tensor | None  # index of the molecules among all; None: all
    kept: dict  # lasts as long as the boundaries: masks and the like

    def __len__(self) -> int:
        return self.k_ptr.numel() - 1

    def restore(self, part: Tensor, nothing: float) -> Tensor:
        """Rows of the live molecules into all rows, ``nothing`` elsewhere."""
        if len(self.shape) == 2:
            part = part.reshape(len(self), self.shape[1], *part.shape[1:])
        absent = self.shape[0] - part.shape[0]
        if absent == 0:
            return part.contiguous()
        full = part.new_full((self.shape[0], *part.shape[1:]), nothing)
        if self.index is None:
            return torch.cat([part, full[:absent]])
        return full.index_copy(0, self.index, part)


def pack(
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor | None, k_ptr: Tensor, repeat: bool = True
) -> Packed:
    """Live molecules only. repeat: shared seeds become rows of each molecule."""
    plan = layout(q_ptr, k_ptr, q.shape[0], k.shape[0])
    if plan.own is None:
        k, v = k[: plan.rows_k], v[: plan.rows_k]
    else:
        k, v = k.index_select(0, plan.own), v.index_select(0, plan.own)
    if q_ptr is not None:
        q = q[: plan.rows_q] if plan.index is None else q.index_select(0, plan.index)
    elif repeat:
        q = q.expand(plan.k_ptr.numel() - 1, *q.shape).flatten(0, 1)
    return Packed(
        q, k, v, plan.q_ptr, plan.k_ptr, plan.longest_q, plan.longest_k, plan.shape, plan.index,
        plan.live, plan.kept,
    )  # fmt: skip


def layout(q_ptr: Tensor | None, k_ptr: Tensor, rows_q: int, rows_k: int) -> Layout:
    """Reads the boundaries, once for all layers where a ``Ragged`` holds those of the keys."""
    kept = ragged.kept(k_ptr)
    if kept is None or (q_ptr is not None and ragged.kept(q_ptr) is None):
        return _layout(q_ptr, k_ptr, rows_q, rows_k)
    # Its tensors may still be under way on their stream; those of inference mode have no gradient.
    stream = torch.cuda.current_stream(k_ptr.device).cuda_stream if k_ptr.is_cuda else 0
    place = None if q_ptr is None else (ragged._place(q_ptr), q_ptr._version)
    key = place, rows_q, rows_k, stream, torch.is_inference_mode_enabled()
    found = kept.get(key)
    if found is None:
        found = kept[key] = _layout(q_ptr, k_ptr, rows_q, rows_k)
        if q_ptr is not None and q_ptr.data_ptr() != k_ptr.data_ptr():
            found.source = (q_ptr,)  # its address cannot be that of others as long as it is a key
    return found


def _layout(q_ptr: Tensor | None, k_ptr: Tensor, rows_q: int, rows_k: int) -> Layout:
    molecules, seeds = k_ptr.numel() - 1, rows_q if q_ptr is None else 0
    n_k = _edges(k_ptr, rows_k).diff()
    n_q = torch.full_like(n_k, seeds) if q_ptr is None else _edges(q_ptr, rows_q).diff()
    live = (n_q > 0) & (n_k > 0)
    sizes = torch.stack([live.long(), n_q, n_k, n_q * live, n_k * live])
    most = sizes.amax(1) if molecules else torch.zeros_like(sizes.sum(1))
    (count, any_q, any_k, own_q, own_k), (*_, longest_q, longest_k) = torch.stack(
        [sizes.sum(1), most]
    ).tolist()
    if max(own_q, own_k) >= 2**31:
        raise NotImplementedError(
            f"{max(own_q, own_k)} rows: other libraries take int32 boundaries; leave backend=None"
        )
    shape = (rows_q,) if q_ptr is not None else (molecules, seeds)
    index = own = chosen = None
    if count < molecules:
        index = chosen = live.nonzero()[:, 0]
        own = _rows(live, n_k, rows_k)
        if q_ptr is not None:
            index = _rows(live, n_q, rows_q)
        n_q, n_k = n_q[chosen], n_k[chosen]
    return Layout(
        _boundaries(n_q), _boundaries(n_k), longest_q, longest_k, shape, any_q, any_k, index, own,
        chosen,
    )  # fmt: skip


def _edges(ptr: Tensor, rows: int) -> Tensor:
    """Boundaries from 0, rising, inside the rows: contents on a GPU have not been checked."""
    edges = ptr.long().clamp(0, rows).cummax(0).values
    return torch.cat([edges.new_zeros(1), edges[1:]])


def _rows(live: Tensor, counts: Tensor, rows: int) -> Tensor:
    """Index of the rows of live molecules."""
    row = torch.arange(rows, device=counts.device)
    molecule = torch.searchsorted(counts.cumsum(0), row, right=True)
    return torch.cat([live, live.new_zeros(1)])[molecule].nonzero()[:, 0]


def _boundaries(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()


def attend(
    call: Callable[..., tuple[Tensor, Tensor | None]],
    q: Tensor, k: Tensor, v: Tensor, q_ptr: Tensor | None, k_ptr: Tensor,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Runs a library's attention of packed rows on the live molecules.

    call(Packed) -> out [n, H, W], lse [n, H] or None; it gets q, k and v of one width W, a
    multiple of 8 (zero columns change no product, and the scale is passed explicitly), at
    addresses and strides that are multiples of 16 bytes, and at most 65,535 molecules.
    """
    batch = pack(q, k, v, q_ptr, k_ptr)
    width = padded_width(q, v)
    outs, lses = [], []
    for piece in _pieces(batch):
        rows = (_aligned(x, width) for x in (piece.q, piece.k, piece.v))
        out, lse = call(replace(piece, **dict(zip(("q", "k", "v"), rows))))  # type: ignore[arg-type]
        outs.append(out[..., : v.shape[2]])
        if lse is not None:
            lses.append(lse)
    if not outs:
        out = q.new_zeros(*batch.shape, q.shape[1], v.shape[2])
        return out, out[..., 0].float() - torch.inf
    out = batch.restore(outs[0] if len(outs) == 1 else torch.cat(outs), 0.0)
    return out, batch.restore(torch.cat(lses), -torch.inf) if lses else None


def _pieces(batch: Packed) -> Iterator[Packed]:
    if 0 < len(batch) <= GRID:
        yield batch
        return
    for first in range(0, len(batch), GRID):
        q_ptr, k_ptr = (x[first : first + GRID + 1] for x in (batch.q_ptr, batch.k_ptr))
        (q0, q1), (k0, k1) = q_ptr[[0, -1]].tolist(), k_ptr[[0, -1]].tolist()
        yield replace(
            batch, q=batch.q[q0:q1], k=batch.k[k0:k1], v=batch.v[k0:k1],
            q_ptr=q_ptr - q0, k_ptr=k_ptr - k0, kept={},
        )  # fmt: skip


def padded_width(q: Tensor, v: Tensor) -> int:
    """One width for q, k and v, a multiple of 16 bytes."""
    return -(-max(q.shape[2], v.shape[2]) // ALIGNMENT) * ALIGNMENT


def _aligned(x: Tensor, width: int) -> Tensor:
    if x.shape[2] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[2]))
    odd = [step * x.element_size() % 16 for step in x.stride()[:2]]
    if x.stride(2) == 1 and not any(odd) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
