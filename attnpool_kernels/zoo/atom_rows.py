"""What every backbone is: atoms and their neighbours in, one row an atom out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..nn.attention import positive
from ..ragged import Ragged
from ..tracing import autocasting, watched
from .graph import checked_cutoff, edges
from .pairs import Filters, Radial, halved, hooked
from .periodic import Cells, edges_in_cells, vectors_in_cells


class Backbone(torch.nn.Module):
    """Vectors of atoms: ``forward(z [N], pos [N, 3], Ragged)`` → [N, channels].

    A subclass implements ``atoms``; its constructor takes options by name, with the values that it
    was made with in ``options``. ``channels``: width of a row. ``elements``: atomic numbers from 1
    to this one are known. ``cutoff``: of the neighbours, Å.
    """

    name: str | None = None  # under which ``backbone`` makes it
    rows = "atoms"  # what a row of ``located`` is
    elements: int = 99

    def __init__(self, channels: int, cutoff: float) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.cutoff = checked_cutoff(cutoff)
        self.options: dict[str, Any] = {}

    def forward(self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None = None) -> Tensor:
        """[N, channels] in the dtype of the weights.

        z: [N] int64 atomic numbers. pos: [N, 3] in Å; differences are taken in its dtype. cells: of
        structures that repeat, whose neighbours may be images.

        Raises ValueError on the CPU, where reading costs nothing: an element that the embedding
        does not know, a position that is not finite, two atoms in the same place.
        """
        index, vectors = self.graph(z, pos, ragged, cells)
        radial = self._by_pairs(pos)
        if radial is None:
            return self.atoms(z, index, vectors)
        return radial.rows(z, halved(index, vectors))

    def with_filters(
        self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None, learning: bool
    ) -> tuple[Tensor, Filters] | None:
        """The rows without a graph of positions, and what has forces of an energy of theirs.

        None where there is no such shorter way: the rows' graph has the forces then. learning:
        whether forces are to be differentiated in the weights.
        """
        kind = type(self)
        own = kind.forward is Backbone.forward and kind.located is Backbone.located
        radial = self._by_pairs(pos) if own and not hooked(self) else None
        if radial is None:
            return None
        index, vectors = self.graph(z, pos.detach(), ragged, cells)
        return radial.with_filters(z, halved(index, vectors), learning)

    def radial(self) -> Radial | None:
        """The parts of ``atoms``, if that is a SchNet's."""
        return None

    def _by_pairs(self, pos: Tensor) -> Radial | None:
        # Who records cannot halve edges, which depends on them; under autocast every layer chooses
        # its dtype.
        if watched() or autocasting(pos.device.type):
            return None
        definers = [_definer(type(self), name) for name in ("radial", "atoms")]
        radial = self.radial() if definers[0] is definers[1] else None
        return radial if radial is not None and radial.plain else None

    def located(
        self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None = None
    ) -> tuple[Tensor, Ragged]:
        """The rows that are pooled, and their boundaries."""
        return self(z, pos, ragged, cells), ragged

    def graph(
        self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None = None
    ) -> tuple[Tensor, Tensor]:
        """The edges [2, E] (source, target), sorted by target, and pos[source] - pos[target]."""
        readable = pos.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable:
            self._check(z, pos)
        if cells is None:
            index = edges(pos, ragged, self.cutoff)
            vectors = pos[index[0]] - pos[index[1]]
        else:
            index, shift = edges_in_cells(pos, ragged, self.cutoff, cells)
            vectors = vectors_in_cells(pos, ragged, index, shift, cells)
        if readable and bool((vectors == 0).all(1).any()):
            i = int((vectors == 0).all(1).nonzero()[0])
            raise ValueError(
                f"pos must have one place an atom, got atoms {int(index[1, i])} and "
                f"{int(index[0, i])} in the same"
            )
        # Quantised layers have no parameters or integers; the embeddings have the model's dtype.
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        return index, vectors.to(dtype)

    def atoms(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        """[N, channels] from the edges [2, E] (source, target) and pos[source] - pos[target]."""
        raise NotImplementedError

    def _check(self, z: Tensor, pos: Tensor) -> None:
        unknown = (z < 1) | (z > self.elements)
        if bool(unknown.any()):
            i = int(unknown.nonzero()[0])
            raise ValueError(
                f"z must be atomic numbers from 1 to {self.elements}, which "
                f"{self.name or type(self).__name__} knows, got {int(z[i])} for atom {i}"
            )
        wrong = ~pos.detach().isfinite().all(1)
        if bool(wrong.any()):
            i = int(wrong.nonzero()[0])
            raise ValueError(f"pos must be finite, got {pos[i].tolist()} for atom {i}")


def _definer(kind: type, name: str) -> type:
    """The class that a method comes from: one that has other ``atoms`` has other parts."""
    return next(x for x in kind.__mro__ if name in vars(x))
