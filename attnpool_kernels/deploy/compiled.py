"""Training on forces as one compiled graph, where ``torch.compile`` of the model cannot help.

AOTAutograd refuses a derivative of a derivative, so a compiled model does not train on forces. But
``make_fx`` records the energy, the forces and the gradient of the loss as one graph without
autograd, which the compiler takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx


class CompiledGradients:
    """``loss(model, *inputs)`` and its gradients for the parameters, recorded once and compiled.

    ::

        step = CompiledGradients(loss, model, *batch)      # minutes; once
        for batch in batches:
            value = step(*batch)                           # as loss(...) and .backward()
            optimizer.step()

    The loss may call ``torch.autograd.grad(..., create_graph=True)`` for forces. A call puts the
    gradients into ``.grad`` of the parameters (in place of what was there) and returns the detached
    value. Batches of other sizes need no second compilation. Python that depends on contents (a
    neighbour list, a check) goes outside, and hooks of parameters are refused.

    Args:
        loss: (model, *inputs) → a number; called while it is recorded.
        model: its parameters are read at every call and must stay the same objects; its buffers are
            constants of the graph, unless it writes into them.
        inputs: tensors of one batch, in which no size may be 0 or 1, nor the number of molecules,
            for torch tells these apart: add an empty molecule. Sizes that differ from batch to
            batch must differ in this one.
        compiler: of the recorded graph; default ``torch.compile(graph, dynamic=True)``. The
            identity runs the recorded operators as they are.

    Raises ValueError: inputs that cannot be recorded; sizes, when called, that the graph does not
    serve. RuntimeError: the model has other parameters. NotImplementedError: a parameter's hook.

    Examples:
        >>> def loss(model, x, y):
        ...     return (model(x) - y).square().mean()
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(5, 3), torch.randn(5, 2)
        >>> step = CompiledGradients(loss, model, x, y, compiler=lambda graph: graph)
        >>> value = step(x, y)
        >>> torch.allclose(value, loss(model, x, y)), model.weight.grad.shape
        (True, torch.Size([2, 3]))
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: torch.nn.Module,
        *inputs: Tensor,
        compiler: Callable[[torch.fx.GraphModule], Callable] | None = None,
    ) -> None:
        self.model = model
        self.parameters = self._trained()

        def gradients(weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [w.detach().requires_grad_() for w in weights]
            with torch.enable_grad(), _in_place_of(self.parameters, leaves, model):
                value = loss(model, *inputs)
                found = torch.autograd.grad(value, leaves, materialize_grads=True)
            return (value.detach(), *found)

        self._check_parameters()
        for i, x in enumerate(inputs):
            boundaries = x.dim() == 1 and not x.is_floating_point() and x.shape[0] == 2
            if min(x.shape, default=2) < 2 or boundaries:
                raise ValueError(
                    f"inputs must have no size of 0 or 1 and no boundaries of a single molecule to "
                    f"be recorded, got {tuple(x.shape)} in place {i}: add an empty molecule"
                )
        record = make_fx(gradients, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        inputs = tuple(x.contiguous() for x in inputs)
        with _unchanged(model):
            self.graph = record(self._weights(), *inputs)
        self._served: set[tuple] = set()
        self._run = (
            torch.compile(self.graph, dynamic=True) if compiler is None else compiler(self.graph)
        )

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    def _check_parameters(self) -> None:
        now = self._trained()
        if len(now) != len(self.parameters) or any(
            a is not b for a, b in zip(now, self.parameters)
        ):
            raise RuntimeError(
                "model has other parameters than when it was recorded (frozen, added, or put in by "
                "load_state_dict(assign=True)): record it again"
            )
        for parameter in now:
            after = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if parameter._backward_hooks or after:
                raise NotImplementedError("a parameter has a hook, which the graph would leave out")

    def _check_sizes(self, inputs: tuple[Tensor, ...]) -> None:
        """Whether what was assumed while the graph was recorded holds for these sizes, too."""
        sizes = tuple((x.dtype, x.shape) for x in inputs)
        if sizes in self._served:
            return
        places = [x.meta["val"] for x in self.graph.graph.nodes if x.op == "placeholder"]
        given = [*self._weights(), *inputs]
        wrong = [
            i
            for i, (x, place) in enumerate(zip(given, places, strict=True))
            if x.dtype != place.dtype or x.dim() != place.dim()
        ]
        env = self.graph.shape_env
        assert env is not None
        if wrong or not env.evaluate_guards_for_args(places, given, ignore_static=False):
            shapes = ", ".join(str(tuple(shape)) for _, shape in sizes)
            raise ValueError(
                f"inputs of shapes {shapes} are not served by what was recorded, whose dtypes were "
                "others, or which had equal sizes by chance: record another batch"
            )
        self._served.add(sizes)

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._check_parameters()
        inputs = tuple(x.contiguous() for x in inputs)
        self._check_sizes(inputs)
        with torch.no_grad():
            value, *found = self._run(self._weights(), *inputs)
        held = {x.untyped_storage().data_ptr() for x in (value, *inputs)}
        for parameter, gradient in zip(self.parameters, found):
            # As autograd does it: a tensor of its own, laid out as the parameter.
            place = gradient.untyped_storage().data_ptr()
            if place in held or gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter).copy_(gradient)
            held.add(place)
            parameter.grad = gradient
        return value


@contextmanager
def _unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Recording runs the model: its buffers and the tensors in its attributes stay as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    attributes = [
        (module, {k: v for k, v in module.__dict__.items() if isinstance(v, Tensor)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, held in attributes:
            module.__dict__.update(held)


@contextmanager
def _in_place_of(
    parameters: list[torch.nn.Parameter], leaves: list[Tensor], model: torch.nn.Module
) -> Iterator[None]:
    """The leaves wherever the model holds the parameters.

    ``torch.func.functional_call`` would leave its tensors behind in a module that a model holds
    under two names, as PyG's SchNet does.
    """
    leaf_of = {id(p): leaf for p, leaf in zip(parameters, leaves)}
    places = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in leaf_of
    ]
    try:
        for held, name, parameter in places:
            held[name] = leaf_of[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for held, name, parameter in places:
            held[name] = parameter
