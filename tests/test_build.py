"""Builds: where something is missing, pure Python and one line, or an error if it was asked for;
a wheel with the CUDA library, made without a GPU, that keeps the promises of a stable ABI.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEPLOYED = (  # for C++ programs
    "attnpool_kernels-config.cmake",
    "autograd.cpp",
    "include/attnpool_kernels/attention.h",
)


@pytest.fixture
def source(tmp_path):
    """A copy of what a build needs."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("not a source checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "nn", "zoo")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copytree(ROOT / "attnpool_kernels", tmp_path / "attnpool_kernels", ignore=ignored)
    return tmp_path


@pytest.fixture
def build(source):
    tmp_path = source
    (tmp_path / "bin").mkdir()

    def run(mode):
        """``setup.py build`` on a machine whose PATH holds no compiler."""
        environment = os.environ | {"ATTNPOOL_BUILD": mode, "PATH": str(tmp_path / "bin")}
        for name in ("CXX", "CC", "CUDA_HOME"):
            environment.pop(name, None)
        done = subprocess.run(
            [sys.executable, "setup.py", "build", "--build-base", "build"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1200,
        )
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


def test_code_for_every_chip_and_one_ptx_for_the_new_ones(monkeypatch):
    monkeypatch.setenv("ATTNPOOL_BUILD", "python")
    monkeypatch.setattr(sys, "argv", ["setup.py", "-q", "--name"])
    build = runpy.run_path(str(ROOT / "setup.py"))

    def codes(archs):
        return [x.removeprefix("-gencode=arch=compute_") for x in build["codes_of"](archs.split())]

    assert codes(build["CUDA_ARCHS"]) == [
        "80,code=[sm_80]",
        "90,code=[sm_90]",
        "100,code=[sm_100,sm_120,compute_100]",
    ]
    assert codes("90") == ["90,code=[sm_90,compute_90]"]
    assert codes("120 90a") == ["90a,code=[sm_90a]", "120,code=[sm_120,compute_120]"]
    assert codes("86 103 121") == ["86,code=[sm_86]", "103,code=[sm_103,sm_121,compute_103]"]


def test_sources_use_no_header_of_a_later_torch():
    """torch 2.10's headers end before 2.13's STABLE_TORCH_ERROR_CODE_CHECK."""
    for path in (ROOT / "csrc").glob("*.*"):
        assert "STABLE_TORCH_ERROR" not in path.read_text(), path


def test_a_source_distribution_holds_what_a_build_needs(source):
    """It is made where nothing is compiled, and builds elsewhere; see also `make wheel`."""
    shutil.copy(ROOT / "MANIFEST.in", source)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"],
        check=True,
        cwd=source,
        env=os.environ | {"ATTNPOOL_BUILD": "python"},
        capture_output=True,
    )
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    needed = {str(x.relative_to(source)) for x in (source / "csrc").rglob("*") if x.is_file()}
    needed |= {"setup.py", "pyproject.toml", "README.md", "LICENSE", "attnpool_kernels/py.typed"}
    needed |= {f"attnpool_kernels/deploy/{name}" for name in DEPLOYED}
    assert needed <= held, needed - held


# Of what may be absent or of another version where the wheel is used.
LIBRARIES = {"c", "m", "dl", "rt", "pthread", "stdc++", "gcc_s", "torch_cpu", "torch_cuda"}
INSTALLED = """
import torch, attnpool_kernels as a
x = torch.randn(7, 2, 8)
a.explain(x, x, x, torch.tensor([0, 3, 7]))
assert a.set_attention(x, x, x, torch.tensor([0, 3, 7]), backend="cpu").isfinite().all()
"""


def check_wheel(wheel: Path, folder: Path) -> None:
    """What a wheel with both libraries must be; folder: where it may be unpacked."""
    assert re.search(r"-cp310-abi3-\w+\.whl$", wheel.name)
    assert wheel.stat().st_size <= 30e6
    zipfile.ZipFile(wheel).extractall(folder)
    package = folder / "attnpool_kernels"
    assert {x.name for x in package.glob("*.so")} == {"_C_cpu.abi3.so", "_C_cuda.abi3.so"}
    assert all((package / "deploy" / name).exists() for name in DEPLOYED)
    for library in package.glob("*.so"):
        read = ["readelf", "--wide", "--dynamic", "--dyn-syms", library]
        text = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        needed = set(re.findall(r"\(NEEDED\).*\[lib(.+?)\.so", text))
        assert needed <= LIBRARIES, needed
        assert ("torch_cuda" in needed) == ("cuda" in library.name)
        absent = {x.partition("@")[0] for x in re.findall(r" UND (\S+)", text)}
        torch = {x for x in absent if re.match(r"_Z(T[ISV])?N?K?(2at|3c10|5torch)|aoti_|torch_", x)}
        assert torch and all(re.match("(aoti_)?torch_", x) for x in torch), torch
        assert not [x for x in absent if x.startswith(("cuda", "cu", "__cuda"))]
    for tool in (["abi3audit", "--strict"], ["auditwheel", "show"]):
        program = Path(sys.executable).with_name(tool[0])
        if program.exists():
            subprocess.run([program, *tool[1:], wheel], check=True, capture_output=True)


def check_installed(python: Path | str, folder: Path, environment: dict) -> None:
    """The CPU library serves; the CUDA library is there, not loaded, and explain says why."""
    done = subprocess.run(
        [python, "-c", INSTALLED], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "the CUDA library is not loaded" in done.stdout, done.stdout


BESIDE_CUDA = """
import torch, attnpool_kernels
from attnpool_kernels.impl import cuda
assert cuda.load() == "", cuda.load()
for name in ("attention", "attention_backward", "attention_double_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"attnpool::{name}", "CUDA")
assert not torch.cuda.is_initialized()
"""


def make_wheel(source: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps"]
    done = subprocess.run(
        [*command, "-w", "dist"],
        cwd=source,
        capture_output=True,
        text=True,
        env=os.environ | {"ATTNPOOL_BUILD": "cuda"} | environment,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (source / "dist").glob("*.whl")
    return wheel


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")


@needs_nvcc
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wheel_with_the_cuda_library(source, whole):
    """whole: as `make wheel` makes it, minutes; else one architecture and one instance a pass."""
    small = {
        "ATTNPOOL_CUDA_ARCHS": "90",
        "CXXFLAGS": "-O0",
        "NVCCFLAGS": "-DATTN_ONLY_TYPE=float -DATTN_ONLY_WIDTH=32",
    }
    wheel = make_wheel(source, **({} if whole else small))
    folder = source / "unpacked"
    check_wheel(wheel, folder)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    if torch.version.cuda is None:
        check_installed(sys.executable, folder, environment)
    else:  # every symbol is found, with or without a GPU
        command = [sys.executable, "-c", BESIDE_CUDA]
        subprocess.run(command, check=True, cwd=folder, env=environment)
