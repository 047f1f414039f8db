"""What the tests of the CPU kernels share."""

import pytest
import torch

from attnpool_kernels.impl import cpu


def _built():
    """The vector widths that the CPU library was built for; none without it."""
    if cpu.load():
        return []
    return torch.ops.attnpool.build_info().split("built for ")[1].split(";")[0].split()


@pytest.fixture(params=_built())
def width(request):
    """Runs a test by the kernels of each vector width that this machine has."""
    try:
        torch.ops.attnpool._use_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.attnpool._use_isa("")
