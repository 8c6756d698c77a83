"""The comparison as one command; `benchmarks/glyphs/plan.py` says what is trained and how everything is chosen."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.digits.training import positive
from benchmarks.glyphs import plan
from benchmarks.glyphs.runs import Comparison
from benchmarks.retrieval import glyphs
from tcm_fused.thresholds.outputs import check_folder
from tcm_fused.thresholds.terminal import Parser, printable, run


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, compare, write."""
    parser = Parser(
        prog="python -m benchmarks.glyphs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="A run that is finished is not run twice: the same command goes on. " + (plan.__doc__ or ""),
    )
    folder = Path("out/glyphs")
    parser.add_argument("--root", type=Path, default=folder, metavar="DIR", help=f"of the images (default: {folder})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/glyphs_runs"),
        metavar="DIR",
        help="of all runs (default: out/glyphs_runs)",
    )
    parser.add_argument(
        "--processes", type=positive, default=os.cpu_count() or 1, metavar="N", help="of one thread (default: all CPUs)"
    )
    options = parser.parse_args(arguments)

    def work() -> None:
        check_folder(options.out)
        if not (options.root / "glyphs.npz").exists():
            glyphs.render(options.root)
        print(f"images in {printable(options.root)}, torch {torch.__version__}")
        Comparison(options.root, options.out, options.processes).go()

    run(parser, parser.prog, work, "interrupted; the same command goes on")


if __name__ == "__main__":
    main()
