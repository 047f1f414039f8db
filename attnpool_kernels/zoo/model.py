"""A backbone, a pooling and a head: the models that are trained, named by a configuration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..nn.abp import AttentionPooling
from ..nn.arguments import widths_of
from ..nn.attention import one_of, positive
from ..nn.blocks import PYG, SetTransformer
from ..nn.pooling import (
    AttentionalPooling,
    MaxPooling,
    MeanPooling,
    OrbitalWeightedAverage,
    Perceptron,
    SeedPooling,
    SoftmaxPooling,
    SumPooling,
    WeightedAverage,
)
from ..ragged import Ragged
from .backbones import Backbone, backbone
from .molecules import Molecules
from .pairs import hooked
from .periodic import Cells

HEADS = ("molecule", "atom")


def _set_transformer(channels: int, **options) -> SetTransformer:
    """PyG's architecture with the mean of the seeds; options of ``SetTransformer`` over it."""
    options = {**PYG, "seeds": 1, "encoder_blocks": 1, "reduce": "mean", **options}
    return SetTransformer(channels, channels, **options)


def _plain(kind: Callable[[], torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    def made(channels: int, **options) -> torch.nn.Module:
        return kind(**options)  # no options: any is a TypeError with its name

    return made


# name -> (channels, **options) -> pooling; weighted averages get out_features = targets besides
POOLINGS: dict[str, Callable[..., torch.nn.Module]] = {
    "sum": _plain(SumPooling),
    "mean": _plain(MeanPooling),
    "max": _plain(MaxPooling),
    "softmax": _plain(SoftmaxPooling),
    "attentional": AttentionalPooling,
    "weighted": WeightedAverage,
    "orbital_weighted": OrbitalWeightedAverage,
    "seed": SeedPooling,
    "abp": AttentionPooling,
    "set_transformer": _set_transformer,
}
_PREDICTING = ("weighted", "orbital_weighted")  # their networks give the target themselves
_OF_THE_MODEL = ("mean", "std", "out_features")  # so these are not theirs


def pooling(name: str, channels: int, **options) -> torch.nn.Module:
    """A pooling by its name in ``POOLINGS``, for rows of width ``channels``.

    Raises ValueError: an unknown name or option, a value that cannot be, by name.

    Examples:
        >>> pool = pooling("abp", 8, hidden=16, heads=4, seeds=2)
        >>> pool(torch.randn(3, 8), torch.tensor([0, 3])).shape
        torch.Size([1, 8])
    """
    if name not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {name!r}")
    try:
        return POOLINGS[name](channels, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"pooling {name!r}: {error}") from error


class PooledModel(torch.nn.Module):
    r"""Properties of molecules from pooled atom vectors.

    ::

        head="molecule":  y = std · head(pool(atoms)) + mean + Σ_i atomref[z_i]
        head="atom":      y = std · pool(head(atoms)) + mean + Σ_i atomref[z_i]

    The head is that of Buterez et al.: linear layers C, C/2, C/2, T with shifted softplus, xavier
    weights and biases 0.01. "weighted" and "orbital_weighted" have their own networks in its place.
    head="atom" with the sum is size-extensive: there the mean is spread over the atoms, n·mean per
    atom, see ``set_statistics``. A sum of atom *vectors* (head="molecule") is not extensive.

    ``mean``, ``std`` and ``atomref`` are float32 or float64 whatever the weights are, and so is y:
    ``.bfloat16()`` and ``.half()`` convert the weights alone. An energy of -2038 eV in bfloat16 is
    one of -2032 and -2040.

    Args:
        backbone: see ``zoo.backbones.backbone``.
        pooling: a name in ``POOLINGS``, or a module (x [N, C], Ragged) → [B, C'].
        targets: T.
        pooling_options: of the named pooling.
        head: what the head acts on, the pooled row or every atom's row.
        atom_layers: widths of a perceptron with shifted softplus between the backbone and the
            pooling, the last one that of the rows which are pooled; None: none. For head="molecule"
            without a pooling that has networks of its own.
        head_layers: hidden widths of the head; None: C/2, C/2.
        mean, std: as for ``set_statistics``; the mean of an extensive model is that of an atom.

    Raises ValueError: an unknown name or option, by name.

    Examples:
        >>> from attnpool_kernels.zoo.backbones import backbone
        >>> sizes = dict(hidden_channels=8, num_filters=8, num_interactions=1, num_gaussians=4)
        >>> model = PooledModel(backbone("schnet", **sizes), "sum")
        >>> water = Molecules(torch.tensor([8, 1, 1]), torch.randn(3, 3), torch.tensor([0, 3]))
        >>> model(water).shape
        torch.Size([1, 1])
    """

    mean: Tensor  # [T]; of an extensive model: per atom
    std: Tensor  # [T]
    atomref: Tensor  # [100, T], by atomic number; 0 unless set

    def __init__(
        self,
        backbone: Backbone,
        pooling: str | torch.nn.Module,
        *,
        targets: int = 1,
        pooling_options: Mapping[str, Any] | None = None,
        head: str = "molecule",
        atom_layers: Sequence[int] | None = None,
        head_layers: Sequence[int] | None = None,
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.targets = positive("targets", targets)
        one_of("head", head, HEADS)
        if backbone.rows != "atoms" and (head == "atom" or pooling in _PREDICTING):
            raise ValueError(
                f"backbone {backbone.name!r} has rows of {backbone.rows}: head must be 'molecule' "
                f"and pooling none of {', '.join(_PREDICTING)}, got {head!r} and {pooling!r}"
            )
        self.backbone = backbone
        self.acts_on = head
        self._config: dict[str, Any] = {
            "backbone": backbone.name,
            "backbone_options": _plain_values(backbone.options),
            "pooling": pooling if isinstance(pooling, str) else None,
            "pooling_options": _plain_values(_with_defaults(pooling, pooling_options or {})),
            "head": head,
            "targets": targets,
        }
        inner = backbone.channels
        self.before: Perceptron | None = None
        for name, layers in (("atom_layers", atom_layers), ("head_layers", head_layers)):
            if layers is None:
                continue
            if pooling in _PREDICTING or (name == "atom_layers" and head == "atom"):
                raise ValueError(f"{name} must be None with pooling {pooling!r} and head {head!r}")
            # Named where given only: a checkpoint from before there were these has no such key.
            self._config[name] = list(widths_of(name, layers))
            if name == "atom_layers" and not layers:
                raise ValueError("atom_layers must have at least one width, got none")
        if atom_layers is not None:
            self.before = Perceptron((inner, *atom_layers), "shifted_softplus")
            inner = atom_layers[-1]
        width = inner if head == "molecule" else targets
        self.pooling = self._pooling(pooling, width, dict(pooling_options or {}))
        self.head: torch.nn.Module | None = None
        if not isinstance(self.pooling, WeightedAverage):
            pooled = _width(self.pooling, width)
            if head == "molecule":
                inner = pooled
            elif pooled != targets:
                raise ValueError(
                    f"pooling must give rows of width targets = {targets} with head='atom', "
                    f"got {pooled}"
                )
            self.head = buterez_head(inner, targets, head_layers)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("mean", torch.zeros(targets, dtype=dtype))
        self.register_buffer("std", torch.ones(targets, dtype=dtype))
        self.register_buffer("atomref", torch.zeros(100, targets, dtype=dtype))
        if mean is not None or std is not None:
            self.set_statistics(
                self.mean if mean is None else mean, self.std if std is None else std, atoms=1
            )

    def _pooling(
        self, given: str | torch.nn.Module, width: int, options: dict[str, Any]
    ) -> torch.nn.Module:
        if not isinstance(given, str):
            if options:
                raise ValueError("pooling_options must be None with a pooling that is a module")
            return given
        if given in _PREDICTING:
            if self.acts_on == "atom":
                raise ValueError(f"head must be 'molecule' with pooling {given!r}, got 'atom'")
            for name in _OF_THE_MODEL:
                if name in options:
                    raise ValueError(f"pooling_options must not have {name}: the model has it")
            options["out_features"] = self.targets
        return pooling(given, width, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PooledModel:
        """As every module's, but a large mean is not rounded to the precision of the weights."""
        before = {name: getattr(self, name) for name in ("mean", "std", "atomref")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype.itemsize < 4:
                setattr(self, name, old.to(new.device))
        return self

    @property
    def extensive(self) -> bool:
        """Whether two molecules far apart have the sum of their values."""
        return self.acts_on == "atom" and isinstance(self.pooling, SumPooling)

    def set_statistics(self, mean: Tensor, std: Tensor, *, atoms: float | None = None) -> None:
        """Sets mean [T] and std [T] of the targets over the training set, in the targets' units.

        atoms: average number of atoms of its molecules. An extensive model needs it: it adds
        mean / atoms per atom, so that its mean over the set is right and it stays extensive.
        With reference energies the statistics are those of the targets without them.

        Raises ValueError: a wrong shape, a std that is not positive, no ``atoms`` where needed.
        """
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (self.targets,):
                raise ValueError(f"{name} must have shape [{self.targets}], got {[*values.shape]}")
            if not bool(values.isfinite().all()):
                raise ValueError(f"{name} must be finite, got {values.tolist()}")
        if not bool((std > 0).all()):
            raise ValueError(f"std must be positive, got {std.tolist()}")
        if self.extensive:
            if atoms is None or not atoms > 0:
                raise ValueError(
                    f"atoms must be the average number of atoms, which an extensive model "
                    f"(head='atom', pooling='sum') needs, got {atoms}"
                )
            mean = mean.to(self.mean.dtype) / atoms
        self.mean.copy_(mean)
        self.std.copy_(std)

    def set_atomref(self, atomref: Tensor) -> None:
        """Sets reference values [100, T] of free atoms by atomic number."""
        if atomref.shape != self.atomref.shape:
            raise ValueError(
                f"atomref must have shape {[*self.atomref.shape]}, got {[*atomref.shape]}"
            )
        self.atomref.copy_(atomref)

    def forward(self, molecules: Molecules) -> Tensor:
        """[B, T] in the targets' units."""
        return self._scaled(molecules, self._pooled(*self._rows(molecules)))

    def from_edges(self, z: Tensor, pos: Tensor, index: Tensor, ptr: Tensor | Ragged) -> Tensor:
        """[B, T] for a program that has the neighbours already: what is exported and compiled.

        Args:
            z: [N] atomic numbers. pos: [N, 3], Å.
            index: [2, E] int64, every ordered pair (j, i) of different atoms of one molecule within
                the cutoff, sorted by i: what ``zoo.graph.edges`` gives. Not checked.
            ptr: [B + 1] boundaries of the molecules, which must cover the atoms.

        Raises NotImplementedError for a backbone whose rows are not atoms.
        """
        if self.backbone.rows != "atoms":
            raise NotImplementedError(f"backbone {self.backbone.name!r} has rows of edges")
        ragged = ptr if isinstance(ptr, Ragged) else Ragged(ptr)
        dtype = next(p.dtype for p in self.parameters() if p.is_floating_point())
        vectors = pos.index_select(0, index[0]) - pos.index_select(0, index[1])
        y = self._pooled(self.backbone.atoms(z, index, vectors.to(dtype)), ragged)
        return self._scaled(Molecules(z, pos, ragged.ptr), y)

    def _pooled(self, x: Tensor, rows: Ragged) -> Tensor:
        if self.before is not None:
            x = self.before(x)
        if self.head is None:
            return self.pooling(x, rows)
        if self.acts_on == "molecule":
            return self.head(self.pooling(x, rows))
        return self.pooling(self.head(x), rows)

    def with_weights(self, molecules: Molecules) -> tuple[Tensor, Tensor]:
        """Predictions [B, T] and weights [N] of the atoms, of the weighted averages.

        Raises ValueError for other poolings, which have no such weights.
        """
        if not isinstance(self.pooling, WeightedAverage):
            raise ValueError(
                f"pooling must be one of {', '.join(_PREDICTING)} for weights of atoms, got "
                f"{type(self.pooling).__name__}"
            )
        y, weights = self.pooling.with_weights(*self._rows(molecules))
        return self._scaled(molecules, y), weights

    def orbital_loss(self, molecules: Molecules, *, factor: float = 0.1) -> Tensor:
        """factor · mean ((y - target) / std)² + mean (a - coefficients)² (OWA).

        Targets and coefficients are those of ``molecules``. The second mean is over atoms.
        """
        if molecules.y is None or molecules.coefficients is None:
            raise ValueError("molecules must have y and coefficients for the loss of OWA")
        y, weights = self.with_weights(molecules)
        error = (y - molecules.y) / self.std
        return factor * error.square().mean() + mse_loss(weights, molecules.coefficients)

    def _rows(self, molecules: Molecules) -> tuple[Tensor, Ragged]:
        return self.backbone.located(*_place(molecules))

    def _scaled(self, molecules: Molecules, y: Tensor) -> Tensor:
        each = self.atomref[molecules.z]
        if self.extensive:
            each = each + self.mean
        constant = each.new_zeros(molecules.ragged.molecules, self.targets).index_add(
            0, molecules.batch, each
        )
        return y * self.std + (constant if self.extensive else constant + self.mean)

    def energy_and_forces(
        self, molecules: Molecules, create_graph: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Energies E [B] and forces F = -∂E/∂pos [N, 3], also inside no_grad and inference_mode.

        create_graph: whether E and F are to be differentiated again, as a loss of forces needs;
            default: in training mode. Without it both are detached.

        Raises ValueError for a model of more than one target.
        """
        if self.targets != 1:
            raise ValueError(f"targets must be 1 for forces, got {self.targets}")
        create_graph = self.training if create_graph is None else create_graph
        with torch.inference_mode(False), torch.enable_grad():
            fields = {f.name: getattr(molecules, f.name) for f in dataclasses.fields(molecules)}
            tensors = {  # a tensor made in inference mode cannot be saved for a derivative
                k: x.clone() if x is not None and x.is_inference() else x for k, x in fields.items()
            }
            tensors["pos"] = tensors["pos"].detach().requires_grad_()
            given = Molecules(**tensors)
            found = None
            if type(self).forward is PooledModel.forward and not hooked(self):
                found = self.backbone.with_filters(*_place(given), learning=create_graph)
            if found is not None:
                rows, filters = found
                energy = self._scaled(given, self._pooled(rows, given.ragged)).squeeze(1)
                gradient = filters.gradient(energy.sum(), given.pos, create_graph)
            else:
                energy = self(given).squeeze(1)
                (gradient,) = torch.autograd.grad(
                    energy.sum(), given.pos, create_graph=create_graph, materialize_grads=True
                )
        if not create_graph:
            energy = energy.detach()
        return energy, -gradient

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` makes this model of, as plain values for a checkpoint.

        Raises ValueError for a model with parts that have no name.
        """
        for name in ("backbone", "pooling"):
            if self._config[name] is None:
                raise ValueError(f"{name} must be made by name for a model with a config")
        return {k: dict(v) if isinstance(v, dict) else v for k, v in self._config.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PooledModel:
        """From {"backbone", "pooling"} and, if not the defaults, {"backbone_options",
        "pooling_options", "head", "targets", "atom_layers", "head_layers"}; names as in
        ``BACKBONES`` and ``POOLINGS``.

        Raises ValueError: an unknown or a missing key, name or option, by name.
        """
        known = ["backbone", "backbone_options", "pooling", "pooling_options", "head", "targets"]
        known += ["atom_layers", "head_layers"]
        for key in config:
            if key not in known:
                raise ValueError(f"keys of a config are {', '.join(known)}, got {key!r}")
        for key in ("backbone", "pooling"):
            if key not in config:
                raise ValueError(f"config must name a {key}")
        net = backbone(config["backbone"], **(config.get("backbone_options") or {}))
        return cls(
            net,
            config["pooling"],
            pooling_options=config.get("pooling_options"),
            head=config.get("head", "molecule"),
            targets=config.get("targets", 1),
            atom_layers=config.get("atom_layers"),
            head_layers=config.get("head_layers"),
        )

    def get_extra_state(self) -> dict[str, Any]:
        return self._config

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError with what differs where the state dict is that of another model."""
        theirs, mine = _flat(state), _flat(self._config)
        differences = [
            f"{key} is {theirs.get(key, 'the default')!r} there and "
            f"{mine.get(key, 'the default')!r} here"
            for key in sorted(theirs.keys() | mine.keys())
            if theirs.get(key) != mine.get(key)
        ]
        if differences:
            raise ValueError(f"state dict of another model: {'; '.join(differences)}")


def _place(molecules: Molecules) -> tuple[Tensor, Tensor, Ragged, Cells | None]:
    """What a backbone is given."""
    cell, pbc = molecules.cell, molecules.pbc
    cells = None if cell is None or pbc is None else Cells(cell, pbc)
    return molecules.z, molecules.pos, molecules.ragged, cells


def build(config: Mapping[str, Any]) -> PooledModel:
    """``PooledModel.from_config``."""
    return PooledModel.from_config(config)


def buterez_head(width: int, targets: int, hidden: Sequence[int] | None = None) -> Perceptron:
    """Linear layers C, *hidden, T with shifted softplus, xavier weights and biases 0.01.

    hidden: default C/2, C/2.
    """
    half = max(1, width // 2)
    inner = (half, half) if hidden is None else widths_of("head_layers", hidden)
    head = Perceptron((width, *inner, targets), "shifted_softplus")
    for parameter in head.parameters():
        if parameter.dim() == 2:
            torch.nn.init.xavier_uniform_(parameter)
        else:
            torch.nn.init.constant_(parameter, 0.01)
    return head


def _with_defaults(name: str | torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """With the defaults that the pooling's signature shows: they may change, a checkpoint not."""
    if not isinstance(name, str) or name not in POOLINGS:
        return dict(options)
    shown = list(inspect.signature(POOLINGS[name]).parameters.values())[1:]  # less the channels
    defaults = {x.name: x.default for x in shown if x.default is not x.empty}
    if name in _PREDICTING:
        defaults = {k: x for k, x in defaults.items() if k not in _OF_THE_MODEL}
    return defaults | dict(options)


def _plain_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """With lists for tuples, as a configuration file gives them back."""
    return {k: list(x) if isinstance(x, tuple) else x for k, x in options.items()}


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted names, without those that are not the model's but the machine's."""
    flat: dict[str, Any] = {}
    for key, x in config.items():
        if isinstance(x, Mapping):
            flat |= {f"{key}.{option}": value for option, value in x.items()}
        else:
            flat[key] = x
    flat.pop("pooling_options.backend", None)
    return flat


def _width(pool: torch.nn.Module, channels: int) -> int:
    """Width of a pooled row, found by pooling one atom."""
    weight = next(pool.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    training = pool.training
    with torch.no_grad():
        one = torch.zeros(1, channels, dtype=weight.dtype, device=weight.device)
        pooled = pool.eval()(one, Ragged.from_counts([1]).to(weight.device))
    pool.train(training)
    if pooled.dim() != 2:
        raise ValueError(f"pooling must give one row a molecule, got {pooled.dim() - 1} dimensions")
    return pooled.shape[1]
