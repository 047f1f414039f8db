"""One pass at a time: what is called again and again while a clock runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnpool_kernels.impl import KernelBackend
from attnpool_kernels.operands import Cotangents, Operands, Options, Result, Tangents
from benchmarks.workloads.batch import WorkloadBatch

Call = Callable[..., Tensor]


class Kernels:
    """The passes of a kernel backend, called directly: its kernels and nothing else."""

    def __init__(self, batch: WorkloadBatch, module: KernelBackend) -> None:
        q, k, v = (x.detach() for x in batch.inputs)
        q_ptr = batch.ptr if batch.workload.seeds is None else None
        self.module = module
        self.x = Operands.plain(q, k, v, q_ptr, batch.ptr)
        self.options = Options(batch.workload.dim**-0.5)
        self.dy = Cotangents(batch.dout.detach(), None)
        self.tangents = Tangents(*batch.cotangents)
        self.y: Result | None = None

    def forward(self) -> dict[str, Tensor]:
        return self.module.forward(self.x, self.options)._asdict()

    def prepare(self) -> Result:
        """Makes what the other two passes are given."""
        if self.y is None:
            self.y = self.module.forward(self.x, self.options)
        return self.y

    def backward(self) -> dict[str, Tensor]:
        dx = self.module.backward(self.x, self.prepare(), self.dy, self.options, False)
        return {"d0": dx.dq, "d1": dx.dk, "d2": dx.dv}

    def double_backward(self) -> dict[str, Tensor]:
        given = self.x, self.prepare(), self.dy, self.tangents
        gx = self.module.double_backward(*given, self.options)
        return {"g0": gx.gq, "g1": gx.gk, "g2": gx.gv, "g3": gx.gdout}


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
