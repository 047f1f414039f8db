"""What must hold beside the values: the same bits again and alone, graphs, streams, huge tensors.

A captured graph has a process of its own, whose first call it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpu.case import Case, Emit, Settings
from gpu.passes import kernels, parallel

if TYPE_CHECKING:
    import torch

NAME = "invariants"
WEIGHT = 4.0
PARALLEL = parallel
REPEATS = 20
REPLAYS = 20
DTYPES = ("bfloat16", "float32")
LARGE = 16, 64  # heads and width of the batch with more than 2^31 elements


def cases(settings: Settings) -> list[Case]:
    small = settings.device == "cpu"
    found = []
    for backend in kernels(settings):
        after = "prewarm" if backend == "triton" else ""

        def add(name: str, dtype: str, shard: str = "", cuda: bool = True) -> None:
            case = Case(NAME, name, backend, dtype, 120.0, cuda, shard, after)  # noqa: B023
            found.append(case)

        for dtype in ("float32",) if small else DTYPES:
            for kind in ("sets", "few seeds"):
                add(f"repeats of {kind}", dtype, "bits", cuda=False)
                interpreted = small and backend == "triton"
                add(f"alone or in a batch, {kind}", dtype, "bits", cuda=interpreted)
        for dtype in DTYPES:
            for kind in ("sets", "few seeds"):
                add(f"first call captured, {kind}", dtype)
        for kind in ("sets", "few seeds"):
            add(f"replays through autograd, {kind}", "float32", "streams")
            add(f"no synchronisation, {kind}", "float32", "streams")
            add(f"side stream, {kind}", "float32", "streams")
        if backend != "triton" or not small:
            add("more than 2^31 elements", "bfloat16", "bits", cuda=False)
    return found


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    name, _, kind = case.name.replace(" of ", ", ").partition(", ")
    seeds = 4 if kind == "few seeds" else None
    dtype = getattr(torch, case.dtype)
    steps: dict[str, Callable[..., dict[str, Any]]] = {
        "repeats": repeats,
        "alone or in a batch": alone,
        "first call captured": captured,
        "replays through autograd": replays,
        "no synchronisation": unsynchronised,
        "side stream": side_stream,
    }
    arguments = case.backend, dtype, seeds, settings.device
    if name.startswith("more"):
        from gpu import batches

        with batches.memory_to_itself(settings.cache):
            emit(large(*arguments))
    else:
        emit(steps[name](*arguments))


def _batch(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> tuple[Any, Any]:
    """The batch of all sizes, small where it only rehearses, and the module."""
    from gpu import batches, passes

    batch = batches.mixed(dtype, device, seeds, small=device == "cpu")
    return batch, passes.load(backend, batch, dtype)


def _same(first: dict, second: dict, what: str) -> list[str]:
    """Names of results whose bits differ."""
    import torch

    return [f"{key} {what}" for key, x in first.items() if not torch.equal(x, second[key])]


def _row(wrong: list[str], **facts: Any) -> dict[str, Any]:
    if not wrong:
        return {"status": "ok", **facts}
    return {"status": "wrong", "text": "; ".join(wrong[:8]), **facts}


def repeats(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """The same bits in all three passes, again and again, in memory that held NaN."""
    from attnpool_kernels import testing
    from gpu import judgement

    batch, module = _batch(backend, dtype, seeds, device)
    times = REPEATS if device == "cuda" else 1
    wrong: list[str] = []
    with judgement.poisoned():
        first = testing.run_kernels(batch, module)
        for time in range(times):
            again = testing.run_kernels(batch, module)
            wrong += _same(first, again, f"changed in repeat {time + 1}")
    return _row(wrong, repeats=times, shape=list(batch.q.shape))


def alone(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """A molecule's results have the same bits alone and in the batch."""
    from attnpool_kernels import testing

    batch, module = _batch(backend, dtype, seeds, device)
    whole, start, wrong = testing.run_kernels(batch, module), 0, []
    by_rows = ("k", "v", "ddk", "ddv", *(("key_bias", "ddkey_bias") if seeds else ()))
    by_molecule = ("dout", "dlse") if seeds else ("q", "dout", "dlse", "ddq")
    for index, n in enumerate(batch.case.counts):
        rows = slice(start, start + n)
        start += n
        part = slice(index, index + 1) if seeds else rows
        single = replace(batch.case, counts=(n,)).make(dtype, device)
        changes = {key: getattr(batch, key)[rows] for key in by_rows}
        changes |= {key: getattr(batch, key)[part] for key in by_molecule}
        if seeds:
            changes |= {"q": batch.q, "ddq": batch.ddq}
        found = testing.run_kernels(replace(single, **changes), module)
        for key, x in found.items():
            if seeds and key in ("dq", "gq"):
                continue  # sums over the molecules
            own = rows if key.lstrip("dg") in ("k", "v", "key_bias") else part
            wrong += _same({key: x}, {key: whole[key][own]}, f"of {n} atoms differs")
    return _row(wrong, counts=list(batch.case.counts))


def record(call: Callable[[], dict]) -> tuple[Any, dict]:
    """A CUDA graph of a call, and the tensors that its replays write."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def _other_values(batch: Any, place: int) -> None:
    """Other numbers and other molecule sizes in the same tensors."""
    import torch

    from gpu.batches import TENSORS

    generator = torch.Generator().manual_seed(place)
    for key in TENSORS:
        x = getattr(batch, key)
        if x is not None:
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    rows = int(batch.k.shape[0])
    inner = torch.randint(0, rows + 1, (batch.k_ptr.numel() - 2,), generator=generator)
    ptr = torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([rows])])
    batch.k_ptr.copy_(ptr)  # q_ptr is the same tensor, where there is one


def captured(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """All three passes captured before anything of the backend has run in this process."""
    import torch

    from attnpool_kernels import testing

    batch, module = _batch(backend, dtype, seeds, device)
    graph, results = record(lambda: testing.run_kernels(batch, module))
    wrong: list[str] = []
    for time in range(3):
        _other_values(batch, time)
        graph.replay()
        torch.cuda.synchronize()
        eager = testing.run_kernels(batch, module)
        wrong += _same(results, eager, f"of replay {time} differs")
    return _row(wrong, replays=3)


def replays(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """A training step through the public functions, captured and replayed with other values."""
    import torch

    from attnpool_kernels import seed_pool, set_attention

    batch, _ = _batch(backend, dtype, seeds, device)
    inputs = [x.requires_grad_() for x in (batch.q, batch.k, batch.v)]

    def step() -> dict:
        if seeds:
            out = seed_pool(*inputs, batch.k_ptr, backend=backend)
        else:
            out = set_attention(*inputs, batch.k_ptr, backend=backend)
        first = torch.autograd.grad(out, inputs, batch.dout, create_graph=True)
        cotangents = [batch.ddq, batch.ddk, batch.ddv]
        second = torch.autograd.grad(first, inputs, cotangents)
        found = [out, *first, *second]
        names = ("out", "dq", "dk", "dv", "gq", "gk", "gv")
        return {name: x.detach() for name, x in zip(names, found)}

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph, results = record(step)
    wrong: list[str] = []
    for time in range(REPLAYS):
        with torch.no_grad():
            _other_values(batch, time)
        graph.replay()
        torch.cuda.synchronize()
        wrong += _same(results, step(), f"of replay {time} differs")
    return _row(wrong, replays=REPLAYS)


def unsynchronised(
    backend: str, dtype: torch.dtype, seeds: int | None, device: str
) -> dict[str, Any]:
    """No pass waits for the device where the boundaries are on the device."""
    import torch

    from attnpool_kernels import testing

    batch, module = _batch(backend, dtype, seeds, device)
    testing.run_kernels(batch, module)  # compiles and loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        testing.run_kernels(batch, module)
    except RuntimeError as error:
        return _row([str(error)[:300]])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return _row([])


def side_stream(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """Work goes to the current stream: what a slow producer writes there is waited for."""
    import torch

    from attnpool_kernels import testing
    from gpu.batches import TENSORS

    batch, module = _batch(backend, dtype, seeds, device)
    expected = testing.run_kernels(batch, module)
    known = {key: getattr(batch, key) for key in TENSORS if getattr(batch, key) is not None}
    late = {key: torch.zeros_like(x) for key, x in known.items()}
    torch.cuda.synchronize()  # the zeros are there, for a kernel that comes too early
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for key, x in known.items():
            late[key].copy_(x)
        found = testing.run_kernels(replace(batch, **late), module)
    side.synchronize()
    return _row(_same(expected, found, "was computed too early"))


def large(backend: str, dtype: torch.dtype, seeds: int | None, device: str) -> dict[str, Any]:
    """All passes where each tensor has more than 2^31 elements: the outermost molecules are right.

    Bits do not depend on the batch, so a molecule alone is the measure of it in the batch.
    """
    import torch

    from attnpool_kernels import testing
    from gpu import batches, passes

    heads, width = LARGE
    size = 64
    molecules = (2**31 // (heads * width) if device == "cuda" else 2**8) // size + 2
    rows = molecules * size
    batches.require_memory(12 * rows * heads * width * dtype.itemsize, device)
    x = torch.zeros(rows, heads, width, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    ends = [slice(0, size), slice(rows - size, rows)]
    for end in ends:
        x[end].copy_(torch.randn(size, heads, width, generator=generator))
    ptr = torch.arange(0, rows + 1, size, device=device)
    small = testing.Case("", (size,), heads=heads, dim=width).make(dtype, device)
    names = ("q", "k", "v", "dout", "ddq", "ddk", "ddv")

    def passes_of(part: torch.Tensor, boundaries: torch.Tensor) -> dict:
        changes = dict.fromkeys(names, part) | {"q_ptr": boundaries, "k_ptr": boundaries}
        return testing.run_kernels(replace(small, **changes), module)

    module = passes.load(backend, small, dtype)
    whole = passes_of(x, ptr)
    wrong: list[str] = []
    for name, end in zip(("first", "last"), ends):
        alone = passes_of(x[end].clone(), ptr[:2])
        wrong += _same(alone, {key: y[end] for key, y in whole.items()}, f"of the {name} is wrong")
    return _row(wrong, elements=x.numel(), shape=list(x.shape))
