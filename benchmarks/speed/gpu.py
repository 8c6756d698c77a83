"""`make gpu`: build, test and measure on a machine with an NVIDIA GPU, in ten minutes, without a network.

It uses the Python it runs under, with the torch, nvcc and tools that are there, and installs nothing. Each stage has a
time limit of its own, and one that fails does not stop the next; the exit status is 0 if none failed. What came out is
written to benchmarks/results/<device>.json after every stage. A goal that is missed is no failure. In a copy of the
tree without git, TCM_FUSED_COMMIT tells the commit.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
GPU_TESTS = tuple(f"tests/kernels/test_cuda{part}.py" for part in ("", "_counts", "_host"))
TOTAL = 580  # seconds for all stages together
SHOWN = 4000  # characters of a stage's output that are kept

# Sizes at which the sanitizers, hundreds of times slower, still finish; both forms, ragged edges, all precisions.
_SMALL_STEPS = """
import torch
from tcm_fused import tcm_loss
for n, m, d in [(33, 0, 17), (300, 0, 70), (129, 257, 64), (1, 40, 3)]:
    for dtype, precision in [(torch.float32, "fp32"), (torch.bfloat16, "fp16"), (torch.float16, "fp16")]:
        x = torch.randn(n + m, d, generator=torch.manual_seed(n)).to("cuda", dtype)
        y = (torch.arange(n + m) % 7 - 1).cuda()
        sets = [x[:n].clone().requires_grad_(), y[:n].clone()]
        if m:
            sets += [x[n:].clone().requires_grad_(), y[n:].clone()]
        for margin, reduction in [(-2.0, "violating"), (0.0, "violating"), (0.0, "all"), (2.0, "violating")]:
            options = {"margin_plus": margin, "margin_minus": -margin, "reduction": reduction}
            loss = tcm_loss(*sets, **options, precision=precision, backend="cuda")
            loss.backward()
    thresholds = torch.linspace(-0.5, 1, 9).to("cuda")
    for bits in (4, 17):
        torch.ops.tcm_fused.counts(x.float(), y, None, None, 4, thresholds, bits, None)
        torch.ops.tcm_fused.counts(x.float(), y, x.float(), y, 4, thresholds, bits, None)
torch.cuda.synchronize()
print("done")
"""


class Stage(NamedTuple):
    """One command, and the seconds it may take; SECONDS among its arguments becomes what it then has."""

    name: str
    seconds: float
    command: tuple[str, ...]
    environment: dict[str, str]
    optional: bool = False  # may be left out where its tool is missing


class Records(NamedTuple):
    """JSON files that stages write, and that become parts of the result by the same names."""

    speed: Path
    registers: Path


def stages(facts: dict[str, Any], records: Records) -> list[Stage]:
    """All of them, in order. `facts` are the device's."""
    python = sys.executable
    build = {"TCM_FUSED_CUDA": "1", "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))}
    build["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST", facts["capability"])
    tests = (python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *GPU_TESTS, "-k")
    # Every tensor is an allocation of its own, so that memcheck sees where it ends.
    separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = ("compute-sanitizer", "--error-exitcode=9", "--print-limit=20", "--tool")
    speed_command = (python, "-m", "benchmarks.speed.gpu_speed", str(records.speed), "--seconds", "SECONDS")
    return [
        Stage("build", 120, (python, "setup.py", "build_ext", "--inplace"), build),
        # The reports of that build: no product serialised, no spill, registers as in the table.
        Stage("registers", 20, (python, "-m", "benchmarks.speed.ptxas", "--check", str(records.registers)), build),
        # Not in Triton's interpreter, where torch.compile's kernels would run too.
        Stage("tests", 110, (*tests, "not triton"), {"TRITON_INTERPRET": "0"}),
        Stage("triton", 100, (*tests, "triton"), {"TRITON_INTERPRET": "0"}),  # which compiles some 170 kernels
        Stage("memcheck", 55, (*sanitizer, "memcheck", python, "-c", _SMALL_STEPS), separate, optional=True),
        # racecheck does not follow the copy engine's barriers, so it gets the kernels that do without.
        Stage(
            "racecheck",
            55,
            (*sanitizer, "racecheck", python, "-c", _SMALL_STEPS),
            {**separate, "TCM_FUSED_SM": "80"},
            optional=True,
        ),
        Stage("benchmark", 120, speed_command, {}),
    ]


def run_stage(stage: Stage, seconds: float) -> dict[str, Any]:
    """Its outcome ("passed", "failed", "timed out", "not run"), duration and the end of its output, which is shown too.

    "not run": a tool is missing. A stage that is stopped takes everything that it started with it.
    """
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    missing = _missing(stage)
    if missing:
        print(f"{missing} is not installed: {stage.name} was not run", flush=True)
        return {"outcome": "not run", "seconds": 0.0, "output": f"{missing} is not installed"}
    start = time.monotonic()
    # The tests interpret Triton's kernels unless told not to.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0", **stage.environment}
    process = subprocess.Popen(
        [f"{seconds:.0f}" if part == "SECONDS" else part for part in stage.command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        outcome = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        outcome = "timed out"
    took = round(time.monotonic() - start, 1)
    print(f"{output[-SHOWN:].rstrip()}\n== {stage.name} {outcome} after {took} s", flush=True)
    return {"outcome": outcome, "seconds": took, "output": output[-SHOWN:]}


def _missing(stage: Stage) -> str | None:
    """What the stage needs and is not there."""
    if shutil.which(stage.command[0]) is None:
        return stage.command[0]
    if stage.command[1:3] == ("-m", "pytest"):
        asked = subprocess.run([*stage.command[:3], "--version"], capture_output=True, check=False)
        return "pytest" if asked.returncode else None
    return None


def device_facts() -> dict[str, Any]:
    """Device, driver, torch and commit. SystemExit where torch sees no GPU."""
    script = """
import json, torch
assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"
major, minor = torch.cuda.get_device_capability()
properties = torch.cuda.get_device_properties(0)
print(json.dumps({
    "device": torch.cuda.get_device_name(),
    "capability": f"{major}.{minor}",
    "multiprocessors": properties.multi_processor_count,
    "memory_gb": round(properties.total_memory / 1e9, 1),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
}))
"""
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if asked.returncode:
        raise SystemExit(f"`make gpu` needs a GPU and a torch that sees it: {asked.stderr.strip().splitlines()[-1]}")
    facts: dict[str, Any] = json.loads(asked.stdout)
    facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    facts["python"] = sys.version.split()[0]
    facts["commit"] = os.environ.get("TCM_FUSED_COMMIT") or _output("git", "rev-parse", "HEAD")
    facts["dirty"] = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    return facts


def _output(*command: str) -> str:
    """What the command prints, or "unknown"."""
    if shutil.which(command[0]) is None:
        return "unknown"
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else "unknown"


def write(target: Path, result: dict[str, Any]) -> None:
    """The whole file or none of it."""
    from tcm_fused.thresholds.outputs import write_whole  # only here, where it is known that there is a torch

    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda part: part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8"))


def run(chosen: list[Stage], facts: dict[str, Any], target: Path, records: Records, seconds: float = TOTAL) -> bool:
    """Run all stages and write what came of them to `target`; whether none failed.

    A stage has its own limit, and more: what the stages before it left of theirs.
    """
    end = time.monotonic() + seconds
    result: dict[str, Any] = {**facts, "stages": {}}
    for index, stage in enumerate(chosen):
        later = sum(stage.seconds for stage in chosen[index + 1 :])
        result["stages"][stage.name] = run_stage(stage, max(stage.seconds, end - time.monotonic() - later))
        for name, record in records._asdict().items():
            if record.exists():
                result[name] = json.loads(record.read_text())
        write(target, result)
    outcomes = [(stage, result["stages"][stage.name]["outcome"]) for stage in chosen]
    print(f"\n{facts['device']}: {', '.join(f'{stage.name} {outcome}' for stage, outcome in outcomes)}; wrote {target}")
    return all(outcome == "passed" or (outcome == "not run" and stage.optional) for stage, outcome in outcomes)


def main() -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__.splitlines()[0]).parse_args()
    facts = device_facts()
    name = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    (ROOT / "build").mkdir(exist_ok=True)
    records = Records(ROOT / "build/gpu_speed.json", ROOT / "build/gpu_registers.json")
    for record in records:
        record.unlink(missing_ok=True)
    return 0 if run(stages(facts, records), facts, RESULTS / f"{name}.json", records) else 1


if __name__ == "__main__":
    sys.exit(main())
