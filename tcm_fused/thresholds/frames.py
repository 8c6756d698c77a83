"""Columns of results as tables: a DataFrame, CSV or Markdown."""

import csv
import io
import math
from typing import Any

from tcm_fused.thresholds.sets import Array, shown

Columns = dict[str, Any]  # name -> values, all of one length


def frame(columns: Columns) -> Any:
    """A pandas DataFrame; ImportError, with the command that installs it, without pandas."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install pandas") from error
    return pd.DataFrame(dict(columns))


def csv_text(columns: Columns) -> str:
    """With a header; numbers have all their digits, NaN is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for row in _rows(columns):
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    return out.getvalue()


def markdown(columns: Columns, most: int | None = None) -> str:
    """A table with numbers to four digits; the first `most` rows."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in _rows(columns)[:most]]
    return "\n".join(lines) + "\n"


def class_columns(result: Any, **values: Array) -> Columns:
    """Class (its name where labels were text), samples, and a column for each of the `values`."""
    names = result.class_ids if result.class_names is None else result.class_names
    return {"class": names, "samples": result.class_sizes, **values}


def class_table(result: Any) -> Columns:
    """The classes of a `Calibration` or `Evaluation`, with their rates and pairs."""
    rates = {"far": result.class_far, "frr": result.class_frr}
    pairs = {"positive_pairs": result.class_positives, "negative_pairs": result.class_negatives}
    return class_columns(result, **rates, **pairs)


def _rows(columns: Columns) -> list[tuple[Any, ...]]:
    return list(zip(*(c.tolist() if hasattr(c, "tolist") else c for c in columns.values()), strict=True))


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else shown(str(value)).replace("|", r"\|")
