"""One workload: which molecules, how wide, in which layout, and the work that it takes at least."""

from __future__ import annotations

from dataclasses import dataclass

import torch

PASSES = ("forward", "backward", "double_backward")  # each contains the ones before it


@dataclass(frozen=True)
class Workload:
    """One batch. ``x`` is its place on the axis of its family (atoms per molecule, or seeds)."""

    name: str
    family: str
    sizes: tuple[int, ...]
    heads: int = 8
    dim: int = 32
    seeds: int | None = None  # shared queries: seed pooling instead of set attention
    dtype: torch.dtype = torch.float32
    layout: str = "separate"  # or "fused": q, k, v are views of one [N, 3, H, D]
    x: int | None = None
    passes: tuple[str, ...] = PASSES
    rivals: bool = True  # False: only our native backends, for what would take the others minutes
    patience: float = 1.0  # factor on the longest call that is waited for
    without: tuple[str, ...] = ()  # contenders left out unless they are asked for by name
    key_bias: bool = False  # one number per key and head is added to the logits
    module: bool = False  # a whole Set Transformer pooling module instead of the operator

    @property
    def atoms(self) -> int:
        return sum(self.sizes)

    @property
    def pairs(self) -> int:
        """Query-key pairs of all molecules, for one head."""
        if self.seeds is not None:
            return self.seeds * self.atoms
        return sum(n * n for n in self.sizes)

    @property
    def dtype_name(self) -> str:
        """As it stands in a CSV: float32, not torch.float32."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """Names the workload in a CSV: two with one key would be the same measurement."""
        parts = [self.name, f"{self.heads}x{self.dim}", self.dtype_name]
        parts += [f"S={self.seeds}"] * (self.seeds is not None) + [self.layout]
        parts += ["key_bias"] * self.key_bias
        return " ".join(parts)

    def work(self, what: str) -> tuple[float, float]:
        """Flops and bytes that no way to compute the passes can do without.

        Flops: 2 matrix products forward, 4 backward, 10 for the second derivative, where the
        weights are kept. (Kernels of linear memory compute 1 and 2 of them again.) Bytes: rows of
        q, k, v and out, each touched once; with out, their gradients and cotangents after.
        """
        products = {"forward": 2, "backward": 6, "double_backward": 16}[what]
        queries = self.atoms if self.seeds is None else len(self.sizes) * self.seeds
        tensors = {"forward": 2, "backward": 6, "double_backward": 12}[what]
        k_rows, q_rows = tensors * self.atoms, tensors * queries
        if self.seeds is not None:  # the seeds themselves are few: only out and its kin count
            q_rows //= 2
        row = self.heads * self.dim
        flops = 2.0 * products * self.pairs * row
        return flops, float((q_rows + k_rows) * row * self.dtype.itemsize)
