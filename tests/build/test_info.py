"""`python -m tcm_fused info`, the package's face, and the examples in its documentation."""

import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tcm_fused
import tcm_fused.loss
from tcm_fused.__main__ import main
from tcm_fused.backends import choice


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    """The output of `python -m tcm_fused info --json`: one JSON object and nothing else."""
    command = [sys.executable, "-m", "tcm_fused", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_info_json(facts: dict[str, Any]) -> None:
    """Versions, device, threads, and each backend with the reason where it cannot run."""
    assert facts["version"] == tcm_fused.__version__
    assert facts["torch"] == torch.__version__
    assert facts["threads"] >= 1
    assert isinstance(facts["device"], str)
    assert facts["device"]
    assert list(facts["backends"]) == ["cpu", "cuda", "triton", "torch"]
    for state in facts["backends"].values():
        assert set(state) == {"available", "reason"}
        assert isinstance(state["available"], bool)
        assert (state["reason"] is None) == state["available"]
    assert facts["backends"]["torch"]["available"]


@pytest.mark.parametrize("name", ["cpu", "triton", "torch"])
def test_info_says_what_a_call_would(facts: dict[str, Any], name: str) -> None:
    """A backend is available exactly if it runs when asked for by name; otherwise the call gives the same reason."""
    x, y = torch.ones(4, 2), torch.arange(4)
    if facts["backends"][name]["available"]:
        tcm_fused.tcm_loss(x, y, backend=name)
    else:
        with pytest.raises(RuntimeError) as caught:
            tcm_fused.tcm_loss(x, y, backend=name)
        assert facts["backends"][name]["reason"] in str(caught.value)


def test_info_of_the_build(facts: dict[str, Any]) -> None:
    """The kernel is there, and says which compiler, CPU instruction set and CUDA architectures it was built with."""
    assert facts["backends"]["cpu"]["available"], facts["backends"]["cpu"]["reason"]
    assert facts["build"] == choice.build_info()
    assert all(isinstance(value, str) for value in facts["build"].values())
    names = " ".join(facts["build"])
    for fact in ("compiler", "cpu", "cuda"):
        assert fact in names


def test_info_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["tcm_fused", "info"])
    main()
    printed = capsys.readouterr().out
    for word in (tcm_fused.__version__, torch.__version__, *choice.BACKENDS, *(choice.build_info() or {})):
        assert word in printed


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_bad_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tcm_fused", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "usage: python -m tcm_fused" in capsys.readouterr().err


def test_public_names() -> None:
    """Each is there, and in the reference."""
    reference = (Path(__file__).parents[2] / "docs/api.md").read_text()
    for name in tcm_fused.__all__:
        assert hasattr(tcm_fused, name)
        assert name == "__version__" or f"::: tcm_fused.{name}\n" in reference, f"docs/api.md lacks {name}"


def test_import_brings_nothing_optional() -> None:
    """No plots, no peers, no Triton, no compiler, and no touch of a GPU."""
    script = """
import sys, torch
before = set(sys.modules)
import tcm_fused
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"matplotlib", "pyarrow", "pytorch_metric_learning", "sklearn", "torchmetrics", "triton", "tqdm"}, new
assert "torch._dynamo" not in sys.modules
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:tcm_fused runs its slower PyTorch fallback")
def test_documented_examples() -> None:
    found = doctest.testmod(tcm_fused.loss)
    assert found.attempted >= 5
    assert found.failed == 0
