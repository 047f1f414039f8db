"""The errors of the kernels are those of the committed table (tools/accuracy.csv)."""

import pytest
import torch
from tools import accuracy

from attnpool_kernels import testing

LOOSER = 2.0  # other machines round otherwise, and a part has fewer numbers


@pytest.mark.parametrize("dtype", accuracy.DTYPES, ids=str)
def test_no_error_has_grown(dtype):
    committed = accuracy.read()
    chosen = accuracy.cases()[::6]
    for name, run in accuracy.backends():
        for line in accuracy.lines(name, run, dtype, chosen):
            before = committed[line[:3]]
            assert line.largest <= max(1.0, LOOSER * before.largest), (line, before)
            assert line.permille <= LOOSER * before.permille + 0.05, (line, before)


def test_a_loss_of_accuracy_shows():
    """Values of half the precision are far outside of the lines of float32."""
    kept = accuracy.read()["reference", "float32", "forward"]

    def rounded(batch):
        result = testing.run_public(batch, "reference")
        return {k: x.bfloat16().to(x.dtype) for k, x in result.items()}

    line = accuracy.lines("reference", rounded, torch.float32, accuracy.cases()[:3])[0]
    assert line.largest > 10 * kept.largest and line.permille > 10 * kept.permille
