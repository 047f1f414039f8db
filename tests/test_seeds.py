"""--seed-shift and --torch-threads reach every test, and the processes that a test starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWS = """
import numpy as np
import torch
from hypothesis import strategies as st

from tools.drawn import drawn as property_test

drawn = []


@property_test(5, x=st.integers(0, 10**9))
def test_hypothesis(x):
    drawn.append(x)


def test_all():
    generator = torch.Generator().manual_seed(3)
    numbers = [torch.rand(1).item(), torch.rand(1, generator=generator).item()]
    numbers += [np.random.default_rng(5).random(), torch.manual_seed(4).initial_seed()]
    print("DRAWN", *numbers, sum(drawn), torch.get_num_threads())
"""


PATHS = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "ATTNPOOL_SEED_SHIFT": "0"}


def write_tests(folder, text):
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_draws.py").write_text(text)


def draws(tmp_path, *options, **environment):
    write_tests(tmp_path, DRAWS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-s", "-q", "-p", "no:cacheprovider", *options, tmp_path],
        env=os.environ | PATHS | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [x for x in done.stdout.splitlines() if "DRAWN" in x]
    return line.split("DRAWN")[1].split()


def test_every_source_of_random_numbers_is_moved(tmp_path):
    plain = draws(tmp_path)
    moved = draws(tmp_path, "--seed-shift", "7", "--torch-threads", "2")
    assert all(x != y for x, y in zip(plain, moved)), (plain, moved)
    assert int(moved[3]) == int(plain[3]) + 7 and (plain[5], moved[5]) == ("1", "2")
    assert draws(tmp_path, ATTNPOOL_SEED_SHIFT="7")[:5] == moved[:5]


def test_the_matrix_of_machines_is_whole_and_its_tests_exist():
    from tools import portable

    every = portable.combinations()
    assert (
        len({(c.instructions, c.capability, c.threads) for c in every}) == 3 * 2 * 3 == len(every)
    )
    assert len({c.shift for c in every}) == len(every) and {c.busy for c in every} == {True, False}
    for test in (*portable.TESTS, *portable.SAMPLE_TESTS):
        assert (ROOT / test.split("::")[0]).exists(), test


def test_a_failure_under_one_combination_is_the_status(tmp_path):
    """The script passes on what a combination sets, and says which one failed."""
    test = "import os\ndef test_it():\n    assert os.environ['OMP_NUM_THREADS'] != '4'"
    write_tests(tmp_path, test)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "tools" / "portable.py", "--sample", tmp_path],
        env=os.environ | PATHS,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "1 of 2 combinations passed" in done.stdout, done.stdout
    assert "failed: MKL_ENABLE_INSTRUCTIONS=AVX512" in done.stdout
