"""`python -m tcm_fused calibrate --save | evaluate | trials | report`, with two sets and groups: files in, the figures
of the functions out; bad input ends with exit code 2 and nothing half written."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import refuse, run
from support.oracle import Array

from tcm_fused import (
    MatchProbability,
    Threshold,
    calibrate,
    evaluate,
    evaluate_trials,
    match_probability,
    opis,
    retrieval,
    suggest_margins,
)
from tcm_fused.thresholds.trials import trial_similarities

PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def data() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    y = rng.integers(9, size=240)
    x = rng.standard_normal((9, 12))[y] + rng.uniform(0.4, 1.2, 9)[y, None] * rng.standard_normal((240, 12))
    return {"x": x[:150], "y": y[:150], "g": y[:150] % 2, "ref": x[150:], "ref_y": y[150:], "ref_g": y[150:] % 2}


@pytest.fixture(scope="module")
def files(data: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, array in data.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "text_g.npy", np.array([f"camera {g}" for g in data["g"]]))
    np.savetxt(folder / "g.csv", data["g"], fmt="%d", header="camera", comments="")
    np.save(folder / "text_y.npy", np.array([f"bird {c}|" for c in data["y"]]))
    np.savez(folder / "gallery.npz", embeddings=data["ref"], labels=data["ref_y"])
    np.save(folder / "narrow.npy", data["x"][:, :5])
    return folder


def test_from_calibration_to_evaluation(
    files: Path, data: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, out, table, text = (tmp_path / name for name in ("t.json", "out.json", "classes.csv", "rates.md"))
    run(capsys, "calibrate", files / "ref.npy", files / "ref_y.npy", "--far", "0.05", "--save", saved)
    threshold = Threshold.load(saved)
    assert threshold == calibrate(data["ref"], data["ref_y"], far=0.05).threshold
    outputs = ("--json", out, "--csv", table, "--markdown", text, "--plot", tmp_path / "det.png", "--picture", "det")
    printed = run(
        capsys, "evaluate", files / "x.npy", files / "text_y.npy", "--threshold", saved, *outputs, "--worst", 2
    )
    found = evaluate(data["x"], data["y"], threshold=threshold)
    content = json.loads(out.read_text())
    assert [content.pop(name) for name in ("class_names",)] == [[f"bird {c}|" for c in found.class_ids]]
    assert content == json.loads(json.dumps(found.to_dict()))
    assert f"{100 * found.far:9.4g} %" in printed
    assert str(found.far_interval) in printed
    assert printed.count("samples)") == 4
    rows = list(csv.DictReader(table.open()))
    assert [row["class"] for row in rows] == [f"bird {c}|" for c in found.class_ids]
    assert [float(row["frr"]) for row in rows] == found.class_frr.tolist()
    assert "| far |" in text.read_text()
    assert (tmp_path / "det.png").read_bytes().startswith(PNG)
    assert "found at FAR" in printed
    assert run(capsys, "evaluate", files / "x.npy", files / "y.npy", "--threshold", "0.3", "--json", out)
    assert json.loads(out.read_text())["far"] == evaluate(data["x"], data["y"], threshold=0.3).far


def test_two_sets_and_groups_reach_every_command(
    files: Path, data: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    both = ("--ref", files / "gallery.npz")
    sets: dict[str, Any] = {"ref_emb": data["ref"], "ref_labels": data["ref_y"]}
    cameras: dict[str, Any] = {
        "groups": data["g"] + data["y"] // 5,
        "ref_groups": data["ref_g"],
        "group_pairs": "across",
    }
    np.savetxt(tmp_path / "g.csv", cameras["groups"], fmt="%d", header="camera", comments="")
    grouped = ("--groups", tmp_path / "g.csv", "--ref-groups", files / "ref_g.npy", "--group-pairs", "across")
    calls: dict[str, Any] = {
        "opis": (opis, ["--far", "0.05", "0.3"], {"far_range": (0.05, 0.3)}),
        "calibrate": (calibrate, ["--coverage", "0.7"], {"coverage": 0.7}),
        "margins": (suggest_margins, ["--far", "0.1", "--frr", "0.2"], {"far": 0.1, "frr": 0.2}),
        "evaluate": (evaluate, ["--threshold", "0.2"], {"threshold": 0.2}),
    }
    for command, (function, options, keywords) in calls.items():
        for more, words in (((), {}), (grouped, cameras)):
            run(capsys, command, files / "x.npy", files / "y.npy", *both, *more, *options, "--json", out)
            expected = function(data["x"], data["y"], **sets, **words, **keywords).to_dict()
            assert json.loads(out.read_text()) == json.loads(json.dumps(expected)), (command, more)
    printed = run(
        capsys, "evaluate", files / "x.npy", files / "y.npy", "--threshold", "0.2", "--groups", files / "text_g.npy"
    )
    assert "camera 1" in printed


@pytest.mark.parametrize(
    ("option", "keywords"),
    [
        (["--precision", "0.8"], {"precision": 0.8}),
        (["--f-beta", "2"], {"f_beta": 2.0}),
        (["--eer"], {"eer": True}),
        (["--min-dcf", "0.01", "--costs", "10", "1"], {"min_dcf": 0.01, "costs": (10.0, 1.0)}),
    ],
)
def test_targets(
    files: Path,
    data: dict[str, Array],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    option: list[str],
    keywords: dict[str, Any],
) -> None:
    run(capsys, "calibrate", files / "x.npy", files / "y.npy", *option, "--save", tmp_path / "t.json")
    assert Threshold.load(tmp_path / "t.json") == calibrate(data["x"], data["y"], **keywords).threshold


def test_trials(files: Path, data: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.integers(150, size=(2, 400))
    same = data["y"][first] == data["y"][second]
    rows = [f"{int(s)} f/{a}.wav f/{b}.wav" for s, a, b in zip(same, first, second, strict=True)]
    (tmp_path / "trials.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "names.txt").write_text("".join(f"f/{k}.wav\n" for k in range(150)))
    out, saved = tmp_path / "out.json", tmp_path / "t.json"
    options = ("--folds", 10, "--json", out, "--save", saved, "--csv", tmp_path / "c.csv", "--plot", tmp_path / "d.svg")
    named = ("--names", tmp_path / "names.txt")
    printed = run(capsys, "trials", tmp_path / "trials.txt", files / "x.npy", *named, "--far", "0.1", *options)
    scores = trial_similarities(data["x"], first, second)
    sides = (np.array([f"f/{a}.wav" for a in first]), np.array([f"f/{b}.wav" for b in second]))
    expected = evaluate_trials(scores, same, far=0.1, folds=10, subjects=sides, metric="cosine", columns=12)
    assert json.loads(out.read_text()) == json.loads(json.dumps(expected.to_dict()))
    assert "over 10 folds" in printed
    assert "<svg" in (tmp_path / "d.svg").read_text()
    assert (tmp_path / "c.csv").read_text().startswith("threshold,far,frr,precision\n")
    run(capsys, "evaluate", files / "x.npy", files / "y.npy", "--threshold", saved)
    (tmp_path / "scores.csv").write_text("score,same\n2.5,1\n1.5,0\n")
    assert "AUC                    1" in run(capsys, "trials", tmp_path / "scores.csv", "--eer")
    assert "trials" in run(capsys, "trials", tmp_path / "scores.csv", "--threshold", "2")


def test_trials_tell_who_is_left_out(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The persons of LFW's list and VoxCeleb's folders, also where the list has scores and no rows are read."""
    rng = np.random.default_rng(3)
    sides = rng.integers(8, size=(2, 200))
    sides[1, :60] = sides[0, :60]
    scores, same = rng.normal(size=200) + (sides[0] == sides[1]), sides[0] == sides[1]
    rows = [
        f"{s},{int(m)},p{a}/{k}.wav,p{b}/x{k}.wav"
        for k, (s, m, a, b) in enumerate(zip(scores, same, *sides, strict=True))
    ]
    (tmp_path / "t.csv").write_text("\n".join(["score,same,a,b", *rows]) + "\n")
    out = tmp_path / "out.json"
    run(capsys, "trials", tmp_path / "t.csv", "--far", "0.2", "--json", out)
    expected = evaluate_trials(scores, same, far=0.2, subjects=(sides[0], sides[1]))
    assert json.loads(out.read_text())["far_interval"] == pytest.approx(expected.far_interval._asdict())
    assert expected.far_interval != evaluate_trials(scores, same, far=0.2).far_interval


def test_report(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (("--far", "0.1"), ("--threshold", "0.3", "--groups", files / "text_g.npy")):
        out = tmp_path / "page.html"
        printed = run(capsys, "report", files / "x.npy", files / "text_y.npy", *options, "--out", out)
        assert printed == f"wrote {out}\n"
        text = out.read_text()
        assert text.count("data:image/png;base64,") == 5
        assert "bird" in text
        kind = "group" if "--groups" in options else "class"
        assert f"False accepts of each {kind}" in text
        assert ("<td>camera 1</td>" in text) == (kind == "group")
        assert "http" not in text
        assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_probability(files: Path, data: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, out, table, picture = (tmp_path / name for name in ("p.json", "out.json", "bins.csv", "p.png"))
    rows = files / "ref.npy", files / "ref_y.npy"
    outputs = ("--json", out, "--csv", table, "--markdown", tmp_path / "bins.md", "--plot", picture)
    printed = run(capsys, "probability", *rows, "--method", "platt", "--prior", "0.2", "--save", saved, *outputs)
    found = match_probability(data["ref"], data["ref_y"], method="platt", prior=0.2)
    assert MatchProbability.load(saved).to_dict() == json.loads(out.read_text()) == found.to_dict()
    assert found.report() in printed
    assert picture.read_bytes().startswith(PNG)
    assert [float(row["told"]) for row in csv.DictReader(table.open())] == found.reliability.told.tolist()
    printed = run(capsys, "probability", files / "x.npy", files / "y.npy", "--load", saved, *outputs)
    other = found.evaluate(data["x"], data["y"])
    assert f"on these rows: {other!r}" in printed
    assert json.loads(out.read_text()) == other.to_dict()
    assert [float(row["found"]) for row in csv.DictReader(table.open())] == other.found.tolist()
    assert picture.read_bytes().startswith(PNG)


def test_retrieval(files: Path, data: dict[str, Array], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table, picture = (tmp_path / name for name in ("out.json", "queries.csv", "recall.png"))
    outputs = ("--json", out, "--csv", table, "--plot", picture)
    sets = (files / "x.npy", files / "y.npy", "--ref", files / "gallery.npz")
    printed = run(capsys, "retrieval", *sets, "--k", "2", "1", *outputs)
    found = retrieval(data["x"], data["y"], data["ref"], data["ref_y"], k=(1, 2))
    assert found.report() in printed
    assert json.loads(out.read_text()) == json.loads(json.dumps(found.to_dict()))
    assert [int(row["first_rank"]) for row in csv.DictReader(table.open())] == found.first_rank.tolist()
    assert picture.read_bytes().startswith(PNG)
    printed = run(capsys, "retrieval", files / "x.npy", files / "y.npy", "--groups", files / "g.npy")
    assert retrieval(data["x"], data["y"], groups=data["g"]).report() in printed


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["probability", "x.npy", "y.npy", "--prior", "1"], "prior must lie between 0 and 1"),
        (["probability", "x.npy", "y.npy", "--method", "beta"], "invalid choice: 'beta'"),
        (["probability", "x.npy", "y.npy", "--load", "none.json"], "cannot read the match probability none.json"),
        (["probability", "x.npy", "y.npy", "--load", "t12.json"], "t12.json is no match probability"),
        (["probability", "x.npy", "y.npy", "--load", "x.npy"], "x.npy is no match probability, since it is no JSON"),
        (["probability", "narrow.npy", "y.npy", "--load", "p.json"], "for embeddings of 12 columns, got 5"),
        (["probability", "x.npy", "y.npy", "--load", "p.json", "--prior", "0.1"], "--prior is for a fit"),
        (["probability", "x.npy", "y.npy", "--load", "p.json", "--csv", "p.json"], "is an input or the other output"),
        (["probability", "x.npy", "y.npy", "--save", "no/p.json"], "there is no folder"),
        (["probability", "x.npy", "y.npy", "--ref-labels", "y.npy"], "--ref-labels came without --ref"),
        (["probability", "x.npy", "y.npy", "--plot", "p.txt"], "its name must end in one of"),
        (["retrieval", "x.npy", "y.npy", "--k", "0"], "k must be at least 1, got 0"),
        (["retrieval", "x.npy", "y.npy", "--k", "half"], "invalid int value: 'half'"),
        (["retrieval", "x.npy", "ref_y.npy"], "ref_y.npy"),
        (["retrieval", "x.npy", "y.npy", "--ref", "narrow.npy", "--ref-labels", "y.npy"], "ref_emb has D=5"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "1.5"], "from -1 to 1, got 1.5"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "none.json"], "cannot read the threshold none.json"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "y.npy"], "y.npy is no threshold"),
        (["evaluate", "x.npy", "y.npy", "--threshold", ""], "--threshold is empty; give a number, or a file"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "nan"], "threshold must be finite"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "t12.json", "--ref", "narrow.npy"], "needs a file of labels"),
        (["evaluate", "narrow.npy", "y.npy", "--threshold", "t12.json"], "for embeddings of 12 columns, got 5"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "score.json"], "one on scores of trials"),
        (["evaluate", "x.npy", "y.npy"], "the following arguments are required: --threshold"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "0.1", "--ref-labels", "ref_y.npy"], "came without --ref"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "0.1", "--ref-groups", "ref_g.npy"], "came without --ref and"),
        (
            ["evaluate", "x.npy", "y.npy", "--threshold", "0.1", "--groups", "ref_g.npy"],
            "has 90 rows, but there are",
        ),
        (["evaluate", "x.npy", "y.npy", "--threshold", "0.1", "--groups", "none.npy"], "none.npy"),
        (["calibrate", "x.npy", "y.npy"], "one of the arguments --far --frr is required, or one of --precision"),
        (["trials", "scores.csv"], "one of the arguments --far --frr is required, or one of --precision --f-beta"),
        (["report", "x.npy", "y.npy", "--out", "page.html"], "--min-dcf --threshold"),
        (["calibrate", "x.npy", "y.npy", "--far", "0"], "far must lie between 0 and 1, both excluded, got 0"),
        (["calibrate", "x.npy", "y.npy", "--far", "0.1", "--eer"], "not allowed with"),
        (["calibrate", "x.npy", "y.npy", "--coverage", "2"], "coverage must lie between 0 and 1"),
        (["calibrate", "x.npy", "y.npy", "--false-alarm", "0.1"], "needs queries without a positive"),
        (["calibrate", "x.npy", "y.npy", "--far", "0.1", "--save", "x.npy"], "it is an input or the other output"),
        (["calibrate", "x.npy", "y.npy", "--far", "0.1", "--save", "no/t.json"], "there is no folder"),
        (["trials", "none.txt", "x.npy", "--eer"], "cannot read trials from none.txt"),
        (["trials", "missing.txt", "x.npy", "--eer"], "trials name 1 rows that are not there, the first is '150'"),
        (["trials", "missing.txt", "--eer"], "needs the file EMB"),
        (["trials", "scores.csv", "x.npy", "--eer"], "leave EMB out"),
        (["trials", "missing.txt", "x.npy", "--eer", "--names", "none.txt"], "cannot read names from none.txt"),
        (["trials", "scores.csv", "--eer", "--names", "scores.csv"], "which need no rows; leave --names out"),
        (["trials", "scores.csv", "--threshold", "1", "--costs", "2", "1"], "--costs are those of --min-dcf"),
        (["report", "x.npy", "y.npy", "--threshold", "0", "--costs", "2", "1", "--out", "p.html"], "--costs are those"),
        (["trials", "scores.csv", "--eer", "--folds", "9"], "folds must be from 2"),
        (["trials", "scores.csv", "--eer", "--plot", "a.png", "--picture", "far"], "invalid choice: 'far'"),
        (["report", "x.npy", "y.npy", "--eer", "--out", "no/page.html"], "there is no folder"),
        (["evaluate", "x.npy", "y.npy", "--threshold", "0", "--group-pairs", "across"], "across came without --groups"),
        (["trials", "both.txt", "x.npy", "--threshold", "score.json"], "this threshold is one on metric='score'"),
        (["trials", "both.txt", "narrow.npy", "--threshold", "t12.json"], "for embeddings of 12 columns, got 5"),
        (["trials", "scores.csv", "--threshold", "t12.json"], "must be cosine similarities, from -1 to 1, got 2.5"),
    ],
)
def test_bad_input(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    message: str,
) -> None:
    for path in files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    Threshold(0.3, columns=12).save(tmp_path / "t12.json")
    Threshold(3.0, metric="score").save(tmp_path / "score.json")
    match_probability(np.load("x.npy"), np.load("y.npy")).save("p.json")
    (tmp_path / "missing.txt").write_text("1 0 1\n0 0 150\n".replace("0 0 150", "0 2 150").replace("1 0 1", "1 3 4"))
    (tmp_path / "scores.csv").write_text("score,same\n2.5,1\n1.5,0\n")
    (tmp_path / "both.txt").write_text("0 3 4\n1 0 5\n1 6 7\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    outputs = ["--json", "out.json"] if command[0] != "report" else []
    assert message in refuse(capsys, *command, *outputs)
    assert sorted(path.name for path in tmp_path.iterdir()) == before, "something was written"


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "x.npy", "y.npy", "--threshold", "t.json", "--json", "t.json"],
        ["evaluate", "x.npy", "y.npy", "--threshold", "t.json", "--csv", "./t.json"],
        ["evaluate", "x.npy", "y.npy", "--threshold", "t.json", "--markdown", "t.json"],
        ["report", "x.npy", "y.npy", "--threshold", "t.json", "--out", "t.json"],
        ["trials", "t.txt", "x.npy", "--threshold", "t.json", "--save", "t.json"],
    ],
)
def test_the_threshold_is_an_input(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    for name in ("x.npy", "y.npy"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    (tmp_path / "t.txt").write_text("0 3 4\n1 0 5\n1 6 7\n")
    Threshold(0.3).save(tmp_path / "t.json")
    monkeypatch.chdir(tmp_path)
    assert "it is an input or the other output" in refuse(capsys, *command)
    assert Threshold.load("t.json").similarity == 0.3
