"""Atom-centred networks of PyG and SchNetPack with one signature: atoms in, one row an atom out.

The layers, their initialisation and their numbers are the libraries'; ours is what goes in (all
neighbours within the cutoff, from ``zoo.graph``) and what comes out (the vectors of the atoms, in
place of a property). The libraries are imported where a backbone is made.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from ..nn.attention import positive
from ..nn.esa import EdgeSetEncoder, edge_sets
from ..ragged import Ragged
from . import libraries
from .atom_rows import Backbone
from .basis import GaussianRBF, GaussianSmearing, SphericalBasis
from .defaults import made_plainly
from .graph import lengths, triplets
from .pairs import Convolution, Radial
from .periodic import Cells


class SchNet(Backbone):
    """PyG's SchNet without its output layers: the last hidden state (Schütt et al. 2017).

    Options and defaults are PyG's, which are those of Buterez et al.; they used
    hidden_channels=256, num_filters=256, num_interactions=8 for QM7b. channels = hidden_channels.
    """

    @made_plainly
    def __init__(
        self,
        hidden_channels: int = 128,
        num_filters: int = 128,
        num_interactions: int = 6,
        num_gaussians: int = 50,
        cutoff: float = 10.0,
    ) -> None:
        super().__init__(hidden_channels, cutoff)
        net = libraries.pyg("schnet").SchNet(
            hidden_channels,
            positive("num_filters", num_filters),
            positive("num_interactions", num_interactions),
            _at_least_two("num_gaussians", num_gaussians),
            self.cutoff,
            interaction_graph=_no_graph,
        )
        self.embedding, self.interactions = net.embedding, net.interactions
        self.distance_expansion = GaussianSmearing(num_gaussians, self.cutoff)

    def radial(self) -> Radial | None:
        found, around = [], []
        for one in self.interactions:
            hidden, activation, last = one.mlp
            around += [one, one.conv, one.mlp, activation]
            if not type(hidden) is type(last) is torch.nn.Linear:  # quantised, adapted, ...
                return None
            out = torch.nn.Sequential(one.conv.lin2, one.act, one.lin)
            found.append(Convolution(hidden, last, activation.shift, one.conv.lin1, out))
        return Radial(self.embedding, self.distance_expansion, self.cutoff, found, around)

    def atoms(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        distance = lengths(vectors)
        expanded = self.distance_expansion(distance)
        x = self.embedding(z)
        for interaction in self.interactions:
            x = x + interaction(x, index, distance, expanded)
        return x


class DimeNetPlusPlus(Backbone):
    """PyG's DimeNet++: the sum of its output blocks, atom by atom (Gasteiger et al. 2020).

    Options and defaults are those of the published model; those of Buterez et al. for QM7b are
    hidden_channels=256, num_blocks=6, out_emb_channels=256, latent=50.

    latent: width of the output blocks' last layer, and so of the rows: channels = latent. PyG
        starts that layer at 0, so that at first all atoms are equal; here it starts as its others.
    """

    elements = 94

    @made_plainly
    def __init__(
        self,
        hidden_channels: int = 128,
        num_blocks: int = 4,
        int_emb_size: int = 64,
        basis_emb_size: int = 8,
        out_emb_channels: int = 256,
        latent: int = 50,
        *,
        num_spherical: int = 7,
        num_radial: int = 6,
        cutoff: float = 5.0,
        envelope_exponent: int = 5,
        num_before_skip: int = 1,
        num_after_skip: int = 2,
        num_output_layers: int = 3,
    ) -> None:
        _positive(locals(), "hidden_channels num_blocks int_emb_size basis_emb_size")
        _positive(locals(), "out_emb_channels num_output_layers num_before_skip num_after_skip")
        super().__init__(latent, cutoff)
        self._bases(hidden_channels, num_spherical, num_radial, envelope_exponent)
        parts, act = libraries.pyg("dimenet"), torch.nn.SiLU()
        self.output_blocks = torch.nn.ModuleList(
            parts.OutputPPBlock(
                num_radial,
                hidden_channels,
                out_emb_channels,
                latent,
                num_output_layers,
                act,
                "glorot_orthogonal",
            )
            for _ in range(num_blocks + 1)
        )
        self.interaction_blocks = torch.nn.ModuleList(
            parts.InteractionPPBlock(
                hidden_channels,
                int_emb_size,
                basis_emb_size,
                num_spherical,
                num_radial,
                num_before_skip,
                num_after_skip,
                act,
            )
            for _ in range(num_blocks)
        )

    def _bases(self, hidden: int, num_spherical: int, num_radial: int, exponent: int) -> None:
        _positive(locals(), "num_radial")
        if positive("num_spherical", num_spherical) < 2:
            raise ValueError(f"num_spherical must be at least 2, got {num_spherical}")
        exponent = positive("envelope_exponent", exponent)
        parts = libraries.pyg("dimenet")
        self.rbf = parts.BesselBasisLayer(num_radial, self.cutoff, exponent)
        self.sbf = SphericalBasis(num_spherical, num_radial, parts.Envelope(exponent))
        self.emb = parts.EmbeddingBlock(num_radial, hidden, torch.nn.SiLU())

    def atoms(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        source, target = index
        distance = lengths(vectors)
        *_, idx_kj, idx_ji = triplets(index, z.shape[0], vectors)
        rbf = self.rbf(distance)
        sbf = self.sbf(
            distance / self.cutoff, self._cosine(vectors[idx_kj], vectors[idx_ji]), idx_kj
        )
        x = self.emb(z, rbf, target, source)
        out = self.output_blocks[0](x, rbf, target, num_nodes=z.shape[0])
        for interaction, output in zip(self.interaction_blocks, self.output_blocks[1:]):
            x = interaction(x, rbf, sbf, idx_kj, idx_ji)
            out = out + output(x, rbf, target, num_nodes=z.shape[0])
        return out

    def _cosine(self, kj: Tensor, ji: Tensor) -> Tensor:
        """[T] of the angle between the edges k → j and j → i."""
        return (kj * ji).sum(1) / (lengths(kj) * lengths(ji))


class DimeNet(DimeNetPlusPlus):
    """PyG's DimeNet: the sum of its output blocks, atom by atom (Gasteiger et al. 2020).

    Options and defaults are those of the published model, ``latent`` as in DimeNet++.
    """

    @made_plainly
    def __init__(
        self,
        hidden_channels: int = 128,
        num_blocks: int = 6,
        num_bilinear: int = 8,
        latent: int = 50,
        *,
        num_spherical: int = 7,
        num_radial: int = 6,
        cutoff: float = 5.0,
        envelope_exponent: int = 5,
        num_before_skip: int = 1,
        num_after_skip: int = 2,
        num_output_layers: int = 3,
    ) -> None:
        _positive(locals(), "hidden_channels num_blocks num_bilinear")
        _positive(locals(), "num_output_layers num_before_skip num_after_skip")
        super(DimeNetPlusPlus, self).__init__(latent, cutoff)  # not that of DimeNet++
        self._bases(hidden_channels, num_spherical, num_radial, envelope_exponent)
        parts, act = libraries.pyg("dimenet"), torch.nn.SiLU()
        self.output_blocks = torch.nn.ModuleList(
            parts.OutputBlock(
                num_radial, hidden_channels, latent, num_output_layers, act, "glorot_orthogonal"
            )
            for _ in range(num_blocks + 1)
        )
        self.interaction_blocks = torch.nn.ModuleList(
            parts.InteractionBlock(
                hidden_channels,
                num_bilinear,
                num_spherical,
                num_radial,
                num_before_skip,
                num_after_skip,
                act,
            )
            for _ in range(num_blocks)
        )

    def _cosine(self, kj: Tensor, ji: Tensor) -> Tensor:
        """[T] of the angle at i between j and k: PyG's and the published DimeNet's convention."""
        ki = kj + ji
        return (ji * ki).sum(1) / (lengths(ji) * lengths(ki))


class SchNetPackSchNet(Backbone):
    """SchNetPack's SchNet with Gaussians and a cosine cutoff (Schütt et al. 2017).

    Defaults are those of Buterez et al. for OE62. n_filters: default n_atom_basis.
    channels = n_atom_basis.
    """

    @made_plainly
    def __init__(
        self,
        n_atom_basis: int = 128,
        n_interactions: int = 6,
        n_rbf: int = 64,
        n_filters: int | None = None,
        cutoff: float = 5.0,
        shared_interactions: bool = False,
    ) -> None:
        super().__init__(n_atom_basis, cutoff)
        if n_filters is not None:
            positive("n_filters", n_filters)
        self.net = libraries.schnetpack("representation").SchNet(
            n_atom_basis,
            positive("n_interactions", n_interactions),
            *self._radial(n_rbf),
            n_filters,
            shared_interactions,
        )

    def _radial(self, n_rbf: int) -> tuple[torch.nn.Module, torch.nn.Module]:
        layers = libraries.schnetpack("nn")
        n_rbf = _at_least_two("n_rbf", n_rbf)
        return GaussianRBF(n_rbf, self.cutoff), layers.CosineCutoff(self.cutoff)

    def radial(self) -> Radial | None:
        dense, net = libraries.schnetpack("nn").Dense, self.net
        found, around = [], [net, net.cutoff_fn]
        for one in net.interactions:
            hidden, last = one.filter_network
            around += [one, one.filter_network]
            if not type(hidden) is type(last) is dense:
                return None
            found.append(Convolution(hidden, last, math.log(2.0), one.in2f, one.f2out))
        return Radial(net.embedding, net.radial_basis, self.cutoff, found, around)

    def atoms(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        given = {"_atomic_numbers": z, "_Rij": vectors, "_idx_i": index[1], "_idx_j": index[0]}
        return self.net(given)["scalar_representation"]


class PaiNN(SchNetPackSchNet):
    """SchNetPack's PaiNN with Gaussians and a cosine cutoff (Schütt et al. 2021).

    Defaults are SchNetPack's. The rows are the scalar representation; channels = n_atom_basis.
    """

    @made_plainly
    def __init__(
        self,
        n_atom_basis: int = 128,
        n_interactions: int = 3,
        n_rbf: int = 20,
        cutoff: float = 5.0,
        shared_interactions: bool = False,
        shared_filters: bool = False,
        epsilon: float = 1e-8,
    ) -> None:
        super(SchNetPackSchNet, self).__init__(n_atom_basis, cutoff)  # not that of SchNet
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.net = libraries.schnetpack("representation").PaiNN(
            n_atom_basis,
            positive("n_interactions", n_interactions),
            *self._radial(n_rbf),
            shared_interactions=shared_interactions,
            shared_filters=shared_filters,
            epsilon=epsilon,
        )
        for interaction in self.net.interactions:  # all of them, or one many times
            interaction.register_forward_pre_hook(_in_one_dtype)

    def radial(self) -> None:
        return None


class EdgeSets(Backbone):
    r"""Attention over the edges within the cutoff, with rows for a pooling (Buterez et al. 2025).

    ::

        x_ij = W_2 mish(W_1 [embedding(z_i), embedding(z_j), Gaussians of |r_ij|])
        rows = x + [M S]*(x),  in M edges that share an atom attend to each other

    See ``nn.EdgeSetAttention``: with a pooling of seeds (``seed``, ``abp``) it is the published
    model, but for its last activation. Memory grows with the square of a molecule's edges, so the
    cutoff is that of bonds: 2 Å is the published one for 3-D structures. An edge that appears or
    disappears at the cutoff changes the energy by a step, as in the published model. A molecule
    without edges has the result of a pooling of no rows.

    Args: hidden_channels: channels, the width of the rows. layers: any "M" and "S". heads, norm,
    mlp: see there. num_gaussians: from 0 to the cutoff. cutoff: Å.
    """

    rows = "edges"

    @made_plainly
    def __init__(
        self,
        hidden_channels: int = 256,
        layers: str = "MSMSM",
        heads: int = 16,
        num_gaussians: int = 50,
        cutoff: float = 2.0,
        norm: str = "pre",
        mlp: str = "small",
    ) -> None:
        super().__init__(hidden_channels, cutoff)
        width = positive("hidden_channels", hidden_channels)
        self.distance_expansion = GaussianSmearing(
            _at_least_two("num_gaussians", num_gaussians), self.cutoff
        )
        self.embedding = torch.nn.Embedding(self.elements + 1, width)
        self.edge = torch.nn.Sequential(
            torch.nn.Linear(2 * width + num_gaussians, width),
            torch.nn.Mish(),
            torch.nn.Linear(width, width),
        )
        self.encoder = EdgeSetEncoder(width, layers=layers, heads=heads, norm=norm, mlp=mlp)

    def located(
        self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None = None
    ) -> tuple[Tensor, Ragged]:
        if cells is not None:  # a pair of edges must be told from one with an image
            raise NotImplementedError("backbone 'esa' has no periodic structures")
        index, vectors = self.graph(z, pos, ragged)
        sets, bias = edge_sets(index, ragged)
        return self.encoder(self._edges(z, index, vectors), sets, bias), sets

    def forward(self, z: Tensor, pos: Tensor, ragged: Ragged, cells: Cells | None = None) -> Tensor:
        """[E, channels], sorted by the edges' second atom."""
        return self.located(z, pos, ragged, cells)[0]

    def _edges(self, z: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
        x = self.embedding(z)
        gaussians = self.distance_expansion(lengths(vectors))
        return self.edge(torch.cat([x[index[0]], x[index[1]], gaussians], 1))


def _in_one_dtype(interaction: torch.nn.Module, arguments: tuple) -> tuple:
    """SchNetPack starts PaiNN's vectors as zeros of the default dtype of the process."""
    rows, vectors, *others = arguments
    return (rows, vectors.to(rows.dtype), *others)


def _positive(options: dict[str, Any], names: str) -> None:
    for name in names.split():
        positive(name, options[name])


def _at_least_two(name: str, value: int) -> int:
    """The width of Gaussians is the distance of two of them."""
    if positive(name, value) < 2:
        raise ValueError(f"{name} must be at least 2, got {value}")
    return value


def _no_graph(*_):
    raise RuntimeError("the edges come from zoo.graph")


BACKBONES: dict[str, type[Backbone]] = {
    "schnet": SchNet,
    "schnetpack_schnet": SchNetPackSchNet,
    "dimenet": DimeNet,
    "dimenet++": DimeNetPlusPlus,
    "painn": PaiNN,
    "esa": EdgeSets,
}


def backbone(name: str, **options) -> Backbone:
    """A backbone by its name in ``BACKBONES``, with options of its constructor.

    Raises ValueError: an unknown name or option, a value that cannot be, by name. ImportError: the
    library is not installed.

    Examples:
        >>> sizes = dict(hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=4)
        >>> backbone("schnet", **sizes).channels
        8
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
