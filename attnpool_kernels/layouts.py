"""Between packed rows and the layouts that models hold: padded batches, and neighbour lists.

Everything here is made of torch's indexing, so it is differentiable to any order. Nothing
synchronises with an accelerator where the number of rows is passed (``rows``, ``longest``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .functional import set_attention
from .ragged import PTR_DTYPES, Ragged, last_of
from .tracing import unreadable, unrecorded

__all__ = ["pack", "padded_attention", "unpack", "with_centres"]


def pack(x: Tensor, sets: Ragged | Tensor, rows: int | None = None) -> Tensor:
    """Rows [N, ...] of a padded batch x [B, S, ...], set after set.

    Args:
        sets: the boundaries, where set i is the first rows of x[i]; or a mask [B, S] (bool), True
            for the rows of a set, wherever they are. Its boundaries are ``Ragged.from_mask(mask)``.
        rows: N, if it is known: on an accelerator, finding it out synchronises.

    Raises TypeError, ValueError: a mask that is no mask, sets that do not fit x, or (on the CPU)
    another number of rows than they have.

    Examples:
        >>> padded = torch.tensor([[1, 2, 0], [3, 0, 0]])
        >>> pack(padded, padded > 0).tolist()
        [1, 2, 3]
    """
    _check_rows("x", x, "[B, S, ...]", 2)
    if isinstance(sets, Ragged):
        _check_sets(sets, x.shape[0])
        index = _index(sets, x.shape[1], rows)
    else:
        mask = _checked_mask(sets)
        if mask.shape != x.shape[:2]:
            raise ValueError(f"mask must have shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")
        flat = mask.flatten()
        if rows is not None and _readable(flat):
            _check_number(rows, int(flat.sum()))
        if rows is None:
            index = flat.nonzero()[:, 0]
        else:  # True before False, each in its order
            index = flat.logical_not().to(torch.uint8).argsort(stable=True)[:rows]
    return x.flatten(0, 1).index_select(0, index)


def unpack(x: Tensor, sets: Ragged, longest: int | None = None, value: float = 0.0) -> Tensor:
    """A padded batch [B, S, ...] of rows x [N, ...]: set i is the first rows of the result's i.

    Args:
        longest: S, if it is known: on an accelerator, finding it out synchronises. Sets must not be
            longer.
        value: of the padding.

    Raises ValueError: a set on the CPU that is longer than ``longest``, or boundaries beyond x.

    Examples:
        >>> unpack(torch.tensor([1, 2, 3]), Ragged.from_counts([2, 1]), value=-1).tolist()
        [[1, 2], [3, -1]]
    """
    _check_sets(sets, None)
    _check_rows("x", x, "[N, ...]", 1)
    counts = sets.counts()
    if longest is not None and (isinstance(longest, bool) or not _is_int(longest)):
        raise TypeError(f"longest must be an int, got {type(longest).__name__}")
    if longest is None or _readable(counts):
        most = int(counts.max()) if sets.molecules else 0
        if longest is not None and longest < most:
            raise ValueError(f"longest must be at least {most}, the largest set, got {longest}")
        longest = most if longest is None else longest
    if sets.last is not None and sets.last > x.shape[0]:
        raise ValueError(f"sets must end within the {x.shape[0]} rows of x, got {sets.last}")
    padded = x.new_full((sets.molecules * longest, *x.shape[1:]), value)
    rows = x.shape[0] if sets.last is None else sets.last
    index = _index(sets, longest, rows)
    return padded.index_copy(0, index, x[:rows]).unflatten(0, (sets.molecules, longest))


def with_centres(
    centres: Tensor, neighbours: Tensor, row_ptr: Tensor | Ragged
) -> tuple[Tensor, Ragged]:
    """The rows of every atom's neighbourhood with the atom itself in front: ([A + E, ...], sets).

    Args:
        centres: [A, ...], one row per atom.
        neighbours: [E, ...], rows of the neighbour list sorted by centre.
        row_ptr: [A + 1] the list's CSR row pointer.

    Row ``sets.ptr[i]`` is that of atom i. ``sets`` is ``Ragged.from_csr(row_ptr, centre=True)``.
    Raises TypeError, ValueError: rows that do not fit each other or the pointer, by name.

    Examples:
        >>> rows, sets = with_centres(
        ...     torch.tensor([10, 20]), torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
        ... )
        >>> rows.tolist(), sets.ptr.tolist()
        ([10, 1, 2, 20, 3], [0, 3, 5])
    """
    for name, x in (("centres", centres), ("neighbours", neighbours)):
        _check_rows(name, x, "[A, ...]" if name == "centres" else "[E, ...]", 1)
    if centres.dtype != neighbours.dtype:
        raise TypeError(
            f"centres must have the dtype of neighbours, {neighbours.dtype}, got {centres.dtype}"
        )
    sets = Ragged.from_csr(row_ptr, centre=True)
    if centres.shape[0] != sets.molecules or centres.shape[1:] != neighbours.shape[1:]:
        raise ValueError(
            f"centres must have shape {(sets.molecules, *neighbours.shape[1:])}, "
            f"got {tuple(centres.shape)}"
        )
    atoms, edges = centres.shape[0], neighbours.shape[0]
    if sets.last is not None and sets.last != atoms + edges:
        raise ValueError(
            f"neighbours must have row_ptr[-1] = {sets.last - atoms} rows, got {edges}"
        )
    ptr = sets.ptr.long().to(centres.device)
    own = ptr[:-1]
    atom = torch.arange(atoms, device=own.device)
    ends = ptr[1:] - atom - 1  # of each atom's neighbours among themselves
    edge = torch.arange(edges, device=own.device)
    place = edge + torch.searchsorted(ends, edge, right=True) + 1
    rows = neighbours.new_empty(atoms + edges, *neighbours.shape[1:])
    return rows.index_copy(0, own, centres).index_copy(0, place, neighbours), sets


def padded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    key_bias: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention on padded sets as ``scaled_dot_product_attention`` takes them: [B, H, S, D_v].

    Set b is the first lengths[b] of the S rows of q, k and v; the other rows of the result are 0,
    and what they hold reaches nothing. No product of the padding is taken, and nothing is copied
    where the rows of a batch lie one after the other in memory, as in a projection's
    ``x.view(B, S, H, D).transpose(1, 2)`` or a fused one of q, k and v. Other strides cost a copy.
    The result is such a view, too. Nothing waits for a device.

    Args:
        q, k: [B, H, S, D]; v: [B, H, S, D_v].
        lengths: [B] int32 or int64, each from 0 to S.
        key_bias: [B, S] or [B, H, S] added to the logits of a key, see ``set_attention``.
        scale, dropout, backend: as in ``set_attention``.

    Raises as ``set_attention``; ValueError where the shapes do not fit.

    Examples:
        >>> x = torch.randn(2, 4, 5, 8)  # [B, H, S, D]
        >>> out = padded_attention(x, x, x, torch.tensor([5, 3]))
        >>> out.shape, bool((out[1, :, 3:] == 0).all())
        (torch.Size([2, 4, 5, 8]), True)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_rows(name, x, "[B, H, S, D]", 4)
        if x.dim() != 4 or x.shape[:3] != q.shape[:3]:
            raise ValueError(
                f"{name} must have shape [B, H, S, D] with B, H and S of q, got {tuple(x.shape)}"
            )
    count, heads, size = q.shape[:3]
    queries, keys = _prefixes(_checked_lengths(lengths, count, size).to(q.device), size)
    if key_bias is not None:
        _check_rows("key_bias", key_bias, "[B, S] or [B, H, S]", 2)
        wanted = (count, size), (count, heads, size)
        if tuple(key_bias.shape) not in wanted:
            raise ValueError(
                f"key_bias must have shape {wanted[0]} or {wanted[1]}, got {tuple(key_bias.shape)}"
            )
        by_row = key_bias if key_bias.dim() == 2 else key_bias.transpose(1, 2)
        key_bias = by_row.flatten(0, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = set_attention(
        q,
        k,
        v,
        queries,
        k_ptr=keys,
        key_bias=key_bias,
        scale=scale,
        dropout=dropout,
        backend=backend,
    )
    return out.unflatten(0, (count, size)).transpose(1, 2)


def _prefixes(lengths: Tensor, size: int) -> tuple[Ragged, Ragged]:
    """Boundaries of the queries and of the keys of a padded batch, where it lies.

    Three sets for each of the batch's: its rows; the queries of its padding, which see no key, so
    that their result is 0; and the keys of its padding, which no query sees.
    """
    lengths = lengths.long()
    ends = torch.arange(1, lengths.shape[0] + 1, device=lengths.device) * size
    filled = ends - size + lengths
    first = lengths.new_zeros(1)
    queries, keys = (
        Ragged(torch.cat([first, torch.stack(edges, 1).flatten()]))
        for edges in ((filled, ends, ends), (filled, filled, ends))
    )
    return queries, keys


def _checked_lengths(lengths: object, count: int, size: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a torch.Tensor, got {type(lengths).__name__}")
    if lengths.dtype not in PTR_DTYPES:
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (count,):
        raise ValueError(f"lengths must have shape ({count},), got {tuple(lengths.shape)}")
    if _readable(lengths) and count:
        with unrecorded():
            least, most = int(lengths.min()), int(lengths.max())
        if least < 0 or most > size:
            raise ValueError(
                f"lengths must be from 0 to {size}, got {least if least < 0 else most}"
            )
    return lengths


def _readable(x: Tensor) -> bool:
    """Whether the contents can be looked at without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not unreadable(x)


def _is_int(x: object) -> bool:
    return isinstance(x, int | torch.SymInt)


def _check_rows(name: str, x: object, shape: str, least: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < least:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


def _check_number(rows: object, known: int) -> None:
    if isinstance(rows, bool) or not _is_int(rows):
        raise TypeError(f"rows must be an int, got {type(rows).__name__}")
    if rows != known:
        raise ValueError(f"rows must be the number of rows of all sets, {known}, got {rows}")


def _checked_mask(mask: object) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"sets must be a Ragged or a mask, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(f"sets must be a Ragged or a mask of bool, got {mask.dtype}")
    return mask


def _check_sets(sets: object, count: int | None) -> None:
    if not isinstance(sets, Ragged):
        raise TypeError(f"sets must be a Ragged, got {type(sets).__name__}")
    if count is not None and sets.molecules != count:
        raise ValueError(f"sets must be as many as x has, {count}, got {sets.molecules}")


def _index(sets: Ragged, longest: int, rows: int | None) -> Tensor:
    """Places of the rows of the sets in a padded batch, flat."""
    if rows is None:
        rows = last_of(sets.ptr) if sets.last is None else sets.last
    elif sets.last is not None:
        _check_number(rows, sets.last)
    ptr = sets.ptr.long()
    row = torch.arange(rows, device=ptr.device)
    owner = torch.searchsorted(ptr[1:], row, right=True)
    place = row - ptr[owner]
    if _readable(ptr) and rows and int(place.max()) >= longest:
        raise ValueError(f"sets must have at most {longest} rows, got {int(place.max()) + 1}")
    return owner * longest + place
