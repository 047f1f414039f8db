"""The operator on real molecules: energies, forces and force training, ours against the naive way.

Atoms get features from their element and from the distances to the others; queries, keys and values
are linear in them, a pair bias falls off with distance, a seed pools each molecule to an energy.
Forces are its gradient with respect to positions; the gradient of a loss on forces needs the second
derivative. Everything is computed three times: with this package, with padded matmul and softmax,
and with the latter in float64, and must agree.

Molecules: QM7b from a file (Montavon et al. 2013; coordinates in bohr, converted here to ångström),
else the g2 set and built structures of ASE where it is installed, else a handful written here.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attnpool_kernels import Ragged, seed_pool, set_attention

from ..contenders.padding import Padding
from ..measuring.sheet import BenchmarkError
from ..reporting.tables import render

BOHR = 0.529177  # ångström
HEADS, DIM = 4, 16
QM7B = Path(__file__).resolve().parents[3] / "shared" / "data" / "qm7b.npz"
AGREE = 2e-4  # relative error against float64 of the last of five chained derivatives


@dataclass
class Structures:
    """Molecules one after the other, and where they come from."""

    source: str
    z: Tensor  # [N] atomic numbers
    pos: Tensor  # [N, 3] ångström, float64
    sizes: tuple[int, ...]

    def first(self, count: int) -> Structures:
        sizes = self.sizes[:count]
        atoms = sum(sizes)
        return Structures(self.source, self.z[:atoms], self.pos[:atoms], sizes)


def load(path: Path | None) -> Structures:
    """QM7b from ``path`` (None: where it is kept beside the checkout), else ASE, else built in."""
    if path is None and QM7B.exists():
        path = QM7B
    if path is not None:
        return _qm7b(path)
    try:
        return _ase()
    except ImportError:
        return _built_in()


def _qm7b(path: Path) -> Structures:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            z, pos, ptr = (torch.from_numpy(file[name]) for name in ("z", "pos", "ptr"))
    except (OSError, ValueError, KeyError) as error:
        raise BenchmarkError(f"--qm7b {path}: not a file with z, pos and ptr ({error})") from error
    return Structures("QM7b", z.long(), pos.double() * BOHR, tuple(ptr.diff().tolist()))


def _ase() -> Structures:
    from ase.build import molecule, nanotube
    from ase.collections import g2

    atoms = [molecule(name) for name in g2.names]
    atoms += [molecule("C60"), nanotube(6, 0, length=3), nanotube(5, 5, length=4)]
    atoms = [a for a in atoms if len(a) > 1]
    z = torch.cat([torch.tensor(a.get_atomic_numbers()) for a in atoms])
    pos = torch.cat([torch.tensor(a.get_positions()) for a in atoms])
    source = "g2 set, C60 and carbon nanotubes from ASE"
    return Structures(source, z.long(), pos.double(), tuple(map(len, atoms)))


def _built_in() -> Structures:
    """Idealised geometries: bond lengths and angles from any textbook."""

    def ring(radius: float, count: int) -> list[list[float]]:
        angles = [2 * math.pi * i / count for i in range(count)]
        return [[radius * math.cos(a), radius * math.sin(a), 0.0] for a in angles]

    t = 1.09 / math.sqrt(3)
    corners = [[t, t, t], [t, -t, -t], [-t, t, -t], [-t, -t, t]]
    structures = [
        ([6, 1, 1, 1, 1], [[0.0, 0.0, 0.0], *corners]),  # methane
        ([8, 1, 1], [[0.0, 0.0, 0.0], [0.757, 0.586, 0.0], [-0.757, 0.586, 0.0]]),  # water
        ([6, 8, 8], [[0.0, 0.0, 0.0], [1.16, 0.0, 0.0], [-1.16, 0.0, 0.0]]),  # carbon dioxide
        ([7, 1, 1, 1], [[0.0, 0.0, 0.38], *[[x, y, 0.0] for x, y, _ in ring(0.94, 3)]]),
        ([6] * 6 + [1] * 6, ring(1.39, 6) + ring(2.48, 6)),  # benzene
        ([6, 7, 1], [[0.0, 0.0, 0.0], [1.16, 0.0, 0.0], [-1.07, 0.0, 0.0]]),  # hydrogen cyanide
    ]
    z = torch.tensor([x for elements, _ in structures for x in elements])
    pos = torch.tensor([x for _, places in structures for x in places], dtype=torch.float64)
    return Structures("built in", z, pos, tuple(len(e) for e, _ in structures))


class _Model:
    """Weights of the little model, and the indices of a batch that it needs."""

    def __init__(self, molecules: Structures, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        width = HEADS * DIM
        self.molecules, self.dtype = molecules, dtype
        self.pos = molecules.pos.to(dtype).requires_grad_()
        self.ragged = Ragged.from_counts(molecules.sizes)
        self.pad = Padding(molecules.sizes, "cpu")
        self.elements = normal(100, width)
        self.neighbours = normal(16, width)
        self.qkv = (normal(width, 3 * width) * width**-0.5).requires_grad_()
        self.seeds = normal(1, HEADS, DIM).requires_grad_()
        self.readout = normal(width) * width**-0.5
        pairs = self.ragged.pairs()
        molecule = torch.repeat_interleave(torch.arange(len(molecules.sizes)), pairs.diff())
        place = torch.arange(len(molecule)) - pairs[:-1][molecule]
        n = self.ragged.counts()[molecule]
        start = self.ragged.ptr[:-1][molecule]
        self.query, self.key = start + place // n, start + place % n
        longest = self.pad.longest
        self.pair_place = (molecule * longest + place // n) * longest + place % n

    def energies(self, ours: bool) -> Tensor:
        """[B]"""
        offsets = self.pos[self.query] - self.pos[self.key]
        square = (offsets * offsets).sum(1)
        centres = torch.linspace(0.0, 3.0, 16, dtype=self.dtype)
        distance = (square + 1e-12).sqrt()
        basis = torch.exp(-4.0 * (distance[:, None] - centres) ** 2)
        x = self.elements[self.molecules.z]
        x = x + torch.zeros_like(x).index_add(0, self.query, basis @ self.neighbours) * 0.3
        q, k, v = (x @ self.qkv).unflatten(1, (3, HEADS, DIM)).unbind(1)
        slopes = torch.tensor([0.05 * 2**h for h in range(HEADS)], dtype=self.dtype)
        bias = -square[:, None] * slopes
        if ours:
            atoms = set_attention(q, k, v, self.ragged, bias=bias)
            pooled = seed_pool(self.seeds, atoms, atoms, self.ragged)
        else:
            atoms = self._naive(q, k, v, bias)
            pooled = self._naive_pool(atoms)
        return pooled.flatten(1).tanh() @ self.readout

    def _naive(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        pad, b, n = self.pad, self.pad.molecules, self.pad.longest
        dense = bias.new_zeros(b * n * n, HEADS).index_copy(0, self.pair_place, bias)
        q, k, v = (pad.pad(x).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(2, 3) * DIM**-0.5 + dense.view(b, n, n, HEADS).permute(0, 3, 1, 2)
        mask = pad.bias(self.dtype)
        weights = (logits if mask is None else logits + mask).softmax(3)
        return pad.unpad((weights @ v).transpose(1, 2))

    def _naive_pool(self, atoms: Tensor) -> Tensor:
        k = self.pad.pad(atoms).transpose(1, 2)
        logits = self.seeds.transpose(0, 1) @ k.transpose(2, 3) * DIM**-0.5
        mask = self.pad.bias(self.dtype)
        return ((logits if mask is None else logits + mask).softmax(3) @ k).transpose(1, 2)

    def all(self, ours: bool) -> dict[str, Tensor]:
        energies = self.energies(ours)
        (gradient,) = torch.autograd.grad(energies.sum(), self.pos, create_graph=True)
        loss = (gradient * gradient).sum() / len(gradient)
        wanted = [self.pos, self.qkv, self.seeds]
        names = ["d loss / d positions", "d loss / d weights", "d loss / d seeds"]
        second = torch.autograd.grad(loss, wanted)
        first = {"energies": energies.detach(), "forces": -gradient.detach()}
        return first | dict(zip(names, second))


def compare(path: Path | None = None, count: int = 512, whole: bool = True) -> bool:
    """Prints the comparison on ``count`` molecules; True where everything agrees.

    whole: also the energies of the whole data set.
    """
    everything = load(path)
    molecules = everything.first(count)
    exact = _Model(molecules, torch.float64).all(ours=False)
    found, seconds = {}, {}
    for name, ours in (("naive", False), ("attnpool", True)):
        model = _Model(molecules, torch.float32)
        model.all(ours)
        begin = time.perf_counter()
        found[name] = model.all(ours)
        seconds[name] = time.perf_counter() - begin
    elements = len(set(molecules.z.tolist()))
    print(
        f"real molecules ({everything.source}): {len(molecules.sizes)} molecules of "
        f"{min(molecules.sizes)} to {max(molecules.sizes)} atoms, {sum(molecules.sizes)} atoms, "
        f"{elements} elements; float32 against float64"
    )
    lines, fine = [["", "largest", "naive error", "our error", "ours - naive"]], True
    for name, truth in exact.items():
        norm = truth.norm()
        naive, ours = (found[who][name].double() for who in ("naive", "attnpool"))
        errors = [float((x - truth).norm() / norm) for x in (naive, ours)]
        difference = float((ours - naive).norm() / norm)
        fine &= max(*errors, difference) < AGREE
        parts = [f"{x:.1e}" for x in (*errors, difference)]
        lines.append([name, f"{truth.abs().max():.4g}", *parts])
    print(render(lines))
    verdict = "naive and attnpool agree" if fine else "naive and attnpool DO NOT AGREE"
    print(
        f"{verdict} (relative to the norm; allowed {AGREE:g}). One training step on forces: "
        f"naive {seconds['naive'] * 1e3:.0f} ms, attnpool {seconds['attnpool'] * 1e3:.0f} ms"
    )
    if whole and len(everything.sizes) > count:
        _forward_all(everything)
    return fine


def _forward_all(molecules: Structures) -> None:
    """Energies of the whole data set, in batches of 512, both ways."""
    seconds, start, atoms = {True: 0.0, False: 0.0}, 0, 0
    worst = 0.0
    while start < len(molecules.sizes):
        sizes = molecules.sizes[start : start + 512]
        rows = slice(atoms, atoms + sum(sizes))
        batch = Structures(molecules.source, molecules.z[rows], molecules.pos[rows], sizes)
        model = _Model(batch, torch.float32)
        results = []
        for ours in (True, False):
            begin = time.perf_counter()
            with torch.no_grad():
                results.append(model.energies(ours))
            seconds[ours] += time.perf_counter() - begin
        worst = max(worst, float((results[0] - results[1]).abs().max()))
        start, atoms = start + 512, rows.stop
    print(
        f"energies of all {len(molecules.sizes)} molecules: largest difference {worst:.1e}; naive "
        f"{seconds[False] * 1e3:.0f} ms, attnpool {seconds[True] * 1e3:.0f} ms with features"
    )
