r"""Edge-set attention: attention over the edges (or atoms) of a graph, masked by who is adjacent.

::

    A(x)     = a + mish(a W_o + b_o),  a = multi-head attention of x over itself, or over x in M
    M, S     : pre-norm   n = LN(x);  h = n + A(n);   h + MLP(LN(h))
               post-norm  h = LN(x + A(x));           LN(h + MLP(h))
    P        : k learned seeds attend to LN(x) (pre) or x (post); then the same row-wise half
    ESA(x)   = mish(mean over seeds of S*(P(x + [M S]*(x))) W + b)

In M row i attends to the rows adjacent to it, in S and P to all rows of its graph. Source: Buterez
et al. 2025 (Nat. Commun., arXiv 2402.10793), from its formulas and its program. Three things that
the program does are not done here: with ``xformers_or_torch_attn="torch"`` its mask is inverted, so
that M attends to the rows that are not adjacent; its S and P have no mask for the padding, so that
results depend on the padded length; and rows without an adjacent one average over all of the padded
batch, where here their attention is 0. Its dropout of residuals, on in evaluation too, and the
rescaling of post-norm residuals by admin_torch are left out.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import mish, silu

from ..ragged import Ragged
from .arguments import check_rows, covered, integer, one_of, positive, uncovered
from .attention import SetAttention, equal

NORMS = ("pre", "post")
MLPS = ("none", "small", "gated")
SETS = ("edges", "atoms")


def edge_sets(edge_index: Tensor, ptr: Tensor | Ragged, of: str = "edges") -> tuple[Ragged, Tensor]:
    """The sets that M attends in, and its mask as a ``bias``: 0 where adjacent, else -inf.

    Args:
        edge_index: [2, E], int64, graph after graph as in a batch of torch_geometric.
        ptr: [B + 1] boundaries of the atoms.
        of: "edges": the rows are the edges; two are adjacent if they share an atom. "atoms": the
            rows are the atoms; i attends to j for each edge (i, j). No row is adjacent to itself,
            but by an edge (i, i).

    Returns:
        The boundaries of the rows, and the bias [P, 1], float32, for all heads. P is the sum of the
        squares of the sets' sizes. Reads the boundaries on the host.

    Raises TypeError, ValueError: shapes, an edge between two graphs or atoms of none; rows of edges
    that are not sorted by graph.

    Examples:
        >>> index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])  # the path 0 - 1 - 2
        >>> sets, bias = edge_sets(index, torch.tensor([0, 3]))
        >>> sets.ptr.tolist(), bias.shape
        ([0, 4], torch.Size([16, 1]))
    """
    one_of("of", of, SETS)
    ragged = ptr if isinstance(ptr, Ragged) else Ragged(ptr)
    if not isinstance(edge_index, Tensor):
        raise TypeError(f"edge_index must be a torch.Tensor, got {type(edge_index).__name__}")
    if edge_index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"edge_index must be int64, got {edge_index.dtype}")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape [2, E], got {tuple(edge_index.shape)}")
    device = edge_index.device
    edge_index = edge_index.long().contiguous()  # what a CSR list or nonzero() gives is not
    atoms = ragged.to(device).ptr.long()
    inside = (edge_index >= 0) & (edge_index < atoms[-1])
    graphs = torch.searchsorted(atoms[1:], edge_index, right=True)
    if not bool((inside.all() & (graphs[0] == graphs[1]).all()).all()):
        raise ValueError(
            "edge_index must join atoms of one graph, got an edge between two, or of an atom "
            f"outside 0 to {int(atoms[-1]) - 1}"
        )
    if of == "edges":
        if bool((graphs[0, 1:] < graphs[0, :-1]).any()):
            raise ValueError("edge_index must be sorted by graph, as in a batch of torch_geometric")
        found = Ragged.from_batch(graphs[0], ragged.molecules)
    else:
        found = ragged.to(device)
    rows, sizes = found.ptr.long(), found.counts().long()
    offsets = found.pairs()
    if of == "atoms":
        bias = torch.full((int(offsets[-1]), 1), -torch.inf, device=device)
        first = rows[graphs[0]]
        place = (edge_index[0] - first) * sizes[graphs[0]] + edge_index[1] - first
        return found, bias.index_fill(0, offsets[graphs[0]] + place, 0.0)
    pairs = torch.arange(int(offsets[-1]), device=device)
    owner = torch.searchsorted(offsets[1:], pairs, right=True)
    pairs, size = pairs - offsets[owner], sizes[owner]
    query, key = (rows[owner] + x for x in (pairs // size, pairs % size))
    near = torch.zeros_like(query, dtype=torch.bool)
    for a in edge_index:
        for b in edge_index:
            near |= a[query] == b[key]
    near &= query != key
    return found, torch.where(near, 0.0, -torch.inf)[:, None]


class EdgeSetEncoder(torch.nn.Module):
    r"""x + [M S]*(x): the layers of ``EdgeSetAttention`` before P, for another pooling behind them.

    Args: dim: D; layers: any "M" and "S"; the options of a layer are those of ``EdgeSetAttention``.

    Examples:
        >>> index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> encoder = EdgeSetEncoder(16, layers="MS", heads=4)
        >>> encoder(torch.randn(4, 16), *edge_sets(index, torch.tensor([0, 3]))).shape
        torch.Size([4, 16])
    """

    def __init__(self, dim: int, *, layers: str = "MSMSM", **options) -> None:
        super().__init__()
        self.dim = positive("dim", dim)
        if set(_letters(layers)) - set("MS"):
            raise ValueError(f"layers must be any M and S, such as MSMSM, got {layers!r}")
        self.layers = layers
        self.blocks = torch.nn.ModuleList(_Block(dim, **options) for _ in layers)

    def forward(self, x: Tensor, sets: Tensor | Ragged, bias: Tensor | None = None) -> Tensor:
        """[R, D] from rows x [R, D], their boundaries and M's mask, as ``edge_sets`` gives them.

        Rows of no set are 0.
        """
        check_rows("x", x, self.dim, next(self.parameters(), None))
        if "M" in self.layers and bias is None:
            raise TypeError("bias must be M's mask, see edge_sets, got None")
        count = x.shape[0]
        x, ragged = covered(x, sets)
        rows = x
        for kind, block in zip(self.layers, self.blocks):
            rows = block(rows, ragged, bias if kind == "M" else None)
        return uncovered(x + rows, count, sets, ragged)

    def extra_repr(self) -> str:
        return f"{self.dim}, layers={self.layers!r}"


class EdgeSetAttention(torch.nn.Module):
    r"""A graph's prediction from attention over its edges or atoms, see the module's formulas.

    Args:
        dim: D, width of the rows x, which a network before this one makes of the edges (of both
            atoms' features and the edge's) or atoms.
        out_features: width of the result.
        layers: what follows what, in "M", "S" and "P": any "M" and "S", one "P", any "S".
        seeds: k of P; the published program has 32.
        heads: number of heads of all layers, default 1; divides D.
        norm: "pre" (default) or "post".
        mlp: "none"; "small" (default): mlp_layers linear layers with mish between; "gated": each is
            mish((silu(g) ∘ y) W + b), (y, g) = halves of a linear layer of twice mlp_hidden.
        mlp_hidden: width inside; None: D. mlp_layers: default 2.
        dropout: on the attention weights, in training.
        backend: None or the name of a backend, see ``explain``.

    Examples:
        >>> index = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> model = EdgeSetAttention(16, layers="MSP", heads=4, seeds=2)
        >>> model(torch.randn(4, 16), *edge_sets(index, torch.tensor([0, 3]))).shape
        torch.Size([1, 1])
    """

    def __init__(
        self,
        dim: int,
        out_features: int = 1,
        *,
        layers: str = "MSMSMP",
        seeds: int = 32,
        **options,
    ) -> None:
        super().__init__()
        self.dim = positive("dim", dim)
        before, found, after = _letters(layers).partition("P")
        if not found or set(after) - {"S"}:
            raise ValueError(
                f"layers must be any M and S, one P and any S, such as MSMSMP, got {layers!r}"
            )
        self.encoder = EdgeSetEncoder(dim, layers=before, **options)
        self.seeds = torch.nn.Parameter(torch.empty(positive("seeds", seeds), dim))
        torch.nn.init.xavier_normal_(self.seeds)
        self.decoder = torch.nn.ModuleList(
            _Block(dim, pools=kind == "P", **options) for kind in found + after
        )
        self.head = torch.nn.Linear(dim, positive("out_features", out_features))

    def forward(self, x: Tensor, sets: Tensor | Ragged, bias: Tensor | None = None) -> Tensor:
        """[B, out_features] from rows x [R, D], their boundaries and M's mask.

        sets, bias: of ``edge_sets``; bias may be None where no layer is "M". A graph without rows
        has the result of attention that is 0.
        """
        check_rows("x", x, self.dim, self.seeds)
        x, ragged = covered(x, sets)
        pool, *others = self.decoder
        rows = pool(self.encoder(x, ragged, bias), ragged, seeds=self.seeds)
        seeds = len(self.seeds)
        for block in others:
            rows = block(rows, equal(rows, seeds))
        return mish(self.head(rows.view(-1, seeds, self.dim).mean(1)))

    def extra_repr(self) -> str:
        return f"{self.dim}, layers={self.encoder.layers + 'P' + 'S' * (len(self.decoder) - 1)!r}"


class _Block(torch.nn.Module):
    """M, S or P."""

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 1,
        norm: str = "pre",
        mlp: str = "small",
        mlp_hidden: int | None = None,
        mlp_layers: int = 2,
        dropout: float = 0.0,
        backend: str | None = None,
        pools: bool = False,
    ) -> None:
        super().__init__()
        self.pre = one_of("norm", norm, NORMS) == "pre"
        self.attn = SetAttention(dim, heads, out_projection=False, dropout=dropout, backend=backend)
        self.out = torch.nn.Linear(dim, dim)
        for weight in (*self.attn.in_proj_weight.detach().chunk(3), self.out.weight):
            torch.nn.init.xavier_normal_(weight)
        self.norm = torch.nn.LayerNorm(dim) if self.pre or not pools else None
        hidden = dim if mlp_hidden is None else positive("mlp_hidden", mlp_hidden)
        integer("mlp_layers", mlp_layers, 1)
        without = one_of("mlp", mlp, MLPS) == "none"
        self.mlp = None if without else _mlp(mlp, dim, hidden, mlp_layers)
        self.norm_mlp = None if without else torch.nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        sets: Tensor | Ragged,
        bias: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        if self.pre and self.norm is not None:
            x = self.norm(x)
        if seeds is not None:
            a = self.attn(seeds, None, x, sets)
            h = a + mish(self.out(a))
        else:
            a = self.attn(x, sets, bias=bias)
            h = x + a + mish(self.out(a))
            if not self.pre and self.norm is not None:
                h = self.norm(h)
        if self.mlp is None or self.norm_mlp is None:
            return h
        return h + self.mlp(self.norm_mlp(h)) if self.pre else self.norm_mlp(h + self.mlp(h))


class _Gated(torch.nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.inner, self.outer = torch.nn.Linear(dim, 2 * hidden), torch.nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.inner(x).chunk(2, 1)
        return mish(self.outer(silu(gate) * y))


def _mlp(kind: str, dim: int, hidden: int, layers: int) -> torch.nn.Sequential:
    widths = [dim] + [hidden] * (layers - 1) + [dim]
    if kind == "gated":
        return torch.nn.Sequential(*(_Gated(a, hidden, b) for a, b in pairwise(widths)))
    steps: list[torch.nn.Module] = []
    for a, b in pairwise(widths):
        steps += [torch.nn.Linear(a, b), torch.nn.Mish()]
    # a single layer keeps its activation, as in the published program
    return torch.nn.Sequential(*(steps if layers == 1 else steps[:-1]))


def _letters(layers: object) -> str:
    if not isinstance(layers, str):
        raise TypeError(f"layers must be a str, got {type(layers).__name__}")
    return layers
