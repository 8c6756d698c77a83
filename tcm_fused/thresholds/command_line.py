"""The commands on files of embeddings: how well one threshold serves the classes (`opis`), which threshold and margins
to take (`calibrate`, `margins`), and which model (`compare`). Those on a threshold are in `deployment.py`."""

import argparse
import importlib
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tcm_fused.backends.choice import BACKENDS
from tcm_fused.thresholds.calibration import calibrate, suggest_margins
from tcm_fused.thresholds.files import SUFFIXES, Labelled, load, load_column
from tcm_fused.thresholds.frames import csv_text
from tcm_fused.thresholds.opis import opis
from tcm_fused.thresholds.outputs import check_outputs, check_picture, write_whole
from tcm_fused.thresholds.rates import percent
from tcm_fused.thresholds.terminal import printable

_LONG = 20_000  # rows from which on a bar is shown


def add_commands(commands: Any) -> None:
    """To the subparsers of a command line; each sets `run`, which takes the parsed arguments."""
    command = add_command(
        commands,
        "opis",
        _opis,
        "does one threshold serve all classes: OPIS, epsilon-OPIS and recall@1",
        "OPIS is the variance from class to class of the utility (F-score of true accepts and true rejects) at one "
        "threshold, averaged over the thresholds whose false accept rate lies in a range. 0: one threshold serves all "
        "classes alike.",
        "example: python -m tcm_fused opis test_emb.npy test_labels.npy --far 1e-3 1e-2 --plot utility.png",
    )
    add_set(command)
    add_tables(command)
    _add_opis_options(command)
    command = add_command(
        commands,
        "calibrate",
        _calibrate,
        "the threshold for a bound on false accepts or false rejects, and its cost for each class",
        "Finds the threshold to deploy: the lowest similarity at which at most the share --far of the negative pairs "
        "is accepted, or the highest at which at most the share --frr of the positive pairs is rejected; or by another "
        "aim, of which give one.",
        "example: python -m tcm_fused calibrate held_out.npz --far 1e-3 --plot similarities.png",
    )
    add_set(command)
    add_tables(command)
    add_targets(command, also=("coverage",))
    command.add_argument("--save", type=Path, metavar="OUT.json", help="write the threshold, for `evaluate`")
    add_picture(command, ("similarities", "det", "roc", "far", "frr"))
    command = add_command(
        commands,
        "margins",
        _margins,
        "margins of the loss that bind for given shares of the pairs",
        "Suggests margin_plus and margin_minus of TCMLoss from held-out embeddings: the share --frr of the positive "
        "pairs lies below margin_plus, the share --far of the negative pairs reaches margin_minus.",
        "example: python -m tcm_fused margins held_out.npz --far 0.1 --frr 0.5",
    )
    add_set(command)
    command.add_argument("--far", type=float, metavar="SHARE", required=True, help="of negatives to mine, 0 to 1")
    command.add_argument("--frr", type=float, metavar="SHARE", required=True, help="of positives to mine, 0 to 1")
    command = add_command(
        commands,
        "compare",
        _compare,
        "OPIS against recall@1 of several models",
        "Scores several models, each in an .npz file with the arrays 'embeddings' and 'labels', and draws OPIS against "
        "recognition error.",
        "example: python -m tcm_fused compare base.npz with_tcm.npz --plot pareto.png",
    )
    command.add_argument("files", type=Path, nargs="+", metavar="MODEL.npz", help="one file a model")
    _add_opis_options(command)


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    short: str,
    long: str,
    example: str,
    counts: bool = True,
) -> argparse.ArgumentParser:
    """A command, with the options that all have, or all that count pairs."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=short,
        description=textwrap.fill(long, 80),
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # a line of the example that is broken cannot be copied
    )
    command.set_defaults(run=run)
    command.add_argument("--json", type=Path, metavar="OUT.json", help="write everything that was found")
    command.add_argument("--plot", type=Path, metavar="OUT.png", help="draw it (.png, .pdf or .svg)")
    if not counts:
        return command
    command.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *(name for name, able in BACKENDS.items() if able.counted)),
        help="C++ kernel, CUDA kernel or PyTorch (default: auto)",
    )
    add_device(command, "where pairs are counted")
    return command


def add_device(command: argparse.ArgumentParser, use: str) -> None:
    """Where the work is done."""
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=f"{use} (default: cpu)")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, got {text}")
    return int(text)


def add_set(command: argparse.ArgumentParser, classes: bool = True) -> None:
    """The arguments that name the embeddings: one set or two, with groups; and how many `classes` are listed."""
    kinds = ", ".join(SUFFIXES)
    command.add_argument("embeddings", type=Path, metavar="EMB", help=f"[N, D] numbers, of any length ({kinds})")
    command.add_argument(
        "labels",
        type=Path,
        nargs="?",
        metavar="LABELS",
        help="[N] integers or text; may be missing if EMB is an .npz with the arrays 'embeddings' and 'labels'",
    )
    command.add_argument("--ref", type=Path, metavar="EMB", help="a gallery, which EMB are queries against")
    command.add_argument("--ref-labels", type=Path, metavar="LABELS", help="of --ref, unless it is an .npz of both")
    command.add_argument("--groups", type=Path, metavar="FILE", help="[N] integers or text, such as cameras")
    command.add_argument("--ref-groups", type=Path, metavar="FILE", help="those of --ref")
    command.add_argument(
        "--group-pairs",
        default="within",
        choices=("within", "across"),
        help="which pairs count, with --groups (default: within)",
    )
    if classes:
        command.add_argument(
            "--worst", type=_count, default=5, metavar="K", help="how many classes to list (default: 5)"
        )


def add_tables(command: argparse.ArgumentParser, csv: str = "the classes") -> None:
    """Where tables are written."""
    command.add_argument("--csv", type=Path, metavar="OUT.csv", help=f"write the table of {csv}")
    command.add_argument("--markdown", type=Path, metavar="OUT.md", help="write the rates as a table")


def add_targets(command: argparse.ArgumentParser, also: Sequence[str] = ()) -> Any:
    """The options of which one says how a threshold is found (see `targets`); returns their group."""
    group = command.add_mutually_exclusive_group()
    group.add_argument("--far", type=float, metavar="RATE", help="most false accepts, between 0 and 1")
    group.add_argument("--frr", type=float, metavar="RATE", help="most false rejects, between 0 and 1")
    group.add_argument("--precision", type=float, metavar="SHARE", help="least share of right ones among the accepted")
    if "coverage" in also:
        group.add_argument("--coverage", type=float, metavar="SHARE", help="least share of queries that are answered")
        group.add_argument(
            "--false-alarm", type=float, metavar="RATE", help="most accepts of queries that nothing matches"
        )
    group.add_argument("--f-beta", type=float, metavar="BETA", help="the best F-score of precision and recall")
    group.add_argument("--eer", action="store_true", help="equal false accept and false reject rates")
    group.add_argument(
        "--min-dcf", type=float, metavar="PRIOR", help="least detection cost, with this prior of a match"
    )
    command.add_argument(
        "--costs",
        type=float,
        nargs=2,
        metavar=("MISS", "ACCEPT"),
        default=(1.0, 1.0),
        help="of --min-dcf (default: 1 1)",
    )
    return group


def targets(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those options, as the functions take them; ValueError if there is none."""
    names = ("far", "frr", "precision", "coverage", "false_alarm", "f_beta", "eer", "min_dcf")
    given = {name: getattr(arguments, name, None) for name in names}
    found = {name: value for name, value in given.items() if value is not None and value is not False}
    if not found:
        others = [name for name in names[2:] if hasattr(arguments, name)]
        raise ValueError(
            "one of the arguments --far --frr is required, or one of "
            + " ".join(f"--{name.replace('_', '-')}" for name in (*others, "threshold") if hasattr(arguments, name))
        )
    return found | {"costs": tuple(arguments.costs)}


def _add_opis_options(command: argparse.ArgumentParser) -> None:
    two: dict[str, Any] = {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    command.add_argument("--far", **two, default=(1e-2, 1e-1), help="range by false accept rate (default: 1e-2 1e-1)")
    command.add_argument("--frr", **two, help="range by false reject rate instead")
    command.add_argument(
        "--thresholds", type=float, nargs="+", metavar="T", help="the thresholds themselves instead, ascending"
    )
    command.add_argument("--num-thresholds", type=int, default=101, metavar="K", help="in the range (default: 101)")
    command.add_argument(
        "--distance",
        default="euclidean",
        choices=("euclidean", "cosine"),
        help="axis of thresholds and integrals (default: euclidean)",
    )
    command.add_argument("--beta", type=float, default=1.0, help="weight of true accepts in the utility (default: 1)")
    command.add_argument("--epsilon", type=float, default=0.1, help="share of the worst classes (default: 0.1)")


def _opis(arguments: argparse.Namespace) -> None:
    sets = read_sets(arguments)
    result = opis(**sets.arguments, **_opis_options(arguments))
    written = write(arguments, result)
    print(f"{sets.rows}, {result.report(arguments.worst)}")
    print("".join(written), end="")


def _calibrate(arguments: argparse.Namespace) -> None:
    asked = targets(arguments)
    sets = read_sets(arguments)
    found = calibrate(**sets.arguments, **asked, backend=arguments.backend)
    written = write(arguments, found)
    print(f"{sets.rows}; {found.report(arguments.worst)}")
    print("".join(written), end="")


def _margins(arguments: argparse.Namespace) -> None:
    sets = read_sets(arguments)
    found = suggest_margins(**sets.arguments, far=arguments.far, frr=arguments.frr, backend=arguments.backend)
    written = write(arguments, found)
    print(found.report())
    print("".join(written), end="")


def _compare(arguments: argparse.Namespace) -> None:
    check_files(arguments, arguments.files)
    names = [path.stem for path in arguments.files]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two files are named {name}; the models are named after their files")
    results = {}
    for name, path in zip(names, arguments.files, strict=True):
        data = load(path, None)
        embeddings, labels = _placed(arguments, data)
        results[name] = opis(embeddings, labels, **_opis_options(arguments), **_progress(data))
    written = []
    if arguments.json:
        written.append(_write_json(arguments.json, {name: result.to_dict() for name, result in results.items()}))
    if arguments.plot:
        from tcm_fused.thresholds.plots import plot_pareto

        axes = plot_pareto({printable(name): result for name, result in results.items()})
        written.append(_save_picture(arguments.plot, axes))
    width = max(len(printable(name)) for name in (*results, "model"))
    worst = f"{percent(arguments.epsilon)}-OPIS"
    print(f"{'model':{width}}{'OPIS':>12}{worst:>12}{'recall@1':>12}{'utility':>12}")
    for name, result in sorted(results.items(), key=lambda item: item[1].opis):
        scores = f"{result.opis:12.4g}{result.eps_opis:12.4g}{100 * result.recall_at_1:10.2f} %"
        print(f"{printable(name):{width}}{scores}{result.class_utility.mean():12.4f}")
    print("".join(written), end="")


def _opis_options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "far_range": tuple(arguments.far),
        "frr_range": None if arguments.frr is None else tuple(arguments.frr),
        "thresholds": arguments.thresholds,
        "num_thresholds": arguments.num_thresholds,
        "distance": arguments.distance,
        "beta": arguments.beta,
        "epsilon": arguments.epsilon,
        "backend": arguments.backend,
    }


class Sets(NamedTuple):
    """All that was read, as the functions take it, and a line on the rows."""

    arguments: dict[str, Any]
    rows: str


def check_files(arguments: argparse.Namespace, inputs: Sequence[Path | None]) -> None:
    """Before any work, so that none is lost."""
    check_picture(arguments.plot)
    if arguments.plot is not None:
        importlib.import_module("tcm_fused.thresholds.plots")  # its error says how to install matplotlib
    outputs = [getattr(arguments, name, None) for name in ("json", "plot", "csv", "markdown", "save", "out")]
    loaded = [threshold_file(getattr(arguments, "threshold", None)), getattr(arguments, "load", None)]
    check_outputs(outputs, [*inputs, *loaded])


def threshold_file(text: str | None) -> Path | None:
    """The file that --threshold names; None of a number."""
    if text is None:
        return None
    if not text.strip():
        raise ValueError("--threshold is empty; give a number, or a file of `calibrate --save`")
    try:
        float(text)
    except ValueError:
        return Path(text)
    return None


def read_sets(arguments: argparse.Namespace) -> Sets:
    """The sets, their labels and groups where they are to be."""
    if arguments.ref is None and arguments.ref_labels is not None:
        raise ValueError("--ref-labels came without --ref; give both or neither")
    if arguments.ref_groups is not None and (arguments.ref is None or arguments.groups is None):
        raise ValueError("--ref-groups came without --ref and --groups")
    if arguments.groups is None and arguments.group_pairs != "within":
        raise ValueError(f"--group-pairs {arguments.group_pairs} came without --groups")
    names = ("embeddings", "labels", "ref", "ref_labels", "groups", "ref_groups")
    check_files(arguments, [getattr(arguments, name) for name in names])
    data = load(arguments.embeddings, arguments.labels)
    found: dict[str, Any] = dict(zip(("embeddings", "labels"), _placed(arguments, data), strict=True))
    rows = _rows(data)
    if arguments.ref is not None:
        gallery = load(arguments.ref, arguments.ref_labels)
        found |= zip(("ref_emb", "ref_labels"), _placed(arguments, gallery), strict=True)
        rows += f" against {len(gallery.labels):,}"
    for name, side in (("groups", "embeddings"), ("ref_groups", "ref_emb")):
        path = getattr(arguments, name)
        if path is not None:
            found[name] = load_column(path, len(found[side]))
    if arguments.groups is not None:
        found["group_pairs"] = arguments.group_pairs
    return Sets(found | _progress(data), rows)


def _placed(arguments: argparse.Namespace, data: Labelled) -> tuple[Any, Any]:
    """Embeddings on the device that was asked for, and labels with their names, if they have some."""
    labels = data.labels if data.names is None else data.names[data.labels]
    if arguments.device == "cpu":
        return data.embeddings, labels
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU (torch.cuda.is_available() is False); leave it out")
    return torch.tensor(data.embeddings, device="cuda"), labels if data.names is not None else torch.tensor(
        labels, device="cuda"
    )


def _progress(data: Labelled) -> dict[str, Any]:
    """A bar for long work, where somebody sees it."""
    return {
        "progress": len(data.labels) >= _LONG and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    }


def _rows(data: Labelled) -> str:
    return f"{len(data.embeddings):,} rows of {data.embeddings.shape[1]} columns"


def write(arguments: argparse.Namespace, result: Any, table: Any = None) -> list[str]:
    """The files that were asked for; returns lines that say so, for the end of the page.

    Before the page, which a reader may cut short, such as `| head`. `table` has the columns that are written, where
    the result has none of its own.
    """
    written = []
    if arguments.json:
        written.append(_write_json(arguments.json, result.to_dict()))
    if getattr(arguments, "csv", None):
        written.append(write_text(arguments.csv, csv_text((table or result).columns())))
    if getattr(arguments, "markdown", None):
        written.append(write_text(arguments.markdown, (table or result).to_markdown()))
    if getattr(arguments, "save", None):
        getattr(result, "threshold", result).save(arguments.save)
        written.append(f"wrote {printable(arguments.save)}\n")
    if arguments.plot:
        written.append(_save_picture(arguments.plot, _picture(result, getattr(arguments, "picture", None))))
    return written


def add_picture(command: argparse.ArgumentParser, kinds: Sequence[str]) -> None:
    """Which picture --plot draws; the first unless told."""
    command.add_argument("--picture", default=kinds[0], choices=kinds, help=f"that --plot draws (default: {kinds[0]})")


def _picture(result: Any, kind: str | None) -> Any:
    from tcm_fused.thresholds import curve_plots, plots

    if kind is None:
        return result.plot()
    if kind in ("far", "frr"):
        return curve_plots.plot_rates(result, kind)
    draw = {"similarities": plots.plot_similarities, "det": curve_plots.plot_det, "roc": curve_plots.plot_roc}
    return draw[kind](result)


def _write_json(path: Path, content: Any) -> str:
    return write_text(path, json.dumps(content, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> str:
    """The file, whole or not at all; returns a line that says so."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
    return f"wrote {printable(path)}\n"


def _save_picture(path: Path, axes: Any) -> str:
    write_whole(path, lambda part: axes.figure.savefig(part, format=path.suffix[1:].lower()))
    return f"drew {printable(path)}\n"
