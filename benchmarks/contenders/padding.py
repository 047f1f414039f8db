"""Between packed rows and a padded batch, differentiable twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..workloads.batch import WorkloadBatch
from .contender import Call


class _Pad(torch.autograd.Function):
    """Rows to their places in a zeroed batch. Its derivative is ``_Unpad``, and back."""

    @staticmethod
    def forward(ctx, x, index, rows):
        ctx.save_for_backward(index)
        ctx.rows = len(index)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx, dx):
        return _Unpad.apply(dx, *ctx.saved_tensors), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, dx):
        return _Pad.apply(dx, *ctx.saved_tensors, ctx.rows), None


class Padding:
    """Between packed rows [N, ...] and [B, longest, ...]; a view where all molecules are equal."""

    def __init__(self, sizes: tuple[int, ...], device: str) -> None:
        self.molecules, self.longest = len(sizes), max(sizes)
        self.full = min(sizes) == self.longest
        counts = torch.tensor(sizes)
        molecule = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        place = torch.arange(len(molecule)) - (counts.cumsum(0) - counts)[molecule]
        self.index = (molecule * self.longest + place).to(device)
        self.real = (torch.arange(self.longest) < counts[:, None]).to(device)  # [B, longest]

    def pad(self, x: Tensor) -> Tensor:
        if not self.full:
            x = _Pad.apply(x, self.index, self.molecules * self.longest)
        return x.reshape(self.molecules, self.longest, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        x = x.flatten(0, 1)
        return x if self.full else _Unpad.apply(x, self.index)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, longest] added to the logits: 0 for atoms, -inf for padding."""
        if self.full:
            return None
        zero = torch.zeros(self.real.shape, dtype=dtype, device=self.real.device)
        return zero.masked_fill(~self.real, -torch.inf)[:, None, None]


def padded(batch: WorkloadBatch, attend: Callable[..., Tensor], pad: Padding) -> Call:
    """Around ``attend`` on [B, H, n, D]: padding in, unpadding out, seeds to every molecule.

    What is added to the logits of the keys [N, H] becomes [B, H, 1, n].
    """
    seeds, molecules = batch.workload.seeds, len(batch.workload.sizes)

    def call(q: Tensor, k: Tensor, v: Tensor, *of_keys: Tensor) -> Tensor:
        k, v = pad.pad(k).transpose(1, 2), pad.pad(v).transpose(1, 2)
        added = [pad.pad(x).transpose(1, 2).unsqueeze(2) for x in of_keys]
        if seeds is not None:
            q = q.transpose(0, 1).expand(molecules, -1, -1, -1)
            return attend(q, k, v, *added).transpose(1, 2).contiguous()
        return pad.unpad(attend(pad.pad(q).transpose(1, 2), k, v, *added).transpose(1, 2))

    return call
