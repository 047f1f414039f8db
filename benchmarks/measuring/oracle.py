"""The oracle: what every contender must match, from the formula and in float64.

Written molecule by molecule (molecules of one size together); shares no attention with any
contender. Full results come through autograd; of workloads that are too large for that, sampled
rows of the output and of the gradient of q are computed by hand.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..workloads import set_transformer
from ..workloads.batch import WorkloadBatch
from ..workloads.workload import Workload


def attention64(
    work: Workload, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None
) -> Tensor:
    """The operation on packed rows, differentiable in any order: softmax(c·QKᵀ + 1eᵀ)V."""
    ends = torch.tensor(work.sizes).cumsum(0).tolist()
    groups = defaultdict(list)
    for i, (n, end) in enumerate(zip(work.sizes, ends)):
        groups[n].append((i, end - n))
    parts, places = [], []
    for n, members in groups.items():
        start = torch.tensor([s for _, s in members], device=k.device)
        rows = start[:, None] + torch.arange(n, device=k.device)  # [m, n]
        keys, values = k[rows], v[rows]
        queries = q[rows] if work.seeds is None else q.expand(len(members), *q.shape)
        logits = torch.einsum("mihd,mjhd->mhij", queries, keys) * work.dim**-0.5
        if key_bias is not None:
            logits = logits + key_bias[rows].transpose(1, 2)[:, :, None]
        out = torch.einsum("mhij,mjhd->mihd", torch.softmax(logits, 3), values)
        if work.seeds is None:
            parts.append(out.flatten(0, 1))
            places.append(rows.flatten())
        else:
            parts.append(out)
            places.append(torch.tensor([i for i, _ in members], device=k.device))
    return torch.cat(parts)[torch.cat(places).argsort()]


def module64(work: Workload, x: Tensor, *weights: Tensor) -> Tensor:
    """The formula per molecule; the oracle when given float64."""
    atoms = replace(work, seeds=None)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention64(atoms, q, k, v)

    def pool(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention64(work, q, k, v)

    return set_transformer.ragged(work, x, list(weights), attend, pool)


def everything(batch: WorkloadBatch, what: str) -> dict[str, Tensor]:
    """All results of a pass, by the names of ``WorkloadBatch.run``."""
    work = batch.workload
    wide = replace(
        batch,
        inputs=[x.detach().double() for x in batch.inputs],
        dout=batch.dout.detach().double(),
        cotangents=[x.double() for x in batch.cotangents],
    )
    for x in (*wide.inputs, wide.dout):
        x.requires_grad_(what != "forward")
    formula = module64 if work.module else attention64
    return wide.run(lambda *inputs: formula(work, *inputs), what)


@dataclass(frozen=True)
class Rows:
    """Query rows picked from a batch; of seeds, pairs of a molecule and its seed."""

    row: Tensor  # of out: an atom, or a molecule where there are seeds
    molecule: Tensor
    seed: Tensor  # 0 where there are none
    pooled: bool

    @property
    def out(self) -> tuple[Tensor, ...]:
        """Their index in out."""
        return (self.row, self.seed) if self.pooled else (self.row,)

    @property
    def query(self) -> Tensor:
        """Their index in q."""
        return self.seed if self.pooled else self.row


def pick(work: Workload, count: int) -> Rows:
    """Picks ``count`` rows, the same ones for everybody."""
    generator = torch.Generator().manual_seed(1)
    pooled = work.seeds is not None
    last = (len(work.sizes) if pooled else work.atoms) - 1
    row = torch.randint(0, last + 1, (count,), generator=generator)
    row[-1] = last  # the end of the batch is where kernels go wrong
    ends = torch.tensor(work.sizes).cumsum(0)
    molecule = row if pooled else torch.searchsorted(ends, row, right=True)
    seed = torch.randint(0, work.seeds or 1, (count,), generator=generator)
    return Rows(row, molecule, seed, pooled)


def rows_of(batch: WorkloadBatch, rows: Rows) -> tuple[Tensor, Tensor]:
    """out and dq of the picked rows, each from all keys of its molecule."""
    work, (q, k, v, *added) = batch.workload, [x.detach() for x in batch.inputs]
    douts, queries = batch.dout.detach()[rows.out].double(), q[rows.query].double()
    ends = torch.tensor(work.sizes).cumsum(0).tolist()
    out, dq = [], []
    held: dict[int, tuple[Tensor, ...]] = {}  # of one molecule: it may be a giant
    for place, molecule in enumerate(rows.molecule.tolist()):
        if molecule not in held:
            own = slice(ends[molecule] - work.sizes[molecule], ends[molecule])
            held = {molecule: tuple(x[own].double() for x in (k, v, *added))}
        keys, values, *biases = held[molecule]
        logits = torch.einsum("hd,jhd->hj", queries[place], keys) * work.dim**-0.5
        weights = (logits + sum(x.T for x in biases)).softmax(1)
        out.append(torch.einsum("hj,jhd->hd", weights, values))
        dp = torch.einsum("hd,jhd->hj", douts[place], values)
        ds = weights * (dp - (weights * dp).sum(1, keepdim=True))
        dq.append(torch.einsum("hj,jhd->hd", ds, keys) * work.dim**-0.5)
    return torch.stack(out), torch.stack(dq)
