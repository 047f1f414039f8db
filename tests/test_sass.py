"""The counter of executed instructions: two kernels counted by hand, and single instructions."""

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl
from tools import executed, sass
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HEAD = "//-------- .text.kernel --------\n"


def program(*lines):
    """A kernel of these instructions; a line that ends in a colon is a label."""
    text, address = HEAD + "kernel:\n", 0
    for line in lines:
        if line.endswith(":"):
            text += f".{line}\n"
        else:
            text += f"        /*{address:04x}*/                   {line} ;\n"
            address += 16
    return sass.Program(text, "kernel")


def run(*lines, parameters=b"", **options):
    return sass.execute(program(*lines), (1,), 32, parameters, **options)


def test_a_loop_by_hand():
    """3 before it, 4 in each of 5 turns, 1 behind it."""
    count = run(
        "MOV R0, RZ",
        "LDC R1, c[0x0][0x210]",
        "NOP",
        "L_x_0:",
        "IADD3 R0, R0, 0x1, RZ",
        "FMUL R9, R9, R9",
        "ISETP.LT.AND P0, PT, R0, R1, PT",
        "@P0 BRA `(.L_x_0)",
        "EXIT",
        parameters=(5).to_bytes(4, "little"),
    )
    assert count.instructions == 3 + 5 * 4 + 1 and count.warps == 1


def test_lanes_that_part_and_meet():
    """Either side of a branch is issued once where both have lanes, and what follows once."""
    lines = (
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, BOUND, PT",
        "@P0 BRA `(.L_x_0)",
        "IADD3 R1, R0, R0, RZ",
        "BRA `(.L_x_1)",
        "L_x_0:",
        "IADD3 R1, R0, 0x1, RZ",
        "L_x_1:",
        "EXIT",
    )
    for bound, expected in (("0x0", 6), ("0x7", 7), ("0x20", 5)):
        chosen = [line.replace("BOUND", bound) for line in lines]
        assert run(*chosen).instructions == expected


def test_what_is_unknown_decides_nothing():
    lines = ("HMMA.16816.F32 R0, R4, R8, RZ", "ISETP.LT.AND P0, PT, R3, 0x5, PT")
    with pytest.raises(sass.SassError, match="an unknown value decides"):
        run(*lines, "@P0 EXIT", "EXIT")
    # but a condition that is off without it is known
    both = ("ISETP.LT.AND P1, PT, R9, -0x1, PT", "ISETP.LT.AND P0, PT, R3, 0x5, P1")
    assert run(*lines[:1], *both, "@P0 EXIT", "NOP", "EXIT").instructions == 6
    assert run(*lines, "@P0 EXIT", "EXIT", assume=lambda i: True).instructions == 3


def test_sums_and_shifts_of_64_bits():
    """-(2^32) + 3 * 2^33 >> 2, word by word: 5 * 2^30."""
    negative = ("IADD3 R0, P0, RZ, -R4, RZ", "IMAD.X R1, RZ, RZ, ~R5, P0")
    more = ("IADD3 R0, P1, R0, RZ, RZ", "IADD3.X R1, R1, 0x6, RZ, P1, !PT")
    shift = ("SHF.R.S64 R2, R0, 0x2, R1", "ISETP.EQ.AND P0, PT, R2, 0x40000000, PT")
    lines = ("MOV R4, RZ", "MOV R5, 0x1", *negative, *more, *shift, "SHF.R.S32.HI R3, RZ, 0x2, R1")
    lines += ("ISETP.EQ.AND P0, PT, R3, 0x1, P0", "@P0 EXIT", "NOP", "EXIT")
    assert run(*lines).instructions == len(lines) - 2


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "barriers", "blocks"),
    [(32, 0, 4, 1, 16), (146, 14336, 2, 1, 6), (255, 0, 1, 1, 8), (64, 70000, 4, 1, 3),
     (32, 0, 1, 1, 32), (32, 0, 4, 16, 4)],
)  # fmt: skip
def test_occupancy(registers, shared, warps, barriers, blocks):
    """146 registers: 4,864 of a warp, 3 warps in each quarter of 16,384."""
    assert executed.Resources(registers, shared, warps, barriers, 0, 0).blocks == blocks


def test_parameters_are_aligned():
    assert executed.packed([4, 8, 4], [1, 2, 3]).hex() == "01000000" + "0" * 8 + (
        "0200000000000000" + "03000000"
    )
    assert len(executed.spread(10**6, 50)) == 50 and executed.spread(3, 50) == [0, 1, 2]


@triton.jit
def _sums(ptr, x, y, BLOCK: tl.constexpr):
    """Of rows ptr[i] to ptr[i + 1] of a tensor with BLOCK columns."""
    at = tl.program_id(0)
    first, last = tl.load(ptr + at), tl.load(ptr + at + 1)
    o = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, last):
        total += tl.load(x + row * BLOCK + o)
    tl.store(y + at * BLOCK + o, total)


def test_a_kernel_of_triton_against_its_text():
    """Sets of 0 to 7 rows: the loop is the only cycle, and every line of the text is counted."""
    source = ASTSource(_sums, {"ptr": "*i32", "x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"},
                       {(3,): 32})  # fmt: skip
    options = {"num_warps": 1, "num_stages": 1}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptr = torch.tensor([0, 0, 1, 8], dtype=torch.int32)
    values = [ptr, 0, 0, 0, 0]

    def counted(block):
        program, _ = executed.disassembled(compiled.asm["cubin"], None)
        raw = executed.packed([8] * 5, values)
        return sass.execute(program, (3,), 32, raw, [ptr], blocks=[block])

    counts = [counted(block) for block in range(3)]
    assert [count.by_name["FADD"] for count in counts] == [0, 1, 7]
    assert [count.by_name["STG"] for count in counts] == [1, 1, 1]
    assert [count.requested - counts[0].requested for count in counts] == [0, 128, 7 * 128]


CUDA = """
extern "C" __global__ void rows(const int* ptr, const float* x, float* y) {
  int first = ptr[blockIdx.x], last = ptr[blockIdx.x + 1];
  float total = 0;
#pragma unroll 1
  for (int row = first; row < last; ++row) total += x[row * 32 + threadIdx.x];
  y[blockIdx.x * 32 + threadIdx.x] = total;
}
"""


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_a_kernel_of_nvcc_by_hand(tmp_path):
    """Without turns, and with each turn as long as the text between its label and its branch."""
    source, out = tmp_path / "rows.cu", tmp_path / "rows.cubin"
    source.write_text(CUDA)
    subprocess.run(["nvcc", "-arch=sm_90", "-cubin", "-o", out, source], check=True)
    ptr = torch.tensor([0, 1, 3, 9], dtype=torch.int32)
    program, _ = executed.disassembled(out.read_bytes(), "rows")
    branches = [n for n, i in enumerate(program.code) if i.name == "BRA" and i.guard]
    back = next(n for n in branches if program.labels[program.code[n].operands[-1].text] < n)
    turn = back + 1 - program.labels[program.code[back].operands[-1].text]
    found = []
    for block in range(3):
        raw = executed.packed([8, 8, 8], [ptr, 0, 0])
        found.append(sass.execute(program, (3,), 32, raw, [ptr], blocks=[block]).instructions)
    assert found[1] - found[0] == turn and found[2] - found[1] == 4 * turn
    measured = executed.measure(out.read_bytes(), "rows", (3,), 32, raw, [ptr])
    assert measured.instructions == sum(found) and measured.resources.blocks == 32
    assert np.isclose(measured.requested, 3 * 2 * 128 + 9 * 128 + 3 * 128)
