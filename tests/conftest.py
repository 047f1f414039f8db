"""Shared fixtures: uninitialised memory is poisoned, threads are few, seeds are fixed."""

import os

import pytest
import seeds
import torch

import attnpool_kernels
from attnpool_kernels import backends


def pytest_addoption(parser):
    parser.addoption(
        "--seed-shift", type=int, default=seeds.shift(), help="move every seed of the tests by this"
    )
    parser.addoption("--torch-threads", type=int, default=1, help="threads of torch in every test")


def pytest_configure(config):
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
        if backends.load(name).KIND == "kernel" and not backends.load(name).why_not(problem)
    ]


def pytest_generate_tests(metafunc):
    if "native" in metafunc.fixturenames:
        metafunc.parametrize("native", native_backends() or ["reference"])
