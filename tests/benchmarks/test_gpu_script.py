"""`make gpu` as far as it goes without a GPU: its stages, its cases on tiny batches, its goals."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import gpu, gpu_speed
from benchmarks.speed.gpu import Records, Stage, run_stage
from benchmarks.speed.gpu_speed import Clock, cases, goals
from tcm_fused import tcm_loss

FACTS = {"device": "a test", "capability": "9.0"}


def stage(script: str, seconds: float = 20, **environment: str) -> Stage:
    return Stage("stage", seconds, (sys.executable, "-c", script), environment)


def test_stages_end_in_time() -> None:
    """Ten minutes, and the build is for the card that is there; in every command, something to run."""
    chosen = gpu.stages(FACTS, Records(Path("speed.json"), Path("registers.json")))
    assert [each.name for each in chosen] == [
        "build",
        "registers",
        "tests",
        "triton",
        "memcheck",
        "racecheck",
        "benchmark",
    ]
    assert sum(each.seconds for each in chosen) <= gpu.TOTAL <= 590
    assert chosen[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert chosen[1].environment == chosen[0].environment, "the reports are those of the build"
    for tests in chosen[2:4]:
        assert tests.environment["TRITON_INTERPRET"] == "0", "tests/conftest.py sets it for machines without a GPU"
    files = [
        path for path in gpu.ROOT.glob("tests/*/test_*.py") if "\npytestmark = pytest.mark.cuda" in path.read_text()
    ]
    assert sorted(files) == sorted(gpu.ROOT / name for name in gpu.GPU_TESTS)


def test_small_steps_run() -> None:
    """The steps that the sanitizers watch, on the CPU."""
    script = gpu._SMALL_STEPS.replace('"cuda"', '"cpu"').replace(".cuda()", "").replace("torch.cuda.synchronize()", "")
    done = subprocess.run([sys.executable, "-c", script], cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_stage_outcomes(capfd: pytest.CaptureFixture[str]) -> None:
    passed = run_stage(stage("import os; print(os.environ['WORD'])", WORD="hello"), 20)
    assert (passed["outcome"], passed["output"]) == ("passed", "hello\n")
    assert run_stage(stage("print('before'); raise SystemExit(3)"), 20)["outcome"] == "failed"
    assert "before" in capfd.readouterr().out
    absent = run_stage(Stage("stage", 20, ("no-such-tool-here",), {}), 20)
    assert (absent["outcome"], absent["output"]) == ("not run", "no-such-tool-here is not installed")


def test_stage_that_hangs_is_stopped_with_its_children() -> None:
    script = "import subprocess, sys; print('started', flush=True); subprocess.run([sys.executable, '-c', %r])"
    stopped = run_stage(stage(script % "import time; time.sleep(60)"), 2)
    assert stopped["outcome"] == "timed out"
    assert stopped["seconds"] < 20
    assert stopped["output"] == "started\n"


def test_failed_stage_does_not_stop_the_next(tmp_path: Path) -> None:
    """And the file is there with what has been done, figures included."""
    target, records = tmp_path / "results" / "card.json", Records(tmp_path / "speed.json", tmp_path / "registers.json")
    bad = stage("raise SystemExit(1)")._replace(name="bad")
    good = stage(f"for name in {list(map(str, records))}: open(name, 'w').write('[1]')")._replace(name="good")
    absent = Stage("absent", 5, ("no-such-tool-here",), {}, optional=True)
    assert not gpu.run([bad, good, absent], FACTS, target, records)
    written = json.loads(target.read_text())
    assert {name: one["outcome"] for name, one in written["stages"].items()} == {
        "bad": "failed",
        "good": "passed",
        "absent": "not run",
    }
    assert written["device"] == "a test"
    assert written["speed"] == written["registers"] == [1]
    assert gpu.run([good, absent], FACTS, target, records)
    assert not gpu.run([absent._replace(optional=False)], FACTS, target, records)


def test_seconds_that_are_left(tmp_path: Path) -> None:
    """The last stage gets what the others did not take."""
    report = tmp_path / "seconds"
    last = Stage("last", 5, (sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"), {})
    last = last._replace(command=(*last.command, str(report), "SECONDS"))
    gpu.run(
        [stage("pass"), last], FACTS, tmp_path / "card.json", Records(tmp_path / "no", tmp_path / "none"), seconds=100
    )
    assert 60 < int(report.read_text()) <= 100


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: `make gpu` would run")
@pytest.mark.parametrize("module", ["benchmarks.speed.gpu", "benchmarks.speed.gpu_speed"])
def test_without_a_gpu(module: str, tmp_path: Path) -> None:
    """It says so at once and writes nothing."""
    target = tmp_path / "result.json"
    command = [sys.executable, "-m", module, *([str(target)] if module.endswith("speed") else [])]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not target.exists()


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """Every case on the CPU, with at most 96 rows and without torch.compile, which takes longer than all the rest."""
    tiny = {
        name: replace(
            case,
            n=min(case.n, 96),
            classes=min(case.classes, 9),
            runs=2,
            side=min(case.side, 64),
            peers=tuple(set(case.peers) - {"torch.compile"}),
        )
        for name, case in cases().items()
    }
    return gpu_speed.run(Clock("cpu"), "cpu", tiny, 100)


def test_every_case_runs(measured: dict[str, Any]) -> None:
    assert not measured["errors"]
    assert set(measured["cases"]) == set(cases())
    assert set(measured["ceilings"]) == {"flops", "bytes_per_second"}
    rates = [one["flops"] for one in measured["cases"].values() if "flops" in one]
    assert min(rates) < measured["ceilings"]["flops"] < max(rates), "each case has the rate that was measured beside it"
    for one in measured["cases"].values():
        assert one["ms"]["tcm_fused"] > 0
        assert one["hard_pairs"][0] > 0
    json.dumps(measured)


def test_peer_that_fails_leaves_its_error(measured: dict[str, Any]) -> None:
    other = measured["cases"]["other losses"]
    assert set(other["ms"]) | set(other["failed"]) == {"tcm_fused", *gpu_speed.OTHER_LOSSES}
    assert all("Error: " in message for message in other["failed"].values())


def test_tables_of_what_was_measured(measured: dict[str, Any]) -> None:
    table = gpu_speed.time_table(measured["cases"])
    assert len(table.splitlines()) == 2 + len(cases())
    assert {"eager", "pytorch-metric-learning", "captured"} <= {word.strip(" ,|") for word in table.split(" ")}
    assert len(measured["goals"]) == len(goals({}))


def test_case_that_fails_does_not_stop_the_next() -> None:
    chosen = {"bad": replace(cases()["fp32"], hard="nonsense"), "good": replace(cases()["fp32"], n=50, runs=1)}
    result = gpu_speed.run(Clock("cpu"), "cpu", chosen, 100)
    assert "nonsense" in result["errors"]["bad"]
    assert "good" in result["cases"]
    late = gpu_speed.run(Clock("cpu"), "cpu", chosen, -1)
    assert set(late["errors"]) == {"bad", "good"}


def test_gate_stops_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_speed, "loss_of", lambda *_: partial(tcm_loss, lambda_plus=1.01))
    with pytest.raises(AssertionError, match="loss"):
        gpu_speed.check(Clock("cpu"), "cpu")


# Goals, from figures that are made up to lie on either side.

FLOPS = 65536**2 * 512 / 3e-3  # 3 ms for N^2 D flop


def figures(product_ms: float) -> dict[str, Any]:
    """The figures of a card whose kernels take `product_ms` for each N^2 D flop of N = 65,536, D = 512."""

    def one(n: int, d: int, products: float = 1, **ms: float) -> dict[str, Any]:
        ours = product_ms * products * n**2 * d / (65536**2 * 512)
        times = {"tcm_fused": ours, **{peer: factor * ours for peer, factor in ms.items()}}
        return {"n": n, "d": d, "flops": FLOPS, "ms": times}

    found = {"hard none": one(65536, 512), "hard all": one(65536, 512), "hard half": one(65536, 512, 3)}
    found |= {"hard 1e-4": one(65536, 512, 1.2), "hard 1e-3": one(65536, 512, 1.8), "fp32": one(65536, 512, 1.1)}
    found["OPIS"] = {"ms": {"tcm_fused": 130 * product_ms}}
    found["peers"] = one(32768, 512, eager=16, **{"torch.compile": 5.5})
    found["peers"]["peak_bytes"] = {"tcm_fused": 90, "eager": 10_000}
    found["million"] = one(2**20, 256) | {"peak_bytes": {"tcm_fused": 3e9}, "embedding_bytes": 5e8}
    found |= {f"small {n} {d}": one(n, d, eager=3, **{"torch.compile": 1.2}) for n, d in gpu_speed.SMALL}
    found["small 1024 128"]["ms"]["captured"] = 0.05
    return found | {f"width {d}": one(65536, d) for d in gpu_speed.WIDTHS}


def test_goals_met() -> None:
    assert [row.subject for row in goals(figures(3.5)) if not row.met] == []


def test_goals_missed() -> None:
    """Each, by figures that are just too slow or too large."""
    slow = figures(5.0)  # 1.67 times the floor
    slow["hard 1e-4"]["ms"]["tcm_fused"] = slow["hard 1e-3"]["ms"]["tcm_fused"] = 10.5
    slow["fp32"]["ms"]["tcm_fused"] = 6.5
    slow["peers"]["ms"] = {"tcm_fused": 1.0, "eager": 14.0, "torch.compile": 4.0}
    slow["peers"]["peak_bytes"]["tcm_fused"] = 110
    slow["million"]["ms"]["tcm_fused"] = 1001.0
    slow["million"]["embedding_bytes"] = 6e9
    slow["small 256 128"]["ms"] = {"tcm_fused": 1.0, "eager": 2.0, "torch.compile": 0.9}
    slow["small 1024 128"]["ms"]["captured"] = 0.061
    rows = goals(slow)
    assert [row.subject for row in rows if row.met or row.figure is None] == []


def test_goals_not_measured() -> None:
    rows = goals({})
    assert len(rows) == len(goals(figures(1.0))) == 21
    assert all(row.figure is None and not row.met for row in rows)
