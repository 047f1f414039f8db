r"""Structures that repeat: neighbours through the faces of the cell, and stress.

The neighbours are found by vesin (https://github.com/Luthaf/vesin), in each structure of its own. A
model does not know whether a neighbour is an image: it gets vectors

::

    r_ij = pos_j + S_ij cell - pos_i,     S_ij ∈ Z³

of all pairs within the cutoff, more than one for a pair where the cell is small, and of an atom
with its own images.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ragged import Ragged
from . import libraries
from .graph import edges

if TYPE_CHECKING:
    from .model import PooledModel
    from .molecules import Molecules


class Cells(NamedTuple):
    """cell: [B, 3, 3] in Å, a vector a row. pbc: [B, 3], along which of them it repeats."""

    cell: Tensor
    pbc: Tensor


def edges_in_cells(
    pos: Tensor, ragged: Ragged, cutoff: float, cells: Cells
) -> tuple[Tensor, Tensor]:
    """Edges [2, E] (source j, target i), sorted by target, and shifts S [E, 3].

    Structures that repeat in no direction have those of ``graph.edges`` with S = 0. Positions may
    be outside of the cell. Computed on the CPU, without a gradient.

    Raises ImportError without vesin; ValueError: a cell without a volume.
    """
    found, shifts = [], []
    places = pos.detach().cpu().double()
    ptr, boxes, periodic = ragged.ptr.tolist(), cells.cell.detach().cpu().double(), cells.pbc.cpu()
    for number, (start, end) in enumerate(itertools.pairwise(ptr)):
        own = places[start:end]
        if not bool(periodic[number].any()) or not len(own):
            pairs = edges(own, torch.tensor([0, len(own)]), cutoff)
            shift = torch.zeros(pairs.shape[1], 3, dtype=torch.float64)
        else:
            pairs, shift = _in_cell(own, boxes[number], periodic[number], cutoff, number)
        found.append(pairs + start)
        shifts.append(shift)
    index = torch.cat(found, 1) if found else torch.zeros(2, 0, dtype=torch.int64)
    shift = torch.cat(shifts) if shifts else torch.zeros(0, 3)
    return index.to(pos.device), shift.to(pos)


def _in_cell(
    pos: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, number: int
) -> tuple[Tensor, Tensor]:
    if not float(cell.det().abs()) > 1e-6:
        raise ValueError(f"cell must have a volume, that of structure {number} has none")
    search = libraries.vesin().NeighborList(cutoff=cutoff, full_list=True)
    target, source, shift = search.compute(
        points=pos.numpy(), box=cell.numpy(), periodic=pbc.numpy(), quantities="ijS"
    )
    order = torch.from_numpy(target.astype("int64")).argsort(stable=True)
    pairs = torch.stack([torch.from_numpy(x.astype("int64"))[order] for x in (source, target)])
    return pairs, torch.from_numpy(shift.astype("float64"))[order]


def vectors_in_cells(
    pos: Tensor, ragged: Ragged, index: Tensor, shift: Tensor, cells: Cells
) -> Tensor:
    """r_ij [E, 3], differentiable in positions and cells."""
    structure = ragged.batch(pos.shape[0])[index[1]]
    across = torch.einsum("ei,eij->ej", shift, cells.cell[structure].to(pos.dtype))
    return pos[index[0]] - pos[index[1]] + across


def energy_forces_stress(
    model: PooledModel, molecules: Molecules, create_graph: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Energies E [B], forces F [N, 3] and stress σ [B, 3, 3] of periodic structures.

    ::

        F = -∂E/∂pos,     σ = 1/V ∂E/∂ε at ε = 0,     pos → pos (1 + ε), cell → cell (1 + ε)

    with a symmetric strain ε; in eV, eV/Å and eV/Å³ of a model of energies in eV. σ is positive
    where the structure wants to shrink, as in ASE.

    create_graph: whether they are to be differentiated again; default: in training mode.

    Raises ValueError: molecules without cells, a model of more than one target.
    """
    if molecules.cell is None:
        raise ValueError("molecules must have cells for a stress")
    if model.targets != 1:
        raise ValueError(f"targets must be 1 for forces, got {model.targets}")
    create_graph = model.training if create_graph is None else create_graph
    with torch.inference_mode(False), torch.enable_grad():
        pos, cell = (x.detach().clone() for x in (molecules.pos, molecules.cell))
        pos.requires_grad_()
        strain = torch.zeros_like(cell).requires_grad_()
        symmetric = (strain + strain.mT) / 2
        moved = pos + torch.einsum("ni,nij->nj", pos, symmetric[molecules.batch])
        strained = dataclasses.replace(molecules, pos=moved, cell=cell + cell @ symmetric)
        energy = model(strained).squeeze(1)
        gradient, virial = torch.autograd.grad(
            energy.sum(), (pos, strain), create_graph=create_graph, materialize_grads=True
        )
    stress = virial / cell.det().abs()[:, None, None]
    return (energy if create_graph else energy.detach()), -gradient, stress
