"""What nvcc makes of the CUDA kernels: registers and spills, and a gate on them.

Run:  python tests/tools/nvcc_report.py --archs 80 90 --check   compare with the committed table
      python tests/tools/nvcc_report.py --update                all architectures, new table
      python tests/tools/nvcc_report.py --archs 90 --update     one; the others stay in the table if
                                                               they are of the same sources
      NVCCFLAGS=-Xptxas=-v make wheel 2>build.log              ... --log build.log --update
The table is csrc/cuda/resources.json. It names the sources it belongs to by a hash, so that a test
sees at once that it is old. The gate fails on more spilled bytes than the table has, where only
kernels for small sets may have any, on 8 registers more, and on a kernel that is missing.
"""

from __future__ import annotations

import argparse
import hashlib
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
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ("80", "90", "100", "120")  # of the default build
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\d+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers",
    re.S,
)
SYMBOL = re.compile(
    r"_ZN8attnpool\d+(\w+?_kernel)I(6__half|13__nv_bfloat16|f|d)(?:Li(\d+)E)?(?:Li(\d)E)?E"
)
VARIANTS = ("plain", "any", "plain large", "any large")  # of csrc/cuda/small_sets.cuh
TYPES = {"6__half": "float16", "13__nv_bfloat16": "bfloat16", "f": "float32", "d": "float64"}


def of_sources() -> str:
    """A hash of what the kernels are compiled from; comments and spacing do not count."""
    csrc = ROOT / "csrc"
    digest = hashlib.sha256()
    kernels = [x for x in (csrc / "cuda").iterdir() if x.suffix in (".cu", ".cuh", ".h")]
    for path in sorted([*csrc.glob("*.h"), *kernels]):
        if path.name in ("bridge.h", "operators.h"):  # of the operators, not of the kernels
            continue
        code = re.sub(r"//[^\n]*", "", path.read_text())
        digest.update(f"{path.name} {' '.join(code.split())}\n".encode())
    return digest.hexdigest()[:16]


def readable(symbol: str) -> str:
    """_ZN8attnpool14forward_kernelI13__nv_bfloat16Li64EEv... -> forward_kernel bfloat16 64"""
    match = SYMBOL.match(symbol)
    if not match:
        return symbol
    variant = VARIANTS[int(match[4])] if match[4] else None
    return " ".join(filter(None, (match[1], TYPES[match[2]], match[3], variant)))


def parse(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> registers and spilled bytes, from what ptxas prints."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for match in KERNEL.finditer(text):
        found.setdefault(match["arch"], {})[readable(match["name"])] = {
            "registers": int(match["registers"]),
            "spilled": int(match["stores"]) + int(match["loads"]),
        }
    return found


def compile_one(source: str, arch: str, only: tuple[str, int] | None = None) -> str:
    """What ptxas says. only: (C++ type, width) of the one instance to compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v"]
        if only:
            command += [f"-DATTN_ONLY_TYPE={only[0]}", f"-DATTN_ONLY_WIDTH={only[1]}"]
        command += ["-o", f"{folder}/x.cubin", str(ROOT / f"csrc/cuda/{source}.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stderr


def measure(archs: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_one, source, arch) for arch in archs for source in SOURCES]
        return parse("\n".join(job.result() for job in jobs))


def violations(found: dict, table: dict, archs: list[str], some: bool = False) -> list[str]:
    """some: only some of the kernels were compiled."""
    lines = []
    for arch in archs:
        expected, got = table.get(arch, {}), found.get(arch, {})
        absent = set() if some else expected.keys() - got.keys()
        lines += [f"sm_{arch} {name}: not compiled" for name in sorted(absent)]
        for name, now in sorted(got.items()):
            known = expected.get(name, {"registers": 255, "spilled": 0})
            most = known["registers"] + 8
            if now["spilled"] > (known["spilled"] if name.startswith("small_") else 0):
                lines.append(f"sm_{arch} {name}: spills {now['spilled']} bytes")
            if now["registers"] > most:
                lines.append(
                    f"sm_{arch} {name}: {now['registers']} registers, the table has {most - 8}"
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
    table = json.loads(TABLE.read_text())
    if options.update:
        made = {"nvcc": release(), "sources": of_sources()}
        if all(table.get(name) == value for name, value in made.items()):
            found = table["archs"] | found
        table = made | {"archs": dict(sorted(found.items(), key=lambda x: int(x[0])))}
        text = json.dumps(table, indent=1, sort_keys=True)
        text = re.sub(r"\{\s+(\"registers\": \d+),\s+(\"spilled\": \d+)\s+\}", r"{\1, \2}", text)
        TABLE.write_text(text + "\n")  # a kernel per line
    if options.check:
        lines = violations(found, table["archs"], options.archs)
        print("\n".join(lines) or "within the table")
        return bool(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
