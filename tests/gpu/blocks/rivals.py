"""The same work by other libraries, in the same run and by the same clock as ours beside them.

Passes go through torch's autograd, each by itself. Where a library waits for the device, its calls
cannot be captured and the row says so. PyG's module (a whole Set Transformer pooling) is compared
with the same module on this package and on torch's own multi-head attention.
"""

from __future__ import annotations

from gpu.case import Case, Emit, Outcome, Settings
from gpu.passes import PASSES, kernels

NAME = "rivals"
WEIGHT = 10.0
MODULE = "module, "
# of gpu.shapes, for bfloat16; those of float32 are fewer
HALF = (
    "1024 x 18 atoms, 8x64",
    "1024 x 55 atoms, 8x64",
    "QM7b x 1024, 8x32",
    "QMugs-like x 512, 8x32",
    "10000 neighbour sets, 8x16",
    "16 queries, one set of 100000, 8x64",
    "one set of 4096, 8x64",
    "1024 x 15 atoms, 8x32",
    "4 seeds, QM7b x 1024, 8x32",
    "one set of 16384, 8x64",
    "10000 neighbour sets, 10x64",
    "128 x 18 atoms, 8x64",
    "4096 x 32 atoms, 8x64",
)
SINGLE = (
    "1024 x 18 atoms, 8x64",
    "1024 x 55 atoms, 8x64",
    "QM7b x 1024, 8x32",
    "10000 neighbour sets, 8x16",
    "one set of 4096, 8x64",
)


def cases(settings: Settings) -> list[Case]:
    from gpu import rivals, shapes

    found, cuda = [], settings.device == "cuda"
    mine = [f"ours, {name}" for name in kernels(settings)]
    for dtype, names in (("bfloat16", HALF), ("float32", SINGLE)):
        if not cuda:
            names = tuple(shape.name for shape in shapes.tiny()[: 1 if dtype == "bfloat16" else 3])
        for place, name in enumerate(names):
            found += [
                Case(
                    NAME,
                    f"{name}: {who}",
                    dtype=dtype,
                    seconds=30.0,
                    shard=f"{dtype} {place // 5}",
                    needs_cuda=not _anywhere(who),
                    after="prewarm" if cuda and "triton" in who else "",
                )
                for who in (*mine, *rivals.RIVALS)
            ]
        found += [
            Case(
                NAME, f"{MODULE}{kind}: {who}", dtype=dtype, seconds=40.0, shard=f"{dtype} modules"
            )
            for kind in (("QM7b x 1024, 8x16",) if cuda else ("tiny, 2x8",))
            for who in (rivals.MODULES if cuda or dtype == "float32" else ())
        ]
    return found


def _anywhere(who: str) -> bool:
    from gpu import rivals

    return who in (*rivals.ANYWHERE, "ours, cpu")


def run(case: Case, settings: Settings, emit: Emit) -> None:
    import torch

    from gpu import rivals, shapes

    name, who = case.name.rsplit(": ", 1)
    dtype = getattr(torch, case.dtype)
    if name.startswith(MODULE):
        module(who, dtype, settings.device, emit)
        return
    shape = shapes.named(name, settings.device)
    own = who.removeprefix("ours, ") if who.startswith("ours, ") else ""
    prepare = rivals.ours(own) if own else rivals.RIVALS[who]
    passes = PASSES if own or who in rivals.SECOND else PASSES[:2]
    timed(shape, dtype, who, prepare, passes, settings.device, emit)


def timed(shape, dtype, who, prepare, passes, device: str, emit: Emit) -> None:
    from gpu import alone, clock

    failed: Exception | None = None
    with clock.own_stream(device) as stream:
        turns = clock.Turns(shape, dtype, device)
        call = prepare(turns(0))
        made: list[alone.Autograd] = []
        for what in passes:
            try:
                count = turns.count(what)
                for place in range(len(made), count):
                    made.append(alone.Autograd(turns(place), call))
                chosen = [getattr(one, what) for one in made[:count]]
                for one in chosen:
                    one()  # the passes before it, outside of the graph
                row = {"what": what, "backend": who} | clock.kernels(chosen, stream)
                row |= clock.rates(shape, what, dtype, device, row["seconds"])
                emit(row | clock.eager(chosen[0], stream, row["seconds"]))
            except Outcome:
                raise
            except Exception as error:
                failed = error
                status = "refused" if _refusal(error) else "failed"
                text = f"{type(error).__name__}: {error}"
                emit({"what": what, "backend": who, "status": status, "text": text})
                if status == "refused":
                    break  # the later passes need this one
                raise
        if failed is not None:
            return
        results = clock.checked(turns(0), lambda what: getattr(made[0], what)(), tuple(passes))
        if results is not None:
            emit(results | {"backend": who})


def _refusal(error: Exception) -> bool:
    """Whether a library says that it has no kernel, or not the memory, for this."""
    import torch

    text = str(error)
    return isinstance(error, NotImplementedError | torch.OutOfMemoryError) or any(
        part in text
        for part in (
            "No available kernel",
            "No viable backend",
            "No operator found",
            "not implemented",
        )
    )


def module(who: str, dtype, device: str, emit: Emit) -> None:
    """A whole pooling module, forward and the gradients of its input and weights."""
    from benchmarks.contenders import registry
    from benchmarks.workloads.batch import make_batch
    from benchmarks.workloads.sizes import draw
    from benchmarks.workloads.workload import Workload
    from gpu import alone, clock

    sizes = draw("QM7b", 1024) if device == "cuda" else (4, 7, 2)
    heads, dim = (8, 16) if device == "cuda" else (2, 8)
    work = Workload("module", "modules", sizes, heads, dim, 4, dtype, module=True)
    contender = registry.CONTENDERS[who]
    if reasons := contender.why_not(work, "backward", device):
        raise Outcome("missing", "; ".join(reasons))
    facts = {"sets": len(sizes), "rows": sum(sizes), "heads": heads, "dim": dim, "seeds": 4}
    with clock.own_stream(device) as stream:
        batch = make_batch(work, device)
        batch.prepare("backward")
        passes = alone.Autograd(batch, contender.prepare(batch))
        for what in PASSES[:2]:
            call = getattr(passes, what)
            call()
            row = {"what": what, "backend": who, "shape": facts} | clock.kernels([call], stream)
            emit(row | clock.eager(call, stream, row["seconds"]))
        results = clock.checked(batch, lambda what: getattr(passes, what)(), PASSES[:2])
        if results is not None:
            emit(results | {"backend": who})


def table(rows: list[dict]) -> list[str]:
    """Microseconds of each pass and the multiple of our fastest, a line a contender."""
    timed = [row for row in rows if row["what"] in PASSES and row.get("seconds")]
    lines = []
    for key in dict.fromkeys((r["dtype"], r["name"].rsplit(": ", 1)[0]) for r in timed):
        own = [r for r in timed if (r["dtype"], r["name"].rsplit(": ", 1)[0]) == key]
        lines += ["", f"{key[1]}, {key[0]}: µs (x our fastest)"]
        for who in dict.fromkeys(r["backend"] for r in own):
            cells = []
            for what in PASSES:
                best = [r["seconds"] for r in own if r["what"] == what and _is_ours(r["backend"])]
                at = [r for r in own if r["what"] == what and r["backend"] == who]
                if not at:
                    continue
                took = at[0]["seconds"]
                ratio = f" ({took / min(best):4.1f}x)" if best else ""
                slow = "" if at[0]["clock"] != "calls" else " plain calls"
                cells.append(f"{what} {1e6 * took:9.1f}{ratio}{slow}")
            lines.append(f"  {who:<22}" + "  ".join(cells))
    return lines


def _is_ours(who: str) -> bool:
    return who.startswith("ours") or who == "module"
