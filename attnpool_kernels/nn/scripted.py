"""The layers of ``nn`` for TorchScript: the forward methods that ``torch.jit.script`` compiles.

``torch.jit.script`` asks every module of a model for ``__prepare_scriptable__``. The layers answer
with themselves, their ``forward`` replaced by a function of this file: the same formula in what
TorchScript knows, boundaries being tensors [B + 1]. Called from Python it does what the class's own
``forward`` does, so a model that was scripted goes on as before. In TorchScript it calls
``attnpool_kernels.torchscript``, so forces have the part of the attention; results agree with the
layer's up to rounding, for the layer's shortcuts are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import (
    gelu,
    linear,
    multi_head_attention_forward,
    pad,
    silu,
    softplus,
)

from ..torchscript import seed_pool, set_attention

Layer = TypeVar("Layer", bound=torch.nn.Module)


def prepared(layer: Layer, known: type[torch.nn.Module], forward: Callable[..., object]) -> Layer:
    """The layer with ``forward`` of this file in its place.

    Or as it is, where it is no plain ``known``: a subclass that overrides a method, or another
    ``forward`` on the instance. Those are for TorchScript to compile, or to refuse.
    """
    here = layer.__dict__.get("forward")  # a pickled layer that was scripted has its class's
    own = type(layer).forward if here is None else getattr(here, "__func__", here)
    if _plain(type(layer), known) and own in (forward, type(layer).forward):
        forward.__name__ = "forward"  # under which a pickled layer finds its class's own
        layer.forward = MethodType(forward, layer)  # type: ignore[method-assign]
    return layer


_HARMLESS = {"__init__", "__repr__", "extra_repr", "reset_parameters", "weights"}


def _plain(kind: type, known: type) -> bool:
    """Whether a class computes what ``known`` does: it overrides nothing that ``known`` has."""
    between = kind.__mro__[: kind.__mro__.index(known)]
    changed = {name for made in between for name, value in vars(made).items() if callable(value)}
    return not any(hasattr(known, name) for name in changed - _HARMLESS)


def attention_layer(
    self,
    x: Tensor,
    ptr: Tensor | None,
    y: Tensor | None = None,
    y_ptr: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    residual: str | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(
            self, x, ptr, y, y_ptr, bias=bias, key_bias=key_bias, residual=residual
        )
    rows = x if y is None else y
    if x.dim() != 2 or rows.dim() != 2:
        raise ValueError(f"x and y must have shape [N, C], got {x.shape} and {rows.shape}")
    count = x.size(0)
    sets = ptr if y_ptr is None else y_ptr
    if sets is not None and not sets.is_cuda:  # there the kernels alone know the last row
        rows = covered(rows, sets)
        if key_bias is not None:
            key_bias = key_bias[: rows.size(0)]
    if ptr is not None and not ptr.is_cuda:
        x = covered(x, ptr)
    if hasattr(self, "in_proj_weight"):
        w_q, w_k, w_v = self.in_proj_weight.chunk(3)
    else:
        w_q = self.q_proj_weight
        w_k, w_v = self.kv_proj_weight.chunk(2)
    b_q, b_k, b_v = self.in_proj_bias.chunk(3)
    projected = linear(x, w_q, b_q)
    heads = [self.heads, self.dim // self.heads]
    q = projected.unflatten(1, heads)
    k = linear(rows, w_k, b_k).unflatten(1, heads)
    v = linear(rows, w_v, b_v).unflatten(1, heads)
    dropout = self.dropout if self.training else 0.0
    scale = self.factor
    if ptr is not None:
        out = set_attention(q, k, v, ptr, y_ptr, bias, key_bias, scale, dropout).flatten(1)
    else:
        if y_ptr is None:
            raise TypeError("ptr must be boundaries where y or y_ptr is None, got None")
        out = seed_pool(q, k, v, y_ptr, bias, key_bias, scale, dropout).reshape(-1, self.dim)
    if self.out_proj is not None:
        out = self.out_proj(out)
    if residual is not None:
        base = projected if residual == "query" else x
        if base.size(0) != out.size(0):  # seeds, for each of the molecules
            return (out.view(-1, base.size(0), self.dim) + base).view(-1, self.dim)
        out = out + base
    if ptr is not None and out.size(0) < count:
        return pad(out, [0, 0, 0, count - out.size(0)])
    return out


def activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.relu()
    if name == "silu":
        return silu(x)
    if name == "gelu":
        return gelu(x)
    return softplus(x) - 0.6931471805599453


def mab(
    self,
    x: Tensor,
    ptr: Tensor | None,
    y: Tensor | None = None,
    y_ptr: Tensor | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr, y, y_ptr, bias=bias, key_bias=key_bias)
    h = self.attn(x, ptr, y, y_ptr, bias, key_bias, self.residual)
    if self.layer_norm1 is not None:
        h = self.layer_norm1(h)
    h = h + activate(self.activation, self.lin(h))
    if self.layer_norm2 is not None:
        h = self.layer_norm2(h)
    return h


def sab(
    self, x: Tensor, ptr: Tensor, bias: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr, bias=bias, key_bias=key_bias)
    return self.mab(x, ptr, None, None, bias, key_bias)


def equal(x: Tensor, size: int) -> Tensor:
    """Boundaries of molecules of ``size`` rows each."""
    return torch.arange(0, x.size(0) + 1, size, device=x.device)


def isab(self, x: Tensor, ptr: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr)
    h = self.mab1(self.ind, None, x, ptr)
    return self.mab2(x, ptr, h, equal(h, self.ind.size(0)))


def pma(
    self, x: Tensor, ptr: Tensor, bias: Tensor | None = None, key_bias: Tensor | None = None
) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr, bias=bias, key_bias=key_bias)
    if not ptr.is_cuda:
        x = covered(x, ptr)
        if key_bias is not None:
            key_bias = key_bias[: x.size(0)]
    if self.lin is not None:
        x = self.lin(x).relu()
    out = self.mab(self.seed[0], None, x, ptr, bias, key_bias)
    return out.view(-1, self.seed.size(1), self.seed.size(2))


def covered(x: Tensor, ptr: Tensor) -> Tensor:
    """The rows that belong to a molecule; zeros for the others where reading ptr would wait."""
    if not ptr.is_cuda:
        return x[: int(ptr[-1])]
    outside = torch.arange(x.size(0), device=x.device) >= ptr[-1].to(x.device)
    return x.masked_fill(outside[:, None], 0.0)


def set_transformer(self, x: Tensor, ptr: Tensor) -> Tensor:
    """Also ``AttentionPooling`` without phantom rows."""
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr)
    rows = covered(x, ptr)
    for block in self.encoders:
        rows = block(rows, ptr)
    out = self.pma(rows, ptr)
    seeds = out.flatten(0, 1)
    boundaries = equal(seeds, out.size(1))
    for block in self.decoders:
        seeds = block(seeds, boundaries)
    out = seeds.view(-1, out.size(1), out.size(2))
    if self.head is not None:
        out = self.head(out)
    if self.reduce == "mean":
        return out.mean(1)
    return out.flatten(1) if self.reduce == "concat" else out


def seed_pooling(self, x: Tensor, ptr: Tensor) -> Tensor:
    if not torch.jit.is_scripting():
        return type(self).forward(self, x, ptr)
    out = self.pma(covered(x, ptr), ptr)
    return out.mean(1) if self.reduce == "mean" else out.flatten(1)


def projected_heads(
    rows: list[Tensor],
    stacked: Tensor | None,
    separate: list[Tensor | None],
    bias: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [N, H, D] of rows of queries, keys and values, as torch's MultiheadAttention."""
    made: list[Tensor] = []
    for i, x in enumerate(rows):
        weight = separate[i]
        if stacked is not None:
            weight = stacked.chunk(3)[i]
        assert weight is not None
        added: Tensor | None = None
        if bias is not None:
            added = bias.chunk(3)[i]
        made.append(linear(x, weight, added).unflatten(1, [heads, -1]))
    return made[0], made[1], made[2]


def padding_bias(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """[B·S] added to the logits, from a mask [B, S] over key [S, B, E]."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.size(0) != key.size(1) or mask.size(1) != key.size(0):
        raise ValueError(
            f"key_padding_mask must have shape {[key.size(1), key.size(0)]}, got {mask.shape}"
        )
    if mask.dtype != torch.bool:
        return mask.flatten()
    return torch.zeros_like(mask, dtype=key.dtype).masked_fill(mask, -float("inf")).flatten()


def multihead(
    self,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    ptr: Tensor | None = None,
    key_ptr: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Packed rows, and padded ones without weights; the rest is torch's own code."""
    if not torch.jit.is_scripting():
        return type(self).forward(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
            ptr=ptr,
            key_ptr=key_ptr,
            key_bias=key_bias,
        )
    weights: Tensor | None = None
    plain = self.bias_k is None and not self.add_zero_attn
    separate: list[Tensor | None] = [
        self.q_proj_weight,
        self.k_proj_weight,
        self.v_proj_weight,
    ]
    if ptr is not None:
        if key_padding_mask is not None or attn_mask is not None or is_causal or not plain:
            raise TypeError(
                "ptr must come without masks, in a module without add_bias_kv and add_zero_attn"
            )
        count = query.size(0)
        query = covered(query, ptr)
        keys = ptr if key_ptr is None else key_ptr
        if value.size(0) != key.size(0):
            raise ValueError(f"value must have the rows of key, {key.size(0)}, got {value.size(0)}")
        key, value = covered(key, keys), covered(value, keys)
        if key_bias is not None:
            key_bias = key_bias[: key.size(0)]
        q, k, v = projected_heads(
            [query, key, value], self.in_proj_weight, separate, self.in_proj_bias, self.num_heads
        )
        dropout = self.dropout if self.training else 0.0
        out = set_attention(q, k, v, ptr, key_ptr, None, key_bias, None, dropout)
        out = self.out_proj(out.flatten(1))
        return torch.nn.functional.pad(out, [0, 0, 0, count - out.size(0)]), weights
    if key_ptr is not None or key_bias is not None:
        raise TypeError("ptr must be given with key_ptr or key_bias, got None")
    if query.dim() == 2:
        turned = [query[:, None], key[:, None], value[:, None]]
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
    elif self.batch_first:
        turned = [query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)]
    else:
        turned = [query, key, value]
    if need_weights or attn_mask is not None or is_causal or not plain:
        out, weights = multi_head_attention_forward(
            turned[0],
            turned[1],
            turned[2],
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
    else:
        bias = padding_bias(key_padding_mask, turned[1])
        size, batch = turned[0].size(0), turned[0].size(1)
        if key.dim() != query.dim() or turned[1].size(1) != batch:
            raise ValueError(f"key must have the batch size of query, {batch}, got {key.shape}")
        if list(turned[2].shape[:2]) != list(turned[1].shape[:2]):
            raise ValueError(f"value must have the rows of key, got {value.shape}")
        rows = [x.transpose(0, 1).flatten(0, 1) for x in turned]
        q, k, v = projected_heads(
            rows, self.in_proj_weight, separate, self.in_proj_bias, self.num_heads
        )
        number = torch.arange(batch + 1, device=query.device)
        dropout = self.dropout if self.training else 0.0
        keys = number * turned[1].size(0)
        out = set_attention(q, k, v, number * size, keys, None, bias, None, dropout)
        out = self.out_proj(out.flatten(1)).view(batch, size, -1).transpose(0, 1)
    if query.dim() == 2:
        return out[:, 0], None if weights is None else weights[0]
    return out.transpose(0, 1) if self.batch_first else out, weights
