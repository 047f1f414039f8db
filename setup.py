"""Builds the C++ library of attnpool_kernels, or leaves it out and says why.

ATTNPOOL_BUILD = auto    what this machine's tools allow and its torch can load (default)
                 python  nothing: pure Python
                 cpu     the CPU library, or an error
                 cuda    the CPU and the CUDA library, or an error

MAX_JOBS = compilers at a time (default: one per core)
ATTNPOOL_CUDA_ARCHS = "80 90", say, instead of the four; NVCCFLAGS, CXXFLAGS, LDFLAGS are appended

torch is needed to build (its headers) but is no build requirement: an isolated build would download
gigabytes. So: ``pip install . --no-build-isolation`` where torch is installed.

Libraries are files ``attnpool_kernels/_C_cpu.abi3.so`` (pattern ``_C_cpu*.so``) and, for CUDA,
``_C_cuda*.so``, loaded by ``torch.ops.load_library(path)``; the CPU library holds the schemas of
``torch.ops.attnpool`` and is loaded first. They use torch's stable ABI and nothing of Python: one
build serves torch >= 2.10 with any Python, or none.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
MODE = os.environ.get("ATTNPOOL_BUILD", "auto")
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
CPUS = int(os.environ.get("MAX_JOBS") or CPUS)  # what torch's own builds read

# Sources of csrc/cpu that are compiled once per vector width; the rest of csrc/cpu once.
WIDTH_SOURCES = ("product", "forward", "backward", "double_backward", "kernels", "peak_loops")
CUDA_SOURCES = sorted(path.stem for path in (HERE / "csrc" / "cuda").glob("*.cu"))
# Machine code of 8.0 also runs on 8.6, 8.7 and 8.9, that of 10.0 on 10.3, of 12.0 on 12.1.
CUDA_ARCHS = "80 90 100 120"
X86 = platform.machine().lower() in ("x86_64", "amd64")
WIDTHS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"),
        "-mprefer-vector-width=512",
    ],
}


@dataclass
class Library:
    """One shared library: objects to compile, then a link."""

    name: str
    objects: dict[str, list[str]] = field(default_factory=dict)  # object name: compiler and flags
    link: list[str] = field(default_factory=list)
    stub: str = ""  # a library of torch that is needed when it runs but may be absent here


def compiler():
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


def cpu_library():
    """The CPU library, or None and the reason."""
    if sys.platform != "linux":
        return None, f"it is built on Linux only, this is {sys.platform}"
    if compiler() is None:
        return None, "no C++ compiler was found (set CXX)"
    try:
        import torch
    except ImportError as error:
        return None, f"torch cannot be imported here ({error}); try --no-build-isolation"
    if tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) < (2, 10):
        return None, f"torch {torch.__version__} is older than 2.10"
    torch_home = Path(torch.__file__).parent
    base = [
        *compiler(),
        "-c",
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-g0",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=fast",
        "-Wall",
        "-Wextra",
        f"-ffile-prefix-map={HERE}=.",
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    ]
    with_torch = [
        *base,
        "-O2",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(torch_home / "include"),
    ]
    library = Library("attnpool_kernels._C_cpu")
    library.objects["library"] = [*with_torch, "csrc/library.cpp"]
    for source in ("operators", "peak", "plan"):
        library.objects[source] = [*with_torch, f"csrc/cpu/{source}.cpp"]
    for width, flags in WIDTHS.items() if X86 else [("baseline", [])]:
        for source in WIDTH_SOURCES:
            library.objects[f"{source}.{width}"] = [
                *base,
                *flags,
                f"-DATTN_ISA={width}",
                f"csrc/cpu/{source}.cpp",
            ]
    library.link = [
        *compiler(),
        "-shared",
        *shlex.split(os.environ.get("LDFLAGS", "")),
        "-L",
        str(torch_home / "lib"),
        "-Wl,--as-needed",
        "-ltorch_cpu",
    ]
    return library, ""


def nvcc():
    """The CUDA compiler: CUDA_HOME, the path, or the pip packages nvidia-cuda-nvcc and so on."""
    homes = [os.environ[x] for x in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(x)]
    if homes:
        candidates = [Path(homes[0]) / "bin" / "nvcc"]
    else:
        found = shutil.which("nvcc")
        candidates = [Path(found)] if found else []
        for folder in sys.path:
            candidates += sorted(Path(folder, "nvidia").glob("*/bin/nvcc"), reverse=True)
    return next((x for x in candidates if x.exists()), None)


def codes_of(archs):
    """nvcc's flags: machine code for each architecture, PTX of the newest for later chips.

    From 10.0 on they share the PTX of the first, which is the same for all of them but for its
    name, more than half of the work, and serves 11.0 as well.
    """
    blackwell = [x for x in archs if x.isdigit() and int(x) >= 100]
    made = {x: [f"sm_{x}"] for x in archs if x not in blackwell}
    if blackwell:
        made[min(blackwell, key=int)] = [f"sm_{x}" for x in blackwell]
    newest = list(made)[-1]
    made[newest].append(f"compute_{newest}")
    return [f"-gencode=arch=compute_{x},code=[{','.join(codes)}]" for x, codes in made.items()]


def cuda_library():
    """The CUDA library, or None and the reason."""
    library, reason = cpu_library()
    if library is None:
        return None, reason
    import torch

    if MODE == "auto" and torch.version.cuda is None:  # minutes for what could not be loaded here
        return None, f"torch {torch.__version__} has no CUDA (ATTNPOOL_BUILD=cuda builds it anyway)"
    compiler_path = nvcc()
    if compiler_path is None:
        return None, "no nvcc was found (set CUDA_HOME, or install nvidia-cuda-nvcc 13)"
    said = subprocess.run(
        [compiler_path, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", "x.o"],
        capture_output=True,
        text=True,
    ).stderr
    home = re.search(r"^#\$ TOP=(.*)$", said, re.M)
    version = subprocess.run([compiler_path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    version_of = tuple(map(int, release.groups())) if release else ()
    if not home or version_of < (12, 8):
        return None, f"{compiler_path} is not CUDA 12.8 or later: {version.strip()[-80:]}"
    # The smallest code is read by drivers from 12.4 on; CUDA 13 asks for a later one anyway.
    smallest = ["--compress-mode=size"] if version_of >= (13, 0) else []
    home = Path(home[1]).resolve()
    includes = [x for x in (home / "include", home / "targets/x86_64-linux/include") if x.exists()]
    archs = os.environ.get("ATTNPOOL_CUDA_ARCHS", CUDA_ARCHS).split()
    library.name = "attnpool_kernels._C_cuda"
    plain = library.objects["library"][:-1]
    library.objects = {
        "library_cuda": [
            *plain,
            "-DUSE_CUDA",
            *[f"-isystem{x}" for x in includes],
            "csrc/library_cuda.cpp",
        ]
    }
    for source in CUDA_SOURCES:
        library.objects[source] = [
            str(compiler_path),
            "-c",
            "-O3",
            "-std=c++17",
            *codes_of(archs),
            f"--threads={CPUS}",
            "-cudart=static",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            "-Xfatbin=-compress-all",
            *smallest,
            *shlex.split(os.environ.get("NVCCFLAGS", "")),
            f"csrc/cuda/{source}.cu",
        ]
    folders = [x for x in ("lib64", "lib", "targets/x86_64-linux/lib") if (home / x).exists()]
    library.link += [
        *[f"-L{home / x}" for x in folders],
        "-lcudart_static",
        "-ldl",
        "-lrt",
        "-lpthread",
    ]
    library.stub = "torch_cuda"
    return library, ""


def libraries():
    """What to build under ATTNPOOL_BUILD; prints one line for each library left out."""
    if MODE not in ("auto", "python", "cpu", "cuda"):
        raise SystemExit(f"ATTNPOOL_BUILD must be auto, python, cpu or cuda, got {MODE!r}")
    found = []
    for kind, make, needed_by in (
        ("CPU", cpu_library, ("cpu", "cuda")),
        ("CUDA", cuda_library, ("cuda",)),
    ):
        if MODE != "auto" and MODE not in needed_by:
            continue
        library, reason = make()
        if library:
            found.append(library)
        elif MODE == "auto":
            print(f"attnpool_kernels: the {kind} library is left out: {reason}", file=sys.stderr)
        else:
            raise SystemExit(f"attnpool_kernels: the {kind} library cannot be built: {reason}")
    return {x.name: x for x in found}


class BuildLibraries(build_ext):
    """Compiles objects in parallel, and only those whose command or sources changed."""

    def build_extension(self, ext):
        library = LIBRARIES[ext.name]
        folder = Path(self.build_temp).absolute() / library.name
        folder.mkdir(parents=True, exist_ok=True)

        def changed(source):
            """When the source or a header of csrc/, csrc/cuda/ or its own folder changed last."""
            folders = {HERE / "csrc", HERE / "csrc" / "cuda", source.parent}
            headers = [x for y in folders for x in y.glob("*.*h")]
            return max(x.stat().st_mtime for x in [source, *headers])

        def compiled(item):
            name, command = item
            target, note = folder / f"{name}.o", folder / f"{name}.command"
            command = [*command, "-o", str(target)]
            newest = changed(HERE / command[-3])
            fresh = (
                target.exists()
                and note.exists()
                and note.read_text() == shlex.join(command)
                and target.stat().st_mtime > newest
            )
            if not fresh:
                subprocess.run(command, check=True, cwd=HERE)
                note.write_text(shlex.join(command))
            return str(target)

        with ThreadPoolExecutor(self.parallel or CPUS) as pool:
            objects = list(pool.map(compiled, library.objects.items()))
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        new = target.with_suffix(".new")  # a running program may have the old file mapped
        at = library.link.index("-shared") + 1
        soname = f"-Wl,-soname,{target.name}"  # what a C++ program that is linked to it asks for
        link = [*library.link[:at], soname, *objects, *library.link[at:], "-o", str(new)]
        if library.stub:  # an empty library of that name leaves its name in ours
            stub = folder / f"lib{library.stub}.so"
            stub_command = [*compiler(), "-shared", "-x", "c", os.devnull, "-o", str(stub)]
            subprocess.run([*stub_command, f"-Wl,-soname,{stub.name}"], check=True, cwd=HERE)
            link += [f"-L{folder}", "-Wl,--no-as-needed", f"-l{library.stub}"]
        subprocess.run(link, check=True, cwd=HERE)
        new.replace(target)


LIBRARIES = libraries()
setup(
    ext_modules=[Extension(name, [], py_limited_api=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIBRARIES else {},
)
