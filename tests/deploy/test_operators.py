"""The operators serve a C++ program in which there is no Python."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import attnpool_kernels
from attnpool_kernels import deploy

PROGRAM = Path(__file__).with_name("operators.cpp")
LIBRARIES = sorted(Path(attnpool_kernels.__file__).parent.glob("_C_cpu*.so"))


@pytest.mark.skipif(not LIBRARIES, reason="the C++ library is not built")
@pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
def test_a_program_without_python_calls_the_operator(tmp_path):
    home = Path(torch.__file__).parent
    command = [
        "g++",
        "-std=c++20",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-isystem",
        home / "include",
        "-I",
        deploy.FOLDER / "include",
        PROGRAM,
        "-o",
        tmp_path / "program",
        "-L",
        home / "lib",
        f"-Wl,-rpath,{home / 'lib'}",
        "-Wl,--no-as-needed",
        "-ltorch_cpu",
        "-lc10",
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "program", LIBRARIES[0]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
