"""Models that run without Python: written here, loaded by main.cpp beside this file.

Run: python examples/deploy/export_models.py OUTPUT
Writes three packages of AOTInductor (compiled, .pt2), the same three as exported programs
(.exported.pt2) and two TorchScript models (.pt), and for each the batches that main.cpp compares:

- pool:        attention-based pooling of atom vectors;
- neighbours:  energy and forces by attention over neighbourhoods with a smooth cutoff as key bias;
- schnet:      energy and forces of SchNet with attention-based pooling (needs torch_geometric).

Forces of a compiled model are part of its program: ``make_fx`` records the energy and the gradient
together. A TorchScript model has the energy; who loads it calls autograd.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling
from attnpool_kernels.torchscript import set_attention

CUTOFF = 3.0


class NeighbourModel(torch.nn.Module):
    """Energy [B] of atoms that attend to their edges: a layer in the style of PET.

    It is written for TorchScript; ``attnpool_kernels.set_attention`` would be the same otherwise.
    """

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.cutoff = heads, CUTOFF
        self.element = torch.nn.Embedding(10, width)
        self.edge = torch.nn.Linear(4, width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, 1)

    def forward(self, z: Tensor, pos: Tensor, index: Tensor, ptr: Tensor) -> Tensor:
        vector = pos.index_select(0, index[0]) - pos.index_select(0, index[1])
        distance = vector.square().sum(1, keepdim=True).sqrt()
        edges = self.edge(torch.cat([vector, distance], 1))
        edges = torch.tanh(edges + self.element(z.index_select(0, index[0])))
        queries, _, _ = self.qkv(self.element(z)).unflatten(1, [3, self.heads, -1]).unbind(1)
        _, keys, values = self.qkv(edges).unflatten(1, [3, self.heads, -1]).unbind(1)
        smooth = 0.5 * (torch.cos(distance[:, 0] * (math.pi / self.cutoff)) + 1)
        atoms = torch.arange(z.size(0) + 1, device=z.device)
        sets = torch.searchsorted(index[1].contiguous(), atoms)  # the edges of each atom
        key_bias = smooth.clamp(min=1e-15).log()
        attended = set_attention(queries, keys, values, atoms, sets, key_bias=key_bias)
        energy = self.out(attended.flatten(1))[:, 0]
        batch = torch.searchsorted(ptr, atoms[:-1], right=True) - 1
        return energy.new_zeros(ptr.size(0) - 1).index_add(0, batch, energy)


def with_forces(energy: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """(z, pos, ...) → energy [B] and forces [N, 3]."""

    def program(z: Tensor, pos: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        pos = pos.detach().requires_grad_()
        value = energy(z, pos, *rest)
        (gradient,) = torch.autograd.grad(value.sum(), pos)
        return value.detach(), -gradient

    return program


def batch_of(sizes: list[int]) -> tuple[Tensor, ...]:
    """z, pos, edges and boundaries of random molecules."""
    ptr = Ragged.from_counts(sizes).ptr
    atoms = int(ptr[-1])
    pos = 1.5 * torch.rand(atoms, 3, dtype=torch.float64).mul(max(sizes) ** (1 / 3))
    molecule = torch.searchsorted(ptr, torch.arange(atoms), right=True)
    near = (torch.cdist(pos, pos) < CUTOFF) & (molecule[:, None] == molecule)
    near.fill_diagonal_(False)
    index = near.nonzero().t().flip(0).contiguous()  # (source, target), sorted by target
    return torch.randint(1, 9, (atoms,)), pos, index, ptr


def dynamic(arguments: tuple[Tensor, ...], rows: dict[int, dict[int, str]]) -> tuple:
    """Names of the sizes that change from batch to batch, argument by argument."""
    auto = torch.export.Dim.AUTO
    return tuple(dict.fromkeys(rows.get(i, {}), auto) for i in range(len(arguments)))


ATOMS = {0: {0: "atoms"}, 1: {0: "atoms"}, 2: {1: "edges"}, 3: {0: "molecules"}}


def export(name: str, program: torch.nn.Module, batches: list[tuple], folder: Path) -> None:
    """The exported program, and compiled by AOTInductor."""
    rows = ATOMS if len(batches[0]) == 4 else {0: {0: "atoms"}, 1: {0: "molecules"}}
    exported = torch.export.export(
        program, batches[0], dynamic_shapes=dynamic(batches[0], rows), strict=False
    )
    torch.export.save(exported, folder / f"{name}.exported.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / f"{name}.pt2"))


def data(name: str, program: Callable, batches: list[tuple], folder: Path) -> None:
    """What the program must give, as C++ reads it: [[inputs, outputs], ...]."""
    rows = []
    for batch in batches:
        found = program(*batch)
        rows.append([list(batch), list(found) if isinstance(found, tuple) else [found]])
    torch.save(rows, folder / f"{name}.data")


def compiled(name: str, energy: torch.nn.Module, batches: list[tuple], folder: Path) -> None:
    """Energy and forces in one program."""
    program = with_forces(energy)
    graph = make_fx(program, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*batches[0])
    export(name, graph, batches, folder)
    data(name, program, batches, folder)


def main(output: Path) -> None:
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    output.mkdir(parents=True, exist_ok=True)
    # A batch of one molecule would be a program of its own for torch.export: an empty one joins it.
    batches = [batch_of(sizes) for sizes in ([5, 9, 7], [12, 0], [3, 30, 2, 17, 4])]

    pool = AttentionPooling(16, 32, 4, heads=4, seeds=4, encoder_blocks=1).double().eval()
    pool.requires_grad_(False)
    rows = [(torch.randn(len(z), 16, dtype=torch.float64), ptr) for z, _, _, ptr in batches]
    export("pool", pool, rows, output)
    data("pool", pool, rows, output)
    torch.jit.script(pool).save(output / "pool.pt")

    neighbours = NeighbourModel().double().eval().requires_grad_(False)
    compiled("neighbours", neighbours, batches, output)
    torch.jit.script(neighbours).save(output / "neighbours.pt")

    if importlib.util.find_spec("torch_geometric"):
        from attnpool_kernels.zoo.backbones import backbone
        from attnpool_kernels.zoo.model import PooledModel

        net = backbone("schnet", hidden_channels=32, num_filters=32, num_interactions=2, cutoff=3.0)
        options = {"hidden": 32, "heads": 4, "seeds": 4, "encoder_blocks": 1}
        schnet = PooledModel(net, "abp", pooling_options=options).double().eval()
        schnet.requires_grad_(False)
        compiled("schnet", lambda *x: schnet.from_edges(*x)[:, 0], batches, output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    main(parser.parse_args().output)
