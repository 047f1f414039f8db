"""A GIN of torch_geometric for graph classification, with attention pooling as its readout.

Run: python examples/pyg_gin.py
Needs torch_geometric. The task: a graph is one large ring with a marked node, or two small rings
with one each.
"""

import torch

try:
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import GIN
except ImportError as error:
    raise SystemExit(f"needs torch_geometric: pip install torch_geometric ({error})") from None

from attnpool_kernels.zoo.pyg import SetTransformerAggregation


class Classifier(torch.nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.gnn = GIN(in_channels=2, hidden_channels=width, num_layers=3)
        # The line to change. With torch_geometric's own class of this name: the same weights, and
        # a padded batch. A batch's ptr saves reading the index, so it is passed where there is one.
        self.pool = SetTransformerAggregation(width, num_seed_points=2, heads=4, concat=False)
        self.head = torch.nn.Linear(width, 2)

    def forward(self, data: Data) -> torch.Tensor:
        x = self.gnn(data.x, data.edge_index)
        return self.head(self.pool(x, data.batch, ptr=data.ptr))


def ring(size: int) -> torch.Tensor:
    start = torch.arange(size)
    end = (start + 1) % size
    return torch.stack([torch.cat([start, end]), torch.cat([end, start])])


def graph(label: int) -> Data:
    size = int(torch.randint(6, 14, ()))
    if label == 0:
        edges, marked = ring(2 * size), [0]
    else:
        edges, marked = torch.cat([ring(size), ring(size) + size], 1), [0, size]
    x = torch.zeros(2 * size, 2)
    x[:, 0] = 1.0
    x[marked, 1] = 1.0
    return Data(x=x, edge_index=edges, y=torch.tensor([label]))


def main(steps: int = 60, size: int = 32) -> list[float]:
    """Returns the loss of every step."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        data = Batch.from_data_list([graph(i % 2) for i in range(size)])
        loss = torch.nn.functional.cross_entropy(model(data), data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
