"""Small runs of the retrieval experiment by its command line, and a stand-in for timm."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.retrieval.__main__ import main

PNG = b"\x89PNG"


class Features(torch.nn.Sequential):
    """As timm's models are: they give more columns than `num_features`, and may take images of one size alone."""

    num_features = 3
    pretrained_cfg = types.MappingProxyType({"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.125)})

    def __init__(self) -> None:
        super().__init__(torch.nn.BatchNorm2d(3), torch.nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2:] == (16, 16), f"Input height ({x.shape[2]}) doesn't match model (16)."
        return super().forward(x)


def fake_timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool, int]]:
    """A stand-in for timm, as torchvision does not load beside every torch; the models that it is asked for."""
    asked = []

    def create_model(name: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        asked.append((name, pretrained, num_classes))
        if name != "resnet50":
            raise RuntimeError(f"Unknown model ({name})")
        return Features()

    stand_in = types.SimpleNamespace(create_model=create_model, list_models=lambda pattern: ["resnet50"])
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return asked


def command(root: Path, out: Path, *more: Any) -> list[str]:
    """A small run; `more` may override."""
    small = ("--dim", 32, "--epochs", 2, "--batch-classes", 6, "--batch-images", 3, "--min-crop", 0.6)
    start = ("--dataset", "folder", "--root", root, "--base", "smoothap", "--out", out)
    return [str(a) for a in (*start, *small, *more)]


def results_in(out: Path) -> dict[str, Any]:
    """Results by the name of their run."""
    return {path.parent.name: json.loads(path.read_text()) for path in out.rglob("result.json")}


# Refusals: exit code 2, a message that names what is wrong, nothing written.


def refuse(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "Traceback" not in said
    return said
