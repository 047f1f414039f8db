"""The CPU kernels on another processor: see tests/tools/processors.py."""

import pytest
import torch
from tools import processors


@pytest.mark.slow  # a minute of compiling
@pytest.mark.skipif(bool(processors.missing()), reason=processors.missing())
def test_arm_computes_what_this_machine_does():
    assert not processors.violations(processors.compare())


def test_the_comparison_can_fail():
    good = {"float32 x.out": torch.tensor([1.0, -torch.inf, 4.0], dtype=torch.float64)}
    assert not processors.violations(processors.differences(good, good))
    for i, wrong in ((0, 1.001), (0, torch.nan), (1, 0.0), (1, torch.inf), (2, torch.inf)):
        bad = {name: x.clone() for name, x in good.items()}
        bad["float32 x.out"][i] = wrong
        assert processors.violations(processors.differences(good, bad)), wrong
    with pytest.raises(AssertionError):
        processors.differences(good, {})
