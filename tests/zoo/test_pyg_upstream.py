"""torch_geometric's own test of its class, with ours in its place.

The file belongs to torch_geometric and is not in its wheel: name a checkout of it in the
environment variable PYG_CHECKOUT; without one this is skipped.
"""

import os
import runpy
from pathlib import Path

import pytest

FILE = "test/nn/aggr/test_set_transformer.py"


def test_their_tests_with_our_class(monkeypatch):
    checkout = os.environ.get("PYG_CHECKOUT")
    if not checkout:
        pytest.skip(f"PYG_CHECKOUT names no checkout of torch_geometric with {FILE}")
    aggr = pytest.importorskip("torch_geometric.nn.aggr")
    from attnpool_kernels.zoo.pyg import SetTransformerAggregation

    monkeypatch.setattr(aggr, "SetTransformerAggregation", SetTransformerAggregation)
    names = runpy.run_path(str(Path(checkout) / FILE))
    assert names["SetTransformerAggregation"] is SetTransformerAggregation
    tests = [call for name, call in names.items() if name.startswith("test_")]
    assert tests
    for call in tests:
        call()
