"""A pooling in the place of SchNetPack's ``Atomwise``: dictionary in, dictionary out.

Imports nothing of SchNetPack; the keys are those of its versions 2.x. Where torch is 2.13 or later,
``libraries.schnetpack()`` imports it: up to 2.1.1 it asks torch for a name that is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..nn.arguments import module_or_none, refuse_trace
from ..ragged import Ragged


class PooledAtomwise(torch.nn.Module):
    """Property of a molecule from the pooled representation of its atoms.

    Args:
        pool: any pooling ``pool(x [N, C], Ragged) → [B, C_out]``.
        head: applied to the pooled rows, e.g. ``torch.nn.Linear(C_out, 1)``; None: nothing.
        output_key: of the result in the dictionary.
        input_key: of the atoms' rows [N, C].

    ``forward`` reads ``_idx_m`` [N], the sorted molecule index, and where it is there ``_n_atoms``
    [B], whose length is the number of molecules; without it the last index is read on the host.
    A width of 1 is squeezed from the result, as ``Atomwise`` does. Twice differentiable, so
    SchNetPack's ``Forces`` train through it.

    Examples:
        >>> from attnpool_kernels.nn import SumPooling
        >>> output = PooledAtomwise(SumPooling(), torch.nn.Linear(8, 1))
        >>> rows = {"scalar_representation": torch.randn(3, 8), "_idx_m": torch.tensor([0, 0, 1])}
        >>> output(rows)["y"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        pool: torch.nn.Module,
        head: torch.nn.Module | None = None,
        output_key: str = "y",
        input_key: str = "scalar_representation",
    ) -> None:
        super().__init__()
        module_or_none("pool", pool, required=True)
        module_or_none("head", head)
        for name, key in (("output_key", output_key), ("input_key", input_key)):
            if not isinstance(key, str):
                raise TypeError(f"{name} must be a str, got {type(key).__name__}")
        self.pool, self.head = pool, head
        self.output_key, self.input_key = output_key, input_key
        self.model_outputs = [output_key]

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        refuse_trace()
        counts = inputs.get("_n_atoms")
        ragged = Ragged.from_batch(inputs["_idx_m"], None if counts is None else counts.shape[0])
        y = self.pool(inputs[self.input_key], ragged)
        if self.head is not None:
            y = self.head(y)
        inputs[self.output_key] = y.squeeze(-1)
        return inputs
