"""A build where something is missing: pure Python and one line, or an error if it was asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(tmp_path):
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a source checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "nn", "zoo")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "attnpool_kernels", tmp_path / "attnpool_kernels", ignore=ignored)
    (tmp_path / "bin").mkdir()

    def run(mode):
        """``setup.py build`` on a machine whose PATH holds no compiler."""
        environment = os.environ | {"ATTNPOOL_BUILD": mode, "PATH": str(tmp_path / "bin")}
        for name in ("CXX", "CC", "CUDA_HOME"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "setup.py", "build", "--build-base", "build"],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return done, list(tmp_path.rglob("*.so"))

    return run


def test_without_a_compiler_it_is_pure_python_and_says_so(build):
    done, libraries = build("auto")
    assert done.returncode == 0 and not libraries
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "CPU library" in line]
    assert len(lines) == 1 and "no C++ compiler" in lines[0], done.stdout + done.stderr


def test_pure_python_on_request(build):
    done, libraries = build("python")
    assert done.returncode == 0 and not libraries


@pytest.mark.parametrize(("mode", "word"), [("cpu", "C++ compiler"), ("fast", "fast")])
def test_what_was_asked_and_cannot_be_is_an_error(build, mode, word):
    done, _ = build(mode)
    assert done.returncode != 0 and word in done.stderr + done.stdout
