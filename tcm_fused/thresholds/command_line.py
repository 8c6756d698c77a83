"""The commands on files of embeddings: how well one threshold serves the classes (`opis`), which threshold and margins
to take (`calibrate`, `margins`), and which model (`compare`)."""

import argparse
import importlib
import importlib.util
import json
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tcm_fused.backends.choice import BACKENDS
from tcm_fused.thresholds.calibration import calibrate, suggest_margins
from tcm_fused.thresholds.files import SUFFIXES, Labelled, load
from tcm_fused.thresholds.opis import opis
from tcm_fused.thresholds.outputs import check_outputs, check_picture, write_whole
from tcm_fused.thresholds.rates import percent
from tcm_fused.thresholds.terminal import printable

_LONG = 20_000  # rows from which on a bar is shown


def add_commands(commands: Any) -> None:
    """To the subparsers of a command line; each sets `run`, which takes the parsed arguments."""
    command = _add(
        commands,
        "opis",
        _opis,
        "does one threshold serve all classes: OPIS, epsilon-OPIS and recall@1",
        "OPIS is the variance from class to class of the utility (F-score of true accepts and true rejects) at one "
        "threshold, averaged over the thresholds whose false accept rate lies in a range. 0: one threshold serves all "
        "classes alike.",
        "example: python -m tcm_fused opis test_emb.npy test_labels.npy --far 1e-3 1e-2 --plot utility.png",
    )
    _add_set(command)
    _add_opis_options(command)
    command = _add(
        commands,
        "calibrate",
        _calibrate,
        "the threshold for a bound on false accepts or false rejects, and its cost for each class",
        "Finds the threshold to deploy: the lowest similarity at which at most the share --far of the negative pairs "
        "is accepted, or the highest at which at most the share --frr of the positive pairs is rejected.",
        "example: python -m tcm_fused calibrate held_out.npz --far 1e-3 --plot similarities.png",
    )
    _add_set(command)
    bound = command.add_mutually_exclusive_group(required=True)
    bound.add_argument("--far", type=float, metavar="RATE", help="most false accepts, between 0 and 1")
    bound.add_argument("--frr", type=float, metavar="RATE", help="most false rejects, between 0 and 1")
    command = _add(
        commands,
        "margins",
        _margins,
        "margins of the loss that bind for given shares of the pairs",
        "Suggests margin_plus and margin_minus of TCMLoss from held-out embeddings: the share --frr of the positive "
        "pairs lies below margin_plus, the share --far of the negative pairs reaches margin_minus.",
        "example: python -m tcm_fused margins held_out.npz --far 0.01 --frr 0.1",
    )
    _add_set(command)
    command.add_argument("--far", type=float, metavar="SHARE", required=True, help="of negatives to mine, 0 to 1")
    command.add_argument("--frr", type=float, metavar="SHARE", required=True, help="of positives to mine, 0 to 1")
    command = _add(
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


def _add(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], short: str, long: str, example: str
) -> argparse.ArgumentParser:
    """A command, with the options that all have that read embeddings."""
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
    command.add_argument(
        "--backend",
        default="auto",
        choices=("auto", *(name for name, able in BACKENDS.items() if able.counted)),
        help="C++ kernel, CUDA kernel or PyTorch (default: auto)",
    )
    command.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where pairs are counted (default: cpu)"
    )
    return command


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 0 or above, got {text}")
    return int(text)


def _add_set(command: argparse.ArgumentParser) -> None:
    kinds = ", ".join(SUFFIXES)
    command.add_argument("embeddings", type=Path, metavar="EMB", help=f"[N, D] numbers, of any length ({kinds})")
    command.add_argument(
        "labels",
        type=Path,
        nargs="?",
        metavar="LABELS",
        help="[N] integers or text; may be missing if EMB is an .npz with the arrays 'embeddings' and 'labels'",
    )
    command.add_argument("--worst", type=_count, default=5, metavar="K", help="how many classes to list (default: 5)")


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
    data, result, written = _measure(arguments, opis, _opis_options(arguments))
    print(f"{_rows(data)}, {result.report(arguments.worst)}\n{written}", end="")


def _calibrate(arguments: argparse.Namespace) -> None:
    data, found, written = _measure(arguments, calibrate, _rates(arguments))
    print(f"{_rows(data)}; {found.report(arguments.worst)}\n{written}", end="")


def _margins(arguments: argparse.Namespace) -> None:
    _, found, written = _measure(arguments, suggest_margins, _rates(arguments))
    print(f"{found.report()}\n{written}", end="")


def _compare(arguments: argparse.Namespace) -> None:
    _check_outputs(arguments, arguments.files)
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


def _rates(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"far": arguments.far, "frr": arguments.frr, "backend": arguments.backend}


def _check_outputs(arguments: argparse.Namespace, inputs: list[Path | None]) -> None:
    """Before any work, so that none is lost."""
    check_picture(arguments.plot)
    if arguments.plot is not None:
        importlib.import_module("tcm_fused.thresholds.plots")  # its error says how to install matplotlib
    check_outputs([arguments.json, arguments.plot], inputs)


def _measure(
    arguments: argparse.Namespace, measure: Callable[..., Any], options: dict[str, Any]
) -> tuple[Labelled, Any, str]:
    """The set, its result, and lines that say which files were written.

    The files are written before the page is printed, which a reader may cut short, such as `| head`.
    """
    _check_outputs(arguments, [arguments.embeddings, arguments.labels])
    data = load(arguments.embeddings, arguments.labels)
    result = measure(*_placed(arguments, data), **options, **_progress(data))
    written = ""
    if arguments.json:
        written += _write_json(arguments.json, result.to_dict())
    if arguments.plot:
        written += _save_picture(arguments.plot, result.plot())
    return data, result, written


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


def _write_json(path: Path, content: Any) -> str:
    write_whole(path, lambda part: part.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8"))
    return f"wrote {printable(path)}\n"


def _save_picture(path: Path, axes: Any) -> str:
    write_whole(path, lambda part: axes.figure.savefig(part, format=path.suffix[1:].lower()))
    return f"drew {printable(path)}\n"
