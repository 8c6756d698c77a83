"""One HTML page on a threshold, which needs no other file: tables, and the pictures inside."""

import base64
import html
import io
from typing import Any

from tcm_fused.thresholds import curve_plots, plots
from tcm_fused.thresholds.calibration import Calibration
from tcm_fused.thresholds.evaluation import Evaluation

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .8rem;border-bottom:1px solid #ddd;"
    "text-align:right}td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto}"
)


def page(result: Calibration | Evaluation, title: str, worst: int = 5) -> str:
    """The text of the page; needs matplotlib."""
    groups = getattr(result, "groups", None)
    kind = "class" if groups is None else "group"
    pictures = {
        "Similarities": plots.plot_similarities(result),
        "Detection errors": curve_plots.plot_det(result),
        "True accepts": curve_plots.plot_roc(result),
        f"False accepts of each {kind}": curve_plots.plot_rates(result, "far"),
        f"False rejects of each {kind}": curve_plots.plot_rates(result, "frr"),
    }
    parts = [f"<h1>{html.escape(title)}</h1>", f"<pre>{html.escape(repr(result))}</pre>", _table(result.to_markdown())]
    for rate, name in (("frr", "rejects"), ("far", "accepts")):
        parts.append(f"<h2>Classes with the most false {name}</h2>")
        parts.append("<ul>" + "".join(f"<li>{html.escape(str(c))}</li>" for c in result.worst(worst, rate)) + "</ul>")
    if groups is not None:
        parts.append(f"<h2>Groups</h2>{_table(groups.to_markdown())}")
    parts += [f"<h2>{name}</h2>{_image(axes, name)}" for name, axes in pictures.items()]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(markdown: str) -> str:
    """HTML of a table in Markdown."""
    rows = [line.strip("|").split("|") for k, line in enumerate(markdown.splitlines()) if k != 1]
    cells = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell.strip())}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows), strict=False)
    ]
    return f"<table>{''.join(cells)}</table>"


def _image(axes: Any, name: str) -> str:
    out = io.BytesIO()
    axes.figure.savefig(out, format="png")
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}">'
