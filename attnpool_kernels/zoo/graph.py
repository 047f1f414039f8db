"""Neighbours within a cutoff, and pairs of neighbours, in plain torch.

Every pair within the cutoff is there: a limit on the number of neighbours would keep those that are
stored first, and the result would depend on the order of the atoms.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..ragged import Ragged

# Up to here all pairs of the molecules are tried at once; beyond, only those of adjacent cells.
ALL_PAIRS = 1 << 20
_MARGIN = 1.001  # cells are wider than the cutoff by more than the rounding of a cell's index
_CELLS = 1024  # along an axis, at most; then B·1024³ has room in int64


def edges(pos: Tensor, ptr: Tensor | Ragged, cutoff: float) -> Tensor:
    """All ordered pairs of different atoms of one molecule with |pos_j - pos_i| <= cutoff.

    Args:
        pos: [N, 3]; used without its gradient.
        ptr: [B + 1] boundaries of the molecules; atoms behind ptr[-1] have no neighbours.
        cutoff: in the unit of pos; may be inf.

    Returns:
        [2, E] int64: source j and target i, sorted by target. For pos_j - pos_i in the model take
        ``pos[index[0]] - pos[index[1]]``, which is differentiable.

    An atom whose position is NaN is everybody's neighbour, so that the NaN stays visible. Memory
    grows with the square of a molecule up to 2²⁰ pairs in all; beyond, atoms are sorted into cells
    as wide as the cutoff, and it grows with the number of edges. Synchronises on a CUDA device.

    Raises ValueError: pos not [N, 3], boundaries that do not fit, cutoff not positive; TypeError,
    NotImplementedError: pos of another kind.

    Examples:
        >>> pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 0, 0]])
        >>> edges(pos, torch.tensor([0, 3]), cutoff=2.0).tolist()
        [[1, 0], [0, 1]]
    """
    if not isinstance(pos, Tensor):
        raise TypeError(f"pos must be a torch.Tensor, got {type(pos).__name__}")
    if pos.dtype == torch.bool or pos.is_complex() or pos.is_quantized:
        raise TypeError(f"pos must be real numbers, got {pos.dtype}")
    if pos.layout != torch.strided or pos.is_nested:
        raise NotImplementedError(f"pos must be a dense tensor, got {pos.layout}")
    if pos.dim() != 2 or pos.shape[1] != 3:
        raise ValueError(f"pos must have shape [N, 3], got {tuple(pos.shape)}")
    if not cutoff > 0:
        raise ValueError(f"cutoff must be positive, got {cutoff}")
    ragged = ptr if isinstance(ptr, Ragged) else Ragged(ptr)
    ragged = ragged.to(pos.device)
    atoms, pairs = torch.stack([ragged.ptr[-1].long(), ragged.pairs()[-1]]).tolist()
    if atoms > pos.shape[0]:
        raise ValueError(
            f"ptr[-1] must be at most the number of atoms, {pos.shape[0]}, got {atoms}"
        )
    pos = pos[:atoms].detach()
    if pos.dtype.itemsize < 4:
        pos = pos.float()
    batch = ragged.batch(atoms)
    if pairs <= ALL_PAIRS:
        source, target = _ranges(ragged.ptr[batch, None].long(), ragged.counts()[batch, None])
    else:
        source, target = _adjacent(pos, batch, cutoff)
    square = (pos[source] - pos[target]).square().sum(1)
    near = ~(square > cutoff**2) & (source != target)
    return torch.stack([source[near], target[near]])


def _ranges(start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers start, start + 1, ... of K ranges [N, K] per row, and the row of each."""
    flat = count.flatten().long()
    which = torch.repeat_interleave(flat)
    place = torch.arange(which.shape[0], device=flat.device) - (flat.cumsum(0) - flat)[which]
    return start.flatten()[which] + place, which // count.shape[1]


def _adjacent(pos: Tensor, batch: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Pairs of atoms of one molecule in equal or adjacent cells, sorted by the second."""
    low, high = pos.nan_to_num().aminmax(dim=0)
    size = torch.clamp((high - low) / _CELLS, min=cutoff * _MARGIN)
    cell = ((pos.nan_to_num() - low) / size).long() + 1  # 0 is the empty cell before the first
    x, y, z = cell.unbind(1)
    _, width, depth = (cell.amax(0) + 2).unbind()  # and one after the last
    # Cells along z are consecutive numbers: three of them are one range of the sorted atoms.
    column = (batch * (cell[:, 0].amax() + 2) + x) * width + y
    key, order = (column * depth + z).sort(stable=True)
    shift = torch.tensor(list(itertools.product((-1, 0, 1), repeat=2)), device=pos.device)
    near = (column[:, None] + shift[:, 0] * width + shift[:, 1]) * depth + z[:, None]
    start = torch.searchsorted(key, near - 1)
    end = torch.searchsorted(key, near + 1, right=True)
    place, target = _ranges(start, end - start)
    return order[place], target


def triplets(
    index: Tensor, num_atoms: int, vectors: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All paths k → j → i of two edges with k ≠ i, as DimeNet needs them.

    Args:
        index: [2, E] edges (source, target), sorted by target: what ``edges`` returns.
        num_atoms: N.
        vectors: [E, 3] of the edges in a periodic structure, where an image of i is another atom;
            of an edge and its reverse they must be the same but for the sign.

    Returns:
        idx_i, idx_j, idx_k [T]: the atoms; idx_kj, idx_ji [T]: the edges k → j and j → i. Sorted by
        idx_ji. T grows with the square of the number of neighbours.

    Raises ValueError where the edges are not sorted by target (seen on the CPU only).
    """
    source, target = index
    if index.device.type == "cpu" and bool((target[1:] < target[:-1]).any()):
        raise ValueError("index must be sorted by target, index[1], and is not")
    degree = torch.bincount(target, minlength=num_atoms)
    first = degree.cumsum(0) - degree  # edge of each atom's first neighbour
    idx_kj, idx_ji = _ranges(first[source, None], degree[source, None])
    idx_i, idx_j, idx_k = target[idx_ji], source[idx_ji], source[idx_kj]
    path = idx_i != idx_k
    if vectors is not None:
        (same,) = (~path).nonzero(as_tuple=True)
        around = vectors.detach()[idx_kj[same]] + vectors.detach()[idx_ji[same]]
        path[same] = around.any(1)
    return idx_i[path], idx_j[path], idx_k[path], idx_kj[path], idx_ji[path]


def lengths(vectors: Tensor) -> Tensor:
    """[E] Euclidean norms of vectors [E, 3]; the gradient at 0 is 0 to every order, not NaN."""
    square = vectors.square().sum(1)
    zero = square == 0
    return square.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


def checked_cutoff(cutoff: float) -> float:
    """A cutoff as a positive, finite float; ValueError otherwise."""
    if isinstance(cutoff, bool) or not isinstance(cutoff, int | float):
        raise ValueError(f"cutoff must be a number, got {cutoff!r}")
    if not 0 < cutoff < math.inf:
        raise ValueError(f"cutoff must be positive and finite, got {cutoff}")
    return float(cutoff)
