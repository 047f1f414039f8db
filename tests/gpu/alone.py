"""One pass at a time: what is called again and again while a clock runs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.workloads.batch import WorkloadBatch

Call = Callable[..., Tensor]


class Kernels:
    """The passes of a kernel backend, called directly: its kernels and nothing else."""

    def __init__(self, batch: WorkloadBatch, module: ModuleType) -> None:
        q, k, v = (x.detach() for x in batch.inputs)
        q_ptr = batch.ptr if batch.workload.seeds is None else None
        self.module, self.batch = module, batch
        self.problem = (q, k, v, None, q_ptr, batch.ptr, None, None)
        self.options = (batch.workload.dim**-0.5, 0.0)
        self.known: tuple | None = None

    def forward(self) -> dict[str, Tensor]:
        out, lse = self.module.forward(*self.problem, *self.options)
        return {"out": out, "lse": lse}

    def prepare(self) -> None:
        """Makes what the other two passes are given."""
        out, lse = self.forward().values()
        self.known = (*self.problem, out, lse, self.batch.dout.detach(), None)

    def backward(self) -> dict[str, Tensor]:
        found = self.module.backward(*self._given(), *self.options, False)
        return dict(zip(("d0", "d1", "d2"), found))

    def double_backward(self) -> dict[str, Tensor]:
        seconds = (*self.batch.cotangents, None)
        found = self.module.double_backward(*self._given(), *seconds, *self.options)
        gq, gk, gv, _, gdout, _ = found
        return {"g0": gq, "g1": gk, "g2": gv, "g3": gdout}

    def _given(self) -> tuple:
        if self.known is None:
            self.prepare()
        assert self.known is not None
        return self.known


class Autograd:
    """The passes of any call through torch's autograd, each on what the ones before it have left.

    The inputs are leaves of their own: torch remembers on which stream a leaf was used first.
    """

    def __init__(self, batch: WorkloadBatch, call: Call) -> None:
        self.call, self.batch = call, batch
        self.inputs = [x.detach().requires_grad_() for x in batch.inputs]
        self.dout = batch.dout.detach().requires_grad_()
        self._out: Tensor | None = None
        self._first: tuple[Tensor, ...] | None = None

    def forward(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"out": self.call(*self.inputs)}

    def backward(self) -> dict[str, Tensor]:
        if self._out is None:
            self._out = self.call(*self.inputs)
        first = torch.autograd.grad(self._out, self.inputs, self.dout.detach(), retain_graph=True)
        return {f"d{place}": x for place, x in enumerate(first)}

    def double_backward(self) -> dict[str, Tensor]:
        if self._first is None:
            out = self.call(*self.inputs)
            self._first = torch.autograd.grad(out, self.inputs, self.dout, create_graph=True)
        second = torch.autograd.grad(
            self._first, [*self.inputs, self.dout], self.batch.cotangents, retain_graph=True
        )
        return {f"g{place}": x for place, x in enumerate(second)}
