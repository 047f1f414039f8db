"""What people use today, in plain torch: the contenders that are not this package.

Every function takes a ``Batch`` and returns ``call(q, k, v) -> out`` on packed rows. What a program
computes once per batch (indices, masks, lists of sizes) is prepared outside the clock, for all;
padding and unpadding the rows happens in every call and is inside it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from benchmarks.workloads.suites import Batch

Call = Callable[..., Tensor]


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


def _padded(batch: Batch, attend: Callable[[Tensor, Tensor, Tensor], Tensor], pad: Padding) -> Call:
    """Around ``attend`` on [B, H, n, D]: padding in, unpadding out, seeds to every molecule."""
    seeds, molecules = batch.workload.seeds, len(batch.workload.sizes)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = pad.pad(k).transpose(1, 2), pad.pad(v).transpose(1, 2)
        if seeds is not None:
            q = q.transpose(0, 1).expand(molecules, -1, -1, -1)
            return attend(q, k, v).transpose(1, 2).contiguous()
        return pad.unpad(attend(pad.pad(q).transpose(1, 2), k, v).transpose(1, 2))

    return call


def naive(batch: Batch) -> Call:
    """softmax(QKᵀ)V on the padded batch with the matrix of weights in memory."""
    pad = Padding(batch.workload.sizes, batch.device)
    bias, scale = pad.bias(batch.workload.dtype), batch.workload.dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = (q * scale) @ k.transpose(2, 3)
        if bias is not None:
            logits = logits + bias
        return logits.softmax(3) @ v

    return _padded(batch, attend, pad)


def chunked(batch: Batch, q_chunk: int = 1024, k_chunk: int = 1024) -> Call:
    """Rabe & Staats 2021: blocks of queries and keys, running maximum, blocks recomputed backward.

    Their chunk of queries; padded, as theirs is. Both derivatives come from autograd through
    recomputed blocks.
    """
    pad = Padding(batch.workload.sizes, batch.device)
    bias, scale = pad.bias(batch.workload.dtype), batch.workload.dim**-0.5

    def block(q: Tensor, k: Tensor, v: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        logits = q @ k.transpose(2, 3)
        if b is not None:
            logits = logits + b
        top = logits.detach().amax(3, keepdim=True)
        # The finite floor keeps a block of padding alone from being -inf - (-inf).
        top = top.clamp(min=torch.finfo(logits.dtype).min)
        weights = (logits - top).exp()
        return weights @ v, weights.sum(3, keepdim=True), top

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tracked = torch.is_grad_enabled() and q.requires_grad
        total = norm = top = None
        for start in range(0, k.shape[2], k_chunk):
            own = slice(start, start + k_chunk)
            b = None if bias is None else bias[..., own]
            part = (q, k[:, :, own], v[:, :, own], b)
            if tracked:
                o, l, m = checkpoint(
                    block, *part, use_reentrant=False, preserve_rng_state=False,
                    determinism_check="none",
                )  # fmt: skip
            else:
                o, l, m = block(*part)
            if total is None:
                total, norm, top = o, l, m
                continue
            higher = torch.maximum(top, m)
            old, new = (top - higher).exp(), (m - higher).exp()
            total, norm, top = total * old + o * new, norm * old + l * new, higher
        return total / norm

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([rows(part, k, v) for part in (q * scale).split(q_chunk, 2)], 2)

    return _padded(batch, attend, pad)


def flash(batch: Batch) -> Call:
    """torch's scaled_dot_product_attention on the padded batch, flash kernel and no other."""
    pad = Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(batch.workload.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return _padded(batch, attend, pad)


def efficient(batch: Batch) -> Call:
    """The same with torch's memory-efficient CUDA kernel."""
    pad = Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(batch.workload.dtype)
    if bias is not None:  # the kernel wants rows of the bias aligned to 16 bytes
        width = (pad.longest + 7) // 8 * 8
        wide = bias.new_zeros(pad.molecules, 1, 1, width)
        wide[..., : pad.longest] = bias
        bias = wide[..., : pad.longest]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], -1)
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _padded(batch, attend, pad)


def per_molecule(batch: Batch) -> Call:
    """torch's scaled_dot_product_attention once per molecule: no padding, many calls."""
    sizes, seeds = batch.workload.sizes, batch.workload.seeds

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.transpose(0, 1)
        queries = [q] * len(sizes) if seeds is not None else q.split(sizes, 1)
        parts = zip(queries, k.transpose(0, 1).split(sizes, 1), v.transpose(0, 1).split(sizes, 1))
        outs = [scaled_dot_product_attention(*(x[None] for x in part))[0] for part in parts]
        outs = [x.transpose(0, 1) for x in outs]
        return torch.stack(outs) if seeds is not None else torch.cat(outs)

    return call


def nested(batch: Batch) -> Call:
    """A jagged NestedTensor through scaled_dot_product_attention."""
    work, molecules = batch.workload, len(batch.workload.sizes)
    ptr, few, many = batch.ptr, min(batch.workload.sizes), max(batch.workload.sizes)

    def jagged(x: Tensor, offsets: Tensor, low: int, high: int) -> Tensor:
        made = torch.nested.nested_tensor_from_jagged(
            x.contiguous(),
            offsets,
            min_seqlen=low,
            max_seqlen=high,  # refuses views of a fused qkv
        )
        return made.transpose(1, 2)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (jagged(x, ptr, few, many) for x in (k, v))
        if work.seeds is None:
            q = jagged(q, ptr, few, many)
        else:  # a dense query is refused, so every molecule gets a copy of the seeds
            offsets = torch.arange(molecules + 1, device=ptr.device) * work.seeds
            q = jagged(q.repeat(molecules, 1, 1), offsets, work.seeds, work.seeds)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2).values()
        return out if work.seeds is None else out.unflatten(0, (molecules, work.seeds))

    return call


def einsum(batch: Batch) -> Call:
    """The way of DGL's SetTransformer: padded einsum over [B, n, H, D], masked, softmax, einsum."""
    pad = Padding(batch.workload.sizes, batch.device)
    scale, seeds = batch.workload.dim**-0.5, batch.workload.seeds
    mask = None if pad.full else ~pad.real[:, None, None]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = pad.pad(k), pad.pad(v)
        q = q.expand(pad.molecules, *q.shape) if seeds is not None else pad.pad(q)
        logits = torch.einsum("bxhd,byhd->bhxy", q, k) * scale
        if mask is not None:
            logits = logits.masked_fill(mask, -torch.inf)
        out = torch.einsum("bhxy,byhd->bxhd", logits.softmax(3), v)
        return out.contiguous() if seeds is not None else pad.unpad(out)

    return call
