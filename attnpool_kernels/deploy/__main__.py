"""``python -m attnpool_kernels.deploy``: paths for C++ programs, see the package."""

from __future__ import annotations

import argparse
import inspect

from .. import deploy


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m attnpool_kernels.deploy",
        description=inspect.getdoc(deploy),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("libraries", help="paths of the compiled libraries, one a line")
    commands.add_parser("cmake", help="the value of CMAKE_PREFIX_PATH")
    autograd = commands.add_parser("autograd", help="builds the library for TorchScript models")
    autograd.add_argument("target", help="file to write, FILE.so")
    given = parser.parse_args()
    if given.command == "libraries":
        print(*deploy.libraries(), sep="\n")
    elif given.command == "cmake":
        print(deploy.cmake_prefix_path())
    else:
        print(deploy.build_autograd(given.target))


if __name__ == "__main__":
    main()
