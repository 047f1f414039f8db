"""--seed-shift and --torch-threads reach every test, and the processes that a test starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWS = """
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from test_properties import examples

drawn = []


@examples(5)
@given(st.integers(0, 10**9))
def test_hypothesis(x):
    drawn.append(x)


def test_all():
    generator = torch.Generator().manual_seed(3)
    numbers = [torch.rand(1).item(), torch.rand(1, generator=generator).item()]
    numbers += [np.random.default_rng(5).random(), torch.manual_seed(4).initial_seed()]
    print("DRAWN", *numbers, sum(drawn), torch.get_num_threads())
"""


def draws(tmp_path, *options, **environment):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_draws.py").write_text(DRAWS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", *options, tmp_path],
        env=os.environ
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ATTNPOOL_SEED_SHIFT": "0"}
        | environment,
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [x for x in done.stdout.splitlines() if "DRAWN" in x]
    return line.split("DRAWN")[1].split()


def test_every_source_of_random_numbers_is_moved(tmp_path):
    plain = draws(tmp_path)
    moved = draws(tmp_path, "--seed-shift", "7", "--torch-threads", "2")
    assert all(x != y for x, y in zip(plain, moved)), (plain, moved)
    assert int(moved[3]) == int(plain[3]) + 7 and (plain[5], moved[5]) == ("1", "2")
    assert draws(tmp_path, ATTNPOOL_SEED_SHIFT="7")[:5] == moved[:5]
