"""torch's MultiheadAttention with this package's attention, padded or on packed rows."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..dispatch import check_name
from ..functional import set_attention
from ..ragged import Ragged
from . import scripted
from .arguments import covered, probability, uncovered
from .projection import project


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` with the same weights and numbers, exact to second order.

    ::

        q, k, v = x W_q + b_q, y W_k + b_k, z W_v + b_v      split into ``num_heads`` chunks
        out     = concat_h softmax(q_h k_hᵀ / √(E/H) + mask) v_h, then out W_o + b_o

    Constructor, state dict and ``forward`` are those of torch's class, of which it is one. What
    differs:

    - Forces train: with ``need_weights=False`` torch's has no second derivative, this one has.
    - ``ptr`` takes packed rows [N, E] of a concatenated batch, without padding.
    - A query whose keys are all padding gets ``out_proj.bias``, where torch's gets NaN.
    - Dropout has the same distribution, other numbers.
    - ``out_proj`` is called, so hooks, adapters and parametrisations of it act; not where torch's
      code runs, see below, which reads its weight.

    In evaluation without gradients torch's ``TransformerEncoderLayer`` does not call its attention
    but reads the weights; ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call.
    Calls that need what no fused kernel gives, weights (``need_weights=True``), an ``attn_mask``,
    ``is_causal``, nested tensors, or a module with ``add_bias_kv`` or ``add_zero_attn``, go to
    torch's own code. For weights on demand see ``attnpool_kernels.attention_weights``.

    Args: as ``torch.nn.MultiheadAttention``. backend: None or a name, see ``explain``; an
    attribute, None at first.

    Examples:
        >>> old = torch.nn.MultiheadAttention(16, 4, batch_first=True)
        >>> new, x = MultiheadAttention.from_torch(old), torch.randn(8, 16)
        >>> new(x, x, x, need_weights=False, ptr=torch.tensor([0, 5, 8]))[0].shape
        torch.Size([8, 16])
    """

    backend = cast("str | None", None)  # TorchScript would have to read an annotation

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, *given, **options):
        super().__init__(embed_dim, num_heads, probability("dropout", dropout), *given, **options)

    @classmethod
    def from_torch(
        cls, module: torch.nn.MultiheadAttention, backend: str | None = None
    ) -> MultiheadAttention:
        """``module`` itself, turned into one of this class in place: same parameters and hooks.

        Raises TypeError: not exactly a ``torch.nn.MultiheadAttention`` (or one of this class).
        ValueError: a dropout that is not in [0, 1).
        """
        if type(module) not in (torch.nn.MultiheadAttention, cls):
            raise TypeError(
                f"module must be a torch.nn.MultiheadAttention, got {type(module).__name__}"
            )
        if backend is not None:
            check_name(backend)
        probability("dropout", module.dropout)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.backend = backend
        return module

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        ptr: Tensor | Ragged | None = None,
        key_ptr: Tensor | Ragged | None = None,
        key_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, weights or None); the first eight arguments and shapes as in torch's class.

        Args:
            key_padding_mask: [B, S] bool, True for keys to leave out; or a float mask, added to the
                logits, with its derivative.
            ptr: boundaries [B + 1] of packed rows: query [N_q, E], key and value [N_k, ·]. Then no
                mask is taken and no weights are returned.
            key_ptr: the same for key and value; None: as ptr.
            key_bias: [N_k] or [N_k, H] added to the logits of a packed key.

        Raises TypeError, ValueError: shapes that do not fit; masks together with ptr.
        NotImplementedError: ptr in a module with add_bias_kv or add_zero_attn.
        """
        if ptr is not None:
            if key_padding_mask is not None or attn_mask is not None or is_causal:
                raise TypeError("ptr must come without masks: packed rows have no padding")
            if not self._fused(query, key, value):
                raise NotImplementedError(
                    "ptr needs a module without add_bias_kv and add_zero_attn, and plain tensors"
                )
            self._check(query, key, value, 2)
            return self._packed(query, key, value, ptr, key_ptr, key_bias), None
        if key_ptr is not None or key_bias is not None:
            raise TypeError("ptr must be given with key_ptr or key_bias, got None")
        if need_weights or is_causal or attn_mask is not None or not self._fused(query, key, value):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        self._check(query, key, value, 2 if query.dim() == 2 else 3)
        out = self._padded(query, key, value, key_padding_mask)
        return out, None

    def __prepare_scriptable__(self) -> MultiheadAttention:
        return scripted.prepared(self, MultiheadAttention, scripted.multihead)

    def _fused(self, *given: Tensor) -> bool:
        nested = any(x.is_nested for x in given)
        return not nested and self.bias_k is None and not self.add_zero_attn

    def _check(self, query: Tensor, key: Tensor, value: Tensor, dim: int) -> None:
        widths = self.embed_dim, self.kdim, self.vdim
        for name, x, width in zip(("query", "key", "value"), (query, key, value), widths):
            wrong = x.dim() != dim or x.shape[-1] != width
            if wrong or (name == "value" and x.shape[:-1] != key.shape[:-1]):
                like = "" if name != "value" else f" and the rows of key, {tuple(key.shape[:-1])}"
                raise ValueError(
                    f"{name} must have {dim} dimensions, the last {width}{like}, "
                    f"got {tuple(x.shape)}"
                )

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ptr: Tensor | Ragged,
        key_ptr: Tensor | Ragged | None,
        key_bias: Tensor | None,
    ) -> Tensor:
        """Of the rows that belong to a set; the others are 0 and reach no weight's gradient."""
        rows, alone = query.shape[0], key is query
        shared = value is key
        query, sets = covered(query, ptr)
        key, keys = (
            (query, None)
            if alone and key_ptr is None
            else covered(key, sets if key_ptr is None else key_ptr)
        )
        value = key if shared else value[: key.shape[0]]
        if key_bias is not None:
            key_bias = key_bias[: key.shape[0]]
        out = self._attend(query, key, value, sets, keys, key_bias)
        return uncovered(out, rows, ptr, sets)

    def _padded(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None
    ) -> Tensor:
        """Every row of the batch as it lies; padded keys get a bias of -inf."""
        first = query.dim() == 2 or self.batch_first
        rows: dict[int, Tensor] = {}
        for x in (query, key, value):
            if id(x) not in rows:  # the same tensor stays the same
                batched = x[None] if x.dim() == 2 else x if first else x.transpose(0, 1)
                rows[id(x)] = batched.flatten(0, 1)
        count = 1 if query.dim() == 2 else query.shape[0 if first else 1]
        size, keys = (x.shape[-2] if first else x.shape[0] for x in (query, key))
        if key.dim() == 3 and key.shape[0 if first else 1] != count:
            raise ValueError(f"key must have the batch size of query, {count}, got {key.shape}")
        bias = None
        if key_padding_mask is not None:
            wanted = (keys,) if query.dim() == 2 else (count, keys)
            bias = _as_bias(key_padding_mask, wanted, query).flatten()
        ptr, key_ptr = (torch.arange(count + 1, device=query.device) * n for n in (size, keys))
        q, k, v = (rows[id(x)] for x in (query, key, value))
        out = self._attend(q, k, v, ptr, None if key is query else key_ptr, bias)
        if query.dim() == 2:
            return out
        out = out.unflatten(0, (count, size))
        return out if first else out.transpose(0, 1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        ptr: Tensor | Ragged,
        key_ptr: Tensor | Ragged | None,
        key_bias: Tensor | None,
    ) -> Tensor:
        q, k, v = (
            x.unflatten(1, (self.num_heads, self.head_dim))
            for x in self._projected(query, key, value)
        )
        dropout = self.dropout if self.training else 0.0
        out = set_attention(
            q, k, v, ptr, key_ptr, key_bias=key_bias, dropout=dropout, backend=self.backend
        )
        return self.out_proj(out.flatten(1))

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif key is value and self.in_proj_bias is not None:
            other = None if key is query else key
            return project(query, other, self.in_proj_weight, self.in_proj_bias, "qkv")
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [linear(*given) for given in zip((query, key, value), weights, biases)]


def _as_bias(mask: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask must be a bool or float tensor, got {got}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"key_padding_mask must have shape {shape}, got {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        return mask if mask.dtype == torch.float32 else mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
