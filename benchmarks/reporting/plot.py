"""Figures from rows: time and memory against atoms per molecule, and batches of molecules."""

from __future__ import annotations

from pathlib import Path

from ..measuring.sheet import BenchmarkError, Row
from . import tables

# One colour and marker a contender in every figure. The colours of the usual contenders are those
# of Okabe and Ito, which colour-blind eyes tell apart; markers and dashes tell them apart in grey.
STYLE = {
    "attnpool:cpu": ("#111111", "o"), "attnpool:cuda": ("#111111", "o"),
    "attnpool:triton": ("#6a3d9a", "o"), "attnpool:sdpa": ("#8c8c8c", "s"),
    "attnpool:reference": ("#bcbcbc", "D"), "attnpool:varlen": ("#1b9e77", "P"),
    "attnpool:flash_attn": ("#66a61e", "P"), "attnpool:xformers": ("#a6761d", "P"),
    "attnpool:flex": ("#7570b3", "P"), "naive": ("#d55e00", "v"),
    "memory_efficient": ("#e69f00", "^"), "flash": ("#0072b2", "s"),
    "efficient": ("#56b4e9", "s"), "per_molecule": ("#009e73", "<"),
    "nested": ("#cc79a7", ">"), "einsum": ("#8c564b", "x"), "module": ("#111111", "o"),
    "module_pyg": ("#6a3d9a", "o"),
    "module_naive": ("#d55e00", "v"), "module_mha": ("#0072b2", "s"), "pyg": ("#e69f00", "^"),
}  # fmt: skip
DASHES = {"v": (0, (6, 2)), "^": (0, (6, 2, 1, 2)), "s": (0, (2, 1.5))}  # by marker; else solid
LABELS = {
    "naive": "naive, padded",
    "memory_efficient": "chunked (Rabe & Staats)",
    "flash": "flash (torch SDPA)",
    "efficient": "memory-efficient (torch SDPA)",
    "per_molecule": "torch SDPA per molecule",
    "nested": "NestedTensor SDPA",
    "einsum": "padded einsum (as DGL)",
    "module": "attnpool",
    "module_pyg": "attnpool, drop-in for PyG",
    "module_naive": "naive, padded",
    "module_mha": "torch multi-head attention, padded",
    "pyg": "PyG SetTransformerAggregation",
}
PASS = {"forward": "forward", "backward": "+ backward", "double_backward": "+ second derivative"}
FLOOR = 3e5  # bytes: the resolution of the memory measurement


def draw(rows: list[Row], stem: Path, title: str) -> list[Path]:
    """Writes <stem>-*.png and .svg for what the rows hold; the files. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 9, "svg.hashsalt": "attnpool", "svg.fonttype": "none"})
    made = []
    for family in ("scaling", "constant"):
        figure = _scaling([r for r in rows if r.family == family], title, family)
        made += save(figure, stem, family)
    batches = [r for r in rows if r.family in ("molecules", "mixed", "long", "neighbours")]
    made += save(_batches(batches, title, "batches of molecules"), stem, "molecules")
    pooling = [r for r in rows if r.family == "seeds"]
    many = len({r.seeds for r in pooling}) > 3
    drawn = _pooling(pooling, title) if many else _batches(pooling, title, "seed pooling")
    made += save(drawn, stem, "seeds")
    modules = [r for r in rows if r.family == "modules"]
    made += save(_batches(modules, title, "pooling module"), stem, "modules")
    return made


def save(figure, stem: Path, name: str) -> list[Path]:
    """Writes <stem>-<name>.png and .svg, of no figure none; the files."""
    if figure is None:
        return []
    import matplotlib.pyplot as plt

    made = []
    for kind in ("png", "svg"):
        path = stem.with_name(f"{stem.name}-{name}.{kind}")
        options = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": 130}
        try:
            figure.savefig(path, bbox_inches="tight", **options)
        except OSError as error:
            path.unlink(missing_ok=True)  # a part of a figure is none
            raise BenchmarkError(f"cannot write {path}: {error.strerror}") from error
        made.append(path)
    plt.close(figure)
    return made


def _look(name: str, rows: list[Row]) -> dict:
    colour, marker = STYLE.get(name, ("#444444", "*"))
    ours = any(row.ours for row in rows)
    label = LABELS.get(name, name.replace("attnpool:", "attnpool, "))
    # Ours are thick and lie below, so that a line that runs along them is seen.
    return {
        "color": colour,
        "marker": marker,
        "markersize": 6 if ours else 4.5,
        "markerfacecolor": colour if ours else "white",
        "linewidth": 3.0 if ours else 1.4,
        "linestyle": "-" if ours else DASHES.get(marker, "-"),
        "zorder": 3 if ours else 5,
        "label": label,
    }


def _legend(place, handles: dict[str, object], where: tuple[float, float], most: int) -> None:
    """Under a figure or an axis, in ``most`` columns at the most."""
    place.legend(
        handles.values(),
        handles.keys(),
        loc="upper center",
        bbox_to_anchor=where,
        ncol=min(most, len(handles)),
        frameon=False,
    )


def _scaling(rows: list[Row], title: str, family: str):
    """Two rows of panels (time, memory), one column a pass, log-log."""
    rows = [r for r in rows if not r.contender.startswith("base:")]
    rows = [r for r in rows if r.x and (r.timed or not r.ok)]
    first = next((r for r in rows if r.timed), None)
    if first is None:
        return None
    rows = [r for r in rows if (r.dtype, r.heads, r.dim) == (first.dtype, first.heads, first.dim)]
    passes = [what for what in PASS if any(r.what == what and r.timed for r in rows)]
    if not passes:
        return None
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(passes), figsize=(4.3 * len(passes), 7.4), sharex=True, sharey="row", squeeze=False
    )
    handles: dict[str, object] = {}
    remembered = False
    for column, what in enumerate(passes):
        time_axis, memory_axis = axes[0][column], axes[1][column]
        own = [r for r in rows if r.what == what]
        ends: list[tuple[object, str]] = []
        for (name,), group in tables.grouped(own, "contender").items():
            good = sorted((r for r in group if r.timed), key=lambda r: r.x)
            if not good:
                continue
            look = _look(name, group)
            (line,) = time_axis.plot([r.x for r in good], [r.p50_ms for r in good], **look)
            time_axis.fill_between(
                [r.x for r in good], *_band(good), color=look["color"], alpha=0.15, linewidth=0
            )
            handles.setdefault(look["label"], line)
            known = [r for r in good if r.peak_bytes is not None and r.peak_bytes > FLOOR]
            remembered |= bool(known)
            memory_axis.plot([r.x for r in known], [r.peak_bytes / 1e6 for r in known], **look)
            if (end := _end(group)) is not None:
                ends.append((line, end))
        last = max(r.x for r in own if r.timed)
        bound = [r for r in own if r.limit_ms and r.x <= last]
        _draw_limit(time_axis, {r.x: r.limit_ms for r in bound}, bound, handles)
        time_axis.set_title(PASS[what])
        if ends:  # in a free corner: words at the ends of lines cover each other
            lines, words = zip(*ends)
            time_axis.legend(lines, words, loc="best", fontsize=7, frameon=False, handlelength=3)
        for axis in (time_axis, memory_axis):
            axis.set_xscale("log", base=2)
            axis.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
        time_axis.set_yscale("log")
        memory_axis.set_xlabel("atoms per molecule")
        memory_axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    if remembered:  # the axes of a row share a scale, which has no logarithm of nothing
        axes[1][0].set_yscale("log")
    else:
        axes[1][0].set_yticks([])
        for axis in axes[1]:
            note = f"no measurement over {FLOOR / 1e6:g} MB"
            axis.text(0.5, 0.5, note, ha="center", transform=axis.transAxes, color="#555555")
    axes[0][0].set_ylabel("milliseconds (median; band p20 to p80)")
    axes[1][0].set_ylabel("peak memory over the inputs, MB")
    what = "one molecule" if family == "scaling" else f"{first.atoms} atoms in equal molecules"
    figure.suptitle(f"{what}, {first.heads} x {first.dim}, {first.dtype}\n{title}", fontsize=10)
    _legend(figure, handles, (0.5, 0.02), 5)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def _band(good: list[Row]) -> tuple[list[float], list[float]]:
    """The 20th and 80th percentiles; no width where one is missing."""
    pairs = [(r.p20_ms, r.p80_ms) if r.p20_ms and r.p80_ms else (r.p50_ms, r.p50_ms) for r in good]
    return [low for low, _ in pairs], [high for _, high in pairs]


def _limit_label(rows: list[Row]) -> str:
    if all(map(tables.is_limit, rows)):
        return "limit of this machine"
    return "at the rates of the library's product and copy (no limit)"


def _draw_limit(axis, limit: dict, rows: list[Row], handles: dict[str, object]) -> None:
    """A dashed line through milliseconds by place; nothing where no row has a limit."""
    if not limit:
        return
    xs, label = sorted(limit), _limit_label(rows)
    (line,) = axis.plot(
        xs, [limit[x] for x in xs], color="#555555", linestyle=(0, (4, 3)), linewidth=1
    )
    handles.setdefault(label, line)


def _end(group: list[Row]) -> str | None:
    """Why a contender's line ends, where it ran out of memory or time."""
    words = {"oom": "out of memory", "timeout": "too slow"}
    found = next((r for r in group if r.status in words), None)
    return None if found is None else f"{words[found.status]} at {found.x:,g} atoms"


def _pooling(rows: list[Row], title: str):
    """Time against the number of seeds: one row of panels a pass, one column a batch."""
    rows = [r for r in rows if r.timed and r.seeds and not r.contender.startswith("base:")]
    columns = tables.grouped(rows, "molecules", "atoms")
    passes = [what for what in PASS if any(r.what == what for r in rows)]
    if not rows or not passes:
        return None
    import matplotlib.pyplot as plt

    size = 4.0 * len(columns), 0.6 + 3.0 * len(passes)
    figure, axes = plt.subplots(len(passes), len(columns), figsize=size, squeeze=False)
    handles: dict[str, object] = {}
    for column, group in enumerate(columns.values()):
        for i, what in enumerate(passes):
            axis, own = axes[i][column], [r for r in group if r.what == what]
            if not own:
                axis.axis("off")
                continue
            for (name,), points in tables.grouped(own, "contender").items():
                points.sort(key=lambda r: r.seeds)
                look = _look(name, points)
                xs, ys = [r.seeds for r in points], [r.p50_ms for r in points]
                handles.setdefault(look["label"], axis.plot(xs, ys, **look)[0])
            bound = [r for r in own if r.limit_ms]
            _draw_limit(axis, {r.seeds: r.limit_ms for r in bound}, bound, handles)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axis.grid(True, which="major", color="#e4e4e4", linewidth=0.7)
            axis.spines[["top", "right"]].set_visible(False)
            batch = own[0].workload.split(f" {own[0].heads}x")[0]
            axis.set_title(f"{batch}, {PASS[what]}", fontsize=9)
            axis.set_xlabel("seeds")
        axes[0][0].set_ylabel("milliseconds (median)")
    first = rows[0]
    figure.suptitle(
        f"seed pooling, {first.heads} x {first.dim}, {first.dtype}\n{title}", fontsize=10
    )
    _legend(figure, handles, (0.5, 0.01), 4)
    figure.tight_layout(rect=(0, 0.01, 1, 1))
    return figure


def _shown(row: Row) -> bool:
    return row.timed and not row.contender.startswith("base:")


def _batches(rows: list[Row], title: str, what: str):
    """One line a workload and pass: the time of every contender as a multiple of the limit."""
    groups = {
        key: group
        for key, group in tables.grouped(rows, "workload", "what").items()
        if any(_shown(r) for r in group)
    }
    if not groups:
        return None
    import matplotlib.pyplot as plt

    if len(groups) > 40:  # a figure must be readable: forward only
        groups = {key: group for key, group in groups.items() if key[1] == "forward"}
    figure, axis = plt.subplots(figsize=(9.5, 1.6 + 0.27 * len(groups)))
    seen: dict[str, object] = {}
    names = []
    for y, ((workload, kind), group) in enumerate(groups.items()):
        short = workload.replace(" float32", "").replace(" separate", "")  # what most have
        names.append(f"{short}, {PASS.get(kind, kind)}")
        for row in group:
            if not _shown(row):
                continue
            look = _look(row.contender, [row])
            point = axis.scatter(
                row.p50_ms,
                y,
                color=look["color"],
                marker=look["marker"],
                s=70 if row.ours else 34,
                zorder=look["zorder"],
            )
            seen.setdefault(look["label"], point)
        bound = [r for r in group if r.limit_ms]
        if bound:
            least = min(r.limit_ms for r in bound)
            mark = axis.scatter(least, y, color="#555555", marker="|", s=110, zorder=2)
            seen.setdefault(_limit_label(bound), mark)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xscale("log")
    axis.set_xlabel("milliseconds (median); left is faster")
    axis.grid(True, axis="x", which="major", color="#d8d8d8", linewidth=0.7)
    axis.grid(True, axis="y", color="#f0f0f0", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.set_title(f"{what}\n{title}", fontsize=10)
    _legend(axis, seen, (0.35, -0.5 / (0.3 + 0.27 * len(groups))), 4)
    return figure
