"""Compilation ahead of time, and tiles of the Triton kernels: pruned, swept, taken over."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnpool_kernels.impl import cpu

from . import alone, clock, shapes
from .blocks import prewarm
from .blocks import sweep as sweep_block
from .case import Case
from .test_speed import SMALL, rows_of, settings

ROOT = Path(__file__).resolve().parents[2]
triton = pytest.importorskip("triton")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    from gpu import variants

    return variants


def test_a_launch_finds_what_was_compiled_ahead(compiler, tmp_path):
    import attnpool_kernels.impl.triton as backend

    JIT = triton.runtime.jit.JITFunction
    compile_ = JIT._do_compile
    batch = shapes.without_values(SMALL, torch.bfloat16)
    with compiler.collecting((9, 0)) as collected:
        alone.Kernels(batch, backend).forward()
    assert JIT._do_compile is compile_
    jobs = list(collected.found.values())
    done = list(compiler.compiled(jobs, collected.target, 1, lambda: 100.0))
    assert len(done) == len(jobs) == 1 and not done[0].error
    files = set((tmp_path / "triton").rglob("*.cubin"))
    assert len(files) == 1
    hashes = []
    with compiler.collecting((9, 0)) as collected:
        # What the launcher itself does with the arguments of the same call.
        JIT._do_compile = lambda self, *x: hashes.append(compile_(self, *x).hash)
        alone.Kernels(batch, backend).forward()
    assert set((tmp_path / "triton").rglob("*.cubin")) == files and len(hashes) == 1


def test_a_compiler_that_dies_costs_its_variant(compiler, monkeypatch):
    parent = os.getpid()

    def compile_(source, target, options):
        assert os.getpid() != parent
        if source.place == 1:
            os._exit(1)

    monkeypatch.setattr(compiler.triton, "compile", compile_)

    def job(place):
        kernel = SimpleNamespace(__module__="a.b", __name__=str(place))
        return compiler.Variant(SimpleNamespace(fn=kernel, place=place), SimpleNamespace())

    jobs = [job(place) for place in range(6)]
    found = list(compiler.compiled(jobs, compiler.target((9, 0)), 1, lambda: 100.0))
    good = {one.name for one in found if not one.error}
    assert good >= {f"b.{place}" for place in (0, 3, 4, 5)}, found
    assert any("its process ended" in one.error for one in found) and len(found) == 6
    assert list(compiler.compiled(jobs, compiler.target((9, 0)), 1, lambda: -1.0)) == []


def test_prewarm_finds_every_variant_of_the_blocks(compiler, monkeypatch, tmp_path):
    """And in the rehearsal compiles a few; here none, the compiler has its own test."""
    asked = []
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    monkeypatch.setattr(
        compiler,
        "compiled",
        lambda jobs, *_: asked.extend(jobs) or [compiler.Compiled(job.name, 0.1) for job in jobs],
    )
    chosen = settings(tmp_path, "cpu")
    (case,) = prewarm.cases(chosen)
    (row,) = rows_of(prewarm, case, chosen)
    assert row["compiled"] == len(asked) == prewarm.REHEARSED and row["status"] == "ok"
    with compiler.collecting((9, 0)) as collected:
        for call in prewarm.of_blocks(torch.bfloat16, False):
            call()
    names = {variant.name for variant in collected.found.values()}
    assert any("few_seeds" in name for name in names) and len(collected.found) > 100
    assert any("double" in name for name in names)


# Tiles


def test_a_file_of_tiles_can_be_taken_over(monkeypatch):
    from attnpool_kernels.impl.triton import tile_table
    from gpu import tiles

    key, tile = tiles.Key("bf16", 64, "forward"), (16, 32, 64, 1, 3, 255)
    text = tiles.lines((9, 0), {key: (tile, 31.2e-6, 24e-6)})
    assert "31.2 -> 24.0 µs" in text
    original, older = (tiles.shipped(key, chip) for chip in ((9, 0), (8, 0)))
    with tiles.using({key: tile}):
        assert tiles.shipped(key, (9, 0)) == tile
        assert tiles.shipped(tiles.Key("bf16", 32, "forward"), (9, 0)) != tile
    assert tiles.shipped(key, (9, 0)) == original != tile
    tile_table.tile.cache_clear()
    monkeypatch.setattr(tile_table, "_CHIPS", tile_table._CHIPS | tiles.take_over(text))
    assert tiles.shipped(key, (9, 0)) == tile
    assert tiles.shipped(key, (8, 0)) == older
    tile_table.tile.cache_clear()


def test_candidates_are_tiles_of_the_table():
    from gpu import tiles

    found = tiles.candidates()
    assert len(found) >= 12
    assert tiles.Key("bf16", 64, "forward") in found
    for key, candidates in found.items():
        original = tiles.shipped(key, (9, 0))
        assert original is not None and candidates and original not in candidates
        for m, n, part, warps, stages, *most in candidates:
            assert {m, n, part, warps} <= {2**i for i in range(9)} and 1 <= stages <= 4
            assert part <= key.width and most in ([], [255])


def test_pruning_reads_the_machine_code(monkeypatch):
    from gpu import candidates, tiles

    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], x}>"
    dot = (
        "%1 = tt.dot %a, %b, %c : tensor<16x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, "
        "kWidth = 2}>> * tensor<64x32xbf16, #ttg.dot_op<{opIdx = 1}>> -> tensor<16x32xf32, #mma>"
    )
    assert candidates.repeated(f"{layout}\n{dot}") == 4.0
    assert candidates.repeated(f"{layout}\n{dot.replace('16x64', '64x64')}") == 1.0
    entry = {"tile": [1], "spills": 0, "repeated": 1.0, "shared": 1000}
    costs = [{"instructions": {"18": x, "55": 100}} for x in (5, 9, 3, 1, 2)]
    entries = [entry | cost | {"tile": [i]} for i, cost in enumerate(costs)]
    entries[3] |= {"repeated": 4.0}
    entries[4] |= {"spills": 500}
    assert [x["tile"] for x in candidates.pruned(entries)] == [[2], [1]]  # the first is the table's
    key = tiles.Key("bf16", 32, "forward")
    found = candidates.measured(key, (16, 16, 32, 1, 1, 255))
    assert found["registers"] > 0 and found["repeated"] == 1.0
    assert found["instructions"]["55"] > found["instructions"]["18"] > 100


@pytest.fixture
def tuned(as_cuda, monkeypatch):
    """Kernels whose time and result depend on the tile that the table holds."""
    import attnpool_kernels.impl.triton as backend
    from attnpool_kernels.impl.triton import tile_table

    times = {16: 3e-4, 32: 5e-4, 64: 1e-4, 128: 1e-5}
    current = []

    def forward(x, options):
        width = tile_table.tile("forward", (9, 0), "fp32", 16, False)["BLOCK_M"]
        current[:] = [times[width]]
        if width == 128:
            raise RuntimeError("out of resource: shared memory")
        y = cpu.forward(x, options)
        return y._replace(out=y.out + 1.0) if width == 64 else y

    def seconds(calls, stream):
        calls[0]()
        return {"seconds": current[0]}

    monkeypatch.setattr(backend, "forward", forward)
    monkeypatch.setattr(clock, "kernels", seconds)
    tiles = [(16, 16, 16, 1, 1), (64, 16, 16, 1, 1), (128, 16, 16, 1, 1)]
    monkeypatch.setattr(sweep_block, "REHEARSED", {"fp32 16 forward": tiles})
    monkeypatch.setattr(
        "gpu.tiles.candidates",
        lambda: {__import__("gpu.tiles").tiles.Key("fp32", 16, "forward"): tiles},
    )
    monkeypatch.setattr(sweep_block, "_shapes", lambda *_: [SMALL])


def test_the_sweep_keeps_the_fastest_right_tile(tuned, tmp_path):
    from gpu import tiles

    case = Case("sweep", "measure fp32 16 forward", "triton", "float32")
    chosen = settings(tmp_path)
    rows = rows_of(sweep_block, case, chosen)
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong", "refused"]
    assert rows[0]["shipped"] and not rows[1]["shipped"]
    taken = tiles.take_over((tmp_path / "tiles.txt").read_text())
    assert taken == {((9, 0), "fp32", 16, "forward"): (16, 16, 16, 1, 1)}
    assert any("1.67x" in line for line in sweep_block.table(rows))
    late = settings(tmp_path, deadline=0.0)
    assert {row["status"] for row in rows_of(sweep_block, case, late)} == {"no time"}
    assert tiles.take_over((tmp_path / "tiles.txt").read_text()) == taken  # what was found stays
