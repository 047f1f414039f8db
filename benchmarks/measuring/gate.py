"""The float64 oracle that every contender must match before it is timed.

Written from the formula, molecule by molecule (molecules of one size together), and shares no code
with any contender. Small workloads are checked in full, with all gradients; where that would cost
more than the benchmark, sampled rows of the output and of the gradient of q are, and the second
derivative is checked in full on the same workload with its molecules cut short.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.workloads.suites import Batch, Workload

FULL = 12_000_000  # pairs x heads up to which everything is checked
ROWS = 32  # sampled query rows above that
# Relative Frobenius error; gradients may have 3 times as much, second gradients 10 times.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}
FACTOR = {"o": 1.0, "d": 3.0, "g": 10.0}


def attention64(work: Workload, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The operation on packed rows, differentiable in any order: softmax(c·QKᵀ)V per molecule."""
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
        out = torch.einsum("mhij,mjhd->mihd", torch.softmax(logits, 3), values)
        if work.seeds is None:
            parts.append(out.flatten(0, 1))
            places.append(rows.flatten())
        else:
            parts.append(out)
            places.append(torch.tensor([i for i, _ in members], device=k.device))
    return torch.cat(parts)[torch.cat(places).argsort()]


class Gate:
    """Compares what contenders give on one batch and pass with float64."""

    def __init__(self, batch: Batch, what: str) -> None:
        self.batch, self.what, self.work = batch, what, batch.workload
        self.full = self.work.pairs * self.work.heads <= FULL
        self.check = "all" if self.full else f"{ROWS} rows"
        self._truth: dict[str, Tensor] | None = None

    def error(self, found: dict[str, Tensor]) -> tuple[float, str]:
        """The worst relative error over the tolerance's factor, and "" or what is wrong."""
        if self._truth is None:
            self._truth = self._all() if self.full else self._rows()
        worst, wrong = 0.0, []
        for name, truth in self._truth.items():
            x = found[name].detach()
            if not self.full:
                x = x[self._picked] if name == "out" else x[self._picked[-1]]
            if x.shape != truth.shape:
                wrong.append(f"{name}: shape {tuple(x.shape)}, expected {tuple(truth.shape)}")
                continue
            norm = truth.norm().item() or 1.0
            relative = (x.double() - truth).norm().item() / norm
            allowed = TOLERANCE[self.work.dtype] * FACTOR[name[0]]
            if self.work.module and name != "out":
                # A relu whose argument rounds to the other side of 0 switches a whole gradient on
                # or off: every contender, torch's own modules too, is off by up to 2e-3 here.
                allowed = max(allowed, 5e-3)
            worst = max(worst, relative / FACTOR[name[0]])
            if not relative <= allowed:
                wrong.append(f"{name}: relative error {relative:.2g}, allowed {allowed:.2g}")
        return worst, "; ".join(wrong)

    def _all(self) -> dict[str, Tensor]:
        """Everything in float64 through autograd."""
        wide = Batch.__new__(Batch)
        wide.__dict__.update(self.batch.__dict__)
        wide.inputs = [x.detach().double() for x in self.batch.inputs]
        wide.dout = self.batch.dout.detach().double()
        wide.cotangents = [x.double() for x in self.batch.cotangents]
        for x in (*wide.inputs, wide.dout):
            x.requires_grad_(self.what != "forward")
        return wide.run(oracle(self.work), self.what)

    def _rows(self) -> dict[str, Tensor]:
        """Sampled rows of out and dq, each from all keys of its molecule."""
        work, q, k, v = self.work, *(x.detach() for x in self.batch.inputs)
        generator = torch.Generator().manual_seed(1)
        ends = torch.tensor(work.sizes).cumsum(0)
        seeds = work.seeds is not None
        last = (len(work.sizes) if seeds else work.atoms) - 1
        picked = torch.randint(0, last + 1, (ROWS,), generator=generator)
        picked[-1] = last  # the end of the batch is where kernels go wrong
        molecule = picked if seeds else torch.searchsorted(ends, picked, right=True)
        place = torch.randint(0, work.seeds or 1, (ROWS,), generator=generator)
        self._picked = (picked, place) if seeds else (picked,)
        out, dq = [], []
        held: dict[int, tuple[Tensor, Tensor]] = {}  # of one molecule: it may be a giant
        for row, mol, seed in zip(picked.tolist(), molecule.tolist(), place.tolist()):
            if mol not in held:
                own = slice(int(ends[mol]) - work.sizes[mol], int(ends[mol]))
                held = {mol: (k[own].double(), v[own].double())}
            keys, values = held[mol]
            query = q[seed if seeds else row].double()
            weights = (torch.einsum("hd,jhd->hj", query, keys) * work.dim**-0.5).softmax(1)
            out.append(torch.einsum("hj,jhd->hd", weights, values))
            dout = self.batch.dout.detach()[(row, seed) if seeds else row].double()
            dp = torch.einsum("hd,jhd->hj", dout, values)
            ds = weights * (dp - (weights * dp).sum(1, keepdim=True))
            dq.append(torch.einsum("hj,jhd->hd", ds, keys) * work.dim**-0.5)
        truth = {"out": torch.stack(out)}
        if self.what != "forward" and not seeds:  # the gradient of seeds sums over molecules
            truth["d0"] = torch.stack(dq)
        return truth


def oracle(work: Workload) -> Callable[..., Tensor]:
    if work.module:
        from benchmarks.contenders.modules import module64

        return lambda *inputs: module64(work, *inputs)
    return lambda q, k, v: attention64(work, q, k, v)


def shortened(work: Workload) -> Workload:
    """The workload with few, short molecules: small enough for a full check of every gradient."""
    sizes = tuple(min(n, 300) for n in sorted(work.sizes)[-8:])
    return replace(work, sizes=sizes, name=work.name + " (short)")
