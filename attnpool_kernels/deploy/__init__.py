"""Models in programs without Python: which libraries to load, and how to build against them.

::

    python -m attnpool_kernels.deploy libraries            what a program loads, in this order
    python -m attnpool_kernels.deploy cmake                CMAKE_PREFIX_PATH: torch and this package
    python -m attnpool_kernels.deploy autograd FILE.so     builds the library for TorchScript models

- A package of AOTInductor, or an exported program, calls ``attnpool::attention`` and its
  derivatives: the libraries of ``libraries()``. They serve every torch from 2.10 on. Outside of
  Python these operators themselves have no autograd: called on an inner node of a graph they raise;
  a leaf that requires grad they cannot tell from a constant.
- A TorchScript model calls ``attnpool_autograd::attention``, which has derivatives to second order
  in C++. torch's stable interface has no autograd, so that library is made for one version of
  torch, from ``autograd.cpp`` in this folder.

In Python ``import attnpool_kernels`` is enough for all three. Own C++ code calls
``attnpool_kernels::attention`` of ``include/attnpool_kernels/attention.h``. An example with CMake
is ``examples/deploy``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import torch

FOLDER = Path(__file__).parent


def libraries() -> list[Path]:
    """The compiled libraries that a program has to load, in this order.

    Raises FileNotFoundError where they are not built.

    Examples:
        >>> [path.name for path in libraries()][:1]
        ['_C_cpu.abi3.so']
    """
    found = sorted(FOLDER.parent.glob("_C_cpu*.so"))
    if not found:
        raise FileNotFoundError(
            "the C++ library is not built: reinstall where a C++ compiler and torch are present"
        )
    if torch.version.cuda is not None:
        found += sorted(FOLDER.parent.glob("_C_cuda*.so"))
    return found


def cmake_prefix_path() -> str:
    """What ``find_package(Torch)`` and ``find_package(attnpool_kernels)`` need.

    Examples:
        >>> cmake_prefix_path().endswith("deploy")
        True
    """
    return f"{torch.utils.cmake_prefix_path};{FOLDER}"


def build_autograd(target: str | os.PathLike[str]) -> Path:
    """Compiles ``attnpool_autograd::attention`` for the torch that is imported; returns its path.

    It takes about a minute and works with that version of torch only. The compiler is $CXX or g++.

    Raises FileNotFoundError: no compiler. subprocess.CalledProcessError: it failed.

    Examples:
        >>> build_autograd("attention.so")  # doctest: +SKIP
    """
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"the C++ compiler {compiler[0]!r} is not installed (set CXX)")
    home, target = Path(torch.__file__).parent, Path(target).absolute()
    command = [
        *compiler,
        *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(home / "include")),
        *("-isystem", str(home / "include/torch/csrc/api/include")),
        *("-I", str(FOLDER / "include")),
        str(FOLDER / "autograd.cpp"),
        *("-o", str(target), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True)
    return target
