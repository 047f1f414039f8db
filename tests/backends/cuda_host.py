"""The CUDA kernels compiled for the CPU, as a kernel backend: the same source that nvcc compiles.

``build()`` makes a Python module with ninja from csrc/cuda and the twins in tests/csrc; ``Kernels``
gives its three passes the interface of a backend, so the cases and the budget of
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

from attnpool_kernels import testing

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

    csrc, tests = ROOT / "csrc", ROOT / "tests" / "csrc"
    flags = ["-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-DMODULE_NAME={MODULE}"]
    flags += ["-O1", *SANITIZE] if sanitize else ["-O2"]
    ready: dict[str, Path] = {}  # objects that an edit leaves as they are
    if edit:  # the headers are found by relative path, so the tree is copied
        shutil.copytree(csrc, folder / "csrc", dirs_exist_ok=True)
        shutil.copytree(tests, folder / "tests" / "csrc", dirs_exist_ok=True)
        csrc, tests = folder / "csrc", folder / "tests" / "csrc"
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
    sources = {"host_module": tests / "host_module.cpp"}
    sources |= {x: csrc / "cuda" / f"{x}.cu" for x in SOURCES}
    objects = " ".join(str(ready.get(x, f"{x}.o")) for x in sources)
    lines = [
        f"flags = {' '.join(flags)} -x c++ -include {tests / 'host_shim.h'}",
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

    schedule: the order in which emulated threads run (tests/csrc/fibers.h); vector: whether 16-byte
    copies are allowed; split: keys of a part of a molecule with few seeds. Outputs and scratch are
    NaN before the call.
    """

    KIND = "kernel"
    __name__ = "attnpool_kernels.backends.cuda"

    def __init__(self, module, schedule: int = 0, vector: bool = True, split: int = 512):
        self.module, self.schedule, self.vector, self.split = module, schedule, vector, split

    def why_not(self, problem) -> list[str]:
        return []

    def forward(self, q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout):
        call = self._call(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
        rows = q.shape[:1] if q_ptr is not None else (k_ptr.numel() - 1, q.shape[0])
        out = _nan(q, (*rows, q.shape[1], v.shape[2]))
        lse = _nan(q, (*rows, q.shape[1]), _sums(q))
        self._run("forward", q, call | {"out": out, "lse": lse})
        return out, lse

    def backward(
        self, q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, scale, dropout,
        need_dbias,
    ):  # fmt: skip
        call = self._call(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
        dq, dk, dv = (_nan(x, x.shape) for x in (q, k, v))
        dbias = (q if bias is None else bias).new_empty((0, q.shape[1]))
        if bias is not None and need_dbias:
            dbias = _nan(bias, bias.shape)
        call |= {"out": out, "lse": lse, "dout": dout, "dlse": dlse, "dq": dq, "dk": dk, "dv": dv}
        call |= {"dbias": dbias if dbias.shape[0] else None}
        self._run("backward", q, call)
        return dq, dk, dv, dbias

    def double_backward(
        self, q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, out, lse, dout, dlse, ddq, ddk, ddv,
        ddbias, scale, dropout,
    ):  # fmt: skip
        call = self._call(q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout)
        gq, gk, gv = (_nan(x, x.shape) for x in (q, k, v))
        gbias = q.new_empty((0, q.shape[1])) if bias is None else _nan(bias, bias.shape)
        gdout, gdlse = _nan(out, out.shape), _nan(lse, lse.shape)
        call |= {"out": out, "lse": lse, "dout": dout, "dlse": dlse}
        call |= {"ddq": ddq, "ddk": ddk, "ddv": ddv, "ddbias": ddbias}
        call |= {"gq": gq, "gk": gk, "gv": gv, "gdout": gdout, "gdlse": gdlse}
        call |= {"gbias": gbias if gbias.shape[0] else None}
        self._run("double_backward", q, call)
        return gq, gk, gv, gbias, gdout, gdlse

    def _call(self, q, k, v, bias, q_ptr, k_ptr, pair_ptr, seed, scale, dropout) -> dict:
        return {
            "q": q, "k": k, "v": v, "bias": bias, "q_ptr": q_ptr, "k_ptr": k_ptr,
            "pair_ptr": pair_ptr, "seed": seed, "molecules": k_ptr.numel() - 1,
            "heads": q.shape[1], "head_dim": q.shape[2], "value_dim": v.shape[2],
            "query_rows": q.shape[0], "key_rows": k.shape[0],
            "pairs": 0 if bias is None else bias.shape[0],
            "scale": scale, "keep_scale": 1 / (1 - dropout),
            "drop_threshold": math.floor(dropout * 2**32), "dtype": DTYPES[q.dtype],
            "bias_dtype": DTYPES[q.dtype if bias is None else bias.dtype],
            "ptr_is_64": int(k_ptr.dtype == torch.int64), "shared_seeds": int(q_ptr is None),
            "vector": self.vector, "split": self.split,
        }  # fmt: skip

    def _run(self, name: str, q: Tensor, call: dict):
        """Allocates what csrc/library_cuda.cpp does."""
        sizes = self.module.scratch(name, self._plain(call))
        scratch = {x: _nan(q, (size,), _sums(q)) if size else None for x, size in sizes.items()}
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


def _sums(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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
    names = ("ddq", "ddk", "ddv", "ddbias", "dlse")
    for name in names:
        zero, none = replace(batch), replace(batch)
        for other in names if name == "dlse" else (name,):
            setattr(zero, other, torch.zeros_like(getattr(batch, other)))
            setattr(none, other, None)
        one, other = (testing.run_kernels(x, kernels) for x in (zero, none))
        one.pop("gdlse"), other.pop("gdlse", None)
        for key, x in one.items():
            assert torch.equal(x, other[key]), (name, key)
