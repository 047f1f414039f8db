"""Attention pooling in plain torch, from the number of atoms of each molecule.

Run: python examples/plain_torch.py
Needs nothing but torch. The model learns the largest gap between two atoms' charges, which no sum
over atoms can give.
"""

import torch

from attnpool_kernels import Ragged
from attnpool_kernels.nn import AttentionPooling


class Model(torch.nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.SiLU())
        # The line to change: any pooling of attnpool_kernels.nn has the same call.
        self.pool = AttentionPooling(width, width, heads=4, seeds=4)
        self.head = torch.nn.Linear(width, 1)

    def forward(self, charges: torch.Tensor, molecules: Ragged) -> torch.Tensor:
        return self.head(self.pool(self.embed(charges), molecules)).squeeze(1)


def batch(size: int) -> tuple[torch.Tensor, Ragged, torch.Tensor]:
    counts = torch.randint(2, 24, (size,))
    charges = torch.randn(int(counts.sum()), 1)
    parts = charges.squeeze(1).split(counts.tolist())
    target = torch.stack([part.max() - part.min() for part in parts])
    return charges, Ragged.from_counts(counts), target


def main(steps: int = 200, size: int = 64) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for step in range(steps):
        charges, molecules, target = batch(size)
        loss = torch.nn.functional.mse_loss(model(charges, molecules), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
