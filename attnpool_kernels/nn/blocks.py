r"""The blocks of the Set Transformer on concatenated batches, with its variants as options.

::

    MAB(x, y): a = attention of x over y;  h = LN(r + [W_o] a);  LN(h + act(h W + b))
               r = the projected queries ("query") or x itself ("input")
    SAB(x)  = MAB(x, x)      ISAB(x) = MAB(x, MAB(I, x))      PMA(x) = MAB(S, [relu(x W + b)])
    SetTransformer(x) = head(SAB^d(PMA(SAB^e(x))))

The published variants are three settings of the same blocks, ``ORIGINAL`` (the defaults), ``PAPER``
and ``PYG``: keyword arguments of ``SetTransformer`` and ``AttentionPooling``. Sources: Lee et al.
2019 (arXiv 1810.00825) and its code; Buterez et al. 2023; torch_geometric's aggregation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu, softplus
from torch.utils.checkpoint import checkpoint

from ..ragged import Ragged
from ..tracing import watched
from . import scripted
from .arguments import check_rows, covered, flag, integer, one_of, positive
from .attention import SetAttention, equal
from .projection import add_relu_linear, bare, relu_linear

RESIDUALS = ("query", "input")
ACTIVATIONS = ("relu", "silu", "gelu", "shifted_softplus")
REDUCTIONS = ("mean", "concat", "none")

ORIGINAL: dict[str, Any] = {
    "scale": "width",
    "residual": "query",
    "out_projection": False,
    "activation": "relu",
    "norm": False,
    "pre_linear": False,
    "init": "linear",
}
PAPER: dict[str, Any] = {
    "scale": "width",
    "residual": "input",
    "out_projection": True,
    "activation": "relu",
    "norm": True,
    "pre_linear": True,
    "init": "linear",
}
PYG: dict[str, Any] = {
    "scale": "head",
    "residual": "input",
    "out_projection": True,
    "activation": "relu",
    "norm": False,
    "pre_linear": True,
    "init": "xavier",
}


def activate(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return x.relu()
    if name == "silu":
        return silu(x)
    if name == "gelu":
        return gelu(x)
    return softplus(x) - 0.6931471805599453  # log 2


class MAB(torch.nn.Module):
    r"""Multi-head attention block: attention of x over y, residual, row-wise layer, residual.

    Args:
        dim: D, the width of the result.
        heads: number of heads; divides D.
        query_dim, key_dim: widths of x and y, default D.
        scale: factor of the logits: "width" D**-0.5, "head" (D/heads)**-0.5, or a number.
        residual: added to the attention: "query", the projected queries, or "input", x itself
            (its width must be D).
        out_projection: with a linear layer after merging the heads.
        activation: of the row-wise layer: "relu", "silu" (swish), "gelu", "shifted_softplus".
        norm: with a LayerNorm after each of the two residuals.
        dropout: on the attention weights, in training.
        init: "linear" or "xavier", see ``SetAttention``.
        backend: None or the name of a backend.
        recompute: keep the inputs of the block for its derivatives, not what lies between, which is
            computed again when a derivative needs it: the same bits, less memory, more time. It has
            no part where something else looks at the call: torch.compile, which decides by itself,
            tracers and TorchScript.

    Examples:
        >>> x, y = torch.randn(4, 16), torch.randn(8, 16)
        >>> block = MAB(16, heads=4)
        >>> block(x, torch.tensor([0, 2, 4]), y, torch.tensor([0, 5, 8])).shape
        torch.Size([4, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        query_dim: int | None = None,
        key_dim: int | None = None,
        scale: str | float = "width",
        residual: str = "query",
        out_projection: bool = False,
        activation: str = "relu",
        norm: bool = False,
        dropout: float = 0.0,
        init: str = "linear",
        backend: str | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = flag("recompute", recompute)
        self.residual = one_of("residual", residual, RESIDUALS)
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.attn = SetAttention(
            dim,
            heads,
            query_dim=query_dim,
            key_dim=key_dim,
            out_projection=out_projection,
            scale=scale,
            dropout=dropout,
            init=init,
            backend=backend,
        )
        if residual == "input" and self.attn.query_dim != dim:
            raise ValueError(
                f"residual='input' needs query_dim = dim = {dim}, got {self.attn.query_dim}"
            )
        self.lin = torch.nn.Linear(dim, dim)
        self.layer_norm1 = torch.nn.LayerNorm(dim) if flag("norm", norm) else None
        self.layer_norm2 = torch.nn.LayerNorm(dim) if norm else None

    def reset_parameters(self) -> None:
        for child in (self.attn, self.lin, self.layer_norm1, self.layer_norm2):
            if child is not None:
                child.reset_parameters()

    def forward(
        self,
        x: Tensor,
        ptr: Tensor | Ragged | int | None,
        y: Tensor | None = None,
        y_ptr: Tensor | Ragged | None = None,
        *,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """[N, D] from x [N, query_dim] and its boundaries [B + 1]; y, y_ptr: the keys (default x).

        ptr may be an int or None as in ``SetAttention``. bias, key_bias: [P, H] and [N_k, H] added
        to the logits. A row without keys attends to nothing: its attention is 0.
        """
        rows = x, ptr, y, y_ptr, bias, key_bias
        if self.recompute and torch.is_grad_enabled() and not watched():
            return checkpoint(self._block, *rows, use_reentrant=False)
        return self._block(*rows)

    def _block(
        self,
        x: Tensor,
        ptr: Tensor | Ragged | int | None,
        y: Tensor | None,
        y_ptr: Tensor | Ragged | None,
        bias: Tensor | None,
        key_bias: Tensor | None,
    ) -> Tensor:
        h = self.attn(x, ptr, y, y_ptr, bias=bias, key_bias=key_bias, residual=self.residual)
        if self.layer_norm1 is not None:
            h = self.layer_norm1(h)
        if self.activation == "relu":
            h = add_relu_linear(h, self.lin)
        else:
            h = h + activate(self.activation, self.lin(h))
        return h if self.layer_norm2 is None else self.layer_norm2(h)

    def __prepare_scriptable__(self) -> MAB:
        return scripted.prepared(self, MAB, scripted.mab)

    def extra_repr(self) -> str:
        return f"residual={self.residual!r}, activation={self.activation!r}"


class SAB(torch.nn.Module):
    """Set attention block, MAB(x, x). ``in_dim``: width of x, default ``dim``; options of MAB.

    Examples:
        >>> SAB(16, heads=4, in_dim=8)(torch.randn(8, 8), torch.tensor([0, 5, 8])).shape
        torch.Size([8, 16])
    """

    def __init__(self, dim: int, heads: int = 1, *, in_dim: int | None = None, **options) -> None:
        super().__init__()
        in_dim = dim if in_dim is None else positive("in_dim", in_dim)
        self.mab = MAB(dim, heads, query_dim=in_dim, key_dim=in_dim, **options)

    def __prepare_scriptable__(self) -> SAB:
        return scripted.prepared(self, SAB, scripted.sab)

    def reset_parameters(self) -> None:
        self.mab.reset_parameters()

    def forward(
        self,
        x: Tensor,
        ptr: Tensor | Ragged | int,
        *,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """[N, D] from x [N, in_dim] and boundaries [B + 1]; an int: so many rows per molecule."""
        return self.mab(x, ptr, bias=bias, key_bias=key_bias)


class ISAB(torch.nn.Module):
    """Set attention through m learned points, MAB(x, MAB(I, x)): cost m·n instead of n².

    Args: ``points`` m; ``in_dim``: width of x, default ``dim``; options of MAB.

    Examples:
        >>> ISAB(16, points=2, heads=4)(torch.randn(8, 16), torch.tensor([0, 5, 8])).shape
        torch.Size([8, 16])
    """

    def __init__(
        self, dim: int, points: int, heads: int = 1, *, in_dim: int | None = None, **options
    ) -> None:
        super().__init__()
        in_dim = dim if in_dim is None else positive("in_dim", in_dim)
        size = positive("points", points), positive("dim", dim)
        self.in_dim = in_dim
        self.ind = torch.nn.Parameter(torch.empty(size))
        self.mab1 = MAB(dim, heads, query_dim=dim, key_dim=in_dim, **options)
        self.mab2 = MAB(dim, heads, query_dim=in_dim, key_dim=dim, **options)
        torch.nn.init.xavier_uniform_(self.ind)

    def __prepare_scriptable__(self) -> ISAB:
        return scripted.prepared(self, ISAB, scripted.isab)

    def reset_parameters(self) -> None:
        torch.nn.init.xavier_uniform_(self.ind)
        self.mab1.reset_parameters()
        self.mab2.reset_parameters()

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[N, D] from x [N, in_dim] and the boundaries [B + 1]."""
        check_rows("x", x, self.in_dim, self.ind)
        h = self.mab1(self.ind, None, x, ptr)
        return self.mab2(x, ptr, h, equal(h, self.ind.shape[0]))


class PMA(torch.nn.Module):
    """Pooling by multi-head attention: ``seeds`` learned queries attend to the rows of a molecule.

    Args: ``in_dim``: width of x, default ``dim``; ``pre_linear``: relu(x W + b) before the
    attention; options of MAB.

    Examples:
        >>> PMA(16, seeds=3, heads=4)(torch.randn(8, 16), torch.tensor([0, 5, 8])).shape
        torch.Size([2, 3, 16])
    """

    def __init__(
        self,
        dim: int,
        seeds: int = 1,
        heads: int = 1,
        *,
        in_dim: int | None = None,
        pre_linear: bool = False,
        **options,
    ) -> None:
        super().__init__()
        dim, seeds = positive("dim", dim), positive("seeds", seeds)
        in_dim = dim if in_dim is None else positive("in_dim", in_dim)
        self.in_dim = in_dim
        self.lin = torch.nn.Linear(in_dim, in_dim) if flag("pre_linear", pre_linear) else None
        self.mab = MAB(dim, heads, query_dim=dim, key_dim=in_dim, **options)
        self.seed = torch.nn.Parameter(torch.empty(1, seeds, dim))
        torch.nn.init.xavier_uniform_(self.seed)

    def __prepare_scriptable__(self) -> PMA:
        return scripted.prepared(self, PMA, scripted.pma)

    def reset_parameters(self) -> None:
        if self.lin is not None:
            self.lin.reset_parameters()
        torch.nn.init.xavier_uniform_(self.seed)
        self.mab.reset_parameters()

    def forward(
        self,
        x: Tensor,
        ptr: Tensor | Ragged,
        *,
        bias: Tensor | None = None,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] from x [N, in_dim] and the boundaries [B + 1]."""
        check_rows("x", x, self.in_dim, self.seed)
        x, sets = covered(x, ptr)
        if isinstance(key_bias, Tensor) and key_bias.dim():
            key_bias = key_bias[: x.shape[0]]
        out = self.mab(self.seed[0], None, self._rows(x), sets, bias=bias, key_bias=key_bias)
        return out.view(-1, *self.seed.shape[1:])

    def _rows(self, x: Tensor) -> Tensor:
        return x if self.lin is None else relu_linear(x, self.lin)

    def weights(
        self, x: Tensor, ptr: Tensor | Ragged, top: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the seeds look at: [P, H], by molecule, then seed, then row; or the ``top`` largest,
        (weights, rows) [B, S, H, top]. See ``attnpool_kernels.attention_weights``.
        """
        check_rows("x", x, self.in_dim, self.seed)
        x, sets = covered(x, ptr)
        return self.mab.attn.weights(self.seed[0], None, self._rows(x), sets, top=top)


class SetTransformer(torch.nn.Module):
    """Encoder of set attention blocks, pooling to S seeds, decoder over the seeds, linear head.

    ::

        SAB^e or ISAB^e  →  PMA  →  SAB^d over the S rows of each molecule  →  Linear  →  reduction

    Args:
        in_features: C, width of x.
        hidden: D, width of the blocks.
        out_features: width of the head, a linear layer on each seed; None: no head.
        heads: number of heads of all blocks; divides D.
        seeds: S.
        encoder_blocks, decoder_blocks: number of blocks, may be 0. The first block (or PMA) maps
            C to D; with residual="input" the encoder needs C = D.
        points: None for SABs in the encoder, else the number of induced points of ISABs.
        reduce: of the seeds: "mean" [B, C_out], "concat" [B, S·C_out], "none" [B, S, C_out].
        options: of ``MAB``, and ``pre_linear`` of ``PMA``; ``ORIGINAL`` (the defaults), ``PAPER``
            or ``PYG`` hold all of them.

    Examples:
        >>> model = SetTransformer(16, 16, 1, heads=4, seeds=2, reduce="mean", **PYG)
        >>> model(torch.randn(8, 16), torch.tensor([0, 5, 8])).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int | None = None,
        *,
        heads: int = 1,
        seeds: int = 1,
        encoder_blocks: int = 2,
        decoder_blocks: int = 1,
        points: int | None = None,
        reduce: str = "none",
        **options,
    ) -> None:
        super().__init__()
        self.in_features = positive("in_features", in_features)
        positive("hidden", hidden)
        integer("encoder_blocks", encoder_blocks, 0)
        integer("decoder_blocks", decoder_blocks, 0)
        if points is not None:
            positive("points", points)
        self.reduce = one_of("reduce", reduce, REDUCTIONS)
        widths = [in_features] + [hidden] * encoder_blocks
        block = dict(options)
        block.pop("pre_linear", None)
        self.encoders = torch.nn.ModuleList(
            SAB(hidden, heads, in_dim=width, **block)
            if points is None
            else ISAB(hidden, points, heads, in_dim=width, **block)
            for width in widths[:-1]
        )
        self.pma = PMA(hidden, seeds, heads, in_dim=widths[-1], **options)
        self.decoders = torch.nn.ModuleList(
            SAB(hidden, heads, **block) for _ in range(decoder_blocks)
        )
        self.head = None
        if out_features is not None:
            self.head = torch.nn.Linear(hidden, positive("out_features", out_features))

    def __prepare_scriptable__(self) -> SetTransformer:
        return scripted.prepared(self, SetTransformer, scripted.set_transformer)

    def reset_parameters(self) -> None:
        for block in (*self.encoders, self.pma, *self.decoders):
            block.reset_parameters()  # type: ignore[operator]
        if self.head is not None:
            self.head.reset_parameters()

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, C_out], [B, S·C_out] or [B, S, C_out] from x [N, C] and the boundaries [B + 1]."""
        check_rows("x", x, self.in_features)
        x, ragged = covered(x, ptr)
        for block in self.encoders:
            x = block(x, ragged)
        return reduced(decoded(self.pma(x, ragged), self.decoders), self.head, self.reduce)

    def weights(
        self, x: Tensor, ptr: Tensor | Ragged, top: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the seeds look at among the encoder's rows; see ``PMA.weights``."""
        check_rows("x", x, self.in_features)
        x, ragged = covered(x, ptr)
        for block in self.encoders:
            x = block(x, ragged)
        return self.pma.weights(x, ragged, top)


def decoded(x: Tensor, decoders: torch.nn.ModuleList) -> Tensor:
    """Blocks over the S rows of each molecule, x [B, S, D] → [B, S, D]."""
    shape, rows = x.shape, x.flatten(0, 1)
    for block in decoders:
        rows = block(rows, shape[1])
    return rows.view(-1, *shape[1:])


def reduced(x: Tensor, head: torch.nn.Module | None, reduce: str) -> Tensor:
    """Head and reduction of the seeds. A mean is taken before a head that is linear."""
    if head is None:
        x = x.mean(1) if reduce == "mean" else x
    elif reduce == "mean":
        x = head(x.mean(1)) if bare(head) else head(x).mean(1)
    else:
        x = head(x)
    return x.flatten(1) if reduce == "concat" else x
