"""Everything that only a GPU can prove, in one command on one machine without a network.

    python tests/gpu_check.py                    on a CUDA device, about 3 minutes
    python tests/gpu_check.py --device cpu       proves the script itself; CUDA-only steps say so

Runs the whole matrix (cases x dtypes x passes x backends) against the float64 oracle, then
repeatability, batch invariance, CUDA graphs, no synchronisation, another stream, more than 2^31
elements and compute-sanitizer. Prints one line a step, writes a JSON with versions, date and the
hash of the kernels' sources, exits with 1 where anything failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from attnpool_kernels import BackendError, Problem, backends, set_attention, testing

ROOT = Path(__file__).resolve().parent.parent
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# beyond testing.CASES: long molecules and keys of few seeds in parts have kernels of their own
SCHEDULES = (
    testing.Case("long molecules", (300, 18, 255, 256), heads=2, dim=32, lse=True),
    testing.Case("parts of seeds", (600, 18, 0, 513), heads=2, dim=32, seeds=4, lse=True),
    testing.Case("parts and options", (600, 18), heads=2, seeds=3, bias="pair", dropout=0.3),
)
TINY = ("molecules", "empty among them", "four seeds", "bias", "dropout")


class Skip(Exception):
    """The step cannot run here; the text says why."""


def able(device: str, dtype: torch.dtype, kind: str | None = None) -> list[str]:
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    problem = Problem(device, dtype, 16, 16, capability)
    found = [name for name in backends() if not backends.load(name).why_not(problem)]
    return [name for name in found if kind is None or kind == backends.load(name).KIND]


def matrix(options) -> str:
    """Values, gradients and second gradients of every backend on every case."""
    failures, count = [], 0
    cases = [c for c in (*testing.CASES, *SCHEDULES) if not options.tiny or c.name in TINY]
    for dtype in options.dtypes:
        for name in able(options.device, dtype):
            exact = getattr(backends.load(name), "GRAD_ORDER", 2)
            for case in cases:
                count += 1
                try:
                    check(case, dtype, name, exact, options.device)
                except BackendError:
                    count -= 1  # refused by name with its reasons, which tests/ cover
                except Exception as error:
                    failures.append(f"{name}: {case.name}, {dtype}: {error!s:.300}")
    if failures:
        raise AssertionError("\n    ".join([f"{len(failures)} of {count}", *failures]))
    return f"{count} combinations"


def check(case, dtype, name, exact, device) -> None:
    if exact >= 2:
        return testing.judge(case, dtype, lambda batch: testing.run_public(batch, name), device)
    batch = replace(case, lse=False).make(dtype, device)  # first-order backends: values only
    exactly = testing.dense(batch, torch.float64, batch.inputs())[0]
    found = public(batch, name)
    lines = testing.violations({"out": found}, {"out": exactly}, testing.budget(batch, dtype))
    if lines:
        raise AssertionError("; ".join(lines))


def public(batch, name, return_lse=False):
    from attnpool_kernels import seed_pool

    options = {
        "bias": batch.bias, "scale": batch.scale, "dropout": batch.case.dropout, "backend": name,
        "return_lse": return_lse,
    }  # fmt: skip
    if batch.q_ptr is None:
        return seed_pool(batch.q, batch.k, batch.v, batch.k_ptr, **options)
    return set_attention(batch.q, batch.k, batch.v, batch.q_ptr, batch.k_ptr, **options)


def kernels_on(options):
    names = able(options.device, torch.float32, "kernel")
    if not names:
        raise Skip("no kernel backend runs here")
    return [(name, backends.load(name)) for name in names]


def mixed(device, dtype=torch.float32, **changes):
    counts = (18, 0, 33, 1, 64, 17, 130, 700)
    case = testing.Case("mixed", counts, heads=4, dim=32, lse=True)
    return replace(case, **changes).make(dtype, device)


def repeatability(options) -> str:
    """The same bits in all three passes, again and again."""
    for name, module in kernels_on(options):
        for dtype in (torch.float32, torch.bfloat16):
            for seeds in (None, 4):
                batch = mixed(options.device, dtype, seeds=seeds)
                first = testing.run_kernels(batch, module)
                for _ in range(options.repeats):
                    again = testing.run_kernels(batch, module)
                    for key, x in first.items():
                        assert torch.equal(x, again[key]), f"{name}: {key} changed"
    return f"{options.repeats} repeats"


def invariance(options) -> str:
    """A molecule's results have the same bits alone and in the batch."""
    fields = ("q", "k", "v", "dout", "dlse", "ddq", "ddk", "ddv")
    for name, module in kernels_on(options):
        for dtype in (torch.float32, torch.bfloat16):
            batch = mixed(options.device, dtype)
            whole, start = testing.run_kernels(batch, module), 0
            for n in batch.case.counts:
                alone = replace(batch.case, counts=(n,)).make(dtype, options.device)
                for field in fields:
                    setattr(alone, field, getattr(batch, field)[start : start + n])
                for key, x in testing.run_kernels(alone, module).items():
                    same = torch.equal(x, whole[key][start : start + n])
                    assert same, f"{name}: {key} of {n} atoms, {dtype}"
                start += n
    return "alone = in a batch"


def graphs(options) -> str:
    """Capture of forward and backward; replays with other values and other molecule sizes."""
    if options.device != "cuda":
        raise Skip("needs CUDA")
    for name, _ in kernels_on(options):
        q, k, v = (torch.randn(64, 4, 32, device="cuda", requires_grad=True) for _ in range(3))
        ptr = torch.tensor([0, 18, 18, 50, 64], device="cuda")

        def step(q=q, k=k, v=v, ptr=ptr, name=name):
            out = set_attention(q, k, v, ptr, backend=name)
            return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for i in range(options.replays):
            with torch.no_grad():
                for x in (q, k, v):
                    x.normal_()
                ptr[1:4] = torch.tensor([i % 30, 30, 60], device="cuda")
            graph.replay()
            for a, b in zip(captured, step()):
                assert torch.equal(a, b), name
    return f"{options.replays} replays"


def synchronisation(options) -> str:
    """No host synchronisation in a call whose boundaries are on the device."""
    if options.device != "cuda":
        raise Skip("needs CUDA")
    for _, module in kernels_on(options):
        batch = mixed("cuda")
        testing.run_kernels(batch, module)  # compiles and loads
        torch.cuda.set_sync_debug_mode("error")
        try:
            testing.run_kernels(batch, module)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none"


def streams(options) -> str:
    """Work goes to the current stream: a slow producer on a side stream is waited for."""
    if options.device != "cuda":
        raise Skip("needs CUDA")
    for name, _ in kernels_on(options):
        x = torch.randn(4096, 4, 32, device="cuda")
        ptr = torch.arange(0, 4097, 16, device="cuda")
        expected = set_attention(x, x, x, ptr, backend=name)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            late = torch.empty_like(x)
            torch.cuda._sleep(50_000_000)
            late.copy_(x)
            out = set_attention(late, late, late, ptr, backend=name)
        side.synchronize()
        assert torch.equal(out, expected), name
    return "side stream"


def large(options) -> str:
    """More than 2^31 elements in q, k, v and out; the last molecule is right."""
    heads, dim = 16, 64
    rows = 2**31 // (heads * dim) + 64
    if options.device != "cuda" or torch.cuda.mem_get_info()[0] < 6 * 2 * rows * heads * dim:
        raise Skip("needs CUDA and 26 GB")
    for name, _ in kernels_on(options):
        x = torch.zeros(rows, heads, dim, device="cuda", dtype=torch.bfloat16)
        x[-64:].normal_()
        ptr = torch.arange(0, rows + 1, 64, device="cuda")
        x = x[: int(ptr[-1])]
        out = set_attention(x, x, x, ptr, backend=name)[-64:].float()
        tail = x[-64:].clone()
        alone = set_attention(tail, tail, tail, ptr[:2], backend=name)
        assert torch.equal(out, alone.float()), name
    return f"{rows * heads * dim:,} elements"


def peers(options) -> str:
    """Which second derivative the libraries beside us give: an error, right, or silently wrong."""
    if options.device != "cuda":
        raise Skip("needs CUDA")
    found = []
    for name in able("cuda", torch.bfloat16, "composite"):
        q, k, v = (
            torch.randn(36, 2, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        ptr = torch.tensor([0, 18, 36], device="cuda")
        try:
            out = set_attention(q, k, v, ptr, backend=name)
            (first,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
            first.float().square().sum().backward()
            found.append(f"{name}: answers")
        except (NotImplementedError, RuntimeError) as error:
            found.append(f"{name}: {type(error).__name__}")
    return ", ".join(found)


def sanitizer(options) -> str:
    """compute-sanitizer's four tools on the small part of the matrix."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if options.device != "cuda" or not Path(tool).exists():
        raise Skip("needs CUDA and compute-sanitizer")
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = [sys.executable, __file__, "--only", "matrix", "--tiny", "--dtypes", "float32"]
    for kind in ("memcheck", "racecheck", "initcheck", "synccheck"):
        padding = ["--padding", "512"] if kind == "memcheck" else []
        run = subprocess.run(
            [tool, "--tool", kind, *padding, "--error-exitcode", "9", *script],
            env=environment, capture_output=True, text=True, timeout=options.timeout,
        )  # fmt: skip
        assert run.returncode == 0, f"{kind}: {(run.stdout + run.stderr)[-2000:]}"
    return "memcheck, racecheck, initcheck, synccheck"


STEPS = (
    matrix, repeatability, invariance, graphs, synchronisation, streams, large, peers, sanitizer,
)  # fmt: skip


def kernel_hash() -> str:
    """Of all kernel sources: results of other sources do not speak for these."""
    files = [*(ROOT / "csrc").rglob("*"), *(ROOT / "attnpool_kernels/backends").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(p for p in files if p.is_file()):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def provenance(device: str) -> dict:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version,
        "python": sys.version.split()[0],
        "kernels": kernel_hash(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the small part of the matrix")
    parser.add_argument("--only", choices=[step.__name__ for step in STEPS])
    parser.add_argument("--dtypes", nargs="+", default=[str(d)[6:] for d in DTYPES])
    parser.add_argument("--repeats", type=int, default=250)
    parser.add_argument("--replays", type=int, default=100)
    parser.add_argument("--timeout", type=int, default=180, help="seconds a sanitizer tool")
    parser.add_argument("--out", type=Path, help="write a JSON here")
    options = parser.parse_args()
    options.dtypes = [getattr(torch, name) for name in options.dtypes]
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: nothing was checked (--device cpu proves the script)")
        return 2
    record, failed = provenance(options.device) | {"steps": {}}, 0
    for step in STEPS:
        if options.only not in (None, step.__name__):
            continue
        begin = time.perf_counter()
        try:
            state, text = "ok", step(options)
        except Skip as reason:
            state, text = "skipped", str(reason)
        except Exception as error:
            state, text, failed = "FAILED", f"{type(error).__name__}: {error}", failed + 1
        seconds = time.perf_counter() - begin
        print(f"{step.__name__:<16} {state:<8} {seconds:6.1f} s  {text}", flush=True)
        record["steps"][step.__name__] = {"state": state, "text": text, "seconds": seconds}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
