"""The tensors of a workload, and one pass over them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import set_transformer
from .workload import Workload

Normal = Callable[..., Tensor]  # normal(*shape): standard normal numbers


@dataclass
class WorkloadBatch:
    """``inputs`` that are differentiated, and cotangents for each pass.

    q is [N, H, D] or, with seeds, [S, H, D]; k, v are [N, H, D], then the bias of the keys [N, H]
    where the workload has one; out has the shape of q or
    [B, S, H, D]. A module workload has x [N, C] and the module's weights instead.
    """

    workload: Workload
    device: str
    seed: int
    ptr: Tensor
    inputs: list[Tensor]
    dout: Tensor
    cotangents: list[Tensor]

    def prepare(self, what: str) -> None:
        """Makes leaves that require grad, and the cotangents of the pass, before any clock runs."""
        if what == "double_backward" and self.cotangents[0].numel() == 0:
            normal = _normal(self.workload.dtype, self.device, self.seed + 1)
            self.cotangents = [normal(*x.shape) for x in self.inputs]
        grad = what != "forward"
        self.inputs = [x.detach().requires_grad_(grad) for x in self.inputs]
        self.dout = self.dout.detach().requires_grad_(what == "double_backward")

    def run(self, call: Callable[..., Tensor], what: str) -> dict[str, Tensor]:
        """One pass with everything before it; the tensors that it gives, by name."""
        if what == "forward":
            with torch.no_grad():
                return {"out": call(*self.inputs)}
        out = call(*self.inputs)
        if what == "backward":
            first = torch.autograd.grad(out, self.inputs, self.dout)
            return {"out": out.detach(), **{f"d{i}": x for i, x in enumerate(first)}}
        first = torch.autograd.grad(out, self.inputs, self.dout, create_graph=True)
        wanted = [*self.inputs, self.dout]
        # A bias behind the last layer has no second derivative: zeros instead of an error.
        second = torch.autograd.grad(
            first, wanted, self.cotangents, allow_unused=True, materialize_grads=True
        )
        named = {"out": out.detach(), **{f"d{i}": x.detach() for i, x in enumerate(first)}}
        return named | {f"g{i}": x for i, x in enumerate(second)}


def make_batch(work: Workload, device: str, seed: int = 0) -> WorkloadBatch:
    """Draws the tensors of a workload; without cotangents, which ``prepare`` makes."""
    normal = _normal(work.dtype, device, seed)
    ptr = torch.tensor([0, *work.sizes], dtype=torch.int64).cumsum(0).to(device)
    atoms, molecules, shape = work.atoms, len(work.sizes), (work.heads, work.dim)
    width = work.heads * work.dim
    if work.module:
        inputs = [normal(atoms, width), *set_transformer.draw_weights(work, normal)]
        dout = normal(molecules, (work.seeds or 1) * width)
    else:
        if work.seeds is not None:
            inputs = [normal(work.seeds, *shape), normal(atoms, *shape), normal(atoms, *shape)]
        elif work.layout == "fused":
            inputs = list(normal(atoms, 3, *shape).unbind(1))
        else:
            inputs = [normal(atoms, *shape) for _ in range(3)]
        if work.key_bias:
            inputs.append(normal(atoms, work.heads))
        rows = (atoms,) if work.seeds is None else (molecules, work.seeds)
        dout = normal(*rows, *shape)
    none = [torch.empty(0)] * len(inputs)
    return WorkloadBatch(work, device, seed, ptr, inputs, dout, none)


def _normal(dtype: torch.dtype, device: str, seed: int) -> Normal:
    """Draws in float32 whatever the dtype, so that all dtypes get the same numbers, rounded."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        x = torch.empty(shape, dtype=torch.float32, device=device)
        return x.normal_(generator=generator).to(dtype)

    return normal
