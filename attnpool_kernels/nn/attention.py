"""Multi-head attention as a layer: projections, the operator, and nothing in between."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..dispatch import check_name
from ..functional import seed_pool, set_attention
from ..ragged import Ragged
from ..weights import attention_weights
from . import scripted
from .arguments import (
    Covered,
    check_rows,
    covered,
    flag,
    number,
    one_of,
    positive,
    probability,
    uncovered,
)
from .projection import add_linear, project

INITS = ("linear", "xavier")
SCALES = ("head", "width")


class SetAttention(torch.nn.Module):
    r"""Attention of every row over the rows of its own molecule, on a concatenated batch.

    ::

        q, k, v = x W_q + b_q, y W_k + b_k, y W_v + b_v      split into ``heads`` chunks of D/heads
        out     = concat_h softmax(scale · q_h k_hᵀ) v_h     per molecule
        out     = out W_o + b_o                              with ``out_projection``

    Args:
        dim: D, the width of the result; a multiple of ``heads``.
        heads: number of heads.
        query_dim, key_dim: widths of x and y, default D. Equal widths share one stacked matrix
            ``in_proj_weight`` (torch's ``MultiheadAttention`` has the same names and shapes);
            else ``q_proj_weight`` and ``kv_proj_weight``.
        out_projection: with W_o.
        scale: "head" (D/heads)**-0.5, "width" D**-0.5 (Set Transformer), or a number.
        dropout: probability on the attention weights, in training only.
        init: "linear" (as ``torch.nn.Linear``) or "xavier" (as ``torch.nn.MultiheadAttention``).
        backend: None or the name of a backend, see ``explain``.

    Raises: TypeError, ValueError: a width, number or option that cannot be, by name.
    Source: Vaswani et al. 2017; Lee et al. 2019 (Set Transformer).

    Examples:
        >>> layer = SetAttention(16, heads=4)
        >>> layer(torch.randn(8, 16), Ragged.from_counts([5, 3])).shape
        torch.Size([8, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        query_dim: int | None = None,
        key_dim: int | None = None,
        out_projection: bool = True,
        scale: str | float = "head",
        dropout: float = 0.0,
        init: str = "linear",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.dim = positive("dim", dim)
        self.heads = positive("heads", heads)
        if dim % heads:
            raise ValueError(f"heads must divide dim = {dim}, got {heads}")
        self.query_dim = positive("query_dim", dim if query_dim is None else query_dim)
        self.key_dim = positive("key_dim", dim if key_dim is None else key_dim)
        known = isinstance(scale, str)
        self.scale = one_of("scale", scale, SCALES) if known else number("scale", scale)
        self.dropout = probability("dropout", dropout)
        if backend is not None:
            check_name(backend)
        self.backend = backend
        self.init = one_of("init", init, INITS)
        if self.query_dim == self.key_dim:
            self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * dim, self.key_dim))
        else:
            self.q_proj_weight = torch.nn.Parameter(torch.empty(dim, self.query_dim))
            self.kv_proj_weight = torch.nn.Parameter(torch.empty(2 * dim, self.key_dim))
        self.in_proj_bias = torch.nn.Parameter(torch.empty(3 * dim))
        out_projection = flag("out_projection", out_projection)
        self.out_proj = torch.nn.Linear(dim, dim) if out_projection else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        row = 0
        for weight in [x for x in self.parameters(recurse=False) if x.dim() == 2]:
            bound = 0.0
            if self.init == "xavier":
                torch.nn.init.xavier_uniform_(weight)
            else:
                torch.nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                bound = weight.shape[1] ** -0.5
            rows = self.in_proj_bias.detach()[row : row + len(weight)]
            torch.nn.init.uniform_(rows, -bound, bound)
            row += len(weight)
        if self.out_proj is not None:
            self.out_proj.reset_parameters()
            if self.init == "xavier":
                torch.nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        x: Tensor,
        ptr: Tensor | Ragged | int | None,
        y: Tensor | None = None,
        y_ptr: Tensor | Ragged | None = None,
        *,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
        residual: str | None = None,
    ) -> Tensor:
        """[N, D] from x [N, query_dim] and its boundaries [B + 1]; y, y_ptr: the keys (default x).

        Rows of no molecule may hold anything, and are 0 in the result.

        Args:
            ptr: or an int, so many rows for each molecule; or None: x [S, query_dim] are seeds that
                all molecules of y share, and the result is [B·S, D].
            bias, key_bias: [P, H] and [N_k, H] added to the logits, see ``set_attention``.
            residual: added to the result: "query", the projected queries, "input", x, or None. The
                blocks ask for it here, so a hook on this module in a block sees the sum.
        """
        check_rows("x", x, self.query_dim, self.in_proj_bias)
        if y is not None:
            check_rows("y", y, self.key_dim, self.in_proj_bias)
        if isinstance(ptr, int):
            _check_size(x.shape[0], ptr)
        if residual not in (None, "query", "input"):
            raise ValueError(f"residual must be 'query', 'input' or None, got {residual!r}")
        queries = residual == "query"
        count, given = x.shape[0], ptr
        x, ptr, y, y_ptr, key_bias = _own(x, ptr, y, y_ptr, key_bias)
        added: dict[str, Any] = {"bias": bias, "key_bias": key_bias}
        q: Tensor | None
        if ptr is None:
            if y is None or y_ptr is None:
                raise TypeError("ptr must be boundaries where y or y_ptr is None, got None")
            q, out = self._attend_seeds(x, y, y_ptr, added)
        elif not isinstance(ptr, int | torch.SymInt):
            q, out = self._attend(x, ptr, y, y_ptr, added)
        elif ptr == 1 and self._is_alone(y, bias, key_bias):
            q, out = self._attend_alone(x, queries)
        else:
            q, out = self._attend(x, equal(x, ptr), y, y_ptr, added)
        out = self._finished(out, None if residual is None else q if queries else x)
        return uncovered(out, count, given, ptr) if isinstance(ptr, Covered) else out

    def _finished(self, out: Tensor, base: Tensor | None) -> Tensor:
        """W_o and the residual, [N, D], or [S, D] for each of the molecules."""
        if base is None:
            return out if self.out_proj is None else self.out_proj(out)
        if self.out_proj is not None:
            return add_linear(base, out, self.out_proj)
        if base.shape[0] == out.shape[0]:
            return out + base
        return (out.view(-1, *base.shape) + base).view(out.shape)

    def weights(
        self,
        x: Tensor,
        ptr: Tensor | Ragged | None,
        y: Tensor | None = None,
        y_ptr: Tensor | Ragged | None = None,
        *,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
        top: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The attention weights of ``forward``, [P, H], or the ``top`` largest of each row.

        Arguments as there (no int for ptr); results as ``attnpool_kernels.attention_weights``.
        Without dropout.
        """
        check_rows("x", x, self.query_dim, self.in_proj_bias)
        if y is not None:
            check_rows("y", y, self.key_dim, self.in_proj_bias)
        x, ptr, y, y_ptr, key_bias = _own(x, ptr, y, y_ptr, key_bias)
        q, k, _ = self._split(*self._projected(x, y))
        options: dict[str, Any] = {"bias": bias, "key_bias": key_bias, "top": top}
        return attention_weights(q, k, ptr, y_ptr, scale=self.factor, **options)

    def _attend(
        self,
        x: Tensor,
        ptr: Tensor | Ragged,
        y: Tensor | None,
        y_ptr: Tensor | Ragged | None,
        added: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """The projected queries [N, D] and the heads' results [N, D], before W_o."""
        q, k, v = self._split(*self._projected(x, y))
        out = set_attention(q, k, v, ptr, y_ptr, **added, **self._options())
        return q.flatten(1), out.flatten(1)

    def _attend_seeds(
        self, seeds: Tensor, y: Tensor, ptr: Tensor | Ragged, added: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The same for seeds [S, query_dim] that all molecules share: q [S, D] and [B·S, D].

        The seeds are projected once, not once a molecule. With few of them W_k goes into the seeds
        and W_v behind the sum, so that nothing is projected atom by atom.
        """
        plain = all(x is None for x in added.values())
        if plain and self._absorbs(seeds.shape[0], y.dtype):
            return self._absorbed(seeds, y, ptr)
        q, k, v = self._split(*self._projected(seeds, y))
        out = seed_pool(q, k, v, ptr, **added, **self._options())
        return q.flatten(1), out.view(-1, self.dim)

    def _absorbs(self, seeds: int, dtype: torch.dtype) -> bool:
        # The products with the seeds grow by the number of heads and are slower than a projection,
        # by less than the 8 here; kernels have widths up to 256; halves keep the usual rounding.
        few = 8 * seeds * self.heads <= self.dim and self.key_dim <= 256
        return few and dtype.itemsize >= 4 and not (self.training and self.dropout > 0)

    def _absorbed(self, seeds: Tensor, y: Tensor, ptr: Tensor | Ragged) -> tuple[Tensor, Tensor]:
        """q·(W_k y + b_k) = (W_kᵀ q)·y + const and Σ p (W_v y + b_v) = W_v Σ p y + b_v.

        Every head of every seed is a seed of its own over the rows y themselves.
        """
        if self.query_dim == self.key_dim:
            w_q, w_k, w_v = self.in_proj_weight.chunk(3)
        else:
            w_q, (w_k, w_v) = self.q_proj_weight, self.kv_proj_weight.chunk(2)
        b_q, _, b_v = self.in_proj_bias.chunk(3)
        heads = (self.heads, -1)
        q = linear(seeds, w_q, b_q)
        over_y = torch.einsum("shd,hdc->shc", q.unflatten(1, heads), w_k.unflatten(0, heads))
        rows = y.unsqueeze(1)
        sums = seed_pool(over_y.flatten(0, 1).unsqueeze(1), rows, rows, ptr, **self._options())
        sums = sums.view(-1, self.heads, y.shape[1])  # of [B, S·H, 1, C]
        out = torch.einsum("nhc,hdc->nhd", sums, w_v.unflatten(0, heads)).flatten(1)
        atoms = (ptr.ptr if isinstance(ptr, Ragged) else ptr).diff().to(out.device)
        some = (atoms > 0).to(out.dtype).repeat_interleave(seeds.shape[0])
        return q, out + some[:, None] * b_v  # without atoms the attention is 0, not b_v

    def _is_alone(self, *given: Tensor | None) -> bool:
        """Whether a molecule's one row has nothing to attend to but itself."""
        return all(x is None for x in given) and not (self.training and self.dropout > 0)

    def _attend_alone(self, x: Tensor, need_queries: bool) -> tuple[Tensor | None, Tensor]:
        """The same for molecules of exactly one row, whose softmax is 1: the result is v.

        Not for training with dropout, which may drop that one weight, or a bias, which may be -inf.
        """
        if self.query_dim != self.key_dim:
            raise ValueError(f"y must be rows of width {self.key_dim}, got None")
        if need_queries:
            q, v = project(x, None, self.in_proj_weight, self.in_proj_bias, "qv")
            return q, v
        return None, project(x, None, self.in_proj_weight, self.in_proj_bias, "v")[0]

    def _projected(self, x: Tensor, y: Tensor | None) -> list[Tensor]:
        if self.query_dim == self.key_dim:
            return project(x, y, self.in_proj_weight, self.in_proj_bias, "qkv")
        q = linear(x, self.q_proj_weight, self.in_proj_bias[: self.dim])
        kv = linear(x if y is None else y, self.kv_proj_weight, self.in_proj_bias[self.dim :])
        return [q, *kv.unflatten(1, (2, self.dim)).unbind(1)]

    def _split(self, *parts: Tensor) -> list[Tensor]:
        return [x.unflatten(1, (self.heads, -1)) for x in parts]

    @property
    def factor(self) -> float:
        """Of the logits."""
        if isinstance(self.scale, str):
            return (self.dim // self.heads if self.scale == "head" else self.dim) ** -0.5
        return self.scale

    def _options(self) -> dict:
        dropout = self.dropout if self.training else 0.0
        return {"scale": self.factor, "dropout": dropout, "backend": self.backend}

    def __prepare_scriptable__(self) -> SetAttention:
        return scripted.prepared(self, SetAttention, scripted.attention_layer)

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, scale={self.scale!r}, dropout={self.dropout}"


def _check_size(rows: int, size: int) -> None:
    """TypeError, ValueError where molecules of ``size`` rows cannot share the rows out."""
    if isinstance(size, bool):
        raise TypeError("ptr must be boundaries or an int, got bool")
    if size < 1:
        raise ValueError(f"ptr must be at least 1 row for each molecule, got {size}")
    if type(rows) is int and not torch.compiler.is_compiling() and rows % size:
        raise ValueError(f"ptr must divide the number of rows, {rows}, got {size}")


def _own(
    x: Tensor, ptr: Any, y: Tensor | None, y_ptr: Any, key_bias: Tensor | None
) -> tuple[Tensor, Any, Tensor | None, Any, Tensor | None]:
    """The arguments without the rows of no molecule, which may hold anything."""
    bounds = Tensor | Ragged
    if y is None and y_ptr is not None and ptr is not None:
        y = x  # its rows as keys may be others than as queries
    sets = ptr if y_ptr is None else y_ptr
    if y is not None and isinstance(sets, bounds):
        y, sets = covered(y, sets, "ptr" if y_ptr is None else "y_ptr")
        y_ptr = None if y_ptr is None else sets
    if isinstance(ptr, bounds):
        x, ptr = covered(x, ptr)
    if isinstance(key_bias, Tensor) and key_bias.dim():
        keys = x if y is None else y
        key_bias = key_bias[: keys.shape[0]]
    return x, ptr, y, y_ptr, key_bias


def equal(x: Tensor, size: int) -> Tensor:
    """Boundaries of molecules of ``size`` rows each."""
    return torch.arange(0, x.shape[0] + 1, size, device=x.device)
