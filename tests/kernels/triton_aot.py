"""Compiles every kernel that the Triton backend launches on an architecture, without a GPU, and tells what came out.

`python tests/triton_aot.py sm_90` prints one JSON object a kernel. The launches are those of `triton_loss.launch`, on
tensors without memory, recorded instead of launched: argument types, alignments and constants are those of a GPU.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tcm_fused.backends import triton_loss
from tcm_fused.backends.problem import Problem

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
}
# Rows, columns (None: the rows), components, dtype, fp16 numbers for a component, row_offset; whose gradients, if any.
CALLS: list[tuple[int, int | None, int, torch.dtype, int, int | None, str]] = [
    (65_536, None, 512, torch.bfloat16, 1, None, "loss"),
    (65_536, None, 512, torch.float32, 2, None, "loss"),
    (8192, 65_536, 512, torch.float32, 2, 0, "loss"),
    (8192, 65_536, 512, torch.float16, 1, None, "penalties"),
    (1000, None, 100, torch.float32, 2, None, "loss"),
    (300, 77, 9, torch.float16, 1, 0, "none"),
]


def launches(name: str) -> Iterator[tuple[JITFunction, dict[str, str], dict[str, Any], dict[Any, Any], dict[str, int]]]:
    """Kernel, signature, constants, attributes and options of the launches that the calls make, each once."""
    found: dict[str, Any] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **meta: Any) -> None:
        launch = specialise(kernel, args, meta)
        found.setdefault(repr((kernel.__name__, *launch)), (kernel, *launch))

    JITFunction.run = record
    for n, m, d, dtype, parts, row_offset, gradients in CALLS:
        x, y = torch.empty(n, d, dtype=dtype, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
        reference: tuple[Any, Any] = (None, None)
        if m is not None:
            reference = (
                torch.empty(m, d, dtype=dtype, device="meta"),
                torch.empty(m, dtype=torch.int64, device="meta"),
            )
        two = torch.empty(2, dtype=torch.float64, device="meta")
        wanted = (gradients != "none", gradients != "none" and m is not None)
        weights = None if gradients == "penalties" else two
        problem = Problem(x, y, *reference, row_offset, two, weights, False, parts == 1, *wanted)
        triton_loss.launch(triton_loss.CONFIGS[name], 132, problem)
    yield from found.values()


def specialise(
    kernel: JITFunction, args: tuple[Any, ...], meta: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any], dict[str, int]]:
    """Signature, constants, attributes and options that Triton compiles a kernel with for these arguments."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | meta
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        kind, aligned = describe(value, specialised=not parameter.do_not_specialize)
        if parameter.is_constexpr or kind == "constexpr":
            kind, constants[parameter.name] = "constexpr", getattr(value, "value", value)
        elif aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
        signature[parameter.name] = kind
    options: dict[str, int] = {key: meta[key] for key in ("num_warps", "num_stages") if key in meta}
    return signature, constants, attributes, options


def describe(value: Any, specialised: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is known to be divisible by 16."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>".replace(" ", ""), False
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype], value.storage_offset() * value.itemsize % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, int) and value == 1 and specialised:
        return "constexpr", False
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64", specialised and value % 16 == 0
    return "constexpr", False


def report(name: str) -> Iterator[dict[str, Any]]:
    """For each kernel ptxas' figures, and counts of instructions in the machine code."""
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    target = GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    for kernel, signature, constants, attributes, options in launches(name):
        log = io.StringIO()
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        with contextlib.redirect_stdout(log):
            binary = triton.compile(source, target=target, options=options)
        code = disassemble(binary.asm["cubin"])
        spills = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()
        )
        yield {
            "kernel": kernel.__name__,
            "variant": {key: value for key, value in constants.items() if key.isupper() or value is None},
            "registers": max(map(int, re.findall(r"Used (\d+) registers", log.getvalue()))),
            "spilled": sum(int(size) for sizes in spills for size in sizes) if spills else None,
            "shared": binary.metadata.shared,
            "warnings": re.findall(r".*(?:warning|C75\d\d|erializ).*", log.getvalue()),
            "instructions": len(code),
            "local": sum(bool(re.search(r"\b(STL|LDL)\b", line)) for line in code),
            "trap": any("BPT.TRAP" in line for line in up_to_exit(code)),
            **{
                unit: sum(bool(re.search(rf"\b{unit}\b", line)) for line in code)
                for unit in ("HMMA", "HGMMA", "UTCHMMA")
            },
            "TMA": sum("UTMALDG" in line for line in code),
            "cp.async": sum("LDGSTS" in line for line in code),
        }


def disassemble(cubin: bytes) -> list[str]:
    """The instructions."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


def up_to_exit(code: list[str]) -> list[str]:
    """The kernel's own path: behind its last EXIT lie out-of-line guards of tensor memory on sm_100, which may trap."""
    last = max(i for i, line in enumerate(code) if re.search(r"\bEXIT\b", line))
    return code[: last + 1]


if __name__ == "__main__":
    for row in report(sys.argv[1]):
        print(json.dumps(row), flush=True)
