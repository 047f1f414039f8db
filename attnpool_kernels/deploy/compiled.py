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
    value. Batches of other sizes need no second compilation, but no size may be 0 or 1 in the
    first batch, and Python that depends on contents (a neighbour list, a check) goes outside.

    Args:
        loss: (model, *inputs) → a number; called while it is recorded.
        model: its parameters are read at every call; its buffers are constants of the graph.
        inputs: tensors of one batch.
        compiler: of the recorded graph; default ``torch.compile(graph, dynamic=True)``. The
            identity runs the recorded operators as they are.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: torch.nn.Module,
        *inputs: Tensor,
        compiler: Callable[[torch.fx.GraphModule], Callable] | None = None,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]

        def gradients(weights: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
            leaves = [w.detach().requires_grad_() for w in weights]
            with torch.enable_grad(), _in_place_of(self.parameters, leaves, model):
                value = loss(model, *inputs)
                found = torch.autograd.grad(value, leaves, materialize_grads=True)
            return (value.detach(), *found)

        record = make_fx(gradients, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        graph = record(self._weights(), *inputs)
        self._run = torch.compile(graph, dynamic=True) if compiler is None else compiler(graph)

    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.parameters]

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.no_grad():
            value, *found = self._run(self._weights(), *inputs)
        for parameter, gradient in zip(self.parameters, found):
            parameter.grad = gradient
        return value


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
