"""The models of examples/deploy in C++ without Python and in fresh Python processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnpool_kernels import deploy
from attnpool_kernels.impl import library

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deploy"

pytestmark = [
    pytest.mark.skipif(library.load_cpu() != "", reason="the C++ library is not built"),
    pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed"),
]
needs_cmake = pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What the example writes."""
    folder = tmp_path_factory.mktemp("models")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run(sys.executable, "-W", "ignore", EXAMPLE / "export_models.py", folder, env=environment)
    assert {"pool.pt2", "neighbours.pt2", "pool.pt", "neighbours.pt"} <= set(os.listdir(folder))
    return folder


@needs_cmake
def test_in_cpp_without_python(models, tmp_path):
    """Found by CMake, built, run; it knows what Python gave, for batches of other sizes."""
    prefix = run(sys.executable, "-m", "attnpool_kernels.deploy", "cmake").strip()
    run("cmake", "-S", EXAMPLE, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path, "--parallel", "2")
    dynamic = run("readelf", "--dynamic", tmp_path / "deployed")
    needed = " ".join(line for line in dynamic.splitlines() if "(NEEDED)" in line)
    assert "_C_cpu" in needed and "attnpool_kernels_autograd" in needed and "python" not in needed
    programs = [*models.glob("*.pt"), *models.glob("*.pt2")]
    for program in (x for x in programs if ".exported" not in x.name):
        data = program.with_suffix(".data")
        print(run(tmp_path / "deployed", program, data))
    wrong = models / "pool.data"
    done = subprocess.run(
        [tmp_path / "deployed", models / "neighbours.pt", wrong], capture_output=True
    )
    assert done.returncode != 0


FRESH = """
import sys, torch, {first}
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    name = path.name.split(".")[0]
    if "exported" in path.name:
        program = torch.export.load(path).module()
    else:
        program = torch._inductor.aoti_load_package(str(path))
    for inputs, expected in torch.load(path.with_name(name + ".data")):
        found = program(*inputs)
        found = found if isinstance(found, (tuple, list)) else [found]
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
"""


def test_in_a_fresh_python_process(models):
    paths = sorted(models.glob("*.pt2"))
    assert len(paths) >= 4
    run(sys.executable, "-W", "ignore", "-c", FRESH.format(first="attnpool_kernels"), *paths)


WITHOUT_THE_PACKAGE = """
import sys, torch
model, data, *libraries = sys.argv[1:]
for path in libraries:
    torch.ops.load_library(path)
z, pos, index, ptr = torch.load(data)[0][0]
energy, force = torch.load(data)[0][1]
def forces(create_graph=False):
    x = pos.clone().requires_grad_()
    found = torch.jit.load(model)(z, x, index, ptr).sum()
    return x, -torch.autograd.grad(found, x, create_graph=create_graph)[0]
def second():
    x, found = forces(True)
    return torch.autograd.grad(found.square().sum(), x)[0]
torch.testing.assert_close(forces()[1], force, rtol=0, atol=1e-12)
in_cpp = second()
x, found = forces(True)
(once,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
try:
    torch.autograd.grad(once.sum(), x)
    raise SystemExit("a third derivative was given")
except NotImplementedError as error:
    assert "third derivative" in str(error)
assert "attnpool_kernels" not in sys.modules
import attnpool_kernels  # and the two do not get into each other's way
torch.testing.assert_close(forces()[1], force, rtol=0, atol=1e-12)
q = torch.randn(5, 2, 4, requires_grad=True)
attnpool_kernels.set_attention(q, q, q, torch.tensor([0, 5])).sum().backward()
torch.save(in_cpp, data + ".second")
"""


def test_libraries_alone_serve_torchscript(models, tmp_path):
    """As an engine does that loads a model's libraries; the second derivative is Python's."""
    built = deploy.build_autograd(tmp_path / "autograd.so")
    model, data = models / "neighbours.pt", models / "neighbours.data"
    # In any order.
    run(sys.executable, "-c", WITHOUT_THE_PACKAGE, model, data, built, *deploy.libraries())
    z, pos, index, ptr = torch.load(data)[0][0]
    pos.requires_grad_()
    energy = torch.jit.load(model)(z, pos, index, ptr).sum()
    (gradient,) = torch.autograd.grad(energy, pos, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), pos)
    torch.testing.assert_close(torch.load(f"{data}.second"), second, rtol=1e-12, atol=1e-12)


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match="no-such-compiler"):
        deploy.build_autograd(tmp_path / "autograd.so")
