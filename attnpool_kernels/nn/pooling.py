"""Poolings with one signature: (x [N, C], ptr [B + 1] or Ragged) → [B, C_out].

Molecules without atoms give 0 in the simple poolings. Sums over a molecule are differentiable to
every order; their backward is a gather, and no row of one molecule reaches another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..ragged import Ragged
from . import scripted
from .arguments import check_rows, covered, number, one_of, positive, widths_of
from .blocks import ACTIVATIONS, PMA, activate

TOGETHER = (64, 64**2)  # rows of a molecule that are summed first


def segment_sum(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """[B, C] sums of the rows x [N, C] of each molecule; batch = ``ragged.batch(N)``."""
    return _sums(x, ragged, batch)[:-1].to(x.dtype)


def _sums(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """[B + 1, C] sums, in float32 at least; the last line is for the rows of no molecule.

    Groups of rows of a molecule are added up first, counted from its own first row, then groups of
    such sums: a running float32 sum of 10^6 equal rows is 1 % off.
    """
    total = x.to(torch.promote_types(x.dtype, torch.float32))
    molecules, ptr = ragged.ptr.shape[0], ragged.ptr.long()
    start, row = ptr.index_select(0, batch), torch.arange(x.shape[0], device=x.device)
    steps = [(start // n + batch + (row - start) // n, x.shape[0] // n) for n in TOGETHER]
    place = row  # where in total the sum is that has a row
    for group, most in [*steps, (batch, -1)]:
        into = torch.zeros_like(total[:, 0], dtype=torch.long).scatter(0, place, group)
        total = total.new_zeros(most + molecules + 1, x.shape[1]).index_add(0, into, total)
        place = group
    return total


def segment_max(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """[B, C] largest rows; the gradient goes to the first of equal ones; 0 without atoms."""
    return _select(x, _first_largest(x.detach(), ragged, batch)[:-1])


def segment_softmax(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """[N, C] softmax over the rows of each molecule, channel by channel."""
    x = x.masked_fill(
        (batch == ragged.ptr.shape[0] - 1)[:, None], 0.0
    )  # whatever rows of no molecule hold
    top = _select(x.detach(), _first_largest(x.detach(), ragged, batch))
    e = (x - top.index_select(0, batch)).exp()
    total = _sums(e, ragged, batch)
    return (e / total.index_select(0, batch)).to(x.dtype)


def _first_largest(x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
    """Row of the first largest element (or NaN) in each molecule, N where there is none.

    [B + 1, C]: the last line is for the rows of no molecule.
    """
    rows, shape = x.shape[0], (ragged.ptr.shape[0], x.shape[1])
    index = batch[:, None].expand_as(x)
    top = x.new_full(shape, -torch.inf).scatter_reduce_(0, index, x, "amax")
    row = torch.arange(rows, device=x.device)[:, None]
    row = torch.where((x == top.index_select(0, batch)) | x.isnan(), row, rows)
    return row.new_full(shape, rows).scatter_reduce_(0, index, row, "amin")


def _select(x: Tensor, row: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1, x.shape[1])]).gather(0, row)


class Pooling(torch.nn.Module):
    """Checks the arguments and makes the molecule index, which all simple poolings need."""

    channels: int | None = None

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, C_out] from x [N, C] and the boundaries [B + 1]."""
        return self.pool(*self.located(x, ptr))

    def located(self, x: Tensor, ptr: Tensor | Ragged) -> tuple[Tensor, Ragged, Tensor]:
        """The rows, the molecules on their device, and the molecule of each row."""
        # A quantised layer's integers say nothing about the dtype of the rows.
        like = next((p for p in self.parameters() if p.is_floating_point()), None)
        check_rows("x", x, self.channels, like)
        x, ragged = covered(x, ptr)
        if ragged.ptr.device != x.device:
            ragged = ragged.to(x.device)
        return x, ragged, ragged.batch(x.shape[0])

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        raise NotImplementedError


class SumPooling(Pooling):
    """Σ_i x_i.

    Examples:
        >>> SumPooling()(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[3.0], [5.0]]
    """

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        return segment_sum(x, ragged, batch)


class MeanPooling(Pooling):
    """Σ_i x_i / n.

    Examples:
        >>> MeanPooling()(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[1.5], [5.0]]
    """

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        sums = _sums(x, ragged, batch)[:-1]  # may leave the range of a half type, the mean does not
        counts = ragged.counts().clamp(min=1)
        return (sums / counts[:, None].to(sums.dtype)).to(x.dtype)


class MaxPooling(Pooling):
    """max_i x_i, channel by channel; the gradient goes to the first of equal elements.

    Examples:
        >>> MaxPooling()(torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[2.0], [5.0]]
    """

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        return segment_max(x, ragged, batch)


class SoftmaxPooling(Pooling):
    """Σ_i x_i softmax_i(x), channel by channel (Buterez et al. 2023, OE62 baselines).

    Examples:
        >>> SoftmaxPooling()(torch.tensor([[2.0], [2.0], [5.0]]), torch.tensor([0, 2, 3])).tolist()
        [[2.0], [5.0]]
    """

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        return segment_sum(x * segment_softmax(x, ragged, batch), ragged, batch)


class AttentionalPooling(Pooling):
    """Σ_i softmax_i(gate(x)) · transform(x_i): gated pooling (Li et al. 2016, GGNN).

    Args:
        channels: C.
        out_features: width of transform(x) = x W + b; None: x itself.
        hidden: width of the gate's hidden layer; None: gate(x) = x w + b.
        activation: of the gate's hidden layer.

    Examples:
        >>> pool = AttentionalPooling(8, 4, hidden=16)
        >>> pool(torch.randn(8, 8), Ragged.from_counts([5, 3])).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        channels: int,
        out_features: int | None = None,
        *,
        hidden: int | None = None,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        widths = (channels, 1) if hidden is None else (channels, positive("hidden", hidden), 1)
        self.gate = Perceptron(widths, activation)
        self.transform = None
        if out_features is not None:
            self.transform = torch.nn.Linear(channels, positive("out_features", out_features))

    def pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> Tensor:
        weights = segment_softmax(self.gate(x), ragged, batch)
        values = x if self.transform is None else self.transform(x)
        return segment_sum(weights * values, ragged, batch)


class Perceptron(torch.nn.Sequential):
    """Linear layers of the given widths with an activation between them.

    Examples:
        >>> Perceptron((8, 16, 1), "silu")(torch.randn(5, 8)).shape
        torch.Size([5, 1])
    """

    def __init__(self, widths: Sequence[int], activation: str) -> None:
        if len(widths_of("widths", widths)) < 2:
            raise ValueError(f"widths must hold at least 2 widths, got {len(widths)}")
        super().__init__(*(torch.nn.Linear(a, b) for a, b in pairwise(widths)))
        self.activation = one_of("activation", activation, ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self):
            x = layer(x) if i == 0 else layer(activate(self.activation, x))
        return x


class WeightedAverage(Pooling):
    r"""Average of atom predictions with learned weights (WA of Chen et al. and Buterez et al.).

    ::

        y = Σ_i a_i (std · f(x_i) + mean),   a = softmax over the molecule's atoms of g(x_i)

    f and g are separate networks of widths ``channels, *hidden, out_features`` and
    ``channels, *hidden, 1``. Without atoms y = 0.

    Args:
        channels: C.
        out_features: width of y.
        hidden: widths of the hidden layers; the original has 64, 32, 16 for C = 128.
        mean, std: of the target over the training set, in its units.
        activation: of both networks.

    Examples:
        >>> y, a = WeightedAverage(8).with_weights(torch.randn(8, 8), torch.tensor([0, 5, 8]))
        >>> y.shape, torch.allclose(a[:5].sum(), torch.tensor(1.0))
        (torch.Size([2, 1]), True)
    """

    def __init__(
        self,
        channels: int,
        out_features: int = 1,
        *,
        hidden: tuple[int, ...] = (64, 32, 16),
        mean: float = 0.0,
        std: float = 1.0,
        activation: str = "shifted_softplus",
    ) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        hidden = widths_of("hidden", hidden)
        self.value = Perceptron(
            (channels, *hidden, positive("out_features", out_features)), activation
        )
        self.gate = Perceptron((channels, *hidden, 1), activation)
        self.mean, self.std = number("mean", mean), number("std", std)
        if self.std <= 0:
            raise ValueError(f"std must be positive, got {std}")

    def forward(  # type: ignore[override]
        self, x: Tensor, ptr: Tensor | Ragged, weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, C_out] from x [N, C] and the boundaries [B + 1]; or as ``with_weights``."""
        found = self._pool(*self.located(x, ptr))
        return found if weights else found[0]

    def with_weights(self, x: Tensor, ptr: Tensor | Ragged) -> tuple[Tensor, Tensor]:
        """y [B, C_out] and the weights a [N] of the atoms."""
        return self(x, ptr, weights=True)

    def _pool(self, x: Tensor, ragged: Ragged, batch: Tensor) -> tuple[Tensor, Tensor]:
        weights = segment_softmax(self.gate(x), ragged, batch)
        values = self.value(x) * self.std + self.mean
        return segment_sum(weights * values, ragged, batch), weights.squeeze(1)


class OrbitalWeightedAverage(WeightedAverage):
    """WA whose weights are trained towards orbital coefficients (OWA).

    Examples:
        >>> pool, x, ptr = OrbitalWeightedAverage(8), torch.randn(8, 8), torch.tensor([0, 5, 8])
        >>> pool.loss(x, ptr, torch.zeros(2, 1), torch.full((8,), 0.25)).shape
        torch.Size([])
    """

    def loss(
        self,
        x: Tensor,
        ptr: Tensor | Ragged,
        target: Tensor,
        coefficients: Tensor,
        *,
        factor: float = 0.1,
    ) -> Tensor:
        """factor · mean (y - target)² + mean (a - coefficients)².

        target: [B, C_out]; coefficients: [N], the share of each atom in the orbital. The second
        mean is over atoms; the original averaged over its padding too, so that the weight of the
        coefficients there depends on the largest molecule of the batch.
        """
        factor = number("factor", factor)
        y, weights = self.with_weights(x, ptr)
        for name, given, made in (("target", target, y), ("coefficients", coefficients, weights)):
            if given.shape != made.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(made.shape)}, got {tuple(given.shape)}"
                )
        return factor * mse_loss(y, target) + mse_loss(weights, coefficients)


class SeedPooling(torch.nn.Module):
    """PMA alone: ``seeds`` learned queries attend to the atoms, then their mean or concatenation.

    Args: ``channels`` C; ``out_features``: width of a seed's result, default C (with
    residual="input" the seeds have that width); ``reduce``: "mean" [B, out_features] or "concat"
    [B, seeds·out_features]; options of ``PMA`` and ``MAB``.

    Examples:
        >>> pool = SeedPooling(8, 16, seeds=3, heads=4, reduce="concat")
        >>> pool(torch.randn(8, 8), torch.tensor([0, 5, 8])).shape
        torch.Size([2, 48])
    """

    def __init__(
        self,
        channels: int,
        out_features: int | None = None,
        *,
        seeds: int = 1,
        heads: int = 1,
        reduce: str = "mean",
        **options,
    ) -> None:
        super().__init__()
        self.reduce = one_of("reduce", reduce, ("mean", "concat"))
        self.channels = positive("channels", channels)
        dim = channels if out_features is None else positive("out_features", out_features)
        self.pma = PMA(dim, seeds, heads, in_dim=channels, **options)

    def __prepare_scriptable__(self) -> SeedPooling:
        return scripted.prepared(self, SeedPooling, scripted.seed_pooling)

    def forward(self, x: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, C_out] from x [N, C] and the boundaries [B + 1]."""
        check_rows("x", x, self.channels)
        out = self.pma(*covered(x, ptr))
        return out.mean(1) if self.reduce == "mean" else out.flatten(1)
