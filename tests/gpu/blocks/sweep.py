"""Tiles of the Triton kernels against each other; runs only where --blocks names it.

Candidates were pruned by their machine code beforehand (gpu.candidates). Each is checked against
the result of the shipped tile, timed by graph replay on typical shapes, and the fastest of an entry
is kept while the entries behind it are tried. ``tiles.txt`` in the output folder holds what won, as
entries of ``tile_table._CHIPS``, after every entry.
"""

from __future__ import annotations

import json
import math

from gpu.case import Case, Emit, Outcome, Settings

NAME = "sweep"
WEIGHT = 30.0
COMPILE, MEASURE = "compile", "measure"
RESERVE = 4.0  # seconds before the end at which no further tile is tried
GAIN = 0.97  # of the shipped time: a tile that is not faster than this is noise
# The kernels that make up a pass, in the order in which they are tuned.
GROUPS = {
    "forward": ("forward",),
    "backward": ("backward_query", "backward_key"),
    "double_backward": ("double_backward_query", "double_backward_key"),
    "few seeds forward": ("few_seeds_forward",),
    "few seeds backward": ("few_seeds_backward",),
    "few seeds double_backward": ("few_seeds_double_backward",),
    "long forward": ("forward_long",),
    "long backward": ("backward_query_long", "backward_key_long"),
}
ROWS = (("bf16", 64), ("bf16", 32), ("fp32", 64), ("fp32", 32))
ALLOWED = {"bf16": 1.5e-2, "fp32": 1e-5}  # relative difference to the result of the shipped tile
# What is tried without CUDA, in Triton's interpreter.
REHEARSED = {"fp32 16 forward": [(16, 16, 16, 1, 1), (32, 16, 16, 1, 1)]}


def cases(settings: Settings) -> list[Case]:
    if not settings.wants("triton"):
        return []
    if settings.device != "cuda":
        return [
            Case(NAME, COMPILE, seconds=60.0),
            Case(NAME, f"{MEASURE} fp32 16 forward", "triton", "float32", seconds=60.0),
            Case(NAME, "graph replay", "triton", needs_cuda=True),
        ]
    found = [Case(NAME, COMPILE, seconds=150.0)]
    for row, width in ROWS:
        for group in GROUPS:
            if _entries(row, width, group, settings.device):
                found.append(
                    Case(
                        NAME,
                        f"{MEASURE} {row} {width} {group}",
                        "triton",
                        {"bf16": "bfloat16", "fp32": "float32"}[row],
                        seconds=60.0,
                        shard="all",
                    )
                )
    return found


def run(case: Case, settings: Settings, emit: Emit) -> None:
    if case.name == COMPILE:
        compile_all(settings, emit)
        return
    _, row, width, group = case.name.split(" ", 3)
    measure(row, int(width), group, settings, emit)


def _entries(row: str, width: int, group: str, device: str) -> dict:
    """Candidates of a group's entries."""
    from gpu import tiles

    if device != "cuda":
        known = {tiles.Key.of(name): found for name, found in REHEARSED.items()}
    else:
        known = tiles.candidates()
    keys = [tiles.Key(row, width, name) for name in GROUPS[group]]
    return {key: known[key] for key in keys if key in known}


def _shapes(width: int, group: str, device: str) -> list:
    """What a group is timed on: typical sizes, about equally important."""
    from benchmarks.workloads.sizes import draw
    from gpu.shapes import Shape, equal

    if device != "cuda":
        return [equal(5, 2, 1, width)]
    if group.startswith("long"):
        return [Shape(f"one set of {n}", (n,), 8, width) for n in (2048, 8192)]
    if group.startswith("few seeds"):
        return [
            Shape(f"{s} seeds, {kind}", draw(kind, 1024), 8, width, s)
            for s, kind in ((1, "QMugs-like"), (4, "QM7b"))
        ]
    return [equal(n, 1024, 8, width) for n in (18, 55)]


def compile_all(settings: Settings, emit: Emit) -> None:
    """All candidates, on all cores, without the GPU."""
    import torch

    import attnpool_kernels.impl.triton as backend
    from gpu import alone, shapes, tiles, variants
    from gpu.blocks import prewarm

    if reason := backend._why_no_triton():
        raise Outcome("missing", reason)
    cuda = settings.device == "cuda"
    capability = prewarm.of_the_card() if cuda else (9, 0)
    with variants.collecting(capability) as collected:
        for row, width in ROWS if cuda else ROWS[:1]:
            dtype = getattr(torch, tiles.DTYPES[row])
            for group in GROUPS if cuda else ("forward",):
                for key, found in _entries(row, width, group, "cuda").items():
                    original = tiles.shipped(key, capability)
                    for tile in (original, *found) if cuda else (original,):
                        with tiles.using({key: tile}):
                            for shape in _shapes(width, group, "cuda"):
                                batch = shapes.without_values(shape, dtype)
                                getattr(alone.Kernels(batch, backend), group.split()[-1])()
    jobs = list(collected.found.values())
    done = list(
        variants.compiled(
            jobs, collected.target, settings.cores, lambda: settings.left() - RESERVE, cuda
        )
    )
    failed = [one for one in done if one.error]
    for one in failed:  # a tile that does not compile is one that does not win
        emit({"what": one.name, "status": "refused", "text": one.error})
    emit(
        {
            "what": "variants",
            "variants": len(jobs),
            "compiled": len(done) - len(failed),
            "status": "ok" if len(done) == len(jobs) else "no time",
            "core_seconds": sum(one.seconds for one in done),
        }
    )


def measure(row: str, width: int, group: str, settings: Settings, emit: Emit) -> None:
    import torch

    import attnpool_kernels.impl.triton as backend
    from gpu import alone, clock, tiles

    device, what = settings.device, group.split()[-1]
    dtype = getattr(torch, tiles.DTYPES[row])
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    chosen: dict = {}
    with clock.own_stream(device) as stream:
        shapes = _shapes(width, group, device)
        kernels = []
        for shape in shapes:
            turns = clock.Turns(shape, dtype, device)
            made = [alone.Kernels(turns(i), backend) for i in range(turns.count(what))]
            for one in made if what != "forward" else ():
                one.prepare()
            kernels.append([getattr(one, what) for one in made])
        expected = [calls[0]() for calls in kernels]
        won: dict = {}
        for key, found in _entries(row, width, group, device).items():
            original = tiles.shipped(key, capability)
            if original is None:
                continue
            times: dict = {}
            for tile in dict.fromkeys((original, *found)):
                if settings.left() < RESERVE:
                    emit({"what": str(key), "tile": list(tile), "status": "no time"})
                    continue
                said = {"what": str(key), "tile": list(tile), "shipped": tile == original}
                try:
                    with tiles.using(won | {key: tile}):
                        results = [calls[0]() for calls in kernels]
                        error = max(map(_difference, results, expected))
                        took = [clock.kernels(calls, stream)["seconds"] for calls in kernels]
                except Exception as problem:
                    if device == "cuda":
                        torch.cuda.synchronize()  # raises where the context is gone
                    text = f"{type(problem).__name__}: {problem}"[:300]
                    emit(said | {"status": "refused", "text": text})
                    continue
                right = error <= ALLOWED[row]  # not of NaN
                mean = math.prod(took) ** (1 / len(took))
                emit(
                    said
                    | {
                        "status": "ok" if right else "wrong",
                        "difference": error,
                        "seconds": mean,
                        "of": {shape.name: x for shape, x in zip(shapes, took)},
                    }
                )
                if right:
                    times[tile] = mean
            if original not in times:
                continue
            best = min(times, key=times.__getitem__)
            if times[best] < GAIN * times[original]:
                won[key] = best
                chosen[key] = best, times[original], times[best]
    _write(settings, capability or (9, 0), chosen)


def _difference(found: dict, expected: dict) -> float:
    """The worst relative difference; NaN where there is any."""
    worst = 0.0
    for name, x in expected.items():
        apart = (found[name].double() - x.double()).norm() / x.double().norm().clamp(min=1e-30)
        worst = apart.item() if apart.isnan() else max(worst, apart.item())
        if math.isnan(worst):
            return worst
    return worst


def _write(settings: Settings, capability: tuple[int, int], chosen: dict) -> None:
    """Adds to what earlier cases of this output folder have found."""
    from gpu import tiles

    path = settings.out / "tiles.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {str(key): [list(tile), *times] for key, (tile, *times) in chosen.items()}
    path.write_text(json.dumps(known, indent=1))
    merged = {
        tiles.Key.of(name): (tuple(tile), before, after)
        for name, (tile, before, after) in known.items()
    }
    (settings.out / "tiles.txt").write_text(tiles.lines(capability, merged))


def table(rows: list[dict]) -> list[str]:
    """The best tile of each entry and what it saves."""
    timed = [row for row in rows if row.get("tile") and row.get("seconds")]
    lines = ["", f"{'entry':<36} {'shipped':>30} {'best':>40}"]
    for name in dict.fromkeys(row["what"] for row in timed):
        own = [row for row in timed if row["what"] == name and row["status"] == "ok"]
        first = [row for row in own if row["shipped"]]
        if not first:
            continue
        best = min(own, key=lambda row: row["seconds"])
        cells = [
            f"{' x '.join(map(str, row['tile']))}: {1e6 * row['seconds']:.1f} µs"
            for row in (first[0], best)
        ]
        ratio = first[0]["seconds"] / best["seconds"]
        lines.append(f"{name:<36} {cells[0]:>30} {cells[1]:>32} {ratio:6.2f}x")
    return lines
