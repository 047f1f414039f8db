r"""SchNet by pairs of atoms instead of edges, and forces without second derivatives of networks.

The filter of an edge is that of its reverse, so one row serves both: half of the rows of ``edges``.
A filter is a function of one number, the distance d. ``Filters`` has W(d) and W'(d) side by side,
by the product rule from the Gaussians on; then

::

    ∂E/∂d_p = Σ_layers Σ_f  ∂E/∂W_pf · W'_pf

is what forces need, and a loss of forces goes back to the weights through W and W' alone: distances
and Gaussians are constants, and no network is differentiated twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, softplus

from .graph import lengths

_CACHED = 1 << 16  # numbers of a block of rows: a few such blocks lie in a core's cache


class Pairs(NamedTuple):
    """first, second: [P] int64, each pair of neighbours once. vectors: [P, 3], pos[first] -
    pos[second] (of an image, where the structure repeats)."""

    first: Tensor
    second: Tensor
    vectors: Tensor


class Convolution(NamedTuple):
    """The parts of an interaction of SchNet: x + out(Σ_j into(x)_j ∘ W_ij).

    W = (filter ∘ (softplus - shift) ∘ hidden)(Gaussians of d) · cutoff(d)
    """

    hidden: torch.nn.Linear
    filter: torch.nn.Linear
    shift: float
    into: torch.nn.Module
    out: Callable[[Tensor], Tensor]


def hooked(module: torch.nn.Module) -> bool:
    """Whether somebody looks at the calls of a module, or changes what it gives."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name) for name in names)


def halved(index: Tensor, vectors: Tensor) -> Pairs:
    """One of each edge and its reverse; edges of an atom with its own image come in twos, too."""
    source, target = index
    keep = source < target
    own = source == target
    if bool(own.any()):
        x, y, z = vectors.unbind(1)
        keep = keep | (own & ((x > 0) | ((x == 0) & ((y > 0) | ((y == 0) & (z > 0))))))
    (rows,) = keep.nonzero(as_tuple=True)
    return Pairs(source[rows], target[rows], vectors.index_select(0, rows))


class Radial(NamedTuple):
    """A SchNet by its parts. expansion: Gaussians of distances, ``basis.GaussianSmearing``."""

    embedding: torch.nn.Module
    expansion: Any
    cutoff: float
    convolutions: Sequence[Convolution]
    around: Sequence[torch.nn.Module]  # what is not called, but replaced by what is here

    @property
    def plain(self) -> bool:
        """Whether nobody would miss that modules are not called."""
        inside = (x for layer in self.convolutions for x in (layer.hidden, layer.filter))
        return not any(map(hooked, (self.expansion, *self.around, *inside)))

    def rows(self, z: Tensor, pairs: Pairs) -> Tensor:
        """[N, C], differentiable in everything to any order."""
        distance = lengths(pairs.vectors)
        gaussians, (cut, _) = self.expansion(distance), _cutoffs(distance, self.cutoff)
        filters = []
        for layer in self.convolutions:
            inner = softplus(linear(gaussians, layer.hidden.weight, layer.hidden.bias))
            outer = linear(inner - layer.shift, layer.filter.weight, layer.filter.bias)
            filters.append(outer * cut)
        return self._convolved(z, filters, pairs)

    def with_filters(self, z: Tensor, pairs: Pairs, learning: bool) -> tuple[Tensor, Filters]:
        """The same rows, which know of no positions, and what makes forces of their energies."""
        with torch.no_grad():
            distance = lengths(pairs.vectors)
            gaussians, cut = self.expansion.with_slopes(distance), _cutoffs(distance, self.cutoff)
        made = Filters(self.convolutions, gaussians, cut, pairs, distance, learning)
        return self._convolved(z, made.values, pairs), made

    def _convolved(self, z: Tensor, filters: Sequence[Tensor], pairs: Pairs) -> Tensor:
        x = self.embedding(z)
        for layer, each in zip(self.convolutions, filters):
            x = x + layer.out(PairSum.apply(layer.into(x), each, pairs.first, pairs.second))
        return x


def _cutoffs(distance: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """[P, 1]: (cos(π d / cutoff) + 1) / 2, and its derivative."""
    angle = (distance * (math.pi / cutoff))[:, None]
    return 0.5 * (angle.cos() + 1.0), (-0.5 * math.pi / cutoff) * angle.sin()


class Filters:
    """Filters W [P, F] and their slopes W' [P, F], and the forces that they make.

    gaussians: [2P, G], the expansion of all distances and below it its derivative. cut: the two
    [P, 1] of ``cutoffs``. learning: whether W and W' are to be differentiated in the weights.
    """

    def __init__(
        self,
        convolutions: Sequence[Convolution],
        gaussians: Tensor,
        cut: tuple[Tensor, Tensor],
        pairs: Pairs,
        distance: Tensor,
        learning: bool,
    ) -> None:
        self.pairs = pairs
        self.along = pairs.vectors / distance.masked_fill(distance == 0, math.inf)[:, None]
        self.values: list[Tensor] = []
        self.slopes: list[Tensor] = []
        with torch.set_grad_enabled(learning):
            for layer in convolutions:
                # The bias is that of the function and not of its derivative.
                rows = linear(gaussians, layer.hidden.weight)
                inner = Activation.apply(rows, layer.hidden.bias, layer.shift, *cut)
                value, slope = (
                    # As a product the bias has its gradient without a copy of the rows.
                    linear(x, layer.filter.weight).addmm_(c, layer.filter.bias[None])
                    for x, c in zip(inner, cut)
                )
                self.values.append(value if value.requires_grad else value.requires_grad_())
                self.slopes.append(slope)

    def gradient(self, energy: Tensor, pos: Tensor, create_graph: bool) -> Tensor:
        """[N, 3] in the dtype of pos: of the sum of all energies with respect to positions."""
        found = torch.autograd.grad(
            energy, self.values, create_graph=create_graph, materialize_grads=True
        )
        pull = sum(RowDot.apply(g, slope) for g, slope in zip(found, self.slopes))
        assert isinstance(pull, Tensor)
        each = (pull[:, None] * self.along).to(pos.dtype)
        gradient = torch.zeros_like(pos).index_add(0, self.pairs.first, each)
        return gradient.index_add(0, self.pairs.second, each, alpha=-1)


class PairSum(Function):
    """[N, F]: out_i = Σ_j y_j ∘ W_ij over the pairs of i, W_ij = W_ji.

    It and ``PairProduct`` are each other's derivatives, to any order.
    """

    @staticmethod
    def forward(y: Tensor, each: Tensor, first: Tensor, second: Tensor) -> Tensor:
        out = y.new_zeros(y.shape)
        for w, i, j in _blocks(each, first, second):
            out.index_add_(0, i, y.index_select(0, j).mul_(w))
            out.index_add_(0, j, y.index_select(0, i).mul_(w))
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        y, each, *pairs = ctx.saved_tensors
        dy = PairSum.apply(g, each, *pairs) if ctx.needs_input_grad[0] else None
        dw = PairProduct.apply(g, y, *pairs) if ctx.needs_input_grad[1] else None
        return dy, dw, None, None


class PairProduct(Function):
    """[P, F]: g_i ∘ y_j + g_j ∘ y_i of each pair."""

    @staticmethod
    def forward(g: Tensor, y: Tensor, first: Tensor, second: Tensor) -> Tensor:
        out = y.new_empty(first.shape[0], y.shape[1])
        for to, i, j in _blocks(out, first, second):
            torch.mul(g.index_select(0, i), y.index_select(0, j), out=to)
            to.addcmul_(g.index_select(0, j), y.index_select(0, i))
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, each):
        g, y, *pairs = ctx.saved_tensors
        dg = PairSum.apply(y, each, *pairs) if ctx.needs_input_grad[0] else None
        dy = PairSum.apply(g, each, *pairs) if ctx.needs_input_grad[1] else None
        return dg, dy, None, None


class RowDot(Function):
    """[P]: a_p · b_p."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([(x * y).sum(1) for x, y in _blocks(a, b)])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        g = g[:, None]
        return g * b if ctx.needs_input_grad[0] else None, g * a if ctx.needs_input_grad[
            1
        ] else None


class Activation(Function):
    """[P, F] twice: the first layer of a filter times the cutoff, and its derivative.

    From u [P, F], below which u' is, and the bias b: with a = softplus(u + b) - shift

    ::

        a c      and      sigmoid(u + b) u' c + a c'
    """

    @staticmethod
    def forward(
        u: Tensor, bias: Tensor, shift: float, cut: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        halves = _halves(u)
        y, dy = (torch.empty_like(x) for x in halves)
        for x, dx, to, dto, c, dc in _blocks(*halves, y, dy, cut, slope):
            x = x + bias
            a = softplus(x).sub_(shift)
            torch.mul(a, c, out=to)
            torch.mul(x.sigmoid_().mul_(dx), c, out=dto)
            dto.addcmul_(a, dc)
        return y, dy

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        u, bias, ctx.shift, cut, slope = inputs
        ctx.save_for_backward(u, bias, cut, slope)

    @staticmethod
    def backward(ctx, g, dg):
        u, bias, cut, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, in the weights
            x, dx = _halves(u)
            x = x + bias
            a = softplus(x) - ctx.shift
            out = a * cut, x.sigmoid() * dx * cut + a * slope
            du, dbias = torch.autograd.grad(out, (u, bias), (g, dg), create_graph=True)
            return du, dbias, None, None, None
        du = torch.empty_like(u)
        for x, dx, y, dy, to, dto, c, dc in _blocks(*_halves(u), g, dg, *_halves(du), cut, slope):
            s = (x + bias).sigmoid_()
            t = dy * c
            torch.mul(t, s, out=dto)
            t.mul_(dx)
            t.addcmul_(t, s, value=-1).addcmul_(y, c).addcmul_(dy, dc)
            torch.mul(t, s, out=to)
        return du, du[: len(cut)].sum(0), None, None, None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    count = len(x) // 2  # may be 0, of which ``split`` would make one
    return x[:count], x[count:]


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows: what the operators of a loop read and write stays in the cache of a CPU."""
    rows, width = tensors[0].shape
    size = _CACHED // max(1, width) if tensors[0].device.type == "cpu" else rows
    return zip(*(x.split(max(1, size)) for x in tensors))
