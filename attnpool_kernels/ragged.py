"""Molecules in a concatenated batch: boundaries, and the ways other libraries write them.

Molecule i owns the rows ``ptr[i]:ptr[i+1]`` of every packed tensor. Rows from ``ptr[-1]`` on belong
to no molecule. ``Ragged`` carries the boundaries once checked, so that the layers of a model share
one object and check its contents once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tracing import unreadable, unrecorded

PTR_DTYPES = (torch.int32, torch.int64)


def check(ptr: Tensor | Ragged, rows: int, name: str = "ptr") -> None:
    """Checks the contents of boundaries against a tensor of ``rows`` rows, on any device.

    Needs 0 = ptr[0] <= ptr[1] <= ... <= ptr[-1] <= rows and raises ValueError naming the first
    element that breaks it. Reads the contents, so it synchronises for a CUDA tensor and raises
    RuntimeError while a CUDA graph is captured. Operators call it for CPU boundaries only.

    Examples:
        >>> check(torch.tensor([0, 5, 8]), rows=8)
        >>> check(torch.tensor([0, 5, 3]), rows=8)
        Traceback (most recent call last):
        ValueError: ptr must not decrease, got ptr[1] = 5 and ptr[2] = 3
    """
    if isinstance(ptr, Ragged):
        ptr = ptr.ptr
    check_kind(ptr, name)
    if isinstance(rows, bool) or not isinstance(rows, int | torch.SymInt):
        raise TypeError(f"rows must be an int, got {type(rows).__name__}")
    if isinstance(rows, int) and rows >= 2**63:
        raise ValueError(f"rows must be below 2**63, got {rows}")
    if ptr.is_meta:
        raise ValueError(f"{name} must have contents to be checked, got a meta tensor")
    if ptr.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{name}: contents cannot be checked while a CUDA graph is captured")
    check_contents(ptr.contiguous(), rows, name)


def check_kind(ptr: object, name: str = "ptr") -> None:
    """Checks everything about boundaries that can be seen without reading them."""
    if not isinstance(ptr, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of boundaries or a Ragged, got {type(ptr).__name__}"
        )
    if ptr.dtype not in PTR_DTYPES:
        raise TypeError(f"{name} must be int32 or int64, got {ptr.dtype}")
    if ptr.layout != torch.strided or ptr.is_nested:
        raise NotImplementedError(f"{name} must be a dense strided tensor, got {ptr.layout}")
    if ptr.dim() != 1:
        raise ValueError(f"{name} must have shape [B + 1], got {tuple(ptr.shape)}")
    if ptr.numel() == 0:
        raise ValueError(f"{name} must have at least 1 element ([0] is an empty batch), got 0")


def check_contents(ptr: Tensor, rows: int, name: str) -> None:
    """One pass in C++ where the library is loaded and nothing is wrong, else torch operators."""
    with unrecorded():
        native = getattr(torch.ops.attnpool, "check_ptr", None)
        if native is None or ptr.device.type != "cpu" or native.default(ptr, rows) != 0:
            _check_elements(ptr, rows, name)


def _check_elements(ptr: Tensor, rows: int, name: str) -> None:
    first, last = int(ptr[0]), int(ptr[-1])
    if first != 0:
        raise ValueError(f"{name}[0] must be 0, got {first}")
    falls = ptr[1:] < ptr[:-1]
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"{name} must not decrease, got {name}[{i}] = {int(ptr[i])} and "
            f"{name}[{i + 1}] = {int(ptr[i + 1])}"
        )
    if last > rows:
        raise ValueError(f"{name}[-1] must be at most the number of rows, {rows}, got {last}")


def last_of(ptr: Tensor) -> int:
    """The last element of boundaries whose contents can be read."""
    with unrecorded():
        return int(ptr[-1])


class Sizes(NamedTuple):
    """What boundaries say: the least and the most rows of a molecule, and ptr[-1]."""

    shortest: int
    longest: int
    rows: int


# By the identity of boundaries on any device: what was known of them before they left the CPU.
# The operators take tensors only, and a graph holds no contents; kernels may look here when they
# run. Not an attribute of the tensor, which would be saved with it.
_known: dict[int, tuple[weakref.ref, int, Sizes]] = {}


def remember(ptr: Tensor, sizes: Sizes) -> None:
    """Lets ``sizes_of`` find them, until the boundaries change in place."""
    if not ptr.is_inference():  # has no version, so a change would not be seen
        place = id(ptr)
        _known[place] = weakref.ref(ptr, lambda _: _known.pop(place, None)), ptr._version, sizes


def sizes_of(ptr: Tensor) -> Sizes | None:
    """What is known of boundaries without reading them; None where nothing is, or no more, and
    while a graph is captured: it is replayed with other contents."""
    found = _known.get(id(ptr))
    if found is None or found[0]() is not ptr or found[1] != ptr._version:
        return None
    if ptr.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return found[2]


def longest_of(q_ptr: Tensor | None, k_ptr: Tensor, seeds: int) -> int | None:
    """The most queries or keys of a molecule, if known; without q_ptr there are so many seeds."""
    keys = sizes_of(k_ptr)
    queries = keys if q_ptr is k_ptr else None if q_ptr is None else sizes_of(q_ptr)
    if keys is None or (queries is None and q_ptr is not None):
        return None
    return max(keys.longest, seeds if queries is None else queries.longest)


class Ragged:
    """Boundaries of molecules in a concatenated batch, made once per batch and shared by layers.

    ptr: [B + 1], int32 or int64; molecule i owns rows ptr[i]:ptr[i+1].

    Make one with ``from_ptr``, ``from_batch``, ``from_counts``, ``from_csr`` or ``from_mask``.
    Contents on the CPU are checked at once (ValueError); contents on another device are not read,
    see ``ragged.check``. What adapters to other libraries read from them (the longest molecule) is
    read once.

    On the CPU it counts the molecules once it is asked to move to another device, and remembers the
    shortest and the longest there (``sizes``), so that kernels leave out what no molecule needs.
    Only time depends on that: a change of ``ptr`` in place drops it, and one behind torch's back
    (in a replayed graph, by a kernel of somebody else) gives results that are right, or NaN
    gradients of molecules that have become longer than any was.

    last: ptr[-1] once the contents have been checked, else None. kept: what has been read from the
    contents; whoever reads there compares ``ptr._version``, which a change in place raises.

    Examples:
        >>> atoms = Ragged.from_counts([5, 0, 3])
        >>> atoms.ptr.tolist(), len(atoms), atoms.last
        ([0, 5, 5, 8], 3, 8)
        >>> Ragged.from_batch(torch.tensor([0, 0, 2])).counts().tolist()
        [2, 0, 1]
        >>> Ragged.from_counts([2, 3]).pairs().tolist()
        [0, 4, 13]
    """

    __slots__ = ("kept", "last", "ptr")

    def __init__(self, ptr: Tensor) -> None:
        check_kind(ptr)
        self.ptr = ptr.contiguous()
        self.kept: dict[Any, Any] = {}
        self.last: int | None = None
        if ptr.device.type == "cpu" and not unreadable(ptr):
            check_contents(self.ptr, 2**63 - 1, "ptr")
            self.last = last_of(self.ptr)

    @classmethod
    def from_ptr(cls, ptr: Tensor) -> Ragged:
        """From boundaries [B + 1]: PyG's ``data.ptr``, MACE's ``ptr``, FlashInfer's ``indptr``."""
        return cls(ptr)

    @classmethod
    def from_counts(cls, counts: Tensor | Sequence[int]) -> Ragged:
        """From atoms per molecule [B]: DGL's counts, fairchem's ``natoms``, ``_n_atoms``."""
        if not isinstance(counts, Tensor):
            counts = _integers("counts", counts)
        if counts.dtype not in PTR_DTYPES:
            raise TypeError(f"counts must be int32 or int64, got {counts.dtype}")
        if counts.dim() != 1:
            raise ValueError(f"counts must have shape [B], got {tuple(counts.shape)}")
        ends = counts.cumsum(0, dtype=counts.dtype)
        if counts.device.type == "cpu" and not unreadable(counts):
            with unrecorded():
                _check_counts(counts, ends)
        return cls(torch.cat([counts.new_zeros(1), ends]))

    @classmethod
    def from_batch(cls, batch: Tensor, num_molecules: int | None = None) -> Ragged:
        """From the molecule index of each atom [N]: PyG's ``batch``, SchNetPack's ``_idx_m``.

        The vector must be sorted; a gap is an empty molecule. ``num_molecules`` (default: the
        largest index + 1) adds empty molecules at the end. Contents are checked on the CPU, and on
        another device only where ``num_molecules`` is None, since then they are read anyway.
        """
        if not isinstance(batch, Tensor):
            raise TypeError(f"batch must be a torch.Tensor, got {type(batch).__name__}")
        if batch.dtype not in PTR_DTYPES:
            raise TypeError(f"batch must be int32 or int64, got {batch.dtype}")
        if batch.dim() != 1:
            raise ValueError(f"batch must have shape [N], got {tuple(batch.shape)}")
        if num_molecules is not None and (
            isinstance(num_molecules, bool) or not isinstance(num_molecules, int | torch.SymInt)
        ):
            raise TypeError(f"num_molecules must be an int, got {type(num_molecules).__name__}")
        most = torch.iinfo(batch.dtype).max
        if isinstance(num_molecules, int) and num_molecules >= most:
            raise ValueError(f"num_molecules must be below {most}, got {num_molecules}")
        if num_molecules is None or (batch.device.type == "cpu" and not unreadable(batch)):
            with unrecorded():
                largest = int(batch[-1]) if batch.numel() else -1
                _check_batch(batch, largest, num_molecules)
            num_molecules = largest + 1 if num_molecules is None else num_molecules
        edges = torch.arange(num_molecules + 1, device=batch.device, dtype=batch.dtype)
        return cls(torch.searchsorted(batch, edges, out_int32=batch.dtype == torch.int32))

    @classmethod
    def from_csr(cls, row_ptr: Tensor | Ragged, *, centre: bool = False) -> Ragged:
        """From the row pointer [A + 1] of a neighbour list: set i is the neighbours of atom i.

        centre: each set has one more row in front, that of the atom itself; see
        ``layouts.with_centres``.
        """
        sets = row_ptr if isinstance(row_ptr, Ragged) else cls(row_ptr)
        if not centre:
            return sets
        ptr = sets.ptr
        return cls(ptr + torch.arange(sets.molecules + 1, dtype=ptr.dtype, device=ptr.device))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Ragged:
        """From a mask [B, S], True for the rows of a set in a padded batch; ``layouts.pack``."""
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a bool tensor, got {got}")
        if mask.dim() != 2:
            raise ValueError(f"mask must have shape [B, S], got {tuple(mask.shape)}")
        return cls.from_counts(mask.sum(1))

    def pairs(self, keys: Ragged | None = None) -> Tensor:
        """Offsets [B + 1], int64, of each molecule's query-key pairs in a packed bias [P, H].

        Molecule i owns pairs p[i]:p[i+1] with p[i+1] - p[i] = n_q·n_k, query by query;
        P = p[-1]. ``keys`` are the molecules of the keys (default: the same as the queries).
        """
        if keys is not None and not isinstance(keys, Ragged):
            raise TypeError(f"keys must be a Ragged or None, got {type(keys).__name__}")
        n_q = self.ptr.diff().long()
        n_k = n_q if keys is None else keys.ptr.diff().long()
        if n_q.shape != n_k.shape:
            raise ValueError(
                f"keys must have as many molecules as queries, {n_q.shape[0]}, got {n_k.shape[0]}"
            )
        return torch.cat([n_q.new_zeros(1), (n_q * n_k).cumsum(0)])

    def batch(self, rows: int | None = None) -> Tensor:
        """Molecule index of each row [N], int64; rows of no molecule get the index B.

        rows: N, default ptr[-1] (which synchronises on a CUDA device).
        """
        if rows is None:
            rows = last_of(self.ptr)
        elif not torch.compiler.is_compiling():
            if isinstance(rows, bool) or not isinstance(rows, int | torch.SymInt):
                raise TypeError(f"rows must be an int, got {type(rows).__name__}")
            least = 0 if self.last is None else self.last
            if rows < least:
                raise ValueError(f"rows must be at least ptr[-1] = {least}, got {rows}")
        row = torch.arange(rows, device=self.ptr.device, dtype=self.ptr.dtype)
        return torch.searchsorted(self.ptr[1:], row, right=True)

    def counts(self) -> Tensor:
        """Atoms per molecule [B]."""
        return self.ptr.diff()

    def to(self, device: torch.device | str) -> Ragged:
        """The same boundaries on another device, without a second check."""
        moved = object.__new__(Ragged)
        moved.ptr = self.ptr.to(device, non_blocking=True)
        if not unreadable(self.ptr) and moved.ptr is not self.ptr and (sizes := self.sizes):
            remember(moved.ptr, sizes)
        moved.last = self.last if moved.ptr.device.type == "cpu" else None
        moved.kept = {}
        return moved

    @property
    def sizes(self) -> Sizes | None:
        """The shortest and the longest molecule; on another device None unless known before."""
        found = sizes_of(self.ptr)
        if found is None and self.last is not None:
            with unrecorded():
                counts = self.ptr.diff()
                if counts.numel():
                    least, most = torch.aminmax(counts)
                    found = Sizes(int(least), int(most), int(self.ptr[-1]))
                else:
                    found = Sizes(0, 0, int(self.ptr[-1]))
                remember(self.ptr, found)
        return found

    def __reduce__(self) -> tuple:
        return Ragged, (self.ptr,)

    @property
    def molecules(self) -> int:
        """B; ``len`` would make a number of the batch at hand of it where a graph is recorded."""
        return self.ptr.shape[0] - 1

    def __len__(self) -> int:
        return self.molecules

    def __repr__(self) -> str:
        rows = "?" if self.last is None else self.last
        return f"Ragged({len(self)} molecules, {rows} rows, {self.ptr.dtype}, {self.ptr.device})"


class Sets(NamedTuple):
    """The boundaries of one call as its caller gave them: None where it gave a plain tensor."""

    queries: Ragged | None  # None for shared seeds, too
    keys: Ragged | None


def _integers(name: str, values: Sequence[int]) -> Tensor:
    """A sequence (list, tuple, numpy array) as int64; floats and bools are not rounded."""
    try:
        made = torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or a sequence of int, got {values!r}") from error
    if made.numel() == 0:
        return made.long()
    if made.is_floating_point() or made.is_complex() or made.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {made.dtype}")
    return made.long()


def _check_counts(counts: Tensor, ends: Tensor) -> None:
    if bool((counts < 0).any()):
        i = int((counts < 0).nonzero()[0])
        raise ValueError(f"counts must not be negative, got counts[{i}] = {int(counts[i])}")
    if bool((ends < 0).any()):
        raise ValueError(f"counts must have a sum that fits into {counts.dtype}")


def _check_batch(batch: Tensor, largest: int, num_molecules: int | None) -> None:
    falls = batch[1:] < batch[:-1]
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"batch must be sorted, got batch[{i}] = {int(batch[i])} and "
            f"batch[{i + 1}] = {int(batch[i + 1])}"
        )
    if batch.numel() and int(batch[0]) < 0:
        raise ValueError(f"batch must not be negative, got batch[0] = {int(batch[0])}")
    if num_molecules is not None and largest >= num_molecules:
        raise ValueError(
            f"batch must stay below num_molecules = {num_molecules}, got batch[-1] = {largest}"
        )
