"""Aggregations for torch_geometric: a drop-in SetTransformerAggregation, and any pooling of ``nn``.

An aggregation here needs no padded batch: where torch_geometric's own pads every group to the
largest one, these work on the rows as they are. Groups are given by ``ptr`` (which costs nothing)
or by ``index``, whose contents are checked, and whose rows are sorted where they are not sorted.

Importing this module adds ``RaggedSetTransformerAggregation`` and ``AttentionPoolingAggregation``
to ``torch_geometric.nn.aggr``, so that ``aggregation_resolver("ragged_set_transformer", ...)`` and
``MessagePassing(aggr="attention_pooling", aggr_kwargs=...)`` find them; see ``register``.
"""

from __future__ import annotations

import torch
import torch_geometric.nn.aggr
from torch import Tensor
from torch_geometric.nn.aggr import Aggregation

from ..nn.abp import AttentionPooling
from ..nn.arguments import check_rows, flag, integer, module_or_none, number, one_of, positive
from ..nn.attention import equal
from ..nn.blocks import PMA, PYG, SAB, SetTransformer, decoded
from ..nn.pooling import Perceptron
from ..nn.readouts import set2set
from ..nn.scripted import prepared
from ..ragged import PTR_DTYPES, Ragged, check_kind
from . import scripted
from .gps import GPSConv as GPSConv  # found here, where the other drop-ins are
from .graph import edges, lengths

EMPTY = ("attention", "zero")


class RaggedAggregation(Aggregation):
    """An aggregation of rows that lie group after group: ``pooled(x [N, C], Ragged)``.

    Examples:
        >>> from attnpool_kernels.nn import SumPooling
        >>> class Total(RaggedAggregation):
        ...     def pooled(self, x, ragged):
        ...         return SumPooling()(x, ragged)
        >>> Total()(torch.ones(3, 2), torch.tensor([1, 0, 1])).tolist()
        [[1.0, 1.0], [2.0, 2.0]]
    """

    def forward(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        max_num_elements: int | None = None,
    ) -> Tensor:
        """[B, C_out] from x [N, C] and the groups of its rows.

        Args:
            x: [N, C].
            index: [N] group of each row, in any order.
            ptr: [B + 1] boundaries of the groups; then ``index`` is not read.
            dim_size: B; default: that of ptr, or the largest index + 1 (read on the host).
            dim: of the rows, -2 or 0.
            max_num_elements: not needed; checked against the largest group on the CPU.

        Raises ValueError: a wrong width, shape, dim, dim_size, boundary or index, by name.
        """
        return self.pooled(*grouped(x, index, ptr, dim_size, dim, max_num_elements))

    def __call__(
        self,
        x: Tensor,
        index: Tensor | None = None,
        ptr: Tensor | None = None,
        dim_size: int | None = None,
        dim: int = -2,
        **options,
    ) -> Tensor:
        # torch_geometric looks into the arguments before it calls ``forward``.
        if isinstance(ptr, Ragged):
            ptr = ptr.ptr
        check_kinds(x, index, ptr, dim_size, dim, **options)
        return super().__call__(x, index, ptr, dim_size, dim, **options)

    def pooled(self, x: Tensor, ragged: Ragged) -> Tensor:
        raise NotImplementedError


class SetTransformerAggregation(RaggedAggregation):
    r"""torch_geometric's SetTransformerAggregation with the same weights and numbers, unpadded.

    Constructor, ``forward``, state dict, ``repr`` and results are those of
    ``torch_geometric.nn.aggr.SetTransformerAggregation``. In addition it takes ``ptr`` alone and an
    unsorted ``index``, has second derivatives (training on forces) and raises where that one drops
    elements. Its dropout mask is this package's: same distribution, other numbers.

    Args:
        channels: C, width of the rows and of each seed; a multiple of ``heads``.
        num_seed_points: S. num_encoder_blocks, num_decoder_blocks: may be 0.
        concat: True: [B, S·C]; False: the mean over the seeds, [B, C].
        layer_norm: with LayerNorm in every block.
        dropout: on the attention weights, in training.
        empty: result of a group without elements: "attention", what the layers make of an
            attention that is 0 (as torch_geometric on torch ≥ 2.5), or "zero", 0.
        backend: None or the name of a backend, see ``attnpool_kernels.explain``.

    Examples:
        >>> aggr = SetTransformerAggregation(8, num_seed_points=2, heads=4)
        >>> aggr(torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        channels: int,
        num_seed_points: int = 1,
        num_encoder_blocks: int = 1,
        num_decoder_blocks: int = 1,
        heads: int = 1,
        concat: bool = True,
        layer_norm: bool = False,
        dropout: float = 0.0,
        *,
        empty: str = "attention",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        positive("channels", channels)
        positive("num_seed_points", num_seed_points)
        integer("num_encoder_blocks", num_encoder_blocks, 0)
        integer("num_decoder_blocks", num_decoder_blocks, 0)
        flag("layer_norm", layer_norm)
        model = SetTransformer(
            channels,
            channels,
            heads=heads,
            seeds=num_seed_points,
            encoder_blocks=num_encoder_blocks,
            decoder_blocks=num_decoder_blocks,
            dropout=dropout,
            backend=backend,
            **(PYG | {"norm": layer_norm}),
        )
        self.channels = channels
        self.num_seed_points = num_seed_points
        self.heads = heads
        self.concat = flag("concat", concat)
        self.layer_norm = layer_norm
        self.dropout = dropout
        self.empty = one_of("empty", empty, EMPTY)
        self.encoders, self.pma, self.decoders = model.encoders, model.pma, model.decoders

    def reset_parameters(self) -> None:
        for block in (*self.encoders, self.pma, *self.decoders):
            block.reset_parameters()

    def pooled(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[B, S·C] or [B, C]."""
        for block in self.encoders:
            x = block(x, ragged)
        out = decoded(self.pma(x, ragged), self.decoders).nan_to_num()
        if self.empty == "zero":
            out = out.masked_fill((ragged.counts() == 0).to(out.device)[:, None, None], 0.0)
        return out.flatten(1, 2) if self.concat else out.mean(1)

    def __prepare_scriptable__(self) -> SetTransformerAggregation:
        return prepared(self, SetTransformerAggregation, scripted.set_transformer_aggregation)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.channels}, num_seed_points={self.num_seed_points}, "
            f"heads={self.heads}, layer_norm={self.layer_norm}, dropout={self.dropout})"
        )


class GraphMultisetTransformer(RaggedAggregation):
    r"""torch_geometric's GraphMultisetTransformer with the same weights and numbers, unpadded.

    ::

        PMA to k rows  →  SAB^num_encoder_blocks over them  →  PMA to one row

    What is said of ``SetTransformerAggregation`` holds here. Args: channels: C; k; the others as
    there. Source: Baek, Kang & Hwang 2021.

    Examples:
        >>> aggr = GraphMultisetTransformer(8, k=2, heads=4)
        >>> aggr(torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        channels: int,
        k: int,
        num_encoder_blocks: int = 1,
        heads: int = 1,
        layer_norm: bool = False,
        dropout: float = 0.0,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.k = positive("channels", channels), positive("k", k)
        integer("num_encoder_blocks", num_encoder_blocks, 0)
        self.heads, self.layer_norm, self.dropout = heads, flag("layer_norm", layer_norm), dropout
        options = PYG | {"norm": layer_norm, "dropout": dropout, "backend": backend}
        block = {name: value for name, value in options.items() if name != "pre_linear"}
        self.pma1 = PMA(channels, k, heads, **options)
        self.encoders = torch.nn.ModuleList(
            SAB(channels, heads, **block) for _ in range(num_encoder_blocks)
        )
        self.pma2 = PMA(channels, 1, heads, **options)

    def reset_parameters(self) -> None:
        for block in (self.pma1, *self.encoders, self.pma2):
            block.reset_parameters()  # type: ignore[operator]

    def pooled(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[B, C]."""
        found = self.pma1(x, ragged)
        rows = decoded(found, self.encoders).flatten(0, 1)
        return self.pma2(rows, equal(rows, self.k)).squeeze(1)

    def __prepare_scriptable__(self) -> GraphMultisetTransformer:
        return prepared(self, GraphMultisetTransformer, scripted.graph_multiset_transformer)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.channels}, k={self.k}, heads={self.heads}, "
            f"layer_norm={self.layer_norm}, dropout={self.dropout})"
        )


class Set2Set(RaggedAggregation, torch_geometric.nn.aggr.Set2Set):
    """torch_geometric's Set2Set with the same weights and numbers, on the rows as they are.

    In addition it takes ``ptr`` alone and an unsorted ``index``. See ``nn.Set2Set``.

    Examples:
        >>> aggr = Set2Set(8, processing_steps=3)
        >>> aggr(torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])).shape
        torch.Size([2, 16])
    """

    def pooled(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[B, 2C]."""
        check_rows("x", x, self.in_channels)
        return set2set(x, ragged, self.lstm, self.processing_steps)


class RaggedSetTransformerAggregation(SetTransformerAggregation):
    """The same under a name that torch_geometric's resolver can tell from its own.

    Examples:
        >>> resolver = torch_geometric.nn.resolver.aggregation_resolver
        >>> type(resolver("ragged_set_transformer", 8)).__name__
        'RaggedSetTransformerAggregation'
    """


class PoolingAggregation(RaggedAggregation):
    """Any pooling ``pool(x [N, C], Ragged) → [B, C_out]`` as an aggregation of torch_geometric.

    ``head``: applied to the pooled rows.

    Examples:
        >>> from attnpool_kernels.nn import SumPooling
        >>> aggr = PoolingAggregation(SumPooling(), torch.nn.Linear(8, 1))
        >>> aggr(torch.randn(5, 8), torch.tensor([0, 0, 1, 1, 1])).shape
        torch.Size([2, 1])
    """

    def __init__(self, pool: torch.nn.Module, head: torch.nn.Module | None = None) -> None:
        super().__init__()
        module_or_none("pool", pool, required=True)
        module_or_none("head", head)
        self.pool, self.head = pool, head

    def reset_parameters(self) -> None:
        for module in (self.pool, self.head):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def pooled(self, x: Tensor, ragged: Ragged) -> Tensor:
        """[B, C_out]."""
        out = self.pool(x, ragged)
        return out if self.head is None else self.head(out)

    def __prepare_scriptable__(self) -> PoolingAggregation:
        return prepared(self, PoolingAggregation, scripted.pooling_aggregation)

    def __repr__(self) -> str:
        return torch.nn.Module.__repr__(self)


class AttentionPoolingAggregation(PoolingAggregation):
    """``nn.AttentionPooling`` as an aggregation; its arguments.

    Examples:
        >>> aggr = AttentionPoolingAggregation(8, 16, heads=4, seeds=2)
        >>> aggr(torch.randn(5, 8), ptr=torch.tensor([0, 2, 5])).shape
        torch.Size([2, 8])
    """

    def __init__(self, *arguments, **options) -> None:
        super().__init__(AttentionPooling(*arguments, **options))


def register(replace: bool = False) -> None:
    """Makes the aggregations known to torch_geometric's resolver by their names.

    Done at import. With ``replace`` torch_geometric's own name too, ``SetTransformerAggregation``
    or "set_transformer", means the class of this module from then on, in the whole process: for
    programs that choose an aggregation in a configuration file.

    Examples:
        >>> register()
        >>> torch_geometric.nn.aggr.AttentionPoolingAggregation is AttentionPoolingAggregation
        True
    """
    names = [RaggedSetTransformerAggregation, AttentionPoolingAggregation]
    for found in names + [SetTransformerAggregation] * replace:
        setattr(torch_geometric.nn.aggr, found.__name__, found)


def check_kinds(
    x: object,
    index: object,
    ptr: object,
    dim_size: object,
    dim: object,
    max_num_elements: object = None,
) -> None:
    """TypeError, NotImplementedError for arguments of another kind, by name."""
    check_rows("x", x, None)
    if ptr is not None:
        check_kind(ptr)
    if index is not None:
        if not isinstance(index, Tensor):
            raise TypeError(f"index must be a torch.Tensor, got {type(index).__name__}")
        if index.dtype not in PTR_DTYPES:
            raise TypeError(f"index must be int32 or int64, got {index.dtype}")
        if index.layout != torch.strided or index.is_nested:
            raise NotImplementedError(f"index must be a dense tensor, got {index.layout}")
    named = (("dim_size", dim_size), ("dim", dim), ("max_num_elements", max_num_elements))
    for name, value in named:
        whole = isinstance(value, int | torch.SymInt) and not isinstance(value, bool)
        if not whole and (value is not None or name == "dim"):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def grouped(
    x: Tensor,
    index: Tensor | None,
    ptr: Tensor | None,
    dim_size: int | None,
    dim: int = -2,
    max_num_elements: int | None = None,
) -> tuple[Tensor, Ragged]:
    """The rows of x, group after group, and their boundaries."""
    check_kinds(x, index, ptr, dim_size, dim, max_num_elements)
    if dim not in (-2, 0):
        raise ValueError(f"dim must be -2 or 0, got {dim}")
    known = not torch.compiler.is_compiling()
    if ptr is not None:
        ragged = Ragged(ptr)
        last = ragged.last
        if last is not None and last != x.shape[0]:
            raise ValueError(f"ptr[-1] must be the number of rows, {x.shape[0]}, got {last}")
    else:
        if index is None:
            index = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
            dim_size = 1 if dim_size is None else dim_size
        x, index, dim_size = _sorted(x, index, dim_size, known)
        ragged = Ragged.from_batch(index, dim_size)
    groups = ragged.ptr.shape[0] - 1
    if dim_size is not None and dim_size != groups:
        raise ValueError(f"dim_size must be the number of groups, {groups}, got {dim_size}")
    if max_num_elements is not None and known and ragged.ptr.device.type == "cpu":
        largest = int(ragged.counts().amax()) if groups else 0
        if max_num_elements < largest:
            raise ValueError(
                f"max_num_elements must be at least the largest group, {largest}, "
                f"got {max_num_elements}"
            )
    return x, ragged


def _sorted(x: Tensor, index: Tensor, dim_size: int | None, known: bool):
    if index.shape != x.shape[:1]:
        raise ValueError(f"index must have shape [{x.shape[0]}], got {tuple(index.shape)}")
    in_order = False
    if known and index.numel():
        falls = (index[1:] < index[:-1]).any()
        smallest, largest, falls = torch.stack([*index.aminmax(), falls.to(index)]).tolist()
        dim_size = largest + 1 if dim_size is None else dim_size
        if smallest < 0 or largest >= dim_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"index must be from 0 to dim_size - 1 = {dim_size - 1}, got {wrong}")
        in_order = not falls
    elif dim_size is None:
        dim_size = int(index.max()) + 1 if index.numel() else 0
    if not in_order:  # or not known: a compiled graph cannot depend on it
        index, order = index.sort(stable=True)
        x = x.index_select(0, order)
    return x, index, dim_size


class MoleculeGraph(torch.nn.Module):
    """All pairs of atoms of a molecule within a cutoff: ``interaction_graph`` of PyG's SchNet.

    Unlike the default there is no limit on the neighbours, so the result does not depend on the
    order of the atoms; and it needs no compiled extension. cutoff: in the unit of the positions.

    Examples:
        >>> pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [9, 0, 0]])
        >>> index, length = MoleculeGraph(cutoff=2.0)(pos, torch.zeros(3, dtype=torch.int64))
        >>> index.tolist(), length.tolist()
        ([[1, 0], [0, 1]], [1.0, 1.0])
    """

    def __init__(self, cutoff: float = 10.0) -> None:
        super().__init__()
        self.cutoff = number("cutoff", cutoff)
        if self.cutoff <= 0:
            raise ValueError(f"cutoff must be positive, got {cutoff}")

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Edges [2, E] (source, target) and their lengths [E], from pos [N, 3] and batch [N]."""
        index = edges(pos, Ragged.from_batch(batch), self.cutoff)
        return index, lengths(pos[index[0]] - pos[index[1]])


def pooled_schnet(
    model: torch.nn.Module, pool: torch.nn.Module, head: torch.nn.Module | None = None
) -> torch.nn.Module:
    """PyG's SchNet with a pooling of its last hidden state instead of a sum of atom outputs.

    The model is changed in place and returned: its two output layers are dropped, its readout
    becomes ``pool`` [B, C] and then ``head``, by default the one of Buterez et al.: linear layers
    C, C/2, C/2, 1 with shifted softplus, xavier weights, biases 0.01.

    Raises ValueError for a model with dipole, atomref, mean or std, which act on atom outputs.

    Examples:
        >>> schnet = torch_geometric.nn.SchNet(8, 8, 1, 4, interaction_graph=MoleculeGraph(5.0))
        >>> model = pooled_schnet(schnet, AttentionPooling(8, 16, heads=4, seeds=2))
        >>> model(torch.tensor([8, 1, 1]), torch.randn(3, 3), torch.tensor([0, 0, 0])).shape
        torch.Size([1, 1])
    """
    for name in ("dipole", "atomref", "mean", "std"):
        if getattr(model, name) not in (None, False):
            raise ValueError(f"model must not have {name}: it acts on the outputs of single atoms")
    if head is None:
        width = int(model.hidden_channels)  # type: ignore[arg-type]
        head = Perceptron((width, width // 2, width // 2, 1), "shifted_softplus")
        for parameter in head.parameters():
            if parameter.dim() == 2:
                torch.nn.init.xavier_uniform_(parameter)
            else:
                torch.nn.init.constant_(parameter, 0.01)
    model.lin1 = model.act = model.lin2 = torch.nn.Identity()
    model.readout = PoolingAggregation(pool, head)
    return model


register()
