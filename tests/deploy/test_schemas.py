"""The names and schemas that saved programs hold. A change here breaks models that people saved.

Add an operator under a new name instead of changing one of these.
"""

import pytest
import torch

from attnpool_kernels import autograd, ops  # noqa: F401  registers them
from attnpool_kernels.impl import library

OPERANDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? key_bias, Tensor? q_ptr, Tensor k_ptr, "
    "Tensor? pair_ptr, Tensor? seed"
)
RESULT = "Tensor out, Tensor lse, Tensor dout, Tensor? dlse"
TANGENTS = "Tensor? ddq, Tensor? ddk, Tensor? ddv, Tensor? ddbias, Tensor? ddkey_bias"
OPTIONS = "float scale, float dropout"


def tensors(count):
    return "(" + ", ".join(["Tensor"] * count) + ")"


FORWARD = f"attention({OPERANDS}, {OPTIONS}) -> {tensors(2)}"
PASSES = {
    "attention": FORWARD,
    "attention_backward": (
        f"attention_backward({OPERANDS}, {RESULT}, {OPTIONS}, bool need_dbias) -> {tensors(5)}"
    ),
    "attention_double_backward": (
        f"attention_double_backward({OPERANDS}, {RESULT}, {TANGENTS}, {OPTIONS}) -> {tensors(7)}"
    ),
}
CONTRACT = {
    "attnpool": PASSES | {"check_ptr": "check_ptr(Tensor ptr, int rows) -> int"},
    "attnpool_triton": PASSES,
    "attnpool_autograd": {"attention": FORWARD},
}


@pytest.mark.parametrize("namespace", CONTRACT)
def test_schemas_are_what_saved_programs_hold(namespace):
    if namespace != "attnpool_triton" and library.load_cpu():
        pytest.skip("the C++ library is not built")
    for name, schema in CONTRACT[namespace].items():
        found = getattr(getattr(torch.ops, namespace), name).default._schema
        assert str(found) == f"{namespace}::{schema}"
