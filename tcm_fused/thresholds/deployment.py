"""The commands on a threshold: its rates on other data (`evaluate`), on a list of pairs (`trials`), and a page of it
(`report`); the probability of a match instead of a threshold (`probability`), and ranks (`retrieval`)."""

import argparse
from pathlib import Path
from typing import Any

from tcm_fused.thresholds.calibration import calibrate
from tcm_fused.thresholds.command_line import (
    add_command,
    add_device,
    add_picture,
    add_set,
    add_tables,
    add_targets,
    check_files,
    read_sets,
    targets,
    threshold_file,
    write,
    write_text,
)
from tcm_fused.thresholds.evaluation import evaluate
from tcm_fused.thresholds.files import load_embeddings
from tcm_fused.thresholds.probability import MatchProbability, match_probability
from tcm_fused.thresholds.retrieval import check_ranks, retrieval
from tcm_fused.thresholds.threshold import COSINE, SCORE, Threshold
from tcm_fused.thresholds.trial_files import Trials, read_trials, rows_of
from tcm_fused.thresholds.trials import evaluate_trials, trial_similarities


def add_commands(commands: Any) -> None:
    """To the subparsers of a command line; each sets `run`, which takes the parsed arguments."""
    command = add_command(
        commands,
        "evaluate",
        _evaluate,
        "a threshold on other data: error rates with intervals, for all and for each class",
        "Applies a threshold, a number or a file of `calibrate --save`, and tells false accepts and rejects, precision "
        "and coverage, each with the 95 % interval that holds for other classes of the same kind.",
        "example: python -m tcm_fused evaluate test_emb.npy test_labels.npy --threshold threshold.json",
    )
    add_set(command)
    add_tables(command)
    _add_threshold(command, required=True)
    command.add_argument("--beta", type=float, default=1.0, help="weight of recall in the F-score (default: 1)")
    add_picture(command, ("similarities", "det", "roc", "far", "frr"))
    command = add_command(
        commands,
        "trials",
        _trials,
        "a list of pairs that match or not: error rates, equal error, accuracy by LFW's protocol",
        "Reads pairs in the form of LFW (pairs.txt), of VoxCeleb (`1 a b`) or CSV, with the rows of EMB that they "
        "name; or scores with 0 and 1. Finds a threshold, or applies one.",
        "example: python -m tcm_fused trials pairs.txt embeddings.npy --names files.txt --eer --folds 10",
        counts=False,
    )
    command.add_argument("trials", type=Path, metavar="TRIALS", help="pairs or scores, a text file")
    command.add_argument("embeddings", type=Path, nargs="?", metavar="EMB", help="[N, D], unless TRIALS has scores")
    command.add_argument("--names", type=Path, metavar="FILE", help="of the rows of EMB, one a line (default: numbers)")
    command.add_argument("--folds", type=int, metavar="K", help="parts of the list, for the accuracy by LFW's protocol")
    add_tables(command, "the rates at every threshold")
    _add_threshold(add_targets(command), required=False)
    command.add_argument("--save", type=Path, metavar="OUT.json", help="write the threshold")
    add_picture(command, ("det", "roc", "similarities"))
    command = add_command(
        commands,
        "report",
        _report,
        "one HTML page on a threshold, with the pictures inside",
        "Writes one page, which needs no other file: the threshold, its rates, the worst classes, and the pictures. "
        "With --threshold it is that of `evaluate`, else that of `calibrate`.",
        "example: python -m tcm_fused report held_out.npz --far 1e-3 --out report.html",
    )
    add_set(command)
    _add_threshold(add_targets(command, also=("coverage",)), required=False)
    command.add_argument("--out", type=Path, metavar="OUT.html", required=True, help="the page")
    command = add_command(
        commands,
        "probability",
        _probability,
        "from similarity to the probability of a match, and how well that holds",
        "Fits a map from cosine similarity to the probability that a pair matches, with scikit-learn, to the exact "
        "counts of all pairs; or, with --load, tells how well one that was saved holds on these embeddings.",
        "example: python -m tcm_fused probability held_out.npz --prior 0.1 --save probability.json",
    )
    add_set(command, classes=False)
    add_tables(command, "the bins of the reliability")
    command.add_argument("--method", choices=("isotonic", "platt"), help="of the fit (default: isotonic)")
    command.add_argument("--prior", type=float, metavar="SHARE", help="of matches to come (default: that of the pairs)")
    command.add_argument("--save", type=Path, metavar="OUT.json", help="write the map, for --load")
    command.add_argument("--load", type=Path, metavar="FILE.json", help="judge this one, and fit none")
    command = add_command(
        commands,
        "retrieval",
        _retrieval,
        "recall at k, mean average precision and others, of queries against all rows or a gallery",
        "Ranks the rows by similarity to each query, and tells where its positives are: recall@k, mean average "
        "precision over all positives (mAP) and among the R nearest (mAP@R), R-precision and mean reciprocal rank.",
        "example: python -m tcm_fused retrieval queries.npz --ref gallery.npz --k 1 10 100",
        counts=False,
    )
    add_set(command, classes=False)
    add_tables(command, "the queries")
    command.add_argument(
        "--k", type=int, nargs="+", metavar="K", default=[1, 5, 10], help="ranks of recall (default: 1 5 10)"
    )
    add_device(command, "where rows are ranked")


def _add_threshold(command: Any, required: bool) -> None:
    options = {"required": True} if required else {}
    command.add_argument("--threshold", metavar="T", help="a number, or a file of `calibrate --save`", **options)


def _threshold(text: str, metric: str = COSINE) -> Threshold:
    path = threshold_file(text)
    return Threshold(float(text), metric=metric) if path is None else Threshold.load(path)


def _asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The target, or nothing where a threshold is given."""
    if arguments.threshold is None:
        return targets(arguments)
    if tuple(arguments.costs) != (1.0, 1.0):
        raise ValueError("--costs are those of --min-dcf; with --threshold leave them out")
    return {}


def _evaluate(arguments: argparse.Namespace) -> None:
    threshold = _threshold(arguments.threshold)
    sets = read_sets(arguments)
    found = evaluate(**sets.arguments, threshold=threshold, beta=arguments.beta, backend=arguments.backend)
    written = write(arguments, found)
    print(f"{sets.rows}; {found.report(arguments.worst)}")
    print("".join(written), end="")


def _trials(arguments: argparse.Namespace) -> None:
    asked = _asked(arguments)
    check_files(arguments, [arguments.trials, arguments.embeddings, arguments.names])
    trials = read_trials(arguments.trials)
    scores, columns = _scores(arguments, trials)
    # A file of scores does not say what they are: a threshold's file does.
    metric = None if columns is None else COSINE
    if arguments.threshold is not None:
        asked = {"threshold": _threshold(arguments.threshold, metric or SCORE)}
    folds = trials.folds if arguments.folds is None else arguments.folds
    found = evaluate_trials(
        scores, trials.same, **asked, folds=folds, subjects=trials.subjects, metric=metric, columns=columns
    )
    written = write(arguments, found)
    print(found.report())
    print("".join(written), end="")


def _scores(arguments: argparse.Namespace, trials: Trials) -> tuple[Any, int | None]:
    """Scores [P], and how many columns the embeddings have, where they are cosine similarities of some."""
    if trials.scores is not None:
        if arguments.embeddings is not None:
            raise ValueError(f"{arguments.trials} has scores, which need no embeddings; leave EMB out")
        if arguments.names is not None:
            raise ValueError(f"{arguments.trials} has scores, which need no rows; leave --names out")
        return trials.scores, None
    if arguments.embeddings is None or trials.first is None or trials.second is None:
        raise ValueError(f"{arguments.trials} names rows, so it needs the file EMB of their embeddings")
    names = None if arguments.names is None else _names(arguments.names)
    x = load_embeddings(arguments.embeddings, None if names is None else len(names))
    try:
        rows = [rows_of(side, names, len(x)) for side in (trials.first, trials.second)]
    except ValueError as error:
        raise ValueError(f"{arguments.trials}: {error}") from None
    return trial_similarities(x, *rows), x.shape[1]


def _names(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"cannot read names from {path}: {reason}") from error


def _report(arguments: argparse.Namespace) -> None:
    from tcm_fused.thresholds.report import page

    judge = calibrate if arguments.threshold is None else evaluate
    asked = _asked(arguments) or {"threshold": _threshold(arguments.threshold)}
    sets = read_sets(arguments)
    found: Any = judge(**sets.arguments, **asked, backend=arguments.backend)
    text = page(found, f"{arguments.embeddings.name}: {sets.rows}", arguments.worst)
    written = [*write(argparse.Namespace(**{**vars(arguments), "picture": None}), found)]
    written.append(write_text(arguments.out, text))
    print("".join(written), end="")


def _probability(arguments: argparse.Namespace) -> None:
    for name in ("method", "prior", "save"):
        if arguments.load is not None and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for a fit, and with --load there is none; leave one of the two out")
    loaded = None if arguments.load is None else MatchProbability.load(arguments.load)
    sets = read_sets(arguments)
    found: Any
    if loaded is None:
        method = arguments.method or "isotonic"
        found = match_probability(**sets.arguments, method=method, prior=arguments.prior, backend=arguments.backend)
        text, bins = found.report(), found.reliability
    else:
        found = bins = loaded.evaluate(**sets.arguments, backend=arguments.backend)
        text = f"{loaded!r}\non these rows: {found!r}"
    written = write(arguments, found, bins)
    print(f"{sets.rows}; {text}")
    print("".join(written), end="")


def _retrieval(arguments: argparse.Namespace) -> None:
    ranks = check_ranks(arguments.k)
    sets = read_sets(arguments)
    found = retrieval(**sets.arguments, k=ranks)
    written = write(arguments, found)
    print(f"{sets.rows}; {found.report()}")
    print("".join(written), end="")
