"""More poolings with the signature of ``pooling``: variance, Set2Set, several side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..functional import set_attention
from ..ragged import Ragged
from .arguments import check_rows, covered, module_or_none, number, one_of, positive
from .pooling import MeanPooling, Pooling


class VarPooling(Pooling):
    """Σ_i (x_i - x̄)² / n, channel by channel: the variance over a molecule; 0 without atoms.

    Examples:
        >>> VarPooling()(torch.tensor([[1.0], [3.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[1.0], [0.0]]
    """

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        return _variance(x, ragged, batch).to(x.dtype)


class StdPooling(Pooling):
    """The square root of ``VarPooling``; 0 with derivative 0 where the variance is at most eps.

    eps: default 1e-5, with which the numbers are those of torch_geometric's ``StdAggregation``.

    Examples:
        >>> StdPooling()(torch.tensor([[1.0], [5.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[2.0], [0.0]]
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = number("eps", eps)
        if self.eps <= 0:
            raise ValueError(f"eps must be positive, got {eps}")

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        variance = _variance(x, ragged, batch)
        above = ~(variance <= self.eps)  # NaN stays NaN
        # sqrt has no derivative at 0, and a mask behind it would leave 0 · inf
        return torch.where(above, variance, 1.0).sqrt().where(above, 0.0).to(x.dtype)


def _variance(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """[B, C] in float32 at least, from the distances to the mean: squares would cancel."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = MeanPooling().pool
    centre = torch.cat([mean(wide, ragged, batch), wide.new_zeros(1, x.shape[1])])
    distance = wide - centre.index_select(0, batch)
    # the slope of a square would carry what rows of no molecule hold into their gradient
    distance = distance.masked_fill((batch == ragged.molecules)[:, None], 0.0)
    return mean(distance.square(), ragged, batch)


class Set2Set(torch.nn.Module):
    r"""Attention by a query that an LSTM refines in T steps (Vinyals, Bengio & Kudlur 2016).

    ::

        q_t = LSTM(q*_{t-1}),  r_t = Σ_i softmax_i(x_i · q_t) x_i,  q*_t = [q_t, r_t],  q*_0 = 0

    Numbers and state dict are those of ``torch_geometric.nn.aggr.Set2Set``. Second derivatives
    exist wherever torch's LSTM has them: on the CPU, and on CUDA with
    ``torch.backends.cudnn.flags(enabled=False)``.

    Args: channels: C, width of the rows; the result has 2C. steps: T. layers: of the LSTM.

    Examples:
        >>> Set2Set(8, steps=3)(torch.randn(8, 8), torch.tensor([0, 5, 8])).shape
        torch.Size([2, 16])
    """

    def __init__(self, channels: int, steps: int, *, layers: int = 1) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.steps = positive("steps", steps)
        self.lstm = torch.nn.LSTM(2 * channels, channels, positive("layers", layers))

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, 2C] from x [N, C] and the boundaries [B + 1]."""
        check_rows("x", x, self.channels, next(self.lstm.parameters()))
        return set2set(*covered(x, ptr), self.lstm, self.steps)


def set2set(x: Tensor, ragged: Ragged, lstm: torch.nn.LSTM, steps: int) -> Tensor:
    """[B, 2C] of the rows x [N, C]; lstm maps 2C to C."""
    molecules, channels = ragged.molecules, x.shape[1]
    state = tuple(x.new_zeros(lstm.num_layers, molecules, channels) for _ in range(2))
    one = torch.arange(molecules + 1, device=x.device, dtype=ragged.ptr.dtype)
    rows, out = x.unsqueeze(1), x.new_zeros(molecules, 2 * channels)
    for _ in range(steps):
        found, state = lstm(out.unsqueeze(0), state)
        query = found.view(molecules, 1, channels)
        mean = set_attention(query, rows, rows, one, ragged, scale=1.0)
        out = torch.cat([query, mean], 2).flatten(1)
    return out


class Multi(torch.nn.Module):
    """Several poolings of the same rows, side by side (PNA's and torch_geometric's ``Multi``).

    Args:
        pools: modules ``pool(x, ptr) → [B, C_i]``.
        mode: "concat" [B, Σ C_i], or "sum" or "mean" of results of one width.

    Examples:
        >>> pool = Multi([MeanPooling(), VarPooling()])
        >>> pool(torch.randn(8, 4), torch.tensor([0, 5, 8])).shape
        torch.Size([2, 8])
    """

    def __init__(self, pools: Iterable[torch.nn.Module], mode: str = "concat") -> None:
        super().__init__()
        pools = list(pools)
        for pool in pools:
            module_or_none("pools", pool, required=True)
        if not pools:
            raise ValueError("pools must hold at least 1 pooling, got 0")
        self.pools = torch.nn.ModuleList(pools)
        self.mode = one_of("mode", mode, ("concat", "sum", "mean"))

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, C_out] from x [N, C] and the boundaries [B + 1]."""
        ragged = ptr if isinstance(ptr, Ragged) else Ragged(ptr)  # checked once
        found = [pool(x, ragged) for pool in self.pools]
        if self.mode == "concat":
            return torch.cat(found, 1)
        if len({y.shape for y in found}) > 1:
            widths = ", ".join(str(y.shape[1]) for y in found)
            raise ValueError(f"pools must give one width for mode {self.mode!r}, got {widths}")
        total = torch.stack(found)
        return total.sum(0) if self.mode == "sum" else total.mean(0)


class BatchPooling(torch.nn.Module):
    """A pooling called ``agg(H, batch)``, as chemprop calls its aggregations.

    ``chemprop.models.MPNN(message_passing, BatchPooling(pool), predictor)``: H are the rows [N, C],
    batch [N] the sorted molecule of each. ``hparams`` is what chemprop stores of an aggregation.

    Examples:
        >>> agg = BatchPooling(MeanPooling())
        >>> agg(torch.randn(3, 4), torch.tensor([0, 0, 1])).shape
        torch.Size([2, 4])
    """

    def __init__(self, pool: torch.nn.Module) -> None:
        super().__init__()
        module_or_none("pool", pool, required=True)
        self.pool = pool
        self.hparams = {"cls": type(self), "pool": pool}

    def forward(self, H: Tensor, batch: Tensor) -> Tensor:
        """[B, C_out]; B is the last index + 1."""
        return self.pool(H, Ragged.from_batch(batch))
