"""The simulator sees what it should: hand-written PTX with and without a mistake."""

import pytest
import torch
from tools import ptx

HEAD = """
.visible .entry demo(.param .u64 x, .param .u64 y, .param .u32 n)
{
 .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<16>;
 .shared .align 16 .b8 stage[256];
 ld.param.b64 %rd1, [x]; ld.param.b64 %rd2, [y]; ld.param.b32 %r1, [n];
 mov.u32 %r2, %tid.x; mul.wide.u32 %rd3, %r2, 4;
 add.s64 %rd4, %rd1, %rd3; add.s64 %rd5, %rd2, %rd3;
 setp.lt.u32 %p1, %r2, %r1;
"""
COPY = "@%p1 ld.global.b32 %r3, [%rd4]; @%p1 st.global.b32 [%rd5], %r3; ret; }"
SWAP = """
 shl.b32 %r4, %r2, 2; mov.u32 %r5, stage; add.s32 %r6, %r5, %r4;
 ld.global.b32 %r3, [%rd4]; st.shared.b32 [%r6], %r3; BARRIER
 xor.b32 %r7, %r6, 128; ld.shared.b32 %r8, [%r7]; st.global.b32 [%rd5], %r8; ret; }
"""


def run(body, n=64, threads=64, size=64, **options):
    x, y = torch.arange(1.0, size + 1), torch.zeros(size)
    kernel = ptx.Kernel(HEAD + body, "demo")
    ptx.launch(kernel, (1,), threads, [x, y, n], [x, y], **options)
    return x, y


def test_copy():
    x, y = run(COPY, n=50)
    assert torch.equal(y[:50], x[:50]) and not y[50:].any()


def test_access_outside_is_reported():
    with pytest.raises(ptx.PtxError, match="out of bounds"):
        run(COPY, n=64, size=60)


def test_misaligned_access_is_reported():
    with pytest.raises(ptx.PtxError, match="misaligned"):
        run(COPY.replace("[%rd4]", "[%rd4+2]"))


def test_barrier_makes_the_exchange_between_warps_right():
    for seed in range(1, 4):
        x, y = run(SWAP.replace("BARRIER", "bar.sync 0;"), schedule="warp", seed=seed)
        assert torch.equal(y, x.roll(32))


def test_missing_barrier_shows():
    x, y = run(SWAP.replace("BARRIER", ""), schedule="warp", seed=1)
    assert not torch.equal(y, x.roll(32)) and y.isnan().any()


def test_barrier_that_some_threads_miss_is_reported():
    divergent = "setp.lt.u32 %p2, %r2, 32; @%p2 bra DONE; bar.sync 0; ret; DONE: bar.sync 0; ret; }"
    with pytest.raises(ptx.PtxError, match="wait at barriers"):
        run(divergent)


GROUPS = """
 shl.b32 %r4, %r2, 2; mov.u32 %r5, stage; add.s32 %r6, %r5, %r4; shr.u32 %r9, %r2, 6;
 add.s32 %r9, %r9, 1; setp.gt.u32 %p2, %r2, 63; @%p2 bra WORK; bar.sync %r9, COUNT;
 WORK: ld.global.b32 %r3, [%rd4]; st.shared.b32 [%r6], %r3; bar.sync %r9, COUNT;
 xor.b32 %r7, %r6, 128; ld.shared.b32 %r8, [%r7]; st.global.b32 [%rd5], %r8; ret; }
"""


def test_barriers_of_groups_that_do_not_wait_for_each_other():
    head = HEAD.replace("stage[256]", "stage[512]")
    x, y = torch.arange(128.0), torch.zeros(128)
    for seed in range(1, 4):
        kernel = ptx.Kernel(head + GROUPS.replace("COUNT", "64"))
        ptx.launch(kernel, (1,), 128, [x, y, 128], [x, y], schedule="warp", seed=seed)
        assert torch.equal(y, x.reshape(2, 2, 32).flip(1).reshape(-1))
    for count, message in (("96", "wait at barriers"), ("60", "invalid barrier")):
        kernel = ptx.Kernel(head + GROUPS.replace("COUNT", count))
        with pytest.raises(ptx.PtxError, match=message):
            ptx.launch(kernel, (1,), 128, [x, y, 128], [x, y], schedule="warp", seed=1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("bfind.shiftamt.u32 %r3, %r2", lambda i: 31 - (i.bit_length() - 1) if i else -1),
        ("bfind.u32 %r3, %r2", lambda i: i.bit_length() - 1),
        ("bfi.b32 %r3, %r2, -1, 30, 4", lambda i: (i & 3) * 2**30 + 2**30 - 1 - (i & 2) * 2**31),
        ("bfi.b32 %r3, %r2, 0, 4, 3", lambda i: (i & 7) << 4),
        ("mov.b64 %rd6, n; cvta.param.u64 %rd6, %rd6; ld.b32 %r3, [%rd6]", lambda i: 64),
        ("mov.b64 %rd6, n; ld.param.b32 %r3, [%rd6+0]", lambda i: 64),
        ("mov.b32 %r3, 5; { .reg .b32 %r<9>; mov.b32 %r3, 6; }", lambda i: 5),
        (
            "{ .reg .b32 a; .reg .b32 b<2>; mov.b32 a, 1; add.s32 b1, a, %r2; mov.b32 %r3, b1; }",
            lambda i: i + 1,
        ),
        ("{ cvt.u16.u32 %h1, %r2;} { mov.b32 %r3, {0,%h1};}", lambda i: i << 16),
    ],
)
def test_single_instructions(body, expected):
    head = HEAD.replace(".reg .b64", ".reg .b16 %h<4>; .reg .b64")
    x, y = torch.zeros(64), torch.zeros(64, dtype=torch.int32)
    store = "; cvta.to.global.u64 %rd7, %rd5; st.global.b32 [%rd7], %r3; ret; }"
    ptx.launch(ptx.Kernel(head + body + store), (1,), 64, [x, y, 64], [x, y])
    assert y.tolist() == [expected(i) for i in range(64)]


def test_missing_wait_of_an_asynchronous_copy_shows():
    body = """
     shl.b32 %r4, %r2, 2; mov.u32 %r5, stage; add.s32 %r6, %r5, %r4;
     cp.async.ca.shared.global [%r6], [%rd4], 4; cp.async.commit_group; WAIT
     ld.shared.b32 %r8, [%r6]; st.global.b32 [%rd5], %r8; ret; }
    """
    x, y = run(body.replace("WAIT", "cp.async.wait_group 0;"))
    assert torch.equal(y, x)
    assert run(body.replace("WAIT", ""))[1].isnan().all()


def test_lanes_of_a_diverged_warp_meet_at_a_shuffle():
    """The block of the odd lanes lies behind the shuffle, as nvcc may place it."""
    body = """
     mov.u32 %r9, 7; and.b32 %r3, %r2, 1; setp.eq.u32 %p2, %r3, 1; @%p2 bra ODD;
     MEET: shfl.sync.bfly.b32 %r4, %r9, 1, 31, -1; st.global.b32 [%rd5], %r4; ret;
     ODD: add.s32 %r9, %r9, 1; bra MEET; END: ALSO: }
    """
    y = torch.zeros(64, dtype=torch.int32)
    ptx.launch(ptx.Kernel(HEAD + body), (1,), 64, [y, y, 64], [y], schedule="warp", seed=1)
    assert y.tolist() == [8, 7] * 32


def test_what_a_guard_skips_is_poison_in_every_schedule():
    """As in a reduction over warps: the second warp loads nothing, and shuffles it."""
    body = """
     @%p1 ld.global.b32 %r3, [%rd4]; shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
     st.global.b32 [%rd5], %r4; ret; }
    """
    for schedule in ("block", "warp"):
        for seed in range(1, 4):
            x, y = run(body, n=32, schedule=schedule, seed=seed)
            assert torch.equal(y[:32], x[:32].reshape(16, 2).flip(1).reshape(-1))
            assert y[32:].isnan().all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd5], %r9; ret; }", "read before any write"),
        ("@%p1 shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; ret; }", "absent lanes"),
        ("wgmma.fence.sync.aligned; ret; }", "not implemented"),
    ],
)
def test_reports(body, message):
    with pytest.raises(ptx.PtxError, match=message):
        run(body, n=40)


def test_invalid_grid_is_reported():
    x = torch.zeros(64)
    with pytest.raises(ptx.PtxError, match="invalid launch"):
        ptx.launch(ptx.Kernel(HEAD + COPY), (1, 70000), 64, [x, x, 1], [x])


def test_matrix_product():
    """mma.sync m16n8k16 on fragments that ldmatrix has loaded."""
    body = """
.visible .entry product(.param .u64 a, .param .u64 b, .param .u64 c)
{
 .reg .b32 %r<32>; .reg .b64 %rd<8>;
 .shared .align 16 .b8 stage[768];
 ld.param.b64 %rd1, [a]; ld.param.b64 %rd2, [b]; ld.param.b64 %rd3, [c];
 mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mul.wide.u32 %rd4, %r2, 1;
 add.s64 %rd5, %rd1, %rd4; ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd5];
 mov.u32 %r7, stage; add.s32 %r8, %r7, %r2; st.shared.v4.b32 [%r8], {%r3, %r4, %r5, %r6};
 and.b32 %r9, %r2, 255; cvt.u64.u32 %rd6, %r9; add.s64 %rd6, %rd2, %rd6;
 ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd6]; add.s32 %r10, %r7, %r9;
 st.shared.v4.b32 [%r10+512], {%r3, %r4, %r5, %r6}; bar.sync 0;
 and.b32 %r11, %r1, 15; shl.b32 %r11, %r11, 5; and.b32 %r12, %r1, 16; add.s32 %r11, %r11, %r12;
 add.s32 %r11, %r11, %r7;
 ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r13, %r14, %r15, %r16}, [%r11];
 and.b32 %r17, %r1, 7; shl.b32 %r17, %r17, 5; and.b32 %r18, %r1, 8; shl.b32 %r18, %r18, 1;
 add.s32 %r17, %r17, %r18; add.s32 %r17, %r17, %r7;
 ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r19, %r20}, [%r17+512];
 mov.b32 %r21, 0;
 mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r22, %r23, %r24, %r25},
   {%r13, %r14, %r15, %r16}, {%r19, %r20}, {%r21, %r21, %r21, %r21};
 shr.u32 %r26, %r1, 2; and.b32 %r27, %r1, 3; shl.b32 %r26, %r26, 5; shl.b32 %r27, %r27, 3;
 add.s32 %r26, %r26, %r27; cvt.u64.u32 %rd7, %r26; add.s64 %rd7, %rd3, %rd7;
 st.global.v2.b32 [%rd7], {%r22, %r23}; st.global.v2.b32 [%rd7+256], {%r24, %r25}; ret;
}
"""
    torch.manual_seed(0)
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.zeros(16, 8)
    ptx.launch(ptx.Kernel(body), (1,), 32, [a, b, c], [a, b, c])
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), rtol=1e-6, atol=1e-6)
