"""Without the other package an integration imports, and says what it needs when it is called."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from attnpool_kernels.integrations import metatrain as integration


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


def test_the_versions_tried_are_those_installed_and_documented():
    root = Path(__file__).parents[2]
    wanted = f"metatrain=={integration.TRIED}"
    assert f'"{wanted}"' in (root / "pyproject.toml").read_text()
    assert wanted in (root / "examples" / "pet_metatrain.py").read_text()
    page = root / "docs" / "tutorials" / "neighbours.md"
    assert f"PET of metatrain {integration.TRIED}" in page.read_text()
