"""`python -m tcm_fused info`, the package's face, and the examples in its documentation."""

import doctest
import json
import subprocess
import sys

import pytest
import torch

import tcm_fused
import tcm_fused.loss
from tcm_fused import ops


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tcm_fused", *arguments], capture_output=True, text=True, check=False, timeout=120
    )


def test_info_json() -> None:
    """One JSON object: versions, device, each backend with the reason where it cannot run, and the build's facts."""
    done = call("info", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["version"] == tcm_fused.__version__
    assert facts["torch"] == torch.__version__
    assert isinstance(facts["device"], str)
    assert facts["device"]
    assert facts["threads"] >= 1
    assert list(facts["backends"]) == ["cpu", "cuda", "triton", "torch"]
    for state in facts["backends"].values():
        assert set(state) == {"available", "reason"}
        assert isinstance(state["available"], bool)
        assert (state["reason"] is None) == state["available"]
    assert facts["backends"]["torch"]["available"]


def test_info_says_what_a_call_would() -> None:
    """A backend is available exactly if it runs when asked for by name; the others give the same reason."""
    backends = json.loads(call("info", "--json").stdout)["backends"]
    x, y = torch.ones(4, 2), torch.arange(4)
    for name in ("cpu", "triton", "torch"):
        if backends[name]["available"]:
            tcm_fused.tcm_loss(x, y, backend=name)
        else:
            with pytest.raises(RuntimeError) as caught:
                tcm_fused.tcm_loss(x, y, backend=name)
            assert backends[name]["reason"] in str(caught.value)


def test_info_of_the_build() -> None:
    """The kernel is there, and says which compiler and instruction set it was built with."""
    facts = json.loads(call("info", "--json").stdout)
    assert facts["backends"]["cpu"]["available"], facts["backends"]["cpu"]["reason"]
    assert facts["build"] == ops.build_info()
    assert facts["build"]
    for name, value in facts["build"].items():
        assert isinstance(name, str)
        assert isinstance(value, str)
        assert value
    words = " ".join(facts["build"]).lower()
    for fact in ("compiler", "cpu", "cuda"):
        assert fact in words


def test_info_for_people() -> None:
    done = call("info")
    assert done.returncode == 0, done.stderr
    for word in (tcm_fused.__version__, torch.__version__, *ops.BACKENDS):
        assert word in done.stdout


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")])
def test_bad_commands(arguments: tuple[str, ...]) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert "usage: python -m tcm_fused" in done.stderr


def test_public_names() -> None:
    assert set(tcm_fused.__all__) == {"TCMLoss", "TCMStats", "__version__", "tcm_loss"}
    for name in tcm_fused.__all__:
        assert hasattr(tcm_fused, name)


def test_import_brings_nothing_optional() -> None:
    """No plots, no peers, no Triton, no compiler, and no touch of a GPU."""
    script = """
import sys, torch
before = set(sys.modules)
import tcm_fused
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"matplotlib", "pytorch_metric_learning", "sklearn", "triton", "tqdm", "hypothesis"}, new
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore:tcm_fused runs its slower PyTorch fallback")
def test_documented_examples() -> None:
    found = doctest.testmod(tcm_fused.loss)
    assert found.attempted >= 5
    assert found.failed == 0
