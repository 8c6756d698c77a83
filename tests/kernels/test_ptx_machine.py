"""The machine itself: small programs in PTX, right ones in silence, and each fault with what it is to say.

The faults that it finds in the kernels are in test_planted_bugs.py.
"""

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx_machine.build import library
from ptx_machine.machine import Array, Machine
from support.tensor_cores import tensor_core_sums

# %r1 is the thread, %rd3 its place in the output, %r4 its place in shared memory.
PROGRAM = """.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 memory[];
.visible .entry program(.param .u64 out, .param .u64 in) {{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<99>;
  .reg .b64 %rd<9>;
  ld.param.u64 %rd1, [out];
  ld.param.u64 %rd4, [in];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 4;
  add.s64 %rd3, %rd1, %rd2;
  mov.u32 %r2, memory;
  shl.b32 %r3, %r1, 2;
  add.s32 %r4, %r2, %r3;
  {body}
}}
"""


@dataclass(frozen=True)
class Launch:
    """The output as words, and the machine's reports."""

    out: Array
    reports: str


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(library())
    made.select(b"test")
    yield made
    made.take_reports()
    made.free()
    made.unload(b"test")


def launch(
    machine: Machine,
    folder: Path,
    body: str,
    *,
    threads: int = 64,
    blocks: tuple[int, int, int] = (1, 1, 1),
    words: int = 64,
    given: Array | None = None,
    shared: int = 4096,
) -> Launch:
    path = folder / "program.ptx"
    path.write_text(PROGRAM.format(body=body))
    machine.load_files("test", [path])
    out, address = machine.room(words, np.uint32)
    arguments = [address, machine.put(np.zeros(1, np.uint32) if given is None else given)]
    values = (ctypes.c_uint64 * 2)(*arguments)
    pointers = (ctypes.c_void_p * 2)(*(ctypes.addressof(values) + 8 * i for i in range(2)))
    machine.launch(b"program", (ctypes.c_uint32 * 3)(*blocks), threads, shared, pointers)
    return Launch(out.copy(), "\n".join(machine.take_reports()))


STORE = "st.global.u32 [%rd3], %r5; "
OWN = "st.shared.u32 [%r4], %r1; "
OTHER_WARP = "xor.b32 %r6, %r3, 128; add.s32 %r6, %r6, %r2; "  # the place of a thread of the other warp
OTHER_LANE = "xor.b32 %r6, %r3, 4; add.s32 %r6, %r6, %r2; "
INIT = "setp.eq.u32 %p1, %r1, 0; @%p1 mbarrier.init.shared.b64 [%r2], 1; bar.sync 0; "
ARRIVE = "@%p1 mbarrier.arrive.shared.b64 _, [%r2]; "
WAIT = "again: mbarrier.try_wait.parity.shared.b64 %p2, [%r2], 0; @%p2 bra on; bra again; on: "
COPY = "cp.async.ca.shared.global [%r4], [%rd4], 4; cp.async.commit_group; "

# Right programs, wrong ones, and the words in which each is reported.
FAULTS = {
    "global memory: out of bounds": ("mov.u32 %r5, 7; " + STORE, "st.global.u32 [%rd3+4], %r1;", "out of bounds"),
    "global memory: misaligned": ("st.global.u16 [%rd3+2], 7;", "st.global.u32 [%rd3+2], %r1;", "misaligned"),
    "global memory: never written": (
        "st.global.u32 [%rd3], %r1; ld.global.u32 %r5, [%rd3];",
        "ld.global.u32 %r5, [%rd3];",
        "reads global memory that was never written",
    ),
    "global memory: another warp's": (
        "setp.eq.u32 %p1, %r1, 0; @%p1 st.global.u32 [%rd1], %r1;",
        "and.b32 %r5, %r1, 31; mul.wide.u32 %rd5, %r5, 4; add.s64 %rd5, %rd1, %rd5; st.global.u32 [%rd5], %r1;",
        "race in global memory",
    ),
    "register: never written": ("mov.u32 %r5, 1; " + STORE, STORE, "a register that was never written"),
    "shared memory: never written": (OWN + "ld.shared.u32 %r5, [%r4];", "ld.shared.u32 %r5, [%r4];", "never written"),
    "shared memory: out of bounds": (OWN, "st.shared.u32 [%r4+4096], %r1;", "out of bounds"),
    "shared memory: read after write": (
        OWN + OTHER_WARP + "bar.sync 0; ld.shared.u32 %r5, [%r6];",
        OWN + OTHER_WARP + "bar.warp.sync -1; ld.shared.u32 %r5, [%r6];",
        "race: reads what another warp wrote",
    ),
    "shared memory: write after read": (
        OWN + OTHER_WARP + "bar.sync 0; ld.shared.u32 %r5, [%r6]; bar.sync 0; st.shared.u32 [%r4], 1;",
        OWN + OTHER_WARP + "bar.sync 0; ld.shared.u32 %r5, [%r6]; st.shared.u32 [%r4], 1;",
        "what another warp may still be reading",
    ),
    "shared memory: within a warp": (
        OWN + OTHER_LANE + "bar.warp.sync -1; ld.shared.u32 %r5, [%r6];",
        OWN + OTHER_LANE + "ld.shared.u32 %r5, [%r6];",
        "race within a warp",
    ),
    "barrier: too few come": (
        "bar.sync 1, 64;",
        "setp.lt.u32 %p1, %r1, 32; @!%p1 bra out; bar.sync 1, 64; out: ret;",
        "waits forever",
    ),
    "shuffle: a lane that is away": (
        "shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;",
        "and.b32 %r6, %r1, 1; setp.eq.u32 %p1, %r6, 0; @!%p1 bra out; "
        "shfl.sync.bfly.b32 %r5, %r1, 1, 31, 0x55555555; out: ret;",
        "a lane that does not take part",
    ),
    "mbarrier: nobody arrives": (INIT + ARRIVE + WAIT, INIT + WAIT, "waits forever"),
    "mbarrier: not initialised": (INIT + ARRIVE, "mbarrier.arrive.shared.b64 _, [%r2];", "no mbarrier was initialised"),
    "mbarrier: more come than it is for": (
        INIT + ARRIVE + WAIT,
        INIT + "@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [%r2], 16; " + ARRIVE,
        "more arrivals than it is for",
    ),
    "cp.async: not waited for": (
        COPY + "cp.async.wait_group 0; ld.shared.u32 %r5, [%r4];",
        COPY + "ld.shared.u32 %r5, [%r4]; cp.async.wait_group 0;",
        "an asynchronous copy is writing",
    ),
    "cp.async: never waited for": (
        COPY + "cp.async.wait_group 0;",
        COPY,
        "ends with copies to shared memory under way",
    ),
    "instruction: unreachable": ("mov.u32 %r5, 1;", "trap;", "trap"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told(name: str, machine: Machine, tmp_path: Path) -> None:
    right, wrong, words = FAULTS[name]
    assert launch(machine, tmp_path, right).reports == ""
    assert words in launch(machine, tmp_path, wrong).reports


def test_blocks_are_not_ordered(machine: Machine, tmp_path: Path) -> None:
    """Each writes its own, or all by atomics; else it is a race, in whatever order they come."""
    body = "mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd5, %r5, {}; add.s64 %rd5, %rd1, %rd5; st.global.u32 [%rd5], %r1;"
    alone: dict[str, Any] = {"threads": 1, "blocks": (8, 1, 1)}
    assert launch(machine, tmp_path, body.format(4), **alone).reports == ""
    assert "two blocks of threads write one byte" in launch(machine, tmp_path, body.format(0), **alone).reports


@pytest.mark.parametrize(
    ("blocks", "threads", "words"),
    [((1, 65_536, 1), 32, "no such grid"), ((1, 1, 0), 32, "no such grid"), ((1, 1, 1), 1025, "too many threads")],
)
def test_launches_that_a_device_refuses(
    blocks: tuple[int, int, int], threads: int, words: str, machine: Machine, tmp_path: Path
) -> None:
    assert words in launch(machine, tmp_path, "ret;", blocks=blocks, threads=threads).reports


def test_unknown_instructions_are_refused(machine: Machine, tmp_path: Path) -> None:
    """None is passed over."""
    with pytest.raises(AssertionError, match="not implemented"):
        launch(machine, tmp_path, "mul.ftz.f32 %r5, %r6, %r7;")


# Arithmetic: d = op(a, b, c) for words a, b and c of the input.
WORDS = np.random.default_rng(5).integers(2**32, size=(64, 3), dtype=np.uint64).astype(np.uint32)
FLOATS = np.random.default_rng(6).standard_normal((64, 3)).astype(np.float32)


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


A, B, C = (WORDS[:, k].astype(np.uint64) for k in range(3))
X, Y, Z = (FLOATS[:, k] for k in range(3))
INTEGERS = {
    "add.u32 {d}, {a}, {b};": A + B,
    "sub.u32 {d}, {a}, {b};": A - B,
    "mul.lo.u32 {d}, {a}, {b};": A * B,
    "mul.hi.u32 {d}, {a}, {b};": A * B >> np.uint64(32),
    "mad.lo.u32 {d}, {a}, {b}, {c};": A * B + C,
    "div.u32 {d}, {a}, {b};": A // B,
    "rem.u32 {d}, {a}, {b};": A % B,
    "min.s32 {d}, {a}, {b};": np.minimum(A.astype(np.uint32).view(np.int32), B.astype(np.uint32).view(np.int32)),
    "shl.b32 {d}, {a}, 5;": A << np.uint64(5),
    "shr.s32 {d}, {a}, 5;": A.astype(np.uint32).view(np.int32) >> 5,
    "shr.u32 {d}, {a}, 40;": A * 0,
    "shf.l.wrap.b32 {d}, {a}, {b}, 8;": B << np.uint64(8) | A >> np.uint64(24),
    "and.b32 {d}, {a}, {b};": A & B,
    "lop3.b32 {d}, {a}, {b}, {c}, 0x96;": A ^ B ^ C,
    "lop3.b32 {d}, {a}, {b}, {c}, 0xe8;": (A & B) | (A & C) | (B & C),
    "bfe.u32 {d}, {a}, 4, 9;": A >> np.uint64(4) & np.uint64(511),
    "prmt.b32 {d}, {a}, {b}, 0x5410;": (B & np.uint64(0xFFFF)) << np.uint64(16) | A & np.uint64(0xFFFF),
    "popc.b32 {d}, {a};": np.array([int(a).bit_count() for a in A]),
    "clz.b32 {d}, {a};": np.array([32 - int(a).bit_length() for a in A]),
    "bfind.u32 {d}, {a};": np.array([int(a).bit_length() - 1 for a in A]),
    "setp.lt.s32 %p1, {a}, {b}; selp.b32 {d}, {a}, {b}, %p1;": np.minimum(
        A.astype(np.uint32).view(np.int32), B.astype(np.uint32).view(np.int32)
    ),
}
REALS = {
    "add.rn.f32 {d}, {a}, {b};": X + Y,
    "fma.rn.f32 {d}, {a}, {b}, {c};": (X.astype(np.float64) * Y + Z).astype(np.float32),
    "div.rn.f32 {d}, {a}, {b};": X / Y,
    "max.f32 {d}, {a}, {b};": np.maximum(X, Y),
    "abs.f32 {d}, {a};": np.abs(X),
    "cvt.rn.f16.f32 %h1, {a}; cvt.f32.f16 {d}, %h1;": X.astype(np.float16).astype(np.float32),
    "cvt.rmi.f32.f32 {d}, {a};": np.floor(X),
    "cvt.rzi.s32.f32 %r9, {a}; cvt.rn.f32.s32 {d}, %r9;": np.trunc(X),
}


@pytest.mark.parametrize("form", [*INTEGERS, *REALS])
def test_arithmetic(form: str, machine: Machine, tmp_path: Path) -> None:
    """Against NumPy, bit for bit."""
    want = INTEGERS[form].astype(np.int64).astype(np.uint32) if form in INTEGERS else bits(REALS[form] + 0.0)
    given = WORDS if form in INTEGERS else FLOATS
    load = "mul.wide.u32 %rd5, %r1, 12; add.s64 %rd5, %rd4, %rd5; " + "".join(
        f"ld.global.u32 %r{6 + k}, [%rd5+{4 * k}]; " for k in range(3)
    )
    done = launch(machine, tmp_path, load + form.format(d="%r5", a="%r6", b="%r7", c="%r8") + STORE, given=given)
    assert done.reports == ""
    np.testing.assert_array_equal(done.out, want)


# Tensor cores.

MMA = """
  shl.b32 %r5, %r1, 4; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd4, %rd5;
  ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];
  shl.b32 %r5, %r1, 3; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd4, %rd5;
  ld.global.v2.u32 {%r14, %r15}, [%rd5+512];
  mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
  mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r14,%r15},
      {%r20,%r21,%r22,%r23};
  shl.b32 %r5, %r1, 4; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd1, %rd5;
  st.global.v4.u32 [%rd5], {%r20,%r21,%r22,%r23};
"""
# A in registers as above, of each warp; B [8, 16] in shared memory, eight numbers of a row together, without a swizzle.
WGMMA = """
  shl.b32 %r5, %r1, 4; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd4, %rd5;
  ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd5];
  add.s64 %rd5, %rd4, %rd2;
  setp.lt.u32 %p1, %r1, 64;
  @%p1 ld.global.u32 %r14, [%rd5+2048];
  @%p1 st.shared.u32 [%r4], %r14;
  fence.proxy.async.shared::cta;
  bar.sync 0;
  shr.u32 %r5, %r2, 4; cvt.u64.u32 %rd6, %r5; or.b64 %rd6, %rd6, 34360262656;  // 128 bytes to the other half of k
  mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, %rd6, 1, 1, 1, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  shl.b32 %r5, %r1, 4; cvt.u64.u32 %rd5, %r5; add.s64 %rd5, %rd1, %rd5;
  st.global.v4.u32 [%rd5], {%r20,%r21,%r22,%r23};
"""


def fragments(a: Array) -> Array:
    """[warps, 32, 4] words of each lane, for a [16 * warps, 16] in halves."""
    lane = np.arange(32)
    words = np.zeros((len(a) // 16, 32, 4, 2), np.float16)
    for k in range(4):
        for e in range(2):
            rows, columns = lane // 4 + k % 2 * 8, lane % 4 * 2 + k // 2 * 8 + e
            words[:, :, k, e] = a.reshape(-1, 16, 16)[:, rows, columns]
    return words.view(np.uint32)[..., 0]


def product_of(out: Array) -> Array:
    """[16 * warps, 8] from each lane's four."""
    lane = np.arange(32)
    four = out.view(np.float32).reshape(-1, 32, 4)
    d = np.zeros((len(four), 16, 8), np.float32)
    for k in range(4):
        d[:, lane // 4 + k // 2 * 8, lane % 4 * 2 + k % 2] = four[:, :, k]
    return d.reshape(-1, 8)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_products(kind: str, truncated: bool, machine: Machine, tmp_path: Path) -> None:
    """Exact sums, rounded once; or cut off as the model of tensor cores that the oracle's bound is from has it."""
    rng = np.random.default_rng(7)
    rows = 16 if kind == "mma" else 64
    a, b = (rng.standard_normal((n, 16)).astype(np.float16) * 4.0 ** rng.integers(-4, 4, (n, 16)) for n in (rows, 8))
    a, b = a.astype(np.float16), b.astype(np.float16)
    left = fragments(a).ravel()
    if kind == "mma":
        lane = np.arange(32)
        right = np.stack([np.stack([b[lane // 4, lane % 4 * 2 + 8 * k + e] for e in range(2)], 1) for k in range(2)], 1)
    else:
        right = b.reshape(8, 2, 8).transpose(1, 0, 2)  # [half of k, row, 8]
    given = np.concatenate([left, np.ascontiguousarray(right).view(np.uint32).ravel()])
    machine.truncate(truncated)
    done = launch(machine, tmp_path, MMA if kind == "mma" else WGMMA, threads=2 * rows, words=rows * 8, given=given)
    assert done.reports == ""
    products = (a[:, None, :].astype(np.float64) * b[None].astype(np.float64)).reshape(-1, 16)
    want = tensor_core_sums(products, *((8, 1) if kind == "mma" else (16, 2))) if truncated else products.sum(1)
    np.testing.assert_array_equal(product_of(done.out), want.astype(np.float32).reshape(rows, 8))
