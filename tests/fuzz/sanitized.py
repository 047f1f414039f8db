"""The CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, for its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "build" / "sanitized"
FLAGS = "-fsanitize=address,undefined"


def library() -> Path:
    """The folder to import the package from; built where sources have changed, for minutes."""
    environment = os.environ | {
        "ATTNPOOL_BUILD": "cpu",
        "CXXFLAGS": f"-O1 -g1 {FLAGS} -fno-sanitize-recover=all -fno-omit-frame-pointer",
        "LDFLAGS": FLAGS,
    }
    place = PLACE / "lib"
    command = [sys.executable, "setup.py", "--quiet", "build", f"--build-base={PLACE}"]
    subprocess.run(
        [*command, f"--build-lib={place}"],
        cwd=ROOT,
        env=environment,
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return place


def environment() -> dict[str, str]:
    """Of the process: the sanitizers come first, and find the C++ library's throw."""
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in names
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1"
    return {
        "LD_PRELOAD": " ".join(x.strip() for x in found),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
