"""Atom-centred networks of PyG and SchNetPack with one signature: atoms in, one row an atom out.

The layers, their initialisation and their numbers are the libraries'; ours is what goes in (all
neighbours within the cutoff, from ``zoo.graph``) and what comes out (the vectors of the atoms, in
place of a property). The libraries are imported where a backbone is made.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..nn.attention import positive
from ..ragged import Ragged
from .graph import checked_cutoff, edges, lengths


class Backbone(torch.nn.Module):
    """Vectors of atoms: ``forward(z [N], pos [N, 3], Ragged)`` → [N, channels].

    A subclass implements ``atoms``; its constructor takes options by name, with the values that it
    was made with in ``options``. ``channels``: width of a row. ``elements``: atomic numbers from 1
    to this one are known. ``cutoff``: of the neighbours, Å.
    """

    name: str | None = None  # under which ``backbone`` makes it
    elements: int = 99

    def __init__(self, channels: int, cutoff: float) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.cutoff = checked_cutoff(cutoff)
        self.options: dict[str, Any] = {}

    def forward(self, z: Tensor, pos: Tensor, ragged: Ragged) -> Tensor:
        """[N, channels] in the dtype of the weights.

        z: [N] int64 atomic numbers. pos: [N, 3] in Å; differences are taken in its dtype.

        Raises ValueError on the CPU, where reading costs nothing: an element that the embedding
        does not know, a position that is not finite, two atoms in the same place.
        """
        readable = pos.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable:
            self._check(z, pos)
        index = edges(pos, ragged, self.cutoff)
        vectors = pos[index[0]] - pos[index[1]]
        if readable and bool((vectors == 0).all(1).any()):
            i = int((vectors == 0).all(1).nonzero()[0])
            raise ValueError(
                f"pos must have one place an atom, got atoms {int(index[1, i])} and "
                f"{int(index[0, i])} in the same"
            )
        return self.atoms(z, index, vectors.to(next(self.parameters()).dtype))

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


class SchNet(Backbone):
    """PyG's SchNet without its output layers: the last hidden state (Schütt et al. 2017).

    Options and defaults are PyG's, which are those of Buterez et al.; they used
    hidden_channels=256, num_filters=256, num_interactions=8 for QM7b. channels = hidden_channels.
    """

    def __init__(
        self,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_interactions: int = 6,
        num_gaussians: int = 50,
        cutoff: float = 10.0,
    ) -> None:
        super().__init__(hidden_channels, cutoff)
        net = _pyg("schnet").SchNet(
            hidden_channels, positive("num_filters", num_filters),
            positive("num_interactions", num_interactions), at_least_two(num_gaussians),
            self.cutoff, interaction_graph=_no_graph,
        )  # fmt: skip
        self.embedding, self.distance_expansion = net.embedding, net.distance_expansion
        self.interactions = net.interactions

    def atoms(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        distance = lengths(vectors)
        expanded = self.distance_expansion(distance)
        x = self.embedding(z)
        for interaction in self.interactions:
            x = x + interaction(x, index, distance, expanded)
        return x


def at_least_two(num_gaussians: int) -> int:
    """The distance of two Gaussians is their width: one has none."""
    if positive("num_gaussians", num_gaussians) < 2:
        raise ValueError(f"num_gaussians must be at least 2, got {num_gaussians}")
    return num_gaussians


def _no_graph(*_):
    raise RuntimeError("the edges come from zoo.graph")


def _pyg(module: str) -> ModuleType:
    return _library(
        f"torch_geometric.nn.models.{module}", "torch_geometric", "pip install torch_geometric"
    )


def _library(module: str, package: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package:
            raise ImportError(
                f"{package} needs {error.name}, which is missing: {install}"
            ) from error
        raise ImportError(f"this backbone needs {package}: {install}") from error


BACKBONES: dict[str, type[Backbone]] = {"schnet": SchNet}


def backbone(name: str, **options) -> Backbone:
    """A backbone by its name in ``BACKBONES``, with options of its constructor.

    Raises ValueError: an unknown name or option, a value that cannot be, by name. ImportError: the
    library is not installed.
    """
    if name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    kind = BACKBONES[name]
    known = inspect.signature(kind).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"options of backbone {name!r} are {', '.join(known)}, got {option!r}")
    try:
        made = kind(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"backbone {name!r}: {error}") from error
    made.name = name
    made.options = {key: options.get(key, x.default) for key, x in known.items()}
    return made
