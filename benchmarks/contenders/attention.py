"""What people use today, in plain torch: the contenders that are not this package.

Every function takes a batch and returns ``call(q, k, v) -> out`` on packed rows (``naive`` takes a
bias of the keys as well). What a program
computes once per batch (indices, masks, lists of sizes) is prepared outside the clock, for all;
padding and unpadding the rows happens in every call and is inside it.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..workloads.batch import WorkloadBatch
from ..workloads.workload import Workload
from .contender import Call, Contender, Kernel, fits, torch_kernel
from .padding import Padding, padded


def naive(batch: WorkloadBatch) -> Call:
    """softmax(QKᵀ)V on the padded batch with the matrix of weights in memory."""
    pad = Padding(batch.workload.sizes, batch.device)
    bias, scale = pad.bias(batch.workload.dtype), batch.workload.dim**-0.5

    def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
        logits = (q * scale) @ k.transpose(2, 3)
        added = bias
        if key_bias is not None:
            added = key_bias if bias is None else key_bias + bias
        if added is not None:
            logits = logits + added
        return logits.softmax(3) @ v

    return padded(batch, attend, pad)


def chunked(batch: WorkloadBatch, q_chunk: int = 1024, k_chunk: int = 1024) -> Call:
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

    recomputed = partial(
        checkpoint,
        block,
        use_reentrant=False,
        preserve_rng_state=False,
        determinism_check="none",
    )

    def rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = recomputed if torch.is_grad_enabled() and q.requires_grad else block
        total = norm = top = None
        for start in range(0, k.shape[2], k_chunk):
            own = slice(start, start + k_chunk)
            b = None if bias is None else bias[..., own]
            o, l, m = one(q, k[:, :, own], v[:, :, own], b)
            if total is None:
                total, norm, top = o, l, m
                continue
            higher = torch.maximum(top, m)
            old, new = (top - higher).exp(), (m - higher).exp()
            total, norm, top = total * old + o * new, norm * old + l * new, higher
        return total / norm

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([rows(part, k, v) for part in (q * scale).split(q_chunk, 2)], 2)

    return padded(batch, attend, pad)


def flash(batch: WorkloadBatch) -> Call:
    """torch's scaled_dot_product_attention on the padded batch, flash kernel and no other."""
    pad = Padding(batch.workload.sizes, batch.device)
    bias = pad.bias(batch.workload.dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return padded(batch, attend, pad)


def efficient(batch: WorkloadBatch) -> Call:
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

    return padded(batch, attend, pad)


def per_molecule(batch: WorkloadBatch) -> Call:
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


def nested(batch: WorkloadBatch) -> Call:
    """A jagged NestedTensor through scaled_dot_product_attention."""
    work, molecules = batch.workload, len(batch.workload.sizes)
    ptr, few, many = batch.ptr, min(batch.workload.sizes), max(batch.workload.sizes)

    def jagged(x: Tensor, offsets: Tensor, low: int, high: int) -> Tensor:
        # It refuses views of a fused qkv, so the rows are made contiguous.
        made = torch.nested.nested_tensor_from_jagged(
            x.contiguous(), offsets, min_seqlen=low, max_seqlen=high
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


def einsum(batch: WorkloadBatch) -> Call:
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


def _flash_why_not(work: Workload, what: str, device: str) -> list[str]:
    reasons = fits(1)(work, what, device)
    if device == "cuda":
        if work.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"{work.dtype_name}: the CUDA kernel needs float16 or bfloat16")
        if len(set(work.sizes)) > 1:
            reasons.append("molecules differ in size: the CUDA kernel takes no mask")
    return reasons


def _flash_kernel(work: Workload, device: str) -> str:
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if device == "cpu" else "")
    return f"torch {torch.__version__}: aten::{name}"


def _loop_kernel(work: Workload, device: str) -> str:
    chosen = sdpa_choice(work, device, work.sizes[0])
    return f"torch {torch.__version__}: scaled_dot_product_attention ({chosen})"


def sdpa_choice(work: Workload, device: str, n: int, masked: bool = False) -> str:
    """Which kernel torch's scaled_dot_product_attention takes for molecules of n atoms."""
    x = torch.zeros(1, work.heads, n, work.dim, dtype=work.dtype, device=device)
    q = x if work.seeds is None else x[:, :, :1].expand(-1, -1, work.seeds, -1)
    mask = torch.ones(1, 1, 1, n, dtype=torch.bool, device=device) if masked else None
    try:
        return torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, x, x, mask)).name
    except (AttributeError, RuntimeError, ValueError):
        return "its choice"


@cache
def _blas() -> str:
    return "MKL" if torch.backends.mkl.is_available() else "BLAS"


def _plain(formula: str) -> Kernel:
    def kernel(work: Workload, device: str) -> str:
        library = _blas() if device == "cpu" else f"cuBLAS of CUDA {torch.version.cuda}"
        return f"torch {torch.__version__}: {formula} ({library})"

    return kernel


CONTENDERS = (
    Contender(
        "naive",
        "naive, padded",
        naive,
        fits(),
        _plain("matmul, softmax, matmul"),
        key_bias=True,
    ),
    Contender(
        "memory_efficient",
        "chunked (Rabe & Staats)",
        chunked,
        fits(),
        _plain("matmul in blocks of 1024 x 1024, checkpoint"),
    ),
    Contender("flash", "flash (torch SDPA, padded)", flash, _flash_why_not, _flash_kernel),
    Contender(
        "efficient",
        "memory-efficient (torch SDPA, padded)",
        efficient,
        fits(1, ("cuda",)),
        torch_kernel("aten::_scaled_dot_product_efficient_attention"),
    ),
    Contender("per_molecule", "torch SDPA per molecule", per_molecule, fits(1), _loop_kernel),
    # The only kernel for jagged tensors on the CPU is torch's math path, one order of derivative.
    Contender(
        "nested",
        "NestedTensor SDPA",
        nested,
        fits(1),
        torch_kernel("scaled_dot_product_attention of a jagged NestedTensor"),
    ),
    Contender(
        "einsum", "padded einsum (as DGL)", einsum, fits(), _plain("einsum, softmax, einsum")
    ),
)
