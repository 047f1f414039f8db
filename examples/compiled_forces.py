"""Training on forces in one compiled graph: what ``torch.compile`` of a model cannot do.

Run: python examples/compiled_forces.py
Needs nothing but torch and a C++ compiler. Model and data are those of neighbour_sets.py. One step
is compared with the eager one; batches of other sizes need no second compilation.
"""

import time

import torch
from neighbour_sets import Model, draw, forces, morse, neighbours
from torch import Tensor

from attnpool_kernels.deploy.compiled import CompiledGradients

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def loss(model: Model, positions: Tensor, row_ptr: Tensor, near: Tensor, target: Tensor) -> Tensor:
    positions = positions.detach().requires_grad_()
    found = forces(model(positions, row_ptr, near), positions, train=True)
    return torch.nn.functional.l1_loss(found, target)


def batch_of(molecules: int, atoms: int) -> Batch:
    """Positions, neighbours in CSR form, and the forces of a Morse potential."""
    molecule = torch.arange(molecules).repeat_interleave(atoms)
    positions = draw(molecules, atoms).requires_grad_()
    target = forces(morse(positions, molecule), positions, train=False)
    return positions.detach(), *neighbours(positions, molecule), target


def difference(step: CompiledGradients, model: Model, batch: Batch) -> float:
    """The largest of the gradients of the compiled step and of the eager one, relative."""
    step(*batch)
    eager = torch.autograd.grad(loss(model, *batch), step.parameters, materialize_grads=True)
    pairs = [(p.grad - g).abs().max() for p, g in zip(step.parameters, eager)]
    return float(max(pairs) / max(g.abs().max() for g in eager))


def main(steps: int = 200) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Model(width=16, heads=2, layers=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    step = CompiledGradients(loss, model, *batch_of(6, 10))
    losses = []
    for number in range(steps):
        losses.append(float(step(*batch_of(16, 10))))
        optimizer.step()
        if number == 0:
            first = time.perf_counter() - start
        if number % 50 == 0 or number == steps - 1:
            print(f"step {number:4d}  loss {losses[-1]:.4f}")
    apart = difference(step, model, batch_of(5, 9))
    print(f"compiled in {first:.0f} s; gradients {apart:.0e} from the eager ones (float32)")
    return losses


if __name__ == "__main__":
    main()
