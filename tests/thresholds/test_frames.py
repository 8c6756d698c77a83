"""Tables of results: as data frames, CSV and Markdown, the same figures in each."""

import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import batches

from tcm_fused import calibrate, evaluate, opis
from tcm_fused.__main__ import main
from tcm_fused.thresholds.frames import csv_text, frame, markdown

pytestmark = pytest.mark.usefixtures("one_thread")
X, Y = batches.batch(150, 8, 9)
NAMES = [f"class, |{c}|" for c in Y.tolist()]
RESULTS: dict[str, Any] = {
    "opis": opis(X, NAMES, far_range=(0.05, 0.3)),
    "calibrate": calibrate(X, NAMES, far=0.1),
    "evaluate": evaluate(X, NAMES, threshold=0.3),
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_same_figures(name: str) -> None:
    result = RESULTS[name]
    table, columns = result.to_frame(), result.columns()
    assert list(table) == list(columns)
    rows = list(csv.DictReader(io.StringIO(csv_text(columns))))
    assert len(rows) == len(table) == len(result.class_ids)
    for key in columns:
        assert table[key].tolist() == columns[key].tolist()
        read = [row[key] for row in rows]
        assert read == table[key].tolist() or [float(cell) for cell in read] == table[key].tolist()
    assert table["class"].tolist() == result.class_names.tolist()


@pytest.mark.parametrize("command", [("opis", "--far", "0.05", "0.3"), ("calibrate", "--far", "0.1")])
def test_commands(command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "set.npz", embeddings=X.numpy(), labels=np.array(NAMES))
    out, text = tmp_path / "out.csv", tmp_path / "out.md"
    main([command[0], str(tmp_path / "set.npz"), *command[1:], "--csv", str(out), "--markdown", str(text)])
    assert out.read_text() == csv_text(RESULTS[command[0]].columns())
    assert text.read_text() == RESULTS[command[0]].to_markdown()
    assert f"wrote {out}\nwrote {text}\n" in capsys.readouterr().out


def test_cells() -> None:
    columns = {"name": ["a|b\x1b", 'c,"d"'], "rate": np.array([0.123456, math.nan]), "pairs": np.array([12345, 0])}
    assert markdown(columns).splitlines() == [
        "| name | rate | pairs |",
        "|---|---|---|",
        r"| a\|b\x1b | 0.1235 | 12,345 |",
        '| c,"d" |  | 0 |',
    ]
    assert csv_text(columns).splitlines()[1:] == ["a|b\x1b,0.123456,12345", '"c,""d""",,0']
    assert len(markdown(columns, most=1).splitlines()) == 3


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_frame needs pandas: pip install pandas"):
        frame({"a": [1]})
