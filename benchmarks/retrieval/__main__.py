"""The command line: train and score runs, or make the table of their results."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import comparison
from benchmarks.retrieval import table
from benchmarks.retrieval.datasets import DATASETS, TEST_SETS, load
from benchmarks.retrieval.losses import BASES, WITH_WEIGHTS
from benchmarks.retrieval.networks import FROM_SCRATCH, SMALL, import_timm
from benchmarks.retrieval.training import Margins, Run, Settings
from tcm_fused import suggest_margins
from tcm_fused.thresholds import files
from tcm_fused.thresholds.outputs import check_folder, check_outputs, check_picture, write_whole
from tcm_fused.thresholds.terminal import Parser, printable, printable_lines, run

_EXAMPLES = """examples:
  try it, on images that are drawn (a minute each):
    python -m benchmarks.retrieval.drawn out/drawn
    python -m benchmarks.retrieval --dataset folder --root out/drawn --base smoothap --min-crop 0.6 --seeds 0 1 2
    python -m benchmarks.retrieval --dataset folder --root out/drawn --base smoothap --min-crop 0.6 --seeds 0 1 2 \\
      --tcm --lambda-plus 0.1 --lambda-minus 0.1
    python -m benchmarks.retrieval --table out/retrieval --picture out/retrieval.png
  on characters in many typefaces, with margins that classes held out suggest:
    python -m benchmarks.retrieval.glyphs out/glyphs
    python -m benchmarks.retrieval --dataset glyphs --root out/glyphs --base arcface --min-crop 0.7 --epochs 4 \\
      --batch-classes 64 --held-out 200
    python -m benchmarks.retrieval --dataset glyphs --root out/glyphs --base arcface --min-crop 0.7 --epochs 4 \\
      --batch-classes 64 --held-out 200 --tcm --margins-from out/retrieval/glyphs-small-arcface-seed0/held_out.npz \\
      --far 0.1 --frr 0.5
  an experiment of the paper, on a GPU with timm's weights:
    python -m benchmarks.retrieval --dataset inaturalist2018 --root DIR --backbone resnet50 --pretrained \\
      --base smoothap --size 224 --dim 512 --batch-classes 96 --amp bf16 --tcm

Each run is a folder under --out with checkpoint.pt and, once finished, result.json. A run that was interrupted goes on
from its last checkpoint when the same command is given again; a finished one is not run twice. Exit code 2: bad input.

recall@1 is the share of test images whose nearest other test image is of their class (of those whose class has
another; papers on VehicleID search a gallery of one image a vehicle instead). OPIS and 10%-OPIS are tcm_fused.opis's,
over the thresholds that 1 % to 10 % of all negative pairs pass.

data sets and their files under --root:
"""


def _train(options: argparse.Namespace) -> None:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu")
    if options.backbone not in FROM_SCRATCH:
        import_timm(options.backbone)  # before the files are read: it is the likelier to fail
    test_set = options.test_set or "small" if options.dataset == "vehicleid" else ""
    if options.test_set and options.dataset != "vehicleid":
        raise ValueError(f"--test-set is of vehicleid; {options.dataset} has one test set")
    check_folder(options.out)
    margins = _margins(options) if options.tcm else None
    split = load(options.dataset, options.root, test_set).hold_out(options.held_out)
    train, test = split.train, split.test
    print(
        f"{options.dataset}: {len(train.labels):,} images of {len(train.classes):,} classes to train on, "
        f"{len(test.labels):,} of {len(test.classes):,} other classes to test"
    )
    if split.warning:
        print(f"warning: {printable(split.warning)}", file=sys.stderr)
    loss_lr = 100 * options.lr if options.loss_lr is None else options.loss_lr
    for seed in dict.fromkeys(options.seeds):
        settings = Settings(
            test_set=test_set,
            tcm=margins,
            seed=seed,
            loss_lr=loss_lr if options.base in WITH_WEIGHTS else None,
            scale=options.scale if options.base == "arcface" else None,
            device=device,
            mirror=options.dataset != "glyphs" if options.mirror is None else options.mirror,
            **{name: getattr(options, name) for name in _SAME_NAME},
        )
        run_of = Run(settings, split, options.out, options.workers, options.checkpoint_every, options.score_every)
        result = run_of.go()
        scores = result["scores"]
        print(
            f"{printable(settings.name)}: recall@1 {100 * scores['recall_at_1']:.2f} %, OPIS {scores['opis']:.4g}, "
            f"10%-OPIS {scores['eps_opis']:.4g}"
        )


# Settings that come from options of their name.
_SAME_NAME = (
    *(
        "dataset",
        "backbone",
        "base",
        "pretrained",
        "dim",
        "layer_norm",
        "batch_norm",
        "epochs",
        "batch_classes",
        "batch_images",
    ),
    *("lr", "weight_decay", "warmup", "size", "min_crop", "held_out", "amp"),
)


def _margins(options: argparse.Namespace) -> Margins:
    plus, minus = options.margin_plus, options.margin_minus
    if options.margins_from is not None:
        held_out = files.load(options.margins_from, None)
        found = suggest_margins(held_out.embeddings, held_out.labels, far=options.far, frr=options.frr)
        plus, minus = found.margin_plus, found.margin_minus
        print(f"margins that {printable(options.margins_from)} suggests: m+ {plus!r}, m- {minus!r}")
    return Margins(plus, minus, options.lambda_plus, options.lambda_minus, options.bank)


_OF_TABLE = ("markdown", "caption", "picture", "json")
_OF_TCM = ("margin_plus", "margin_minus", "lambda_plus", "lambda_minus", "bank", "margins_from", "far", "frr")
_WHOSE = {
    **dict.fromkeys(_OF_TABLE, "--table"),
    **dict.fromkeys(_OF_TCM, "--tcm"),
    "scale": "--base arcface",
    "far": "--margins-from",
    "frr": "--margins-from",
    "loss_lr": f"base losses with class weights, {' and '.join(WITH_WEIGHTS)}",
}


def _heeded(options: argparse.Namespace) -> set[str]:
    """Names of the options that mean something beside the others."""
    if options.table:
        return {"table", *_OF_TABLE}
    left_out = {"table", *_OF_TABLE, *(() if options.tcm else _OF_TCM)}
    if options.base and options.base not in WITH_WEIGHTS:
        left_out.add("loss_lr")
    if options.base and options.base != "arcface":
        left_out.add("scale")
    if options.margins_from is None:
        left_out |= {"far", "frr"}
    return vars(options).keys() - left_out


def _table(options: argparse.Namespace) -> None:
    check_picture(options.picture)
    files = table.result_files(options.table)
    check_outputs((options.markdown, options.picture, options.json), files)
    results = table.read_results(files)
    experiments = table.make_experiments(results)
    text = table.markdown(experiments, results, options.caption)
    figure = comparison.draw(experiments, "Classes unseen in training") if options.picture is not None else None
    if options.markdown is not None:
        # A name of a file or a caption may hold what is no character.
        write_whole(options.markdown, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))
    if figure is not None:
        kind = options.picture.suffix[1:].lower()
        write_whole(options.picture, lambda part: figure.savefig(part, format=kind, dpi=150))
    if options.json is not None:
        content = json.dumps(results, indent=1) + "\n"
        write_whole(options.json, lambda part: part.write_text(content, encoding="utf-8"))
    print(printable_lines(text), end="")


def _parser() -> Parser:
    layouts = "\n\n".join(f"{name}: {about.source}\n{about.layout}" for name, about in DATASETS.items())
    parser = Parser(
        prog="python -m benchmarks.retrieval",
        description="Train an embedding network on some classes, with a base loss or with that and TCM, and score it\n"
        "on others: recall@1, OPIS and 10%-OPIS. Then put the results side by side.",
        epilog=_EXAMPLES + layouts,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--dataset", choices=tuple(DATASETS), help="train on this data set")
    task.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="RESULTS",
        help="print the table of these results, files or folders of runs, instead of training",
    )

    group = parser.add_argument_group("what is trained")
    group.add_argument("--root", type=Path, metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--test-set", choices=tuple(TEST_SETS), help="of vehicleid: 800, 1600 or 2400 vehicles (default: small)"
    )
    group.add_argument("--base", choices=BASES, help="the base loss")
    group.add_argument("--tcm", action="store_true", help="add the TCM loss to it")
    for name, value, text in (
        ("plus", 0.9, "positives up to this similarity are hard"),
        ("minus", 0.5, "negatives from it on"),
    ):
        _number(group, f"--margin-{name}", value, text, least=-1, most=1)
        _number(group, f"--lambda-{name}", 1.0, f"weight of the {'positives' if name == 'plus' else 'negatives'}")
    _count(group, "--bank", 0, "past embeddings that TCM looks at as well", least=0)
    group.add_argument(
        "--margins-from",
        type=Path,
        metavar="NPZ",
        help="suggest both margins from this, the held_out.npz of a run without TCM that held classes out",
    )
    _number(group, "--far", 0.1, "share of its negatives that are to be hard", most=1)
    _number(group, "--frr", 0.5, "of its positives", most=1)
    group.add_argument(
        "--backbone",
        default=SMALL,
        metavar="NAME",
        help=f"'{SMALL}', a small convolutional network (default), 'small-vit', a small vision transformer, or a "
        "model of timm, such as resnet50",
    )
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights, which it downloads")
    _count(group, "--dim", 128, "columns of the embeddings")
    group.add_argument("--layer-norm", action="store_true", help="layer norm before the last, linear layer")
    group.add_argument("--batch-norm", action="store_true", help="batch norm after it")

    group = parser.add_argument_group("how")
    group.add_argument(
        "--seeds", type=_whole(0), nargs="+", default=[0], metavar="SEED", help="a run for each (default: 0)"
    )
    _count(group, "--epochs", 20, "times through about as many images as there are")
    _count(group, "--batch-classes", 16, "classes in a batch")
    _count(group, "--batch-images", 4, "images of each", least=2)
    _number(group, "--lr", 1e-3, "learning rate of AdamW, rising for --warmup, then falling by a cosine", least=0)
    group.add_argument(
        "--loss-lr",
        type=_real(0),
        metavar="X",
        help="of class weights in proxyanchor and arcface (default: 100 x --lr)",
    )
    _number(group, "--scale", 64.0, "ArcFace's", least=1)
    _number(group, "--weight-decay", 1e-4, "of AdamW")
    _number(group, "--warmup", 0.05, "share of the steps", most=1)
    _count(group, "--size", 32, "pixels of a side that the network sees", least=16)
    _number(group, "--min-crop", 0.2, "least share of an image's area in a random crop", least=0.01, most=1)
    group.add_argument(
        "--mirror",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images (default: all data sets but glyphs)",
    )
    _count(group, "--held-out", 0, "of the classes to train on, held out to choose margins and weights by", least=0)
    _count(
        group, "--score-every", 0, "steps between scores on the way, of the classes held out and the test's", least=0
    )
    group.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast to it (default: off)")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    _count(group, "--workers", 0, "processes that read images", least=0)
    _count(group, "--checkpoint-every", 500, "steps")
    group.add_argument(
        "--out", type=Path, default=Path("out/retrieval"), metavar="DIR", help="of all runs (default: out/retrieval)"
    )

    group = parser.add_argument_group("of --table")
    group.add_argument("--markdown", type=Path, metavar="OUT.md", help="write the table")
    group.add_argument("--caption", default="", metavar="TEXT", help="a paragraph to put below it")
    group.add_argument("--picture", type=Path, metavar="OUT.png", help="draw it (.png, .pdf or .svg)")
    group.add_argument("--json", type=Path, metavar="OUT.json", help="write all results into one file")
    return parser


def _count(group: Any, name: str, default: int, text: str, least: int = 1) -> None:
    group.add_argument(name, type=_whole(least), default=default, metavar="N", help=f"{text} (default: {default})")


def _number(group: Any, name: str, default: float, text: str, least: float = 0, most: float = float("inf")) -> None:
    group.add_argument(
        name, type=_real(least, most), default=default, metavar="X", help=f"{text} (default: {default:g})"
    )


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least or int(text) >= 2**63:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or above, got {text}")
        return int(text)

    return whole


def _real(least: float, most: float = float("inf")) -> Callable[[str], float]:
    def real(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not least <= number <= most or number == float("inf"):
            bounds = f"from {least:g} to {most:g}" if most < float("inf") else f"{least:g} or above"
            raise argparse.ArgumentTypeError(f"must be a number, {bounds}, got {text}")
        return number

    return real


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit code 2 and a message on stderr for bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    unset = argparse.Namespace(**dict.fromkeys(vars(options)))  # what is there is not set to its default
    given = {name for name, value in vars(parser.parse_args(arguments, unset)).items() if value is not None}
    if name := next(iter(sorted(given - _heeded(options))), None):
        parser.error(f"--{name.replace('_', '-')} is of {_WHOSE.get(name, '--dataset')}")
    if options.dataset:
        for name in ("root", "base"):
            if getattr(options, name) is None:
                parser.error(f"--dataset needs --{name}")
    work = _train if options.dataset else _table
    run(parser, parser.prog, lambda: work(options), "interrupted; the same command goes on from the last checkpoint")


if __name__ == "__main__":
    main()
