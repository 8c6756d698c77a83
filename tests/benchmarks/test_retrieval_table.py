"""The table of the retrieval experiment, and folders drawn by command."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from support.retrieval import refuse

from benchmarks.retrieval import table
from benchmarks.retrieval.__main__ import main
from benchmarks.retrieval.datasets import load
from benchmarks.retrieval.drawn import main as draw

pytestmark = pytest.mark.usefixtures("one_thread")


# The table.


def result(base: str, tcm: bool, seed: int, recall: float, score: float, eps: float, **other: Any) -> dict[str, Any]:
    """As a run writes it, as far as the table reads it."""
    margins = {"margin_plus": 0.9, "margin_minus": 0.5, "lambda_plus": 1.0, "lambda_minus": 1.0}
    identity: dict[str, Any] = {
        "dataset": "cub",
        "test_set": "",
        "backbone": "small",
        "base": base,
        "tcm": margins if tcm else None,
    }
    identity |= {"seed": seed, "epochs": 2, "batch_classes": 4, "batch_images": 2, "dim": 8, "images": "f" * 16} | other
    part = {"images": 1234, "classes": 100}
    scores = {"recall_at_1": recall, "opis": score, "eps_opis": eps}
    return {"identity": identity, "scores": scores, "train": part, "test": part}


RESULTS = [
    result("smoothap", False, 0, 0.50, 0.010, 0.020),
    result("smoothap", False, 1, 0.54, 0.012, 0.030),
    result("smoothap", False, 2, 0.90, 0.900, 0.900),  # no other side
    result("smoothap", True, 0, 0.52, 0.007, 0.024),
    result("smoothap", True, 1, 0.55, 0.008, 0.033),
    result("arcface", False, 0, 0.60, 0.02, 0.03),
    result("arcface", True, 0, 0.60, 0.03, 0.02),
    result("recallatk", True, 5, 0.70, 0.02, 0.03),
]


def test_table_by_hand() -> None:
    text = table.markdown(table.make_experiments(RESULTS), RESULTS)
    lines = text.splitlines()
    assert lines[1].count("|") == lines[0].count("|") == lines[2].count("|")
    # Changes of OPIS x 1000: -3 and -4; of 10%-OPIS x 1000: 4 and 3; of recall@1: 2 and 1 points.
    assert lines[2] == (
        "| cub small smoothap | 2 "
        "| 11.0 +- 1.4 | 7.5 +- 0.7 | ↓ -3.5 +- 0.7, better in 2 "
        "| 25.0 +- 7.1 | 28.5 +- 6.4 | ↑ +3.5 +- 0.7, better in 0 "
        "| 52.0 +- 2.8 | 53.5 +- 2.1 | ↑ +1.5 +- 0.7, better in 2 |"
    )
    assert lines[3] == (
        "| cub small arcface | 1 | 20.0 | 30.0 | ↑ +10.0, better in 0 "
        "| 30.0 | 20.0 | ↓ -10.0, better in 1 | 60.0 | 60.0 | = +0.0, better in 0 |"
    )
    assert lines[4] == "| cub small recallatk | 0 | - | 20.0 | - | - | 30.0 | - | - | 70.0 | - |"
    assert "cub: 1,234 images of 100 classes to train on" in text
    assert "TCM with smoothap, arcface, recallatk: m+ = 0.9, m- = 0.5, lambda+ = 1" in text
    captioned = table.markdown(table.make_experiments(RESULTS), RESULTS, "Mind the gap.")
    assert captioned == text + "\nMind the gap.\n"


def test_runs_of_other_settings_are_not_mixed() -> None:
    results = copy.deepcopy(RESULTS[:2] + RESULTS[3:5])
    results[1]["identity"]["epochs"] = results[3]["identity"]["epochs"] = 9
    assert [(row.name, row.seeds()) for row in table.make_experiments(results)] == [
        ("cub small smoothap (epochs 2)", [0]),
        ("cub small smoothap (epochs 9)", [1]),
    ]
    results = copy.deepcopy(RESULTS[:2] + RESULTS[3:5])
    results[3]["identity"]["tcm"]["margin_plus"] = 0.7  # one baseline, two settings of TCM
    names = [row.name for row in table.make_experiments(results)]
    assert len(names) == 2 and "margin_plus 0.9" in names[0] and "margin_plus 0.7" in names[1]


def test_rates_of_class_weights_are_told_where_there_are_such() -> None:
    results = [result("arcface", tcm, 0, 0.5, 0.1, 0.2, loss_lr=rate) for tcm in (False, True) for rate in (0.1, 0.2)]
    results += [result("smoothap", tcm, 0, 0.5, 0.1, 0.2, loss_lr=None) for tcm in (False, True)]
    assert sorted(row.name for row in table.make_experiments(results)) == [
        "cub small arcface (loss_lr 0.1)",
        "cub small arcface (loss_lr 0.2)",
        "cub small smoothap",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.json",), "cannot read none.json: No such file"),
        (("good.json", "--root", "empty"), "--root is of --dataset"),
        (("good.json", "--base", "smoothap"), "--base is of --dataset"),
        (("good.json", "--tcm"), "--tcm is of --dataset"),
        (("good.json", "--seeds", "0"), "--seeds is of --dataset"),
        (("good.json", "--checkpoint-every", "500"), "--checkpoint-every is of --dataset"),
        (("empty",), "there is no result.json under empty"),
        (("bad.json",), "bad.json holds no results"),
        (("list.json",), "list.json holds no results"),
        (("good.json", "other.json"), "other.json has a run that came before with other scores"),
        (("good.json", "--picture", "t.gif"), "its name must end in one of .png, .pdf, .svg"),
        (("good.json", "--markdown", "none/t.md"), "cannot write none/t.md: there is no folder"),
        (("good.json", "--markdown", "empty"), "it is a folder"),
        (("good.json", "--markdown", "t", "--json", "./t"), "it is an input or the other output"),
        (("good.json", "--json", "./good.json"), "it is an input or the other output"),
        (("strange.json",), "strange.json holds no results"),
        (("nothing.json",), "nothing.json holds no results"),
        (("parts.json",), "parts.json holds no results"),
        (("seeds.json",), "seeds.json holds no results"),
        (("one.json", "--picture", "t.png", "--markdown", "t.md"), "nothing to draw"),
    ],
)
def test_bad_tables(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    other = copy.deepcopy(RESULTS[0])
    other["scores"]["opis"] = 0.5
    files: dict[str, Any] = {"bad": "{", "list": "[3]", "good": RESULTS, "other": other, "one": RESULTS[0]}
    files["strange"] = {**RESULTS[0], "scores": {**RESULTS[0]["scores"], "opis": "high"}}
    files["nothing"] = {**RESULTS[0], "identity": []}
    files["parts"] = {name: value for name, value in RESULTS[0].items() if name != "test"}
    files["seeds"] = {**RESULTS[0], "identity": {"tcm": None}}
    for name, content in files.items():
        Path(f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    before = sorted(tmp_path.rglob("*"))
    assert message in refuse(capsys, ["--table", *arguments])
    assert sorted(tmp_path.rglob("*")) == before


def test_drawing_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(tmp_path / "d"), "--classes", "4", "--images", "2", "--seed", "5"]
    draw(arguments)
    assert "drew 4 classes of 2 images" in capsys.readouterr().out
    assert [len(part.paths) for part in load("folder", tmp_path / "d")[:2]] == [4, 4]
    for bad, message in ((arguments, "is there already"), ([*arguments, "--classes", "0"], "must be at least 1")):
        with pytest.raises(SystemExit) as left:
            draw(bad)
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_the_table_survives_terminal_and_caption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that are none, and escape sequences in captions and results: written, and harmless on the page."""
    results = copy.deepcopy(RESULTS)
    for one in results:
        one["identity"]["dataset"] = "cub\x1b[2J"
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--table", tmp_path / "results.json", "--caption", "Käse \udcff \x1b[31m"]
    main([str(a) for a in (*arguments, "--markdown", tmp_path / "t.md", "--json", tmp_path / "t.json")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "cub\\x1b[2J" in printed and "Käse \\udcff" in printed
    assert "Käse \\udcff" in (tmp_path / "t.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "t.json").read_text()) == results
