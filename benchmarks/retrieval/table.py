"""Results of runs, read and put together for the comparison without TCM and with."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import comparison
from benchmarks.comparison import Experiment, Scores

Result = dict[str, Any]  # what `training.Run` writes


def result_files(paths: Iterable[Path]) -> list[Path]:
    """Files of results, and those of finished runs under folders. ValueError: a folder has none."""
    files: list[Path] = []
    for path in paths:
        here = sorted(path.rglob("result.json")) if path.is_dir() else [path]
        if not here:
            raise ValueError(f"there is no result.json under {path}; has a run finished there?")
        files += here
    return files


def read_results(files: Iterable[Path]) -> list[Result]:
    """All results in files, which hold one or a list.

    Raises:
        ValueError: a file is missing, holds no results, or the same run comes twice with other numbers.
    """
    found: dict[str, Result] = {}
    for file in files:
        for result in _results_in(file):
            key = json.dumps(result["identity"], sort_keys=True)
            if found.setdefault(key, result)["scores"] != result["scores"]:
                raise ValueError(f"{file} has a run that came before with other scores")
    return list(found.values())


def _results_in(file: Path) -> list[Result]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        results: list[Result] = content if isinstance(content, list) else [content]
        for result in results:  # all that is read from it later is there
            make_experiments([result])
            _about([result])
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no results of this program: {error!r}") from error
    return results


def _scores(result: Result) -> Scores:
    return Scores(*(float(result["scores"][field]) for field in Scores._fields))


def make_experiments(results: Sequence[Result]) -> list[Experiment]:
    """Runs that differ in nothing but the seed, and TCM, together. One without TCM stands beside each TCM setting.

    Where two would have one name, it says what they differ in.
    """
    bases: dict[str, dict[int, Scores]] = {}
    tcms: dict[str, dict[str, dict[int, Scores]]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for result in results:
        rest = {k: v for k, v in result["identity"].items() if k not in ("seed", "tcm")}
        key = json.dumps(rest, sort_keys=True)
        settings[key] = rest
        tcm, seed = result["identity"]["tcm"], result["identity"]["seed"]
        side = bases.setdefault(key, {})
        if tcm is not None:
            side = tcms.setdefault(key, {}).setdefault(json.dumps(tcm, sort_keys=True), {})
        side[seed] = _scores(result)
    experiments = []
    differing = _differing(list(settings.values()))
    for key, about in settings.items():
        name = " ".join(filter(None, (about["dataset"], about["test_set"], about["backbone"], about["base"])))
        extra = [f"{k} {about[k]}" for k in differing if about.get(k) is not None]
        variants = tcms.get(key, {"null": {}})
        for tcm, side in variants.items():
            margins = json.loads(tcm)
            more = [f"{k} {margins[k]:g}" for k in margins] if len(variants) > 1 else []
            notes = ", ".join((*extra, *more))
            experiments.append(Experiment(f"{name} ({notes})" if notes else name, bases[key], side))
    return experiments


def _differing(settings: list[dict[str, Any]]) -> list[str]:
    """Names of settings that differ between experiments that would else have one name."""
    named = ("dataset", "test_set", "backbone", "base", "images")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for about in settings:
        groups.setdefault(tuple(about[k] for k in named), []).append(about)
    names = [k for k in settings[0] if k not in named] if settings else []
    return [k for k in names if any(len({json.dumps(a.get(k)) for a in group}) > 1 for group in groups.values())]


def markdown(experiments: Sequence[Experiment], results: Sequence[Result], caption: str = "") -> str:
    """The table, and below it how to read it, what was run, and the caption."""
    notes = [line for text in (*_about(results), caption) if text for line in ("", text)]
    return "\n".join([comparison.markdown(experiments).rstrip("\n"), *notes]) + "\n"


def _about(results: Sequence[Result]) -> list[str]:
    """A line for each set of images and settings that was trained on, and one for each setting of TCM."""
    trained: dict[str, None] = {}
    margins: dict[str, dict[str, None]] = {}  # and the base losses they were used with
    for result in results:
        about, train, test = (result[key] for key in ("identity", "train", "test"))
        name = " ".join(filter(None, (about["dataset"], about["test_set"])))
        trained[
            f"{name}: {train['images']:,} images of {train['classes']:,} classes to train on, {test['images']:,} of "
            f"{test['classes']:,} others to test; {about['epochs']} epochs, batches of {about['batch_classes']} "
            f"classes x {about['batch_images']} images, {about['dim']} dimensions."
        ] = None
        if (tcm := about["tcm"]) is not None:
            text = (
                f"m+ = {tcm['margin_plus']:g}, m- = {tcm['margin_minus']:g}, lambda+ = {tcm['lambda_plus']:g}, "
                f"lambda- = {tcm['lambda_minus']:g}"
            )
            margins.setdefault(text, {})[about["base"]] = None
    return [*trained, *(f"TCM with {', '.join(bases)}: {text}." for text, bases in margins.items())]
