"""The blocks written down once more, molecule by molecule and padded: the reference of these tests.

Shares no code with ``attnpool_kernels``; takes the parameters of its modules.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import gelu, layer_norm, silu, softplus

ACTIVATIONS = {
    "relu": torch.relu,
    "silu": silu,
    "gelu": gelu,
    "shifted_softplus": lambda x: softplus(x) - math.log(2),
}


def mab(block, x, y):
    """One block of the package on dense sets x [..., n, C], y [..., m, C']."""
    a = block.attn
    if hasattr(a, "in_proj_weight"):
        w_q, w_k, w_v = a.in_proj_weight.chunk(3)
    else:
        w_q, (w_k, w_v) = a.q_proj_weight, a.kv_proj_weight.chunk(2)
    b_q, b_k, b_v = a.in_proj_bias.chunk(3)
    q, k, v = x @ w_q.T + b_q, y @ w_k.T + b_k, y @ w_v.T + b_v
    width = a.dim // a.heads
    scale = {"head": width**-0.5, "width": a.dim**-0.5}.get(a.scale, a.scale)
    parts = []
    for h in range(a.heads):
        own = slice(h * width, (h + 1) * width)
        logits = scale * q[..., own] @ k[..., own].transpose(-1, -2)
        parts.append(logits.softmax(-1) @ v[..., own])
    out = torch.cat(parts, -1)
    if a.out_proj is not None:
        out = out @ a.out_proj.weight.T + a.out_proj.bias
    h = out + (q if block.residual == "query" else x)
    if block.layer_norm1 is not None:
        h = norm(block.layer_norm1, h)
    h = h + ACTIVATIONS[block.activation](h @ block.lin.weight.T + block.lin.bias)
    return h if block.layer_norm2 is None else norm(block.layer_norm2, h)


def norm(layer, x):
    return layer_norm(x, layer.normalized_shape, layer.weight, layer.bias)


def encoder(block, x):
    if hasattr(block, "ind"):
        return mab(block.mab2, x, mab(block.mab1, block.ind, x))
    return mab(block.mab, x, x)


def pma(block, x):
    if block.lin is not None:
        x = (x @ block.lin.weight.T + block.lin.bias).relu()
    return mab(block.mab, block.seed[0], x)


def set_transformer(model, x):
    """[S, C_out] of one molecule x [n, C], n > 0, every row of x a key of every row."""
    for block in model.encoders:
        x = encoder(block, x)
    x = pma(model.pma, x)
    for block in model.decoders:
        x = mab(block.mab, x, x)
    return x if model.head is None else x @ model.head.weight.T + model.head.bias
