"""The comparison as one command; `benchmarks/glyphs/plan.py` says what is trained and how everything is chosen."""

import argparse
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.digits.training import positive
from benchmarks.glyphs import plan, report
from benchmarks.glyphs.runs import Comparison, Part, utility_models
from benchmarks.retrieval import glyphs
from tcm_fused.thresholds.outputs import check_folder, write_whole
from tcm_fused.thresholds.terminal import Parser, printable, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, write."""
    parser = Parser(
        prog="python -m benchmarks.glyphs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A run that is finished is not run twice: the same command goes on. " + (plan.__doc__ or ""),
    )
    for name, folder, what in (
        ("root", "out/glyphs", "of the images"),
        ("out", "out/glyphs_runs", "of all runs"),
        ("results", "benchmarks/results", "for glyphs.json, glyphs.md and pictures"),
    ):
        text = f"{what} (default: {folder})"
        parser.add_argument(f"--{name}", type=Path, default=Path(folder), metavar="DIR", help=text)
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="of one thread (default: all CPUs)"
    )
    for name, known in (("networks", plan.NETWORKS), ("bases", plan.BASES)):
        parser.add_argument(
            f"--{name}", nargs="+", choices=known, default=known, help="train only these; the tables are of all runs"
        )
    parser.add_argument("--seeds", type=int, nargs="+", default=plan.SEEDS, metavar="SEED", help="likewise")
    parser.add_argument(
        "--variants",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with runs that have one thing changed, and more seeds",
    )
    parser.add_argument("--finished", action="store_true", help="train nothing; write what is finished")
    options = parser.parse_args(arguments)
    run(parser, parser.prog, lambda: _work(options), "interrupted; the same command goes on")


def _work(options: argparse.Namespace) -> None:
    check_folder(options.out)
    check_folder(options.results)
    if not (options.root / "glyphs.npz").exists():
        glyphs.render(options.root)
    if not options.finished:
        part = Part(options.networks, options.bases, options.seeds, options.variants)
        Comparison(options.root, options.out, options.processes, part).go()
    results = report.collect(options.out)
    if not report.cells(results):
        raise ValueError(f"under {options.out} no run is finished both without TCM and with; run it without --finished")
    fonts = json.loads((options.root / "fonts.json").read_text(encoding="utf-8"))
    models = utility_models(options.root, options.out)
    text = report.markdown(results, fonts, models)
    pictures = {"utility": report.draw_utility(models), "pareto": report.draw_pareto(results)}
    options.results.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"fonts": fonts, "runs": results}, indent=1, ensure_ascii=False) + "\n"
    write_whole(options.results / "glyphs.json", lambda part: part.write_text(content, encoding="utf-8"))
    write_whole(options.results / "glyphs.md", lambda part: part.write_text(text, encoding="utf-8"))
    for name, figure in pictures.items():
        write_whole(options.results / f"glyphs_{name}.png", partial(figure.savefig, dpi=150, format="png"))
    print(text)
    print(f"Written: glyphs.json, glyphs.md and pictures in {printable(options.results)}")


if __name__ == "__main__":
    main()
