"""PET of metatrain with set attention in the place of its own: one line in a training script.

    model = use_attnpool(PET(hypers, dataset_info))

Importing this module needs no metatrain; calling it does. Tried with metatrain 2026.4.1. A version
whose PET differs where it matters is refused with the difference, and whatever looks the same must
give the same numbers on four atoms.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["use_attnpool", "use_own_attention"]

TRIED = "2026.4.1"
# Every attribute of PET's modules that is relied on, by the kind of module.
USED = {
    "model": ("backend", "atomic_types", "cutoff", "cutoff_width"),
    "backend": ("gnn_layers",),
    "GNN layer": ("edge_embedder", "neighbor_embedder", "compress", "trans", "is_first"),
    "transformer": ("layers",),
    "transformer layer": (
        *("attention", "mlp", "norm_attention", "norm_mlp", "transformer_type"),
        *("expanded_node_features", "center_contraction", "center_expansion"),
        *("center_mlp", "norm_center_features"),
    ),
    "attention": (
        *("input_linear", "output_linear", "num_heads", "head_dim"),
        *("temperature", "epsilon"),
    ),
}
# Arguments of the two methods that are overridden.
OVERRIDDEN = {
    "PETBackend.calculate_features": ("self", "batch_data", "capture_diagnostics"),
    "CartesianTransformer.forward": (
        *("self", "input_node_embeddings", "input_messages", "element_indices_neighbors"),
        *("edge_vectors", "padding_mask", "edge_distances", "cutoff_factors"),
        "use_manual_attention",
    ),
}
AGREE = {torch.float64: 1e-10, torch.float32: 1e-4}  # of the largest feature


def use_attnpool(model: Any) -> Any:
    r"""Lets a PET model attend through ``set_attention``, on packed rows. Returns the same object.

    For each atom, head and row i of its neighbourhood (the atom itself and its edges)::

        out_i = Σ_j p_ij v_j,   p_i = softmax_j(q_i·k_j / (√D · temperature) + log cutoff_j)

    as in PET, but without padding: from the embedding of the edges to the last GNN layer only real
    edges are computed; the heads run on PET's grid. Parameters, names in the state dict and numbers
    stay. The derivative of the forces is exact in training and in evaluation.

    Only this object changes (the classes of its ``backend`` and of that one's ``gnn_layers``);
    copies and pickles keep it, ``use_own_attention`` takes it back. A second call does nothing.

    TorchScript, and with it ``model.export(...).save(...)``, gets PET's own attention and a warning
    that says so. ``model.export()`` unsaved, as ASE's ``MetatomicCalculator`` takes it, is as fast
    as the model. PET's diagnostic outputs (``mtt::feature::...``) go through PET's own code. Hooks
    on its GNN layers see edges [1, E]; hooks on attention, on transformers and on their layers are
    not called, those on norms, MLPs and linear layers (LoRA's, too) are.

    PET gives padding the weight 1e-15·e^logit, not 0: where logits are above 10, its numbers depend
    on the longest neighbourhood of a batch in more than the last digits. Ours do not.

    Raises:
        ImportError: metatrain is missing, or has no such PET.
        TypeError: model is not a ``metatrain.pet.PET``.
        NotImplementedError: its parts are not those of metatrain 2026.4.1, or the numbers differ.

    Examples:
        >>> model = use_attnpool(PET(hypers, dataset_info))  # doctest: +SKIP
    """
    packed, own = _classes()
    _check_model(model)
    if type(model.backend) is packed.PackedBackend:
        return model
    _check_parts(model, own)
    before = _features(model)
    _reclass(model, packed.PackedBackend, packed.PackedTransformer)
    try:
        _check_features(before, _features(model))
    except BaseException:
        use_own_attention(model)
        raise
    return model


def use_own_attention(model: Any) -> Any:
    """Takes ``use_attnpool`` back: PET's own attention on its grid. Returns the same object.

    Raises TypeError, ImportError as ``use_attnpool`` does.

    Examples:
        >>> model = use_own_attention(model)  # doctest: +SKIP
    """
    packed, own = _classes()
    _check_model(model)
    if type(model.backend) is packed.PackedBackend:
        _reclass(model, own["PETBackend"], own["CartesianTransformer"])
    return model


def _reclass(model: Any, backend: type, layer: type) -> None:
    model.backend.__class__ = backend
    for each in model.backend.gnn_layers:
        each.__class__ = layer


def _version() -> str:
    try:
        return importlib.metadata.version("metatrain")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _found(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = error.name or "metatrain"
        if name.split(".")[0] != "metatrain":
            raise ImportError(f"metatrain needs {name}: pip install metatrain=={TRIED}") from error
        if name == "metatrain":
            raise ImportError(f"this needs metatrain: pip install metatrain=={TRIED}") from error
        raise _unknown(f"it has no {module}", ImportError) from error


def _unknown(what: str, kind: type = NotImplementedError) -> Exception:
    return kind(f"PET of metatrain {_version()} is not the one tried here ({TRIED}): {what}")


def _classes() -> tuple[ModuleType, dict[str, type]]:
    """Our module of classes, and PET's classes by name, once their methods have been compared."""
    _found("metatrain")
    places = {
        "PET": "metatrain.pet",
        "PETBackend": "metatrain.pet.modules.backend",
        **dict.fromkeys(
            ("CartesianTransformer", "Transformer", "TransformerLayer", "AttentionBlock"),
            "metatrain.pet.modules.transformer",
        ),
    }
    own: dict[str, type] = {}
    for name, place in places.items():
        module = _found(place)
        if not hasattr(module, name):
            raise _unknown(f"{place} has no {name}", ImportError)
        own[name] = getattr(module, name)
    for method, expected in OVERRIDDEN.items():
        owner, name = method.split(".")
        function = getattr(own[owner], name, None)
        got = tuple(inspect.signature(function).parameters) if function else None
        if got != expected:
            raise _unknown(f"{method} must take {expected}, got {got}")
    return importlib.import_module("attnpool_kernels.integrations.pet"), own


def _check_model(model: Any) -> None:
    PET = _found("metatrain.pet").PET
    if not isinstance(model, PET):
        got = f"{type(model).__module__}.{type(model).__qualname__}"
        hint = " (call this before export)" if "AtomisticModel" in got or "jit" in got else ""
        raise TypeError(f"model must be a metatrain.pet.PET, got {got}{hint}")


def _check_parts(model: Any, own: dict[str, type]) -> None:
    for kind, part, wanted in _parts(model, own):
        for name in USED[kind]:
            if not hasattr(part, name):
                raise _unknown(f"a {kind} ({type(part).__name__}) has no attribute {name}")
        if wanted is not None and type(part) is not wanted:
            raise _unknown(f"a {kind} must be a {wanted.__name__}, got {type(part).__name__}")


def _parts(model: Any, own: dict[str, type]) -> Iterator[tuple[str, Any, type | None]]:
    """Kind, module and expected class; a part is looked into once it has been checked."""
    yield "model", model, None
    yield "backend", model.backend, own["PETBackend"]
    for gnn_layer in model.backend.gnn_layers:
        yield "GNN layer", gnn_layer, own["CartesianTransformer"]
        yield "transformer", gnn_layer.trans, own["Transformer"]
        for layer in gnn_layer.trans.layers:
            yield "transformer layer", layer, own["TransformerLayer"]
            yield "attention", layer.attention, own["AttentionBlock"]


def _features(model: Any) -> Tensor:
    """[4, C] features of the corners of a square, its diagonals where the cutoff function falls.

    Each corner has as many neighbours as the others, so that PET has no padding there: where logits
    are large, that alone could make a difference.
    """
    metatomic = importlib.import_module("metatomic.torch")
    neighbours = _found("metatrain.utils.neighbor_lists")
    some = next(model.parameters())
    corners = torch.tensor([[0.8, 0, 0.6], [0, 1, 0], [-0.8, 0, -0.6], [0, -1, 0]])
    system = metatomic.System(
        types=torch.tensor([model.atomic_types[i % len(model.atomic_types)] for i in range(4)]),
        positions=corners.to(some.dtype) * (model.cutoff / 2 - model.cutoff_width / 5),
        cell=torch.zeros(3, 3, dtype=some.dtype),
        pbc=torch.zeros(3, dtype=torch.bool),
    )
    lists = neighbours.get_requested_neighbor_lists(model)
    system = neighbours.get_system_with_neighbor_lists(system, lists)
    request = {"feature": metatomic.ModelOutput(sample_kind="atom")}
    with torch.no_grad():
        return model([system.to(some.device)], request)["feature"].block().values


def _check_features(own: Tensor, packed: Tensor) -> None:
    if own.shape == packed.shape:
        error, largest = float((own - packed).abs().max()), float(own.abs().max())
        if error <= AGREE.get(own.dtype, AGREE[torch.float32]) * largest:
            return
        raise _unknown(
            f"features of four atoms differ by {error:.2g}, the largest is {largest:.2g}"
        )
    raise _unknown(f"features must have shape {tuple(own.shape)}, got {tuple(packed.shape)}")
