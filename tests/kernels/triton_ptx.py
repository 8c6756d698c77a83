"""Runs the Triton backend on the PTX machine: `triton_loss.launch` runs as on a GPU, and each kernel is compiled to
PTX for the architecture and executed on the CPU.

`python tests/kernels/triton_ptx.py sm_90` prints one JSON object for each problem, with its errors.
"""

import ctypes
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ptx_machine import build

# Not the user's own: here no compiled kernel has machine code.
os.environ["TRITON_CACHE_DIR"] = str(build.KEPT / "triton")

import numpy as np
import torch
import triton
from ptx_machine.machine import Machine
from support.batches import dyadic, embeddings, margins
from support.oracle import Oracle, Result, compare, compare_sides, oracle_of
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_aot import specialise

from tcm_fused.backends import triton_loss
from tcm_fused.backends.problem import Problem as Contract

NUMBERS = {"fp32": ctypes.c_float, "fp64": ctypes.c_double, "i32": ctypes.c_int32, "i64": ctypes.c_int64}


# The launcher.


def stop_at_ptx() -> None:
    """Triton compiles no further than to PTX."""
    add_stages = CUDABackend.add_stages

    def fewer(self: CUDABackend, stages: dict[str, Any], options: Any, *rest: Any) -> None:
        add_stages(self, stages, options, *rest)
        stages["cubin"] = lambda source, metadata: b""

    CUDABackend.add_stages = fewer


class Launcher:
    """Takes the place of `JITFunction.run`."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.machine = Machine(build.library())
        self.machine.lenient(True)
        self.machine.select(str(architecture).encode())
        self.compiled: dict[str, tuple[str, Any]] = {}

    def run(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | meta
        name, metadata, signature = self.compile(kernel, args, meta)
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        passed: list[Any] = []
        lent: dict[int, int] = {}  # memory of tensors: address and size
        descriptors = iter(getattr(metadata, "tensordesc_meta", None) or [])
        for parameter, kind in signature.items():
            value = values[parameter]
            if kind == "constexpr":
                continue
            if isinstance(value, TensorDescriptor):
                lend(value.base, lent)
                passed += self.descriptor(value, next(descriptors))
            elif isinstance(value, Tensor):
                lend(value, lent)
                passed.append(ctypes.c_uint64(value.data_ptr()))
            else:
                passed.append(NUMBERS[kind](value))
        wanted = self.machine.parameters(name.encode())
        passed += [ctypes.c_uint64(0)] * (wanted - len(passed))  # scratch memory that is not used
        sizes = [self.machine.parameter_bytes(name.encode(), i) for i in range(wanted)]
        assert [ctypes.sizeof(p) for p in passed] == sizes, (name, sizes)
        for address, size in lent.items():
            self.machine.adopt(address, size)
        pointers = (ctypes.c_void_p * wanted)(*(ctypes.addressof(p) for p in passed))
        blocks = (ctypes.c_uint32 * 3)(*[*grid, 1, 1][:3])
        self.machine.launch(name.encode(), blocks, metadata.num_warps * 32, metadata.shared, pointers)
        for address in lent:
            self.machine.release(address)

    def compile(
        self, kernel: JITFunction, args: tuple[Any, ...], meta: dict[str, Any]
    ) -> tuple[str, Any, dict[str, str]]:
        """Name of the kernel in the machine, Triton's facts about it, and its signature."""
        signature, constants, attributes, options = launch = specialise(kernel, args, meta)
        key = repr((kernel.__name__, *launch))
        if key not in self.compiled:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            binary = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
            name = f"{kernel.__name__}_{len(self.compiled)}"
            path = build.KEPT / f"{os.getpid()}-{name}.ptx"
            path.write_text(binary.asm["ptx"].replace(binary.metadata.name, name))
            self.machine.load_files(str(self.architecture), [path])
            path.unlink()
            self.compiled[key] = name, binary.metadata
        return (*self.compiled[key], signature)

    def descriptor(self, value: TensorDescriptor, meta: dict[str, Any]) -> list[Any]:
        """The parameters that a descriptor is passed as: the tensor map, its sizes, its strides."""
        rank, element = len(value.shape), meta["elem_size"]
        room = (ctypes.c_byte * 128)()
        size = (ctypes.c_uint64 * rank)(*reversed(value.shape))
        pitch = (ctypes.c_uint64 * rank)(*(stride * element for stride in reversed(value.strides[:-1])))
        box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
        address, swizzle = value.base.data_ptr(), meta["swizzle"]
        made = self.machine.tensor_map(room, address, element, rank, size, pitch, box, swizzle)
        assert made, "the driver would refuse this tensor map"
        return [room, *map(ctypes.c_int32, value.shape), *map(ctypes.c_int64, value.strides)]


def lend(tensor: Tensor, lent: dict[int, int]) -> None:
    storage = tensor.untyped_storage()
    if storage.nbytes():
        lent[storage.data_ptr()] = storage.nbytes()


# The problems.


@dataclass(frozen=True)
class Problem:
    """The arguments of `make`; `config`: changes of the architecture's Config."""

    n: int
    d: int
    m: int | None = None
    row_offset: int | None = None
    dtype: torch.dtype = torch.float32
    fp16: bool = False
    penalties: bool = False
    share: float | None = 0.5  # of each side's pairs that are hard; None: exact similarities, on the margins
    classes: int = 8
    negative: float = 0.1
    grad_x: bool = True
    grad_ref: bool = True
    processors: int = 4
    kind: str = "random"
    panel_bytes: int = 2**30


PROBLEMS = {
    "plain": Problem(300, 100),
    "split sums": Problem(300, 100, processors=132, share=0.05),
    "panels": Problem(700, 300, share=0.1, panel_bytes=1, kind="groups"),
    "row_offset, penalties": Problem(300, 130, m=500, row_offset=100, dtype=torch.bfloat16, fp16=True, penalties=True),
    "reference set": Problem(300, 9, m=77, dtype=torch.float16, share=0.9),
    "full tiles": Problem(600, 20, dtype=torch.float16, fp16=True, share=1.0, classes=2, negative=0.0),
    "one row": Problem(1, 1, classes=1, negative=0.0),
    "no label": Problem(260, 100, negative=1.0),
    "no gradient": Problem(200, 100, m=513, grad_x=False, grad_ref=False, share=0.3),
    "on the margin": Problem(300, 70, fp16=True, share=None),
    "on the margin, three products": Problem(200, 70, m=300, share=None, panel_bytes=1),
}


def make(problem: Problem, seed: int) -> tuple[list[Tensor], dict[str, Any]]:
    """x, y and perhaps ref_x, ref_y; and row_offset, margins and weights as `oracle_of` has them."""
    rng = np.random.default_rng(seed)
    total = problem.n if problem.m is None else problem.m
    sets: list[Tensor] = []
    for size in (total, problem.n) if problem.row_offset is None and problem.m is not None else (total,):
        y = rng.integers(problem.classes, size=size)
        x = dyadic(size, problem.d, rng) if problem.share is None else embeddings(problem.kind, y, problem.d, rng)
        y = np.where(rng.random(size) < problem.negative, -1 - y, y)
        sets = [torch.from_numpy(x).to(problem.dtype), torch.from_numpy(y), *sets]
    if problem.row_offset is not None:
        own = slice(problem.row_offset, problem.row_offset + problem.n)
        sets = [sets[0][own].clone(), sets[1][own].clone(), *sets]
    options: dict[str, Any] = {"row_offset": problem.row_offset, "lambda_plus": 0.7, "lambda_minus": 1.3}
    if problem.share is None:
        return sets, {**options, "margin_plus": 0.5, "margin_minus": 0.25}
    return sets, {**options, **margins(oracle_of(*sets, **options), problem.share)}


def solve(problem: Problem, config: str, sets: list[Tensor], options: dict[str, Any]) -> Result:
    """The loss, or the penalties, by Triton's kernels."""
    x, y, *reference = sets
    ref_x, ref_y = reference or (None, None)
    two = [torch.tensor([options[f"{name}_plus"], options[f"{name}_minus"]]).double() for name in ("margin", "lambda")]
    weights = None if problem.penalties else two[1]
    how = (False, problem.fp16, problem.grad_x, problem.grad_ref and ref_x is not None)
    loss, dx, dref, penalty, count = triton_loss.launch(
        replace(triton_loss.CONFIGS[config], panel_bytes=problem.panel_bytes),
        problem.processors,
        Contract(x, y, ref_x, ref_y, problem.row_offset, two[0], weights, *how),
    )
    counts = count.numpy()
    return Result(
        loss=float("nan") if loss is None else loss.item(),
        count=counts,
        violation=penalty.numpy() / np.maximum(counts, 1),
        grad_x=dx.numpy() if problem.grad_x else None,
        grad_ref=dref.numpy() if problem.grad_ref and ref_x is not None else None,
    )


def errors(problem: Problem, launcher: Launcher, config: str, seed: int, truncated: bool) -> list[str]:
    """Of one run, held to the oracle."""
    sets, options = make(problem, seed)
    launcher.machine.seed(seed + 1)
    launcher.machine.truncate(truncated)
    result = solve(problem, config, sets, options)
    found = launcher.machine.take_reports()
    oracle: Oracle = oracle_of(*sets, **options)
    how = compare_sides if problem.penalties else compare
    exact = problem.share is None
    try:
        # Embeddings whose similarities are exact have exact unit vectors in fp16.
        how(result, oracle, torch.float32, exact=exact, fp16=problem.fp16 and not exact, tensor_cores=truncated)
    except AssertionError as error:
        found.append(str(error))
    return found


def same_bits(launcher: Launcher, config: str) -> list[str]:
    """Two orders of warps and copies give the same bits."""
    problem = replace(PROBLEMS["split sums"], m=200)
    sets, options = make(problem, 3)
    results = []
    for seed in (1, 2):
        launcher.machine.seed(seed)
        results.append(solve(problem, config, sets, options))
    found: list[str] = launcher.machine.take_reports()
    for name in ("loss", "count", "violation", "grad_x", "grad_ref"):
        first, second = (getattr(result, name) for result in results)
        if not np.array_equal(first, second):
            found.append(f"{name} has other bits")
    return found


def report(config: str) -> Iterator[dict[str, Any]]:
    """Name and errors of each problem."""
    stop_at_ptx()
    launcher = Launcher(int(config.removeprefix("sm_")))
    JITFunction.run = lambda kernel, *args, **kwargs: launcher.run(kernel, *args, **kwargs)
    torch.use_deterministic_algorithms(True)  # memory that torch.empty gives is NaN: a value never written shows
    for seed, (name, problem) in enumerate(PROBLEMS.items()):
        yield {"problem": name, "errors": errors(problem, launcher, config, seed, truncated=seed % 2 == 1)}
    yield {"problem": "same bits", "errors": same_bits(launcher, config)}


if __name__ == "__main__":
    for row in report(sys.argv[1]):
        print(json.dumps(row), flush=True)
