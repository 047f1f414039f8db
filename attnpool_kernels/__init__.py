"""Exact, ragged, twice-differentiable set attention and seed pooling for molecules.

``set_attention`` and ``seed_pool`` work on concatenated batches without padding; ``Ragged`` holds
the molecules' boundaries; ``explain`` says which backend serves a call and why; ``backends`` lists
their names. Optional packages are imported only when a backend that needs them is asked.
"""

from . import ragged
from .dispatch import BackendError, backends
from .functional import explain, seed_pool, set_attention
from .problem import Problem
from .ragged import Ragged
from .weights import attention_weights

__version__ = "0.2.0"

__all__ = [
    "BackendError",
    "Problem",
    "Ragged",
    "attention_weights",
    "backends",
    "explain",
    "ragged",
    "seed_pool",
    "set_attention",
]
