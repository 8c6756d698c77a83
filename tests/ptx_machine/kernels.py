"""The CUDA kernels on the machine: the project's own host code lays out the workspace and launches them.

NumPy in, NumPy out. Whatever the machine reports is an error here. bfloat16 comes as its bits, in uint16.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ptx_machine import build
from ptx_machine.machine import Array, Machine

TYPES = {np.dtype(np.float16): 0, np.dtype(np.uint16): 1, np.dtype(np.float32): 2}
RECTANGLE, SCREEN_FROM, CHUNK, ONE_CHUNK, WINDOW = (
    192,
    4,
    1024,
    4096,
    2**31 - 1,
)  # as shipped: csrc/cuda/work.h and plan.cuh
SHARED = {"80": (163 << 10, 164 << 10), "90": (227 << 10, 228 << 10), "100": (227 << 10, 228 << 10)}


def _structure(name: str, integers: str, pointers: str, **rest: Any) -> type[ctypes.Structure]:
    fields: list[tuple[str, Any]] = [(field, ctypes.c_int64) for field in integers.split()]
    fields += [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(name, (ctypes.Structure,), {"_fields_": [*fields, *rest.items()]})


LossCall = _structure(
    "LossCall",
    "symmetric n m d type fp16 row_offset sm sm_count rectangle screen_from chunk one_chunk",
    "x y ref_x ref_y device_margin device_weight loss grad_x grad_ref penalty count",
    margin=ctypes.c_double * 2,
    weight=ctypes.c_double * 2,
)
CountsCall = _structure(
    "CountsCall",
    "symmetric n m d classes thresholds bits sm sm_count shared_per_block shared_per_sm window chunk one_chunk",
    "x y ref_x ref_y threshold count class_count best ref_best",
)


@dataclass(frozen=True)
class Knobs:
    """How a launch goes, which must not change its result."""

    sm: str = "80"  # the path: by mma.sync, or on "90" by warpgroups
    code: str = ""  # the PTX that runs, where that is not of `sm`: another architecture's, or a variant's
    seed: int = 0  # of the order of warps and of copies
    truncated: bool = False  # tensor cores cut sums off, else they are exact
    sm_count: int = 3
    rectangle: int = RECTANGLE  # tiles a side
    screen_from: int = SCREEN_FROM  # tiles for each block of threads; 0: always a screen, for fp32 accuracy
    chunk: int = CHUNK
    one_chunk: int = ONE_CHUNK
    window: int = WINDOW
    on_device: bool = False  # margins and weights are read from device memory
    shift: int = 0  # elements by which x is off its alignment


SHIPPED = Knobs()


class MachineError(AssertionError):
    """The machine has something to report."""


class Kernels:
    """A machine with the host's part of the kernels in it, and their PTX.

    root: below it lie the sources; host: those of some units' host code, if they are others.
    """

    def __init__(
        self,
        root: Path = build.ROOT,
        architectures: tuple[str, ...] = tuple(build.ARCHITECTURES),
        host: dict[str, Path] | None = None,
    ) -> None:
        files = [(unit, architecture) for architecture in architectures for unit in build.UNITS]
        build.machine_objects()
        with ThreadPoolExecutor(2) as pool:
            objects = tuple(pool.map(lambda unit: build.host_object(unit, (host or {}).get(unit, root)), build.UNITS))
            paths = list(pool.map(lambda file: build.ptx(file[0], file[1], root), files))
        self.machine = Machine(build.library(objects))
        for (_, architecture), path in zip(files, paths, strict=True):
            self.machine.load_files(architecture, [path])
        for kind in ("loss", "counts"):
            getattr(self.machine.library, f"{kind}_bytes").restype = ctypes.c_int64
            getattr(self.machine.library, f"{kind}_run").restype = ctypes.c_char_p

    def loss(
        self,
        x: Array,
        y: Array,
        ref_x: Array | None = None,
        ref_y: Array | None = None,
        *,
        row_offset: int | None = None,
        margin: tuple[float, float] = (0.9, 0.5),
        weight: tuple[float, float] = (1.0, 1.0),
        fp16: bool = False,
        penalties: bool = False,
        grad_x: bool = True,
        grad_ref: bool = True,
        knobs: Knobs = SHIPPED,
    ) -> tuple[float, Array | None, Array | None, Array, Array]:
        """Loss, gradients by x and by ref_x, penalty [2] and count [2].

        `penalties`: the gradients are those of the two penalties, [2, N, D] and [2, M, D]; the loss is NaN.
        """
        machine, symmetric = self.machine, ref_x is None
        (n, d), m = x.shape, len(x if ref_x is None else ref_x)
        call = LossCall(
            symmetric=symmetric,
            n=n,
            m=m,
            d=d,
            type=TYPES[x.dtype],
            fp16=fp16,
            row_offset=0 if symmetric else -1 if row_offset is None else row_offset,
            sm=int(knobs.sm),
            sm_count=knobs.sm_count,
            rectangle=knobs.rectangle,
            screen_from=knobs.screen_from,
            chunk=knobs.chunk,
            one_chunk=knobs.one_chunk,
        )
        shifted = np.concatenate([np.zeros(knobs.shift, x.dtype), x.ravel()])
        call.x, call.y = machine.put(shifted) + knobs.shift * x.itemsize, machine.put(y.astype(np.int64))
        if ref_x is not None and ref_y is not None:
            call.ref_x, call.ref_y = machine.put(ref_x), machine.put(ref_y.astype(np.int64))
        # Numbers on the host must not be looked at when there is a device's.
        host = (np.nan, np.nan) if knobs.on_device else None
        call.margin[:], call.weight[:] = host or margin, host or weight
        if knobs.on_device:
            call.device_margin, call.device_weight = machine.put(np.array(margin)), machine.put(np.array(weight))
        sides = (2,) if penalties else ()
        loss = np.array(np.nan)
        if not penalties:
            loss, call.loss = machine.room((), np.float32)
        penalty, call.penalty = machine.room(2, np.float64)
        count, call.count = machine.room(2, np.int64)
        dx = dref = None
        if grad_x:
            dx, call.grad_x = machine.room((*sides, n, d), np.float32)
        if grad_ref and not symmetric:
            dref, call.grad_ref = machine.room((*sides, m, d), np.float32)
        self._run("loss", call, knobs)
        result = (float(loss), *(None if a is None else a.copy() for a in (dx, dref)), penalty.copy(), count.copy())
        machine.free()
        return result  # type: ignore[return-value]

    def counts(
        self,
        x: Array,
        y: Array,
        classes: int,
        thresholds: Array,
        bits: int,
        knobs: Knobs = SHIPPED,
        ref_x: Array | None = None,
        ref_y: Array | None = None,
        shared: tuple[int, int] | None = None,
    ) -> tuple[Array, Array, Array, Array]:
        """Counts [2, cells], those of each class [2, classes + 1, T], and the largest similarities [2, N] and [2, M].

        `shared`: bytes of a block and of a multiprocessor, where they are not the path's.
        """
        machine, (n, d), m = self.machine, x.shape, len(x if ref_x is None else ref_x)
        per_block, per_sm = shared or SHARED[knobs.sm]
        call = CountsCall(
            symmetric=ref_x is None,
            n=n,
            m=m,
            d=d,
            classes=classes,
            thresholds=len(thresholds),
            bits=bits,
            sm=int(knobs.sm),
            sm_count=knobs.sm_count,
            shared_per_block=per_block,
            shared_per_sm=per_sm,
            window=knobs.window,
            chunk=knobs.chunk,
            one_chunk=knobs.one_chunk,
        )
        call.x, call.y, call.threshold = machine.put(x), machine.put(y.astype(np.int64)), machine.put(thresholds)
        if ref_x is not None and ref_y is not None:
            call.ref_x, call.ref_y = machine.put(ref_x), machine.put(ref_y.astype(np.int64))
        count, call.count = machine.room((2, (2 << bits) + 1), np.int64)
        class_count, call.class_count = machine.room((2, classes + 1, len(thresholds)), np.int64)
        best, call.best = machine.room((2, n), np.float32)
        ref_best, call.ref_best = machine.room((2, 0 if ref_x is None else m), np.float32)
        self._run("counts", call, knobs)
        tables = (count.copy(), class_count.copy(), best.copy(), ref_best.copy())
        machine.free()
        return tables

    def _run(self, kind: str, call: ctypes.Structure, knobs: Knobs) -> None:
        """Raises MachineError with all that the machine has to say."""
        machine, library = self.machine, self.machine.library
        size = getattr(library, f"{kind}_bytes")(ctypes.byref(call))
        _, workspace = machine.room(size, np.uint8)
        machine.select((knobs.code or knobs.sm).encode())
        machine.seed(knobs.seed + 1)
        machine.truncate(knobs.truncated)
        error = getattr(library, f"{kind}_run")(ctypes.byref(call), ctypes.c_void_p(workspace))
        reports = machine.take_reports()
        if error is not None or reports:
            machine.free()
            raise MachineError("\n".join([*([] if error is None else [error.decode()]), *reports]))


@cache
def kernels() -> Kernels:
    """Those of this checkout."""
    return Kernels()
