"""Builds of C++ with one changed file: everything else is compiled once and kept."""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

# of csrc/cpu: compiled once for every vector width, as setup.py does
KERNELS = ("product", "forward", "backward", "double_backward", "kernels", "peak_loops")
AVX512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
WIDTHS = {"avx512": AVX512, "avx2": "-mavx2 -mfma -mf16c", "baseline": ""}


class Build:
    """Objects of a tree; a mutant recompiles those that include its file."""

    def __init__(self, tree: Path, folder: Path):
        self.tree, self.folder = tree, folder
        self.commands = self.compilers()
        (folder / "base").mkdir(parents=True, exist_ok=True)
        (folder / "new").mkdir(exist_ok=True)
        for name, command in self.commands.items():
            kept = folder / "base" / f"{name}.o"
            if not kept.exists():
                run([*command, "-MMD", "-o", kept], tree, True)

    def compilers(self) -> dict[str, list[str]]:
        raise NotImplementedError

    def linked(self, objects: list[Path], to: Path) -> None:
        raise NotImplementedError

    def changed(self, path: str) -> list[str]:
        """Objects that include a file; none does for an empty name."""
        if not path:
            return []
        name = re.escape(path.split("csrc/")[1])
        return [
            x for x in self.commands if re.search(rf"csrc/(\w+/\.\./)?{name}\b", self._included(x))
        ]

    def _included(self, name: str) -> str:
        return (self.folder / "base" / f"{name}.d").read_text()

    def mutated(self, path: str) -> Path | None:
        """The library with a file as it is now, or None where it does not compile."""
        objects = {x: self.folder / "base" / f"{x}.o" for x in self.commands}
        for name in self.to_compile(path):
            objects[name] = self.folder / "new" / f"{name}.o"
            if not run([*self.commands[name], "-o", objects[name]], self.tree, False):
                return None
        library = self.folder / "new" / self.library
        library.unlink(missing_ok=True)
        self.linked(list(objects.values()), library)
        return library

    def to_compile(self, path: str) -> list[str]:
        return self.changed(path)


def run(command: list, folder: Path, check: bool) -> bool:
    done = subprocess.run(
        ["timeout", "900", *map(str, command)], cwd=folder, capture_output=True, text=True
    )
    if check and done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return done.returncode == 0


class Cpu(Build):
    """The CPU library at -O1; of the vector widths only the one that runs here is recompiled."""

    library = "_C_cpu.abi3.so"

    def compilers(self):
        import torch

        self.torch = Path(torch.__file__).parent
        base = shlex.split(
            "g++ -c -O1 -std=c++20 -fPIC -fvisibility=hidden -g0 -fno-math-errno "
            "-fno-trapping-math -ffp-contract=fast"
        )
        with_torch = [*base, "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem"]
        with_torch.append(str(self.torch / "include"))
        found = {"library": [*with_torch, "csrc/library.cpp"]}
        for x in ("operators", "peak", "plan"):
            found[x] = [*with_torch, f"csrc/cpu/{x}.cpp"]
        for width, flags in WIDTHS.items():
            for x in KERNELS:
                more = [*shlex.split(flags), f"-DATTN_ISA={width}"]
                found[f"{x}.{width}"] = [*base, *more, f"csrc/cpu/{x}.cpp"]
        return found

    def to_compile(self, path):
        here = "avx512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "avx2"
        every = path.endswith("kernels.cpp")  # which says where a width runs
        return [x for x in self.changed(path) if every or "." not in x or x.endswith(here)]

    def linked(self, objects, to):
        command = ["g++", "-shared", f"-Wl,-soname,{to.name}", *objects]
        command += ["-L", self.torch / "lib", "-Wl,--as-needed", "-ltorch_cpu", "-o", to]
        run(command, self.tree, True)


class Cuda(Build):
    """The CUDA kernels for the CPU (cuda_host.py), for float32 of width 32 only."""

    library = f"attnpool_cuda_host{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compilers(self):
        import pybind11

        twins = self.tree / "tests" / "tools" / "host"
        flags = ["g++", "-std=c++17", "-fPIC", "-O1", "-DMODULE_NAME=attnpool_cuda_host"]
        flags += ["-DATTN_ONLY_TYPE=float", "-DATTN_ONLY_WIDTH=32"]
        for x in (pybind11.get_include(), sysconfig.get_path("include")):
            flags += ["-isystem", x]
        flags += ["-x", "c++", "-include", str(twins / "host_shim.h"), "-c"]
        found = {"host_module": [*flags, str(twins / "host_module.cpp")]}
        for x in sorted((self.tree / "csrc" / "cuda").glob("*.cu")):
            found[x.stem] = [*flags, str(x)]
        return found

    def linked(self, objects, to):
        run(["g++", "-shared", *objects, "-o", to], self.tree, True)

    def judge(self, library: Path, names: list[str]) -> dict:
        """In a forked process: the cases of the tests of planted bugs, and more of float32."""
        import importlib.util
        import sys
        from dataclasses import replace

        for name in [x for x in sys.modules if x.split(".")[0] in ("tools", "attnpool_kernels")]:
            del sys.modules[name]
        sys.path.insert(0, str(self.tree / "tests" / "impl"))
        import torch

        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        import test_cuda
        import test_cuda_bugs
        import test_cuda_few_seeds_bugs

        from attnpool_kernels import testing
        from tools import cuda_host

        spec = importlib.util.spec_from_file_location("mutated.attnpool_cuda_host", library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        of_seeds = test_cuda_few_seeds_bugs
        cases = [("bugs", x, {}) for x in test_cuda_bugs.CASES]
        cases += [("few seeds", of_seeds.CASE, {"split": of_seeds.SPLIT})]
        known = [*test_cuda.CASES, *test_cuda.EDGES, test_cuda.MIXED, test_cuda.SEEDS]
        by_name = {x.name: x for x in known if max(x.dim, x.value_dim or 0) <= 32}
        cases += [(x, by_name[x], {}) for x in names if x in by_name]
        passed = 0
        for name, case, options in cases:
            kernels = cuda_host.Kernels(module, **options)
            try:
                testing.judge(
                    replace(case),
                    torch.float32,
                    lambda batch, use=kernels: testing.run_kernels(batch, use),
                )
            except (AssertionError, RuntimeError) as error:
                text = str(error).split("\n")[0][:60]
                return {"failed": f"{name}: {text}", "passed": passed}
            passed += 1
        return {"failed": "", "passed": passed}
