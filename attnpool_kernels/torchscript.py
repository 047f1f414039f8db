"""The operation for TorchScript: functions that ``torch.jit.script`` compiles, forces included.

A scripted program calls ``torch.ops.attnpool_autograd.attention``: the operator with its
derivatives to second order. Where this package is imported, Python registers it; a C++ program
loads the libraries that ``attnpool_kernels.deploy`` names. Where neither was done, the program
fails to load ("Unknown builtin op"), so no force can lose the part of the attention.

``torch.jit.script`` of a model takes the layers of ``nn`` that have an equal in TorchScript (see
``nn.scripted``) by themselves. CPU tensors are served by the C++ kernels, CUDA tensors by the CUDA
kernels; there is no other backend. Autocast acts on the layers around them and casts none of their
own operands.
"""

from __future__ import annotations

import torch
from torch import Tensor


def set_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor,
    k_ptr: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``attnpool_kernels.set_attention`` for TorchScript: [N_q, H, D_v].

    Arguments, shapes and result as there; ptr and k_ptr are tensors [B + 1]. What does not fit
    is named by a RuntimeError of the operator, or a torch.jit.Error.

    Examples:
        >>> x, ptr = torch.randn(8, 2, 4), torch.tensor([0, 5, 8])
        >>> set_attention(x, x, x, ptr).shape
        torch.Size([8, 2, 4])
    """
    edges = ptr.to(q.device).contiguous()
    keys = edges if k_ptr is None else k_ptr.to(edges).contiguous()
    return attend(q, k, v, edges, keys, bias, key_bias, scale, dropout)


def seed_pool(
    seeds: Tensor,
    k: Tensor,
    v: Tensor,
    ptr: Tensor,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """``attnpool_kernels.seed_pool`` for TorchScript: [B, S, H, D_v].

    Examples:
        >>> x, ptr = torch.randn(8, 2, 4), torch.tensor([0, 5, 8])
        >>> seed_pool(torch.randn(3, 2, 4), x, x, ptr).shape
        torch.Size([2, 3, 2, 4])
    """
    edges = ptr.to(k.device).contiguous()
    return attend(seeds, k, v, None, edges, bias, key_bias, scale, dropout)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ptr: Tensor | None,
    k_ptr: Tensor,
    bias: Tensor | None,
    key_bias: Tensor | None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """Both of them: q_ptr is None for seeds. Boundaries are contiguous and where the rows are."""
    if q.dim() != 3 or k.dim() != 3 or k.size(2) == 0:
        raise ValueError(f"q and k must have shape [N, H, D], got {q.shape} and {k.shape}")
    rows, heads = k.size(0), k.size(1)
    pair_ptr: Tensor | None = None
    if bias is not None:
        sizes = k_ptr.to(torch.int64).diff()
        queries = sizes * 0 + q.size(0) if q_ptr is None else q_ptr.to(torch.int64).diff()
        ends = (queries * sizes).cumsum(0)
        pair_ptr = torch.cat([torch.zeros_like(k_ptr[:1], dtype=torch.int64), ends])
        if bias.dim() != 2 or (bias.size(1) != 1 and bias.size(1) != heads):
            raise ValueError(f"bias must have shape [P, {heads}] or [P, 1], got {bias.shape}")
        if not bias.is_cuda and bias.size(0) != int(pair_ptr[-1]):
            raise ValueError(f"bias must have P = {int(pair_ptr[-1])} rows, got {bias.size(0)}")
        bias = bias.expand(-1, heads)
    if key_bias is not None:
        added = key_bias[:, None] if key_bias.dim() == 1 else key_bias
        if added.dim() != 2 or added.size(0) != rows or (added.size(1) not in [1, heads]):
            raise ValueError(
                f"key_bias must have shape [{rows}] or [{rows}, {heads}], got {key_bias.shape}"
            )
        key_bias = added.expand(-1, heads)
    seed: Tensor | None = None
    if dropout > 0.0:
        seed = torch.randint(0, 9223372036854775807, [1], dtype=torch.int64, device=k.device)
    factor = float(k.size(2)) ** -0.5 if scale is None else float(scale)
    if not abs(factor) <= 3.4e38:
        raise ValueError(f"scale must be finite and fit into float32, got {factor}")
    return torch.ops.attnpool_autograd.attention(
        q, k, v, bias, key_bias, q_ptr, k_ptr, pair_ptr, seed, factor, dropout
    )[0]
