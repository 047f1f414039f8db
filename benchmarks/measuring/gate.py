"""The gate: every contender must match the float64 oracle before it is timed.

Small workloads are checked in full, with all gradients; where that would cost more than the
benchmark, sampled rows of the output and of the gradient of q are, and the second derivative is
checked in full on the same workload with its molecules cut short.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..workloads.batch import WorkloadBatch
from ..workloads.workload import Workload
from . import oracle

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


class Gate:
    """Compares what contenders give on one batch and pass with float64."""

    def __init__(self, batch: WorkloadBatch, what: str) -> None:
        self.batch, self.what, self.work = batch, what, batch.workload
        self.full = self.work.pairs * self.work.heads <= FULL
        self.check = "all" if self.full else f"{ROWS} rows"
        self._rows = None if self.full else oracle.pick(self.work, ROWS)
        self._truth: dict[str, Tensor] | None = None

    def error(self, found: dict[str, Tensor]) -> tuple[float, str]:
        """The worst relative error over the tolerance's factor, and "" or what is wrong."""
        if self._truth is None:
            self._truth = self._known()
        worst, wrong = 0.0, []
        for name, truth in self._truth.items():
            x = found[name].detach()
            if self._rows is not None:
                x = x[self._rows.out] if name == "out" else x[self._rows.query]
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

    def _known(self) -> dict[str, Tensor]:
        if self._rows is None:
            return oracle.everything(self.batch, self.what)
        out, dq = oracle.rows_of(self.batch, self._rows)
        if self.what == "forward" or self._rows.pooled:  # dq of seeds sums over molecules
            return {"out": out}
        return {"out": out, "d0": dq}


def shortened(work: Workload) -> Workload:
    """The workload with few, short molecules: small enough for a full check of every gradient."""
    sizes = tuple(min(n, 300) for n in sorted(work.sizes)[-8:])
    return replace(work, sizes=sizes, name=work.name + " (short)")
