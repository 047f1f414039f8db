"""The API reference: every public name is on a page, and has an example that runs."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import attnpool_kernels
from attnpool_kernels import layouts, nn
from attnpool_kernels.impl import cpu
from attnpool_kernels.integrations import metatrain

ROOT = Path(__file__).parents[2]
NAMES = [
    name
    for page in sorted((ROOT / "docs" / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
]
# Names of modules whose documented objects cannot be imported without these.
NEEDS = {"zoo.pyg": "torch_geometric", "zoo.gps": "torch_geometric", "zoo.calculator": "ase"}
NEEDS |= {"zoo.model": "torch_geometric", "zoo.backbones": "torch_geometric"}  # to be run
NOT_RUN = {  # of which an example is shown only: what it needs takes minutes, or another package
    "attnpool_kernels.deploy.build_autograd",
    "attnpool_kernels.integrations.metatrain.use_attnpool",
    "attnpool_kernels.integrations.metatrain.use_own_attention",
}


COMPILED = {"attnpool_kernels.testing.check_kernels", "attnpool_kernels.deploy.libraries"}


def resolve(name):
    """The object of a name, where what it needs is installed."""
    if name in COMPILED and cpu.load():
        pytest.skip("the C++ library is not built")
    for needing, package in NEEDS.items():
        if name.startswith(f"attnpool_kernels.{needing}."):
            pytest.importorskip(package)
    place, _, last = name.rpartition(".")
    return getattr(importlib.import_module(place), last)


def test_every_public_name_is_on_a_page():
    public = {f"attnpool_kernels.{x}" for x in attnpool_kernels.__all__} - {
        "attnpool_kernels.ragged"  # a module: its function is there
    }
    public |= {f"attnpool_kernels.nn.{x}" for x in nn.__all__ if not x.isupper() or x in BLOCKS}
    public |= {f"attnpool_kernels.layouts.{x}" for x in layouts.__all__}
    public |= {f"attnpool_kernels.integrations.metatrain.{x}" for x in metatrain.__all__}
    assert public <= set(NAMES), public - set(NAMES)
    assert len(NAMES) == len(set(NAMES))


BLOCKS = ("MAB", "SAB", "ISAB", "PMA")  # the other names in capitals are dictionaries of options


def examples(name):
    found = resolve(name)
    module = importlib.import_module(found.__module__)
    (test,) = doctest.DocTestFinder(recurse=False).find(
        found, name, module, globs=dict(vars(module))
    )
    return test


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    test = examples(name)
    assert test.examples, f"{name} has no example"
    skipped = [x for x in test.examples if doctest.SKIP in x.options]
    assert bool(skipped) == (name in NOT_RUN)
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_an_example_that_is_wrong_is_noticed():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(wrong, out=lambda _: None)
    assert runner.failures == 1
