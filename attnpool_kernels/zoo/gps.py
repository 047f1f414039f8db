"""torch_geometric's GPSConv with attention over the rows of each graph as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric.nn
from torch import Tensor
from torch.nn.functional import dropout

from ..nn.arguments import check_rows
from ..nn.multihead import MultiheadAttention
from ..ragged import Ragged


class GPSConv(torch_geometric.nn.GPSConv):
    r"""``torch_geometric.nn.GPSConv`` with the same weights and numbers, unpadded.

    ::

        h   = norm1(x + conv(x)),  g = norm2(x + attention(x) over each graph)
        out = norm3(h + g + mlp(h + g))

    Constructor, state dict and results are those of torch_geometric's class, of which it is one.
    It needs no dense batch, and has second derivatives: torch_geometric's raises where forces are
    trained, this one trains. Dropout on the attention weights has the same distribution, other
    numbers. With ``attn_type="performer"`` it is torch_geometric's in every respect.

    ``attn.backend``: None or the name of a backend, see ``attnpool_kernels.explain``.

    Raises ValueError: ``add_bias_kv`` or ``add_zero_attn`` in ``attn_kwargs``, which no fused
    attention has. Source: Rampášek et al. 2022.

    Examples:
        >>> layer = GPSConv(8, conv=None, heads=4)
        >>> layer(torch.randn(5, 8), None, torch.tensor([0, 0, 1, 1, 1])).shape
        torch.Size([5, 8])
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        attn = self.attn
        if not isinstance(attn, torch.nn.MultiheadAttention):
            return
        self.attn: torch.nn.Module = MultiheadAttention.from_torch(attn)
        if attn.bias_k is not None or attn.add_zero_attn:
            raise ValueError("attn_kwargs must not have add_bias_kv or add_zero_attn, got one")

    def forward(
        self, x: Tensor, edge_index: Any, batch: Tensor | Ragged | None = None, **options: Any
    ) -> Tensor:
        """[N, C] from x [N, C], the edges, and the graph of each row.

        Args:
            edge_index, options: given to ``conv``.
            batch: [N] sorted indices; or a ``Ragged``, which layers can share and which saves
                reading the indices; None: one graph.

        Raises TypeError, ValueError: rows of another width, an unsorted batch, by name.
        """
        ours = isinstance(self.attn, MultiheadAttention)
        index: Any = batch
        if isinstance(batch, Ragged) and (self.norm_with_batch or not ours):
            index = batch.batch(x.shape[0])
        if not ours:
            return super().forward(x, edge_index, index, **options)
        check_rows("x", x, self.channels)
        sets = _sets(x, batch)
        local = None
        if self.conv is not None:  # first, as in torch_geometric, for the sake of the random state
            local = x + self._dropped(self.conv(x, edge_index, **options))
            local = self._normed(self.norm1, local, index)
        attended, _ = self.attn(x, x, x, need_weights=False, ptr=sets)
        out = self._normed(self.norm2, x + self._dropped(attended), index)
        out = out if local is None else local + out
        return self._normed(self.norm3, out + self.mlp(out), index)

    def _dropped(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

    def _normed(self, norm: torch.nn.Module | None, x: Tensor, index: Any) -> Tensor:
        if norm is None:
            return x
        return norm(x, batch=index) if self.norm_with_batch else norm(x)


def _sets(x: Tensor, batch: Tensor | Ragged | None) -> Ragged:
    """The graphs, which must cover the rows."""
    if batch is None:
        return Ragged(torch.tensor([0, x.shape[0]]))
    if isinstance(batch, Ragged):
        if batch.last is not None and batch.last != x.shape[0]:
            raise ValueError(f"batch must end at the {x.shape[0]} rows of x, got {batch.last}")
        return batch
    if isinstance(batch, Tensor) and batch.shape != x.shape[:1]:
        raise ValueError(f"batch must have shape [{x.shape[0]}], got {tuple(batch.shape)}")
    return Ragged.from_batch(batch)
