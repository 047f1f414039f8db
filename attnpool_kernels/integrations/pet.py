"""PET of metatrain on packed rows: what ``integrations.metatrain`` puts in a model's place.

PET keeps the edges of every atom in a grid [A, M] of atoms and the most neighbours that one of them
has; the last slots of a row are padding. Here the E edges of a batch lie one after another, and
PET's own loop over its GNN layers runs on them as on a grid [1, E]. Attention takes N = A + E rows,
each atom in front of its edges: a neighbourhood is a set.

Imports metatrain. What is used of it stands in ``integrations.metatrain``: the attributes of
``USED``, and the two methods of ``OVERRIDDEN`` with their arguments.
"""

from __future__ import annotations

import warnings
from types import FunctionType
from typing import Any, Dict, List, NamedTuple, Tuple  # noqa: UP035  TorchScript reads them

import torch
from metatrain.pet.modules.backend import PETBackend
from metatrain.pet.modules.transformer import CartesianTransformer
from torch import Tensor

from ..functional import set_attention
from ..ragged import Ragged

WORD = (
    "the scripted model attends by PET's own code, since TorchScript cannot compile packed rows: "
    "the same weights and numbers at PET's own speed. The file does not need attnpool_kernels, "
    "although metatomic lists every library that is loaded while it saves."
)


class Rows(NamedTuple):
    """Where the rows of a batch are: made once per call of the model, shared by all layers.

    sets: the rows of each atom and its edges. key_bias: [N] logarithm of the cutoff function.
    order: [N] which row of cat(atoms, edges) is there; atoms: [A] and edges: [E], where they are.
    slots: [E] the place of each edge in PET's grid, flat.
    """

    sets: Ragged
    key_bias: Tensor
    order: Tensor
    atoms: Tensor
    edges: Tensor
    slots: Tensor


def find_rows(batch: dict[str, Tensor], least: float) -> Rows:
    """The rows of a batch of PET. Nothing here waits for a device.

    least: what the cutoff function is raised to before its logarithm, as PET does it.
    """
    mask, centres, place = (
        batch[name] for name in ("padding_mask", "centers", "nef_to_edges_neighbor")
    )
    centres = centres.long()
    sets = Ragged.from_counts(mask.sum(1) + 1)
    atoms = sets.ptr[:-1]
    edges = atoms.index_select(0, centres) + place + 1
    slots = centres * mask.shape[1] + place
    where = torch.cat([atoms, edges])
    number = torch.arange(where.shape[0], device=where.device)
    order = torch.empty_like(where).index_copy(0, where, number)
    factors = batch["cutoff_factors"].flatten().index_select(0, slots)
    own = factors.new_ones(atoms.shape[0])
    key_bias = torch.cat([own, factors]).clamp(min=least).log().index_select(0, order)
    return Rows(sets, key_bias, order, atoms, edges, slots)


def packed_batch(batch: dict[str, Tensor], rows: Rows) -> dict[str, Any]:
    """The batch with edges [1, E] in the place of the grid, and with ``rows`` as its mask."""
    result: dict[str, Any] = dict(batch, padding_mask=rows)
    for name in ("element_indices_neighbors", "edge_vectors", "edge_distances", "cutoff_factors"):
        result[name] = batch[name].flatten(0, 1).index_select(0, rows.slots)[None]
    reverse = batch["reverse_neighbor_index"].flatten()
    number = torch.arange(rows.slots.shape[0], device=reverse.device)
    edge = torch.zeros_like(reverse).index_copy(0, rows.slots, number)  # of a slot
    reverse = edge.index_select(0, reverse.index_select(0, rows.slots))
    result["reverse_neighbor_index"] = reverse[None]
    return result


def grid(x: Tensor, rows: Rows, shape: torch.Size) -> Tensor:
    """Edges [1, E, C] as PET's grid [A, M, C], with 0 in its padding."""
    empty = x.new_zeros(shape.numel(), x.shape[2])
    return empty.index_copy(0, rows.slots, x[0]).unflatten(0, shape)


def attend(block: Any, x: Tensor, rows: Rows) -> Tensor:
    """[N, C]: each row over its set, softmax(q·k / (√D · temperature) + log cutoff) v."""
    q, k, v = block.input_linear(x).view(-1, 3, block.num_heads, block.head_dim).unbind(1)
    scale = 1 / (block.head_dim**0.5 * block.temperature)
    out = set_attention(q, k, v, rows.sets, key_bias=rows.key_bias, scale=scale)
    return block.output_linear(out.flatten(1))


def transform(layer: Any, atoms: Tensor, edges: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """A layer of a transformer on atoms [A, C_node] and edges [E, C], norms before or after."""
    tokens = torch.cat([layer.center_contraction(atoms), edges]).index_select(0, rows.order)
    if layer.transformer_type == "PreLN":
        tokens = attend(layer.attention, layer.norm_attention(tokens), rows)
        edges = edges + tokens.index_select(0, rows.edges)
        edges = edges + layer.mlp(layer.norm_mlp(edges))
    else:
        tokens = layer.norm_attention(tokens + attend(layer.attention, tokens, rows))
        tokens = layer.norm_mlp(tokens + layer.mlp(tokens))
        edges = tokens.index_select(0, rows.edges)
    new = tokens.index_select(0, rows.atoms)
    if layer.expanded_node_features:
        new = atoms + layer.center_expansion(new)
        new = new + layer.center_mlp(layer.norm_center_features(new))
    return new, edges


class PackedTransformer(CartesianTransformer):
    """A GNN layer that takes edges [1, E] where its mask is ``Rows``.

    With a mask it is its parent, and so it is in TorchScript.
    """

    def forward(
        self,
        input_node_embeddings: torch.Tensor,
        input_messages: torch.Tensor,
        element_indices_neighbors: torch.Tensor,
        edge_vectors: torch.Tensor,
        padding_mask: torch.Tensor,
        edge_distances: torch.Tensor,
        cutoff_factors: torch.Tensor,
        use_manual_attention: bool,
    ) -> Tuple[torch.Tensor, torch.Tensor]:  # noqa: UP006
        if not torch.jit.is_scripting():  # noqa: SIM102  alone, so that TorchScript skips it
            if isinstance(padding_mask, Rows):
                distances = edge_distances[:, :, None]
                parts = [self.edge_embedder(torch.cat([edge_vectors, distances], 2))]
                if not self.is_first:
                    parts.append(self.neighbor_embedder(element_indices_neighbors))
                edges = self.compress(torch.cat([*parts, input_messages], 2))[0]
                atoms = input_node_embeddings
                for layer in self.trans.layers:
                    atoms, edges = transform(layer, atoms, edges, padding_mask)
                return atoms, edges[None]
        return self.own_forward(
            input_node_embeddings,
            input_messages,
            element_indices_neighbors,
            edge_vectors,
            padding_mask,
            edge_distances,
            cutoff_factors,
            use_manual_attention,
        )


class PackedBackend(PETBackend):
    """Packs a batch, lets PET loop over its GNN layers, and puts the edges back into the grid.

    In TorchScript it is its parent, and so it is where PET's diagnostics look into its layers.
    """

    def calculate_features(
        self,
        batch_data: Dict[str, torch.Tensor],  # noqa: UP006
        capture_diagnostics: bool = False,
    ) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:  # noqa: UP006
        if not torch.jit.is_scripting():  # noqa: SIM102
            if not capture_diagnostics:
                least = self.gnn_layers[0].trans.layers[0].attention.epsilon
                rows = find_rows(batch_data, least)
                nodes, edges = self.own_features(packed_batch(batch_data, rows))
                shape = batch_data["padding_mask"].shape
                return nodes, [grid(x, rows, shape) for x in edges]
        return self.own_features(batch_data, capture_diagnostics)

    def __prepare_scriptable__(self) -> PackedBackend:
        """``torch.jit.script`` calls it first."""
        warnings.warn(WORD, UserWarning, stacklevel=2)
        return self


def _named(method: FunctionType, name: str) -> FunctionType:
    """The method under another name: TorchScript files it under its own, and has one of those."""
    parts = (method.__code__, method.__globals__, name, method.__defaults__, method.__closure__)
    return FunctionType(*parts)


PackedTransformer.own_forward = _named(CartesianTransformer.forward, "own_forward")
PackedBackend.own_features = _named(PETBackend.calculate_features, "own_features")
