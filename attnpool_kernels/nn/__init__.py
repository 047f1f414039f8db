"""Modules around the operator: attention layers, Set Transformer blocks and poolings.

Every pooling is called ``pool(x, ptr)`` with x [N, C] and ``ptr`` [B + 1] or a ``Ragged``, and
returns [B, C_out]. State dicts hold parameters only and do not depend on backend or device.
"""

from .abp import AttentionPooling
from .attention import SetAttention
from .blocks import ISAB, MAB, ORIGINAL, PAPER, PMA, PYG, SAB, SetTransformer
from .esa import EdgeSetAttention, EdgeSetEncoder, edge_sets
from .multihead import MultiheadAttention
from .pooling import (
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
from .readouts import BatchPooling, Multi, Set2Set, StdPooling, VarPooling

__all__ = [
    "ISAB",
    "MAB",
    "ORIGINAL",
    "PAPER",
    "PMA",
    "PYG",
    "SAB",
    "AttentionPooling",
    "AttentionalPooling",
    "BatchPooling",
    "EdgeSetAttention",
    "EdgeSetEncoder",
    "MaxPooling",
    "MeanPooling",
    "Multi",
    "MultiheadAttention",
    "OrbitalWeightedAverage",
    "Perceptron",
    "SeedPooling",
    "Set2Set",
    "SetAttention",
    "SetTransformer",
    "SoftmaxPooling",
    "StdPooling",
    "SumPooling",
    "VarPooling",
    "WeightedAverage",
    "edge_sets",
]
