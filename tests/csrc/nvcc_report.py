"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, and a gate on them.

Run:  python tests/csrc/nvcc_report.py --archs 80 90 --check      compare with the committed table
      python tests/csrc/nvcc_report.py --update                   all architectures, new table
      python tests/csrc/nvcc_report.py --log build.log --update   from a build with -Xptxas=-v
The table is csrc/cuda/resources.json. The gate fails on a spill beyond the table's (new kernels: on
any), on 8 registers more than the table has, and on a kernel that is missing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "csrc" / "cuda" / "resources.json"
SOURCES = ("forward", "backward", "double_backward")
ARCHS = ("80", "86", "89", "90", "100", "120")
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.S,
)
SYMBOL = re.compile(r"_ZN8attnpool\d+(\w+?_kernel)I(6__half|13__nv_bfloat16|f|d)(?:Li(\d+)E)?E")
TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}


def readable(symbol: str) -> str:
    """_ZN8attnpool14forward_kernelI13__nv_bfloat16Li64EEv... -> forward_kernel bfloat16 64"""
    match = SYMBOL.match(symbol)
    if not match:
        return symbol
    return " ".join(filter(None, (match[1], TYPES[match[2]], match[3])))


def parse(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers and spilled bytes, from what ptxas prints."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for match in KERNEL.finditer(text):
        found.setdefault(match["arch"], {})[readable(match["name"])] = {
            "registers": int(match["registers"]),
            "spilled": int(match["stores"]) + int(match["loads"]),
        }
    return found


def compile_one(source: str, arch: str, folder: str) -> str:
    command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
    command += ["-o", f"{folder}/{source}.{arch}.cubin", str(ROOT / f"csrc/cuda/{source}.cu")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stderr


def measure(archs: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(compile_one, source, arch, folder) for arch in archs for source in SOURCES
        ]
        return parse("\n".join(job.result() for job in jobs))


def violations(found: dict, table: dict, archs: list[str]) -> list[str]:
    lines = []
    for arch in archs:
        expected, got = table.get(arch, {}), found.get(arch, {})
        lines += [f"sm_{arch} {name}: not compiled" for name in expected.keys() - got.keys()]
        for name, now in sorted(got.items()):
            then = expected.get(name, {"registers": 255, "spilled": 0})
            if now["spilled"] > then["spilled"]:
                lines.append(f"sm_{arch} {name}: spills {now['spilled']} bytes")
            if now["registers"] > then["registers"] + 8:
                lines.append(
                    f"sm_{arch} {name}: {now['registers']} registers, the table has "
                    f"{then['registers']}"
                )
    return lines


def release() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    match = re.search(r"V([\d.]+)", said)
    return match[1] if match else ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    parser.add_argument("--log", type=Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not shutil.which("nvcc") and not options.log:
        print("nvcc is not installed: nothing compiled, nothing checked")
        return 0
    found = parse(options.log.read_text()) if options.log else measure(options.archs)
    for arch in sorted(found, key=int):
        for name, now in sorted(found[arch].items()):
            note = f"  spilled {now['spilled']}" if now["spilled"] else ""
            print(f"sm_{arch:4s} {name:48s} registers {now['registers']:3d}{note}")
    if options.update:
        table = {"nvcc": release(), "archs": dict(sorted(found.items(), key=lambda x: int(x[0])))}
        TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    if options.check:
        lines = violations(found, json.loads(TABLE.read_text())["archs"], options.archs)
        print("\n".join(lines) or "within the table")
        return bool(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
