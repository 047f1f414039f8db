"""Shared fixtures: uninitialised memory is poisoned, threads are few, seeds are fixed."""

import contextlib
import os

import pytest
import torch
from tools import seeds

import attnpool_kernels
from attnpool_kernels import backends, impl

# Files that compile, interpret or run other processes for minutes: they begin first, so that with
# several processes none is left alone with one of them at the end.
FIRST = (
    "test_triton.py",
    "test_cuda_sanitizers.py",
    "test_triton_bits.py",
    "test_cuda_bugs.py",
    "test_triton_compiled.py",
    "test_cuda_few_seeds_bugs.py",
    "test_cuda_ptx.py",
    "test_cuda_compile.py",
    "test_evidence.py",
)


def pytest_collection_modifyitems(items):
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


def pytest_addoption(parser):
    parser.addoption(
        "--seed-shift", type=int, default=seeds.shift(), help="move every seed of the tests by this"
    )
    parser.addoption("--torch-threads", type=int, default=1, help="threads of torch in every test")


def pytest_configure(config):
    # torch_geometric replaces torch.index_select by a function that TorchScript cannot compile, so
    # what metatrain compiles at its import comes before the tests that import both. Not in
    # processes for single files, of which some have sanitizers loaded or Triton's interpreter.
    named = [str(x).split("::")[0] for x in config.args]
    if not all(x.endswith(".py") for x in named) or any(
        "pet" in x or "metatrain" in x for x in named
    ):
        with contextlib.suppress(ImportError):
            import metatrain.pet  # noqa: F401
    number = config.getoption("--seed-shift")
    os.environ[seeds.VARIABLE] = str(number)
    if number:
        patch = pytest.MonkeyPatch()
        config.add_cleanup(patch.undo)
        seeds.install(patch)


@pytest.fixture(autouse=True)
def _poisoned_empties():
    """Fills every torch.empty with NaN, so that an element nobody writes is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _seed(pytestconfig):
    torch.manual_seed(0)
    # Tiny tensors on a busy machine: torch's threads would wait for each other at every operator.
    # What must not depend on the number of threads sets it itself.
    torch.set_num_threads(pytestconfig.getoption("--torch-threads"))


def native_backends():
    """Names of the kernel backends that run on this machine's CPU."""
    problem = attnpool_kernels.Problem("cpu", torch.float32, 8, 8)
    return [
        name
        for name in backends()
        if impl.load(name).KIND == "kernel" and not impl.load(name).why_not(problem)
    ]


def pytest_generate_tests(metafunc):
    if "native" in metafunc.fixturenames:
        metafunc.parametrize("native", native_backends() or ["reference"])
