"""Numbers that the README and the benchmark page quote are those of the committed results."""

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from benchmarks.measuring import sheet
from benchmarks.reporting import goals, tables
from benchmarks.studies import fair
from benchmarks.studies.fair import POOLINGS
from benchmarks.studies.qm7b import Table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
README, BENCHMARKS, MODELS = (
    ROOT / name for name in ("README.md", "docs/benchmarks.md", "docs/models.md")
)
PASSES = {
    "forward": "forward",
    "+ backward": "backward",
    "+ second derivative": "double_backward",
}


@cache
def rows(name):
    return sheet.read(RESULTS / f"{name}.csv")[0]


def group(name, workload, what):
    found = [r for r in rows(name) if r.workload == workload and r.what == what and r.timed]
    assert found, (name, workload, what)
    return found


def time(name, workload, what, contender):
    return next(r.p50_ms for r in group(name, workload, what) if r.contender == contender)


def gain(name, workload, what):
    """How many times as long the fastest other way takes."""
    found = group(name, workload, what)
    return tables.fastest(found, ours=False).p50_ms / tables.fastest(found, ours=True).p50_ms


def same(quoted: str, exact: float) -> bool:
    """Whether a decimal is the exact number, rounded to its last digit."""
    digits = len(quoted.partition(".")[2])
    return abs(float(quoted) - exact) <= 0.51 * 10**-digits


def table(page, head):
    """Cells of the lines of the table whose head begins so."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(head)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[x.strip() for x in line.strip("|").split("|")] for line in lines[start:end]]


def test_the_five_numbers_of_the_readme():
    found = [re.findall(r"[\d.]+", row[2]) for row in table(README, "| what | against")]
    qm7b, one = "QM7b x128 8x32 float32 separate", "n=4096 8x32 float32 separate"
    peaks = {r.contender: r.peak_bytes / 1e6 for r in group("paper", one, "forward")}
    module = "n=55+-20 x128 8x16 float32 S=1 separate", "backward"
    step = "QM7b sizes x128 SchNet 128x3 ABP 256/8/32 float32", "force step"
    expected = [
        [gain("molecules", qm7b, "forward")],
        [gain("molecules", qm7b, "double_backward")],
        [peaks["attnpool:cpu"], peaks["naive"]],
        [time("modules", *module, "pyg") / time("modules", *module, "module_pyg")],
        [time("training", *step, "abp_masked") / time("training", *step, "abp")],
    ]
    assert [len(x) for x in found] == [len(x) for x in expected]
    for quoted, exact in zip(found, expected):
        assert all(map(same, quoted, exact)), (quoted, exact)


def test_batches_of_molecules():
    last = ""
    for batch, what, ours, fastest, *others in table(BENCHMARKS, "| batch | pass"):
        last = batch or last
        name, count = last.split(",")[0].split(" × ")
        key = "molecules", f"{name} x{count} 8x32 float32 separate", PASSES[what]
        own = time(*key, "attnpool:cpu")
        assert same(ours.split()[0], own), (key, own)
        assert same(fastest.rstrip("×"), gain(*key)), (key, gain(*key))
        for quoted, contender in zip(others, ("naive", "flash", "per_molecule")):
            if quoted != "none":
                exact = time(*key, contender) / own
                assert same(quoted.rstrip("×"), exact), (key, contender, exact)


def test_scaling():
    units = {"ms": 1, "s": 1e-3}
    what = ""
    for name, *cells in table(BENCHMARKS, "| one molecule"):
        what = "backward" if "backward" in name or "the same" in name else "forward"
        contender = next(
            key
            for word, key in (
                ("ours", "attnpool:cpu"),
                ("flash", "flash"),
                ("chunked", "memory_efficient"),
                ("naive", "naive"),
            )
            if word in name
        )
        for atoms, cell in zip((1024, 4096, 16384, 100000), cells):
            if cell in ("", "too slow"):
                continue
            (row,) = (
                r
                for r in group("paper", f"n={atoms} 8x32 float32 separate", what)
                if r.contender == contender
            )
            milliseconds, unit, *memory = re.findall(r"[\d.]+|ms|s|MB", cell)
            assert same(milliseconds, row.p50_ms * units[unit]), (name, atoms, row.p50_ms)
            if memory:
                assert abs(float(memory[0]) - row.peak_bytes / 1e6) <= 0.6, (name, atoms)
        good = [r for r in rows("paper") if r.family == "scaling" and r.what == what]
        good = [r for r in good if r.contender == contender and (r.heads, r.dim) == (8, 32)]
        good = [r for r in good if r.dtype == "float32"]
        for quoted, exact in zip(cells[4:], tables.exponents(good)):
            assert same(quoted.removeprefix("n^"), exact), (name, exact)


@pytest.mark.parametrize(
    ("column", "workload"), [(1, "QM9-like x128 {} separate"), (2, "n=55+-20 x128 {} separate")]
)
def test_pooling_modules(column, workload):
    shapes = ("8x16 float32 S=1", "8x32 float32 S=32", "16x64 float32 S=32")
    for row, shape in zip(table(BENCHMARKS, "| channels, heads, seeds"), shapes):
        theirs, ours, ratio = re.findall(r"[\d.]+", row[column])
        key = "modules", workload.format(shape), "backward"
        assert abs(float(theirs) - time(*key, "pyg")) <= 0.51
        assert abs(float(ours) - time(*key, "module_pyg")) <= 0.51
        assert same(ratio, time(*key, "pyg") / time(*key, "module_pyg"))


def test_training_steps():
    small, published = (
        f"QM7b sizes x128 SchNet {x} float32"
        for x in ("128x3 ABP 256/8/32", "256x8 ABP 1024/16/32")
    )
    steps = (small, "energy step"), (small, "force step"), (published, "energy step")
    for row, key in zip(table(BENCHMARKS, "| step | ours"), steps):
        own = time("training", *key, "abp")
        assert same(row[1].split()[0], own)
        padded = "abp_masked" if key[1] == "force step" else "abp_original"
        quoted = [(row[2], padded), (row[5], "sum")]
        quoted += [(row[3], "abp_reference")] if row[3] else []
        for cell, contender in quoted:
            assert same(cell.partition("×")[0], time("training", *key, contender) / own)
        if key[1] == "energy step":
            theirs, ours = (time("training", *key, x) for x in ("st_pyg", "st"))
            assert same(row[4].partition("×")[0], theirs / ours)


def section(title, page=BENCHMARKS):
    """The text under a heading, in one line."""
    text = page.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return " ".join(text.split())


def test_neighbour_sets():
    text, workload = (
        section("Neighbour sets and PET"),
        "2000 neighbourhoods 8x16 float32 separate key_bias",
    )
    passes = ("forward", "backward", "double_backward")
    keeping = re.search(r"forward ([\d.]+)×, .*? ([\d.]+)×, .*? ([\d.]+)× as fast", text).groups()
    default = re.search(r"default malloc ([\d.]+)×, ([\d.]+)× and ([\d.]+)×", text).groups()
    for name, quoted in (("neighbours-keeping-malloc", keeping), ("neighbours", default)):
        for number, what in zip(quoted, passes):
            key = name, workload, what
            assert same(number, time(*key, "naive") / time(*key, "attnpool:cpu")), (name, what)
    memory = re.search(r"Peak memory is ([\d.]+), ([\d.]+) and ([\d.]+) times", text).groups()
    for number, what in zip(memory, passes):
        peak = {r.contender: r.peak_bytes for r in group("neighbours", workload, what)}
        assert same(number, peak["naive"] / peak["attnpool:cpu"]), what


def test_drop_ins():
    text = section("Drop-ins")
    edges = "EdgeSetAttention 256/16 MSMSMP, up to {} edges x{}"
    for sentence, workload, what in (
        (r"([\d.]+)× at 18 atoms", "GPSConv, 10 layers, QM9-like x128", "backward"),
        (r"([\d.]+)× at 55", "GPSConv, 10 layers, n=55+-20 x128", "backward"),
        (r"attention ([\d.]+)×,", "MultiheadAttention 128/8, padded n=55+-20 x128", "backward"),
        (r"Transformer ([\d.]+)×", "GraphMultisetTransformer, n=55+-20 x128", "backward"),
        (r"Set2Set ([\d.]+)×", "Set2Set, QM9-like x128", "backward"),
        (r"94 edges ([\d.]+)×", edges.format(94, 64), "backward"),
        (r"force step ([\d.]+)×", edges.format(94, 64), "force step"),
        (r"1,000 edges ([\d.]+)×", edges.format(1000, 4), "backward"),
        (r"1,000 edges [\d.]+× and ([\d.]+)×", edges.format(1000, 4), "force step"),
    ):
        key = "dropins", workload, what
        quoted = re.search(sentence, text.replace("MultiheadAttention", "attention"))[1]
        assert same(quoted, time(*key, "theirs") / time(*key, "attnpool")), (workload, what)


def test_errors_on_qm7b():
    lines = (RESULTS / "qm7b.csv").read_text().splitlines()
    found = list(csv.DictReader(x for x in lines if not x.startswith("#")))
    targets = list(dict.fromkeys(r["target"] for r in found))
    names = {"ABP": "abp", "sum of atom vectors": "sum"}
    backbone = ""
    for name, *cells in table(MODELS, "| pooling | HOMO"):
        column = "test_mae"
        head, _, last = name.replace("*", "").rpartition(", ")
        backbone = head.split()[0].lower() or backbone if head else backbone
        if name.startswith("constant"):
            column, chosen = "constant_mae", found
        else:
            pooling = names.get(last, last.removesuffix(" (SchNet's own)"))
            chosen = [r for r in found if (r["backbone"], r["pooling"]) == (backbone, pooling)]
        for cell, target in zip(cells, targets, strict=True):
            values = [float(r[column]) for r in chosen if r["target"] == target]
            assert same(cell.strip("*"), sum(values) / len(values)), (name, target)


def test_poolings_at_equal_parameters():
    """The whole table as the study prints it, and what the text says of it."""
    pytest.importorskip("scipy")
    found = fair.last_setting(Table(RESULTS / "fair.csv", ()).read())
    expected = [
        [x.strip() for x in line.strip("|").split("|")]
        for line in fair.table(found, "equal").splitlines()
    ]
    assert table(MODELS, "| target | ABP |") == expected[2:]
    text = section("At equal parameters", MODELS)
    assert f"| {' | '.join(expected[0])} |" in text
    marked = sum(cell.endswith("*") for row in expected[2:] for cell in row)
    lower = sum(float(cell.strip("*")) > 1 for row in expected[2:] for cell in row[2:])
    cells = sum(len(row) - 2 for row in expected[2:])
    wrong = [x for row in expected[2:] for x in row if x.endswith("*") and float(x[:-1]) < 1]
    sentence = (
        r"(\d+) of (\d+) comparisons .*?, (\d+) of them significantly .*? one, (\d+)\s+(?:is|are)"
    )
    quoted = [int(x) for x in re.search(sentence, text).groups()]
    assert quoted == [lower, cells, marked - len(wrong), len(wrong)], quoted
    one = found[0]
    setting = re.search(r"(\d+) × (\d) .*? (\d+) molecules to train on, (\d+) to test", text)
    widths = {r["width"] for r in found if r["pooling"] == "abp"}
    exact = [*widths, one["interactions"], one["train"], one["test"]]
    assert list(setting.groups()) == exact
    splits = {name: len({r["split"] for r in found if r["pooling"] == name}) for name in POOLINGS}
    assert f"{min(splits.values())} published splits" in text, splits
    ends = [int(r["best_epoch"]) for r in found]
    limit = sum(r["run_epochs"] == r["epochs"] for r in found)
    quoted = re.search(r"(\d+) of (\d+) runs ended .*? between (\d+) and (\d+)", text)
    assert [int(x) for x in quoted.groups()] == [limit, len(found), min(ends), max(ends)]
    counts = {int(r["parameters"]) for r in found if r["size"] == "equal"}
    (ours,) = {int(r["parameters"]) for r in found if r["pooling"] == "abp"}
    assert (
        all(abs(count / ours - 1) < 0.02 for count in counts) and f"{ours // 1000} thousand" in text
    )


def test_where_seeds_look():
    lines = (RESULTS / "orbitals.csv").read_text().splitlines()
    found = list(csv.DictReader(x for x in lines if not x.startswith("#")))
    for kind, *cells in table(MODELS, "| looked at"):
        exact = [float(r["looked_at"]) for r in found if r["kind"] == kind]
        assert len(cells) == len(exact) == 2 and all(map(same, cells, exact)), (kind, exact)
    assert {r["kind"] for r in found} == {row[0] for row in table(MODELS, "| looked at")}
    text = section("Where the seeds look", MODELS)
    for target in ("homo_pbe0", "lumo_pbe0"):
        row = next(r for r in found if r["target"] == target)
        quoted = re.search(rf"{target[:4].upper()} ([\d.]+) eV \(([\d.]+)", text).groups()
        assert all(map(same, quoted, (float(row["test_mae"]), float(row["constant_mae"]))))
    assert f"{row['train']} molecules" in text


def test_steps_by_pairs():
    text = section("A training step")
    steps = ("energy step", "force step", "dynamics step")
    for row, case in zip(
        table(BENCHMARKS, "| processor time"), ("x32 {} 5 A", "x128 {} 5 A", "x128 {} 10 A")
    ):
        workload = f"QM7b {case.format('SchNet 128x3')} float32"
        for cell, what in zip(row[1:], steps, strict=True):
            edges, pairs = (time("steps", workload, what, x) for x in ("edges", "pairs"))
            quoted = re.findall(r"[\d.]+", cell)
            assert all(map(same, quoted, (edges, pairs, edges / pairs))), (case, what)
    worst = max(r.error for r in rows("steps") if r.what == "force step")
    assert same(re.search(r"differ by ([\d.]+)e-6", text)[1], worst * 1e6), worst


def test_the_performance_goals():
    """Means over all batches, and the goals that were not reached, as the report judges them."""
    text = section("Batches of molecules") + section("Not reached")
    judged = {name: measured for name, _, measured, _ in goals.judge(rows("molecules"))}

    def measured(start):
        (found,) = (x for name, x in judged.items() if name.startswith(start))
        return [float(x) for x in re.findall(r"[\d.]+", found)]

    every = "21 batches of molecules: "
    exact = [
        *measured(f"forward, {every}geometric"),
        *measured(f"forward + backward, {every}geometric"),
        measured(f"forward + backward, {every}each")[0],
        *measured("second derivative over"),
        *measured("forward over the library's rates at 15"),
        *measured("forward over the library's rates at 55"),
    ]
    quoted = re.search(
        r"geometric mean .*? is ([\d.]+)× forward and ([\d.]+)× .*? the least ([\d.]+)×; the second"
        r" derivative ([\d.]+)×, least ([\d.]+)×.* takes ([\d.]+)× at 15 atoms \(worst ([\d.]+)×\)"
        r" and ([\d.]+)× at 55 atoms \(worst ([\d.]+)×\)",
        text,
    ).groups()
    assert all(map(same, quoted, exact)), (quoted, exact)
    flash = re.search(r"\(([\d.]+)–([\d.]+)× and ([\d.]+)–([\d.]+)×\)", text).groups()
    exact = [
        measured(f"{what}, n = {n}: over torch's flash")[0]
        for n, passes in (
            (512, ("forward", "forward + backward")),
            (2048, ("forward + backward", "forward")),
        )
        for what in passes
    ]
    assert all(map(same, flash, exact)), (flash, exact)


def test_where_we_lose():
    quoted = re.search(
        r"one seed, ([\d.]+)× forward and ([\d.]+)×", section("Not reached")
    ).groups()
    asked = (ROOT / "docs" / "faq.md").read_text()
    for number, what in zip(quoted, ("forward", "backward")):
        assert same(number, gain("seeds", "n=20000 8x32 float32 S=1 separate", what))
        assert f"{number}×" in asked


def test_forces_and_compiled_training():
    text = section("A training step")
    test = "CH3CH2OH GFN2-xTB SchNet 64x3 ABP 64/4/4 test after 1500 steps", "force step"
    own, reference = (time("forces", *test, x) for x in ("abp", "abp_reference"))
    quoted = re.search(r"takes ([\d.]+) ms, through `reference` ([\d.]+) ms \(([\d.]+)×\)", text)
    assert all(map(same, quoted.groups(), (own, reference, reference / own)))
    check = next(r.check for r in group("forces", *test) if r.contender == "abp")
    exact = [float(x) for x in re.findall(r"\d+\.\d+", check)]
    errors = r"is ([\d.]+) eV/Å .*? gives ([\d.]+), and ([\d.]+) eV where .*? gives ([\d.]+)\."
    assert all(map(same, re.search(errors, text).groups(), exact)), exact

    quoted = re.search(r"ABP ([\d.]+)×, .*? model ([\d.]+)× the", section("Compiled training"))
    for number, case in zip(quoted.groups(), ("SchNet", "neighbourhoods")):
        (workload,) = {r.workload for r in rows("compiled") if r.workload.startswith(case)}
        key = "compiled", workload, "force training"
        assert same(number, time(*key, "eager") / time(*key, "compiled"))


def test_pet():
    text = section("Neighbour sets and PET")
    ranges = re.search(r"forces ([\d.]+)–([\d.]+)× .* dynamics ([\d.]+)–([\d.]+)×", text).groups()
    single = re.search(r"malloc ([\d.]+)×, where PET .*? padding, ([\d.]+)× and ([\d.]+)×", text)
    gains = {
        (name, workload, what): time(name, workload, what, "pet")
        / time(name, workload, what, "pet_attnpool")
        for name in ("pet", "pet-keeping-malloc")
        for workload in {r.workload for r in rows(name)}
        for what in ("training step", "md step")
    }
    salt, water = "salt216", ("pet", "water1029", "training step")
    exact = gains[water], gains["pet", salt, "training step"], gains["pet", salt, "md step"]
    assert all(map(same, single.groups(), exact)), exact
    for (low, high), what in ((ranges[:2], "training step"), (ranges[2:], "md step")):
        usual = [
            x for key, x in gains.items() if key[2] == what and key[1] != salt and key != water
        ]
        assert same(low, min(usual)) and same(high, max(usual)), (what, min(usual), max(usual))


def test_a_wrong_digit_is_noticed():
    assert same("0.52", 0.5247) and not same("0.53", 0.5247)
    assert same("4.1", 4.062) and not same("4.0", 4.062)


def test_what_each_cuda_source_takes_to_compile():
    folder = ROOT / "csrc" / "cuda"
    with open(folder / "build.csv", newline="") as file:
        measured = list(csv.DictReader(file))
    columns = {"ptx_s": 1, "code_s": 1, "object_bytes": 1e6}
    shown = table(folder / "README.md", "| source | PTX, s |")
    assert [x[0].strip("`") for x in shown[:-1]] == [x["source"] for x in measured]
    for i, (name, unit) in enumerate(columns.items(), 1):
        exact = [float(x[name]) / unit for x in measured]
        for row, number in zip(shown, [*exact, sum(exact)]):
            assert same(row[i], number), (row, name)


def test_shares_of_a_machine():
    _, runs = sheet.read(RESULTS / "shares.csv")
    multiply_adds = runs[-1]["rates"]["fma_gflops"]["float32"]
    text = BENCHMARKS.read_text()
    assert same(re.search(r"\((\d+) GFLOP/s of multiply-adds", text)[1], multiply_adds)
    kinds = {
        "40–80 atoms": "40-80 atoms x128",
        "55 ± 35 atoms": "QMugs-like x128",
        "20–60 neighbours": "1000 neighbourhoods",
        "10–20 atoms": "10-20 atoms x512",
        "512 atoms": "n=512",
        "2048 atoms": "n=2048",
    }
    for name, *shares in table(BENCHMARKS, "| batch, H × D"):
        kind, width, *other = name.split(", ")
        dtype = "bfloat16" if "bfloat16" in other else "float32"
        key = f"{kinds[kind]} {width.replace(' × ', 'x')} {dtype} separate"
        key += " key_bias" * ("key bias" in other)
        for quoted, what in zip(shares, PASSES.values()):
            (row,) = group("shares", key, what)
            assert same(quoted, row.flops / row.p50_ms / 1e6 / multiply_adds), (name, what)
    key = "QMugs-like x128 8x32 {} separate"
    half, single = (
        time("shares", key.format(dtype), "forward", "attnpool:cpu")
        for dtype in ("bfloat16", "float32")
    )
    assert same(re.search(r"forward pass takes ([\d.]+) of float32's time", text)[1], half / single)
    for seeds, *cells in table(BENCHMARKS, "| seeds | forward"):
        for cell, what in zip(cells, PASSES.values()):
            own, times = re.findall(r"[\d.]+", cell)
            key = "shares", f"n=20000 8x32 float32 S={seeds} separate", what
            assert same(own, time(*key, "attnpool:cpu")), (seeds, what)
            assert same(times, gain(*key)), (seeds, what, gain(*key))
