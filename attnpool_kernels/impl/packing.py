"""The layout of other libraries: molecules that have queries and keys, packed without gaps.

The libraries know no shared queries, no uncovered rows, few widths, and have a history of bugs with
empty sequences. So they get only molecules that have queries and keys, and everything else is 0
with gradient exactly 0 by construction, whatever a library leaves unwritten. ``pack`` reads sizes
on the host: one synchronisation per call, or one for all layers that share a ``Ragged`` on the
device of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..operands import Operands
from ..ragged import Sets
from .needs import HALF, Needs

ALIGNMENT = 8  # elements: 16 bytes of a half type
GRID = 65_535  # the libraries put molecules on a grid axis with this limit
NO_DROPOUT = "its mask is not the stateless one of this package"
# What every attention of packed rows in half precision needs; the libraries have more reasons.
PACKED = Needs(
    devices=("cuda",),
    dtypes=HALF,
    widest=256,
    capability=(8, 0),
    order=1,
    refused={
        "bias": "none in its attention of packed rows",
        "key_bias": "none in its attention of packed rows",
        "dropout": NO_DROPOUT,
    },
)


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
    kept: dict[str, Any] = field(default_factory=dict)  # what an adapter makes of it


@dataclass
class Packed:
    """Molecules that have queries and keys, without gaps, and the way back to all rows.

    q: rows of the live molecules; or, where ``shared``, the seeds as they were given.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
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


def pack(x: Operands, sets: Sets | None, repeat: bool = True) -> Packed:
    """Live molecules only. repeat: shared seeds become rows of each molecule."""
    plan = layout(x, sets)
    q = x.q

    def own(rows: Tensor) -> Tensor:
        return rows[: plan.rows_k] if plan.own is None else rows.index_select(0, plan.own)

    if not x.shared:
        q = q[: plan.rows_q] if plan.index is None else q.index_select(0, plan.index)
    elif repeat:
        q = q.expand(plan.k_ptr.numel() - 1, *q.shape).flatten(0, 1)
    return Packed(
        q=q,
        k=own(x.k),
        v=own(x.v),
        key_bias=None if x.key_bias is None else own(x.key_bias),
        q_ptr=plan.q_ptr,
        k_ptr=plan.k_ptr,
        longest_q=plan.longest_q,
        longest_k=plan.longest_k,
        shape=plan.shape,
        index=plan.index,
        live=plan.live,
        kept=plan.kept,
    )


def layout(x: Operands, sets: Sets | None) -> Layout:
    """Reads the boundaries, once for all layers where both are of a ``Ragged``.

    Nothing is kept while a CUDA graph is captured: a replay could meet other contents.
    """
    keys, queries = (None, None) if sets is None else (sets.keys, sets.queries)
    if keys is None or (queries is None and not x.shared):
        return _layout(x)
    held = [ragged.ptr for ragged in (keys, queries) if ragged is not None]
    if any(ptr.is_inference() for ptr in held):
        return _layout(x)  # a change in place would leave no trace
    if x.k_ptr.is_cuda and torch.cuda.is_current_stream_capturing():
        return _layout(x)
    # Its tensors may still be under way on their stream; those of inference mode have no gradient.
    stream = torch.cuda.current_stream(x.k_ptr.device).cuda_stream if x.k_ptr.is_cuda else 0
    place = (
        "layout",
        x.q.shape[0],
        x.k.shape[0],
        x.shared,
        stream,
        torch.is_inference_mode_enabled(),
    )
    versions = [ptr._version for ptr in held]
    found = keys.kept.get(place)
    if found is None or found[0] is not held[-1] or found[1] != versions:
        found = keys.kept[place] = held[-1], versions, _layout(x)
    return found[2]


def _layout(x: Operands) -> Layout:
    q_ptr, k_ptr, rows_q, rows_k = x.q_ptr, x.k_ptr, x.q.shape[0], x.k.shape[0]
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
        q_ptr=_boundaries(n_q),
        k_ptr=_boundaries(n_k),
        longest_q=longest_q,
        longest_k=longest_k,
        shape=shape,
        rows_q=any_q,
        rows_k=any_k,
        index=index,
        own=own,
        live=chosen,
    )


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
    call: Callable[[Packed], tuple[Tensor, Tensor | None]], x: Operands, sets: Sets | None
) -> tuple[Tensor, Tensor | None]:
    """Runs a library's attention of packed rows on the live molecules.

    call(Packed) -> out [n, H, W], lse [n, H] or None; it gets q, k and v of one width W, a
    multiple of 8 (zero columns change no product, and the scale is passed explicitly), at
    addresses and strides that are multiples of 16 bytes, and at most 65,535 molecules.
    """
    batch = pack(x, sets)
    width = padded_width(x)
    outs, lses = [], []
    for piece in _pieces(batch):
        q, k, v = (_aligned(rows, width) for rows in (piece.q, piece.k, piece.v))
        out, lse = call(replace(piece, q=q, k=k, v=v))
        outs.append(out[..., : x.v.shape[2]])
        if lse is not None:
            lses.append(lse)
    if not outs:
        out = x.q.new_zeros(*batch.shape, x.q.shape[1], x.v.shape[2])
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
        rows = dict(q=batch.q[q0:q1], k=batch.k[k0:k1], v=batch.v[k0:k1])
        yield replace(batch, **rows, q_ptr=q_ptr - q0, k_ptr=k_ptr - k0, kept={})  # type: ignore[arg-type]


def padded_width(x: Operands) -> int:
    """One width for q, k and v, a multiple of 16 bytes."""
    return -(-max(x.q.shape[2], x.v.shape[2]) // ALIGNMENT) * ALIGNMENT


def _aligned(x: Tensor, width: int) -> Tensor:
    if x.shape[2] < width:
        return torch.nn.functional.pad(x, (0, width - x.shape[2]))
    odd = [step * x.element_size() % 16 for step in x.stride()[:2]]
    if x.stride(2) == 1 and not any(odd) and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)
