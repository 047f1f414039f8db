"""The CUDA kernels compiled for the CPU, as a kernel backend: the same source that nvcc compiles.

``build()`` makes a Python module with ninja from csrc/cuda and the twins in tests/tools/host;
``Kernels`` gives its three passes the interface of a backend, so the cases and the budget of
``attnpool_kernels.testing`` judge it. Nothing here runs on a GPU.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from attnpool_kernels import autograd, ops, testing
from attnpool_kernels.operands import (
    Cotangents,
    Gradients,
    Operands,
    Options,
    Result,
    SecondGradients,
    Tangents,
    accumulator,
)
from attnpool_kernels.ragged import longest_of

ROOT = Path(__file__).parents[2]
MODULE = "attnpool_cuda_host"
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
POINTERS = {"q_ptr", "k_ptr", "pair_ptr", "seed"}
POINTERS |= {"statistics", "partial", "partial_sums", "parts"}  # scratch
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


def missing() -> str:
    """Why the module cannot be built here, or an empty string."""
    for tool in ("g++", "ninja"):
        if not shutil.which(tool) and not (Path(sys.executable).parent / tool).exists():
            return f"{tool} is not installed"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return ""


@cache
def build(sanitize: bool = False, edit: tuple[str, str, str] | None = None):
    """The module; edit = (file in csrc/cuda, text, other text) plants a bug in a copy of csrc, of
    which what the edit touches is compiled anew, for float32 of width 32 only.

    sanitize: this process must have started with AddressSanitizer's library loaded.
    """
    library = compile_module(sanitize, edit)
    # pybind11 keeps one module for each full name
    name = f"{library.parent.name}.{MODULE}"
    spec = importlib.util.spec_from_file_location(name, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_module(sanitize: bool = False, edit: tuple[str, str, str] | None = None) -> Path:
    """The library, compiled where it is not of these sources; one process at a time for each."""
    key = hashlib.sha256(repr((sanitize, edit)).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"cuda_host_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        return _compile_module(folder, sanitize, edit)


def _compile_module(folder: Path, sanitize: bool, edit: tuple[str, str, str] | None) -> Path:
    import pybind11

    csrc, twins = ROOT / "csrc", Path(__file__).parent / "host"
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-DMODULE_NAME={MODULE}"]
    flags += ["-O1", *SANITIZE] if sanitize else ["-O2"]
    ready: dict[str, Path] = {}  # objects that an edit leaves as they are
    if edit:  # the headers are found by relative path, so the tree is copied
        shutil.copytree(csrc, folder / "csrc", dirs_exist_ok=True)
        shutil.copytree(twins, folder / "tests" / "tools" / "host", dirs_exist_ok=True)
        csrc, twins = folder / "csrc", folder / "tests" / "tools" / "host"
        path = csrc / "cuda" / edit[0]
        source = path.read_text()
        assert edit[1] in source, f"{edit[0]} has no {edit[1]!r}"
        path.write_text(source.replace(edit[1], edit[2], 1))
        flags += ["-DATTN_ONLY_TYPE=float", "-DATTN_ONLY_WIDTH=32"]
        whole = compile_module(sanitize).parent
        same = [x for x in SOURCES if edit[0].endswith(".cu") and edit[0] != f"{x}.cu"]
        ready = {x: whole / f"{x}.o" for x in ("host_module", *same)}
    includes = pybind11.get_include(), sysconfig.get_path("include")
    flags += [f"-isystem {path}" for path in includes]
    library = folder / f"{MODULE}{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = {"host_module": twins / "host_module.cpp"}
    sources |= {x: csrc / "cuda" / f"{x}.cu" for x in SOURCES}
    objects = " ".join(str(ready.get(x, f"{x}.o")) for x in sources)
    lines = [
        f"flags = {' '.join(flags)} -x c++ -include {twins / 'host_shim.h'}",
        "rule compile",
        "  command = g++ $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ -shared {' '.join(SANITIZE) if sanitize else ''} $in -o $out",
        *[f"build {x}.o: compile {path}" for x, path in sources.items() if x not in ready],
        f"build {library}: link {objects}",
        "",
    ]
    script = folder / "build.ninja"
    if not script.exists() or script.read_text() != "\n".join(lines):
        script.write_text("\n".join(lines))
    ninja = shutil.which("ninja") or str(Path(sys.executable).parent / "ninja")
    done = subprocess.run([ninja, "-C", folder, "-j2"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return library


class Kernels:
    """A kernel backend that runs a host module.

    schedule: the order in which emulated threads run (tests/tools/host/fibers.h); vector: whether
    16-byte copies are allowed; split: keys of a part of a molecule with few seeds. Outputs and
    scratch are NaN before the call. longest: the rows of the longest molecule, 0 where unknown,
    None for what is known of the boundaries.
    """

    KIND = "kernel"
    OPERATORS = "attnpool_host"
    __name__ = "attnpool_kernels.impl.cuda"

    def __init__(
        self,
        module,
        schedule: int = 0,
        vector: bool = True,
        split: int = 512,
        longest: int | None = None,
    ):
        self.module, self.schedule, self.vector, self.split = module, schedule, vector, split
        self.longest = longest

    def why_not(self, problem) -> list[str]:
        return []

    def forward(self, x: Operands, options: Options) -> Result:
        rows = (*x.rows, x.q.shape[1])
        y = Result(_nan(x.q, (*rows, x.v.shape[2])), _nan(x.q, rows, accumulator(x.q.dtype)))
        self._run("forward", x.q, self._call(x, options) | y._asdict())
        return y

    def backward(
        self, x: Operands, y: Result, dy: Cotangents, options: Options, need_dbias: bool
    ) -> Gradients:
        rows = (_nan(part, part.shape) for part in x[:3])
        dbias = _like_bias(x.bias if need_dbias else None, x.q)
        dx = Gradients(*rows, dbias, _like_bias(x.key_bias, x.q))
        call = self._call(x, options) | y._asdict() | dy._asdict() | dx._asdict()
        call["dbias"] = dx.dbias if need_dbias and x.bias is not None else None
        call["dkey_bias"] = None if x.key_bias is None else dx.dkey_bias
        self._run("backward", x.q, call)
        return dx

    def double_backward(
        self, x: Operands, y: Result, dy: Cotangents, tangents: Tangents, options: Options
    ) -> SecondGradients:
        rows = (_nan(part, part.shape) for part in x[:3])
        biases = (_like_bias(part, x.q) for part in (x.bias, x.key_bias))
        gx = SecondGradients(*rows, *biases, *(_nan(part, part.shape) for part in y))
        call = self._call(x, options) | y._asdict() | dy._asdict() | tangents._asdict()
        call |= gx._asdict()
        for name in ("bias", "key_bias"):
            if call[name] is None:
                call[f"g{name}"] = None
        self._run("double_backward", x.q, call)
        return gx

    def _call(self, x: Operands, options: Options) -> dict:
        scale, dropout = options
        longest = self.longest
        if longest is None:
            longest = longest_of(x.q_ptr, x.k_ptr, x.q.shape[0]) or 0
        return x._asdict() | {
            "molecules": x.molecules,
            "heads": x.q.shape[1],
            "head_dim": x.q.shape[2],
            "value_dim": x.v.shape[2],
            "query_rows": x.q.shape[0],
            "key_rows": x.k.shape[0],
            "pairs": 0 if x.bias is None else x.bias.shape[0],
            "scale": scale,
            "keep_scale": 1 / (1 - dropout),
            "drop_threshold": math.floor(dropout * 2**32),
            "dtype": DTYPES[x.q.dtype],
            "bias_dtype": DTYPES[x.q.dtype if x.bias is None else x.bias.dtype],
            "key_bias_dtype": DTYPES[x.q.dtype if x.key_bias is None else x.key_bias.dtype],
            "ptr_is_64": int(x.k_ptr.dtype == torch.int64),
            "shared_seeds": int(x.shared),
            "vector": self.vector,
            "split": self.split,
            "longest": longest,
        }

    def _run(self, name: str, q: Tensor, call: dict):
        """Allocates what csrc/library_cuda.cpp does."""
        sizes = self.module.scratch(name, self._plain(call))
        scratch = {
            x: _nan(q, (size,), accumulator(q.dtype)) if size else None for x, size in sizes.items()
        }
        values = [x for x in (call | scratch).values() if x is not None]
        status = self._launch(name, self._plain(call | scratch), values)
        if status:
            raise RuntimeError(f"launch failed: {status}")

    @staticmethod
    def _plain(call: dict) -> dict:
        by_molecule = call["q_ptr"] is None
        return {
            name: (0 if x is None else x.data_ptr())
            if name in POINTERS
            else _view(x, name, by_molecule)
            if x is None or isinstance(x, Tensor)
            else x
            for name, x in call.items()
        }

    def _launch(self, name: str, plain: dict, values: list) -> int:
        return self.module.run(name, plain, self.schedule)


_registered: list[Kernels] = []


def registered(kernels: Kernels) -> Kernels:
    """The same, as a backend of the public functions; the last one that was registered runs."""
    if kernels.OPERATORS not in ops.PASSES:
        ops.define(kernels.OPERATORS, lambda: _registered[-1])
        autograd.differentiable(kernels.OPERATORS)
    _registered.append(kernels)
    return kernels


def _like_bias(x: Tensor | None, q: Tensor) -> Tensor:
    """A result for a bias or a key_bias; without rows where that is absent or none is wanted."""
    return q.new_empty((0, q.shape[1])) if x is None else _nan(x, x.shape)


def _nan(like: Tensor, shape, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full(tuple(shape), math.nan, dtype=dtype or like.dtype)


def _view(x: Tensor | None, name: str, by_molecule: bool):
    """(address, strides of molecules, rows, heads, units), as csrc/bridge.h makes it."""
    if x is None:
        return None
    strides = list(x.stride())
    results = name in ("out", "lse", "dout", "dlse", "gdout", "gdlse")
    molecule = strides.pop(0) if by_molecule and results else 0
    return (x.data_ptr(), molecule, *strides, *[0] * (3 - len(strides)))


def compare_absent_cotangents(kernels: Kernels, batch: testing.Batch) -> None:
    """A cotangent that is absent must give the bits of one that is zero."""
    names = ["ddq", "ddk", "ddv", "dlse"]
    names += [name for name in ("ddbias", "ddkey_bias") if getattr(batch, name) is not None]
    for name in names:
        zero, none = replace(batch), replace(batch)
        for other in names if name == "dlse" else (name,):
            setattr(zero, other, torch.zeros_like(getattr(batch, other)))
            setattr(none, other, None)
        one, other = (testing.run_kernels(x, kernels) for x in (zero, none))
        one.pop("gdlse"), other.pop("gdlse", None)
        for key, x in one.items():
            assert torch.equal(x, other[key]), (name, key)
