"""Without the other package an integration imports, and says what it needs when it is called."""

import importlib
import sys

import pytest
import torch


@pytest.fixture
def without(monkeypatch):
    def block(package):
        for name in [package, *sys.modules]:
            if name.split(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)

    return block


@pytest.mark.parametrize("name", ["use_attnpool", "use_own_attention"])
def test_metatrain(without, monkeypatch, name):
    without("metatrain")
    monkeypatch.delitem(sys.modules, "attnpool_kernels.integrations.metatrain", raising=False)
    module = importlib.import_module("attnpool_kernels.integrations.metatrain")
    with pytest.raises(ImportError, match="this needs metatrain: pip install metatrain=="):
        getattr(module, name)(torch.nn.Linear(1, 1))


def test_what_metatrain_needs(without, monkeypatch):
    pytest.importorskip("metatrain")
    for name in [x for x in sys.modules if x.split(".")[0] in ("metatrain", "metatomic")]:
        monkeypatch.delitem(sys.modules, name)
    without("metatomic")
    module = importlib.import_module("attnpool_kernels.integrations.metatrain")
    with pytest.raises(ImportError, match=r"metatrain needs metatomic.*: pip install metatrain=="):
        module.use_attnpool(torch.nn.Linear(1, 1))
