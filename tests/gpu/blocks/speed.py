"""Times of our kernels: every shape and pass, by graph replay, against the bytes they must move.

A row a pass: seconds of the kernels called directly, ratio to the byte floor at the copy rate of
this card in this process, and beside it the public call as Python makes it (eager_us, host_us).
"""

from __future__ import annotations

from gpu.case import Case, Emit, Settings
from gpu.passes import PASSES, kernels

NAME = "speed"
WEIGHT = 20.0
SHARD = 24  # shapes of a process


def cases(settings: Settings) -> list[Case]:
    from gpu import shapes

    found = []
    every, cuda = shapes.of(settings.device), settings.device == "cuda"
    for start in range(0, len(every), SHARD):
        for dtype in ("bfloat16", "float32"):
            for backend in kernels(settings):
                found += [
                    Case(
                        NAME,
                        shape.name,
                        backend,
                        dtype,
                        seconds=30.0,
                        shard=f"{dtype} {start}",
                        needs_cuda=backend != "cpu",
                        after="prewarm" if cuda and backend == "triton" else "",
                    )
                    for shape in every[start : start + SHARD]
                ]
    if not cuda:  # the whole list would be rows that say "needs cuda"
        found += [
            Case(NAME, "graph replay", backend, needs_cuda=True, shard="graphs")
            for backend in ("cuda", "triton")
            if settings.wants(backend)
        ]
    return found


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    from gpu import shapes

    shape, dtype = shapes.named(case.name, settings.device), getattr(torch, case.dtype)
    timed(shape, dtype, case.backend, settings.device, emit)


def timed(shape, dtype, backend: str, device: str, emit: Emit) -> None:
    import torch

    from attnpool_kernels import BackendError, Problem, Ragged, impl, seed_pool, set_attention
    from gpu import alone, clock

    module = impl.load(backend)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    problem = Problem(
        device, dtype, shape.dim, shape.dim, capability, seeds=shape.seeds, grad_order=2
    )
    if reasons := module.why_not(problem):
        raise BackendError(f"backend {backend!r}: {'; '.join(reasons)}")
    failed: Exception | None = None
    with clock.own_stream(device) as stream:
        turns = clock.Turns(shape, dtype, device)
        molecules = Ragged.from_ptr(turns(0).ptr)
        attend = set_attention if shape.seeds is None else seed_pool
        public = alone.Autograd(
            turns(0), lambda q, k, v: attend(q, k, v, molecules, backend=backend)
        )
        made: list[alone.Kernels] = []
        for what in PASSES:
            try:
                count = turns.count(what)
                for place in range(len(made), count):
                    made.append(alone.Kernels(turns(place), module))
                chosen = made[:count]
                if what != "forward":
                    for one in chosen:
                        one.prepare()
                row = {"what": what} | clock.kernels([getattr(x, what) for x in chosen], stream)
                row |= clock.rates(shape, what, dtype, device, row["seconds"])
                try:  # the public call needs the other passes, too
                    row |= clock.eager(getattr(public, what), stream, row["seconds"])
                except Exception as error:
                    failed = error
                    row["text"] = f"the public call: {type(error).__name__}: {error}"
                emit(row)
            except Exception as error:  # the other passes may run
                failed = error
                emit({"what": what, "status": "failed", "text": f"{type(error).__name__}: {error}"})
        if failed is not None:
            raise failed
        row = clock.checked(turns(0), lambda what: getattr(made[0], what)(), PASSES)
        if row is not None:
            emit(row)


def table(rows: list[dict]) -> list[str]:
    """Microseconds of the kernels and their ratio to the byte floor, a line a shape."""
    timed = [row for row in rows if row["what"] in PASSES and row.get("seconds")]
    lines = []
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        own = [row for row in timed if row["dtype"] == dtype]
        columns = list(dict.fromkeys((row["backend"], row["what"]) for row in own))
        lines += ["", f"{dtype}: µs of the kernels (ratio to the byte floor)"]
        heads = "".join(f"{f'{b} {w[:8]}':>18}" for b, w in columns)
        lines.append(f"{'':<38}{heads}")
        for name in list(dict.fromkeys(row["name"] for row in own)):
            at = {(r["backend"], r["what"]): r for r in own if r["name"] == name}
            cells = [
                f"{1e6 * at[c]['seconds']:9.1f} ({at[c]['ratio']:5.1f})" if c in at else ""
                for c in columns
            ]
            lines.append(f"{name:<38}" + "".join(f"{cell:>18}" for cell in cells))
    return lines
