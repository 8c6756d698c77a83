"""`python -m benchmarks.digits`: what TCM does to OPIS and recall@1 in the open world, on the handwritten digits.

Three base losses of pytorch-metric-learning at its defaults, on two networks, without and with TCM, over seeds. Trained
on the digits 0 to 4, upright and turned (10 classes), scored on 5 to 9, which no training saw. Runs of one seed start
from the same weights and see the same batches, without TCM and with (checked).

Everything else is chosen here, on training images of the digits 0 to 4 only and in the same way for all six: each pair
of the five is held out in turn, ten trainings of the other three in all. First the number of steps, by recall@1 without
TCM; then margins and weight of TCM, by OPIS, among those that cost at most half a point of recall@1. The digits 5 to 9
only measure, once.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_metric_learning
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss, ProxyAnchorLoss
from torch import nn

from benchmarks import comparison
from benchmarks.comparison import Experiment, Scores
from benchmarks.digits.training import (
    SEEN,
    Split,
    Trained,
    check_paired,
    load,
    make_cnn,
    make_mlp,
    one_thread,
    open_world,
    positive,
    run_all,
    tcm_of,
    train,
    turned,
)
from benchmarks.retrieval.losses import ArcFace
from tcm_fused import __version__, opis
from tcm_fused.thresholds.outputs import check_folder, check_outputs, write_whole
from tcm_fused.thresholds.terminal import Parser, printable, run

WIDTH = 16  # of the embeddings
NETWORKS: dict[str, Callable[[], nn.Module]] = {"MLP": partial(make_mlp, WIDTH), "CNN": partial(make_cnn, WIDTH)}
BASE_LOSSES: dict[str, Callable[[int], nn.Module]] = {
    "ArcFace": lambda classes: ArcFace(classes, WIDTH),
    "ProxyAnchor": lambda classes: ProxyAnchorLoss(classes, WIDTH),
    "MultiSimilarity": lambda classes: MultiSimilarityLoss(),
}
HELD_OUT = tuple(itertools.combinations(SEEN, 2))
FIRST_FOLD_SEED = 1000  # trainings that choose have other seeds than those that measure
RECALL_TO_GIVE = 0.005


class TCM(NamedTuple):
    """Margins of TCM and its weight, lambda+ and lambda-."""

    margin_plus: float
    margin_minus: float
    weight: float


STEPS = (10, 20, 40)
TCM_GRID = tuple(itertools.starmap(TCM, itertools.product((0.9, 0.7), (0.5, 0.3), (0.3, 1.0, 3.0))))


class Job(NamedTuple):
    """One training: `fold` is the pair of digits held out, None where the unseen digits are scored."""

    network: str
    base_loss: str
    fold: int | None
    seed: int
    steps: int
    tcm: TCM | None


class Choice(NamedTuple):
    """What was chosen for one base loss on one network, and the mean scores it was chosen by."""

    steps: int
    tcm: TCM
    without: Scores
    with_tcm: Scores


@cache
def split_of(fold: int | None) -> Split:
    """The images of a job."""
    digits = load()
    if fold is None:
        return open_world(digits)
    others = [digit for digit in SEEN if digit not in HELD_OUT[fold]]
    images = digits.train_x, digits.train_y
    return Split(*turned(*images, others), *turned(*images, HELD_OUT[fold]))


def fit(job: Job) -> tuple[Trained, Scores]:
    """Train as the job says, and score the test images of its split."""
    tcm = job.tcm and tcm_of(*job.tcm)
    split = split_of(job.fold)
    network, base_loss = NETWORKS[job.network], BASE_LOSSES[job.base_loss]
    with one_thread():
        trained = train(split, network, base_loss, tcm, seed=job.seed, epochs=job.steps)
        found = opis(trained.embeddings, split.test_y)
    return trained, Scores(found.opis, found.eps_opis, found.recall_at_1)


def score(job: Job) -> Scores:
    """`fit`, without what only its own process needs."""
    return fit(job)[1]


def score_pair(job: Job) -> tuple[Scores, Scores]:
    """The job without TCM and as it is, from the same start through the same batches."""
    (without, base_scores), (with_tcm, scores) = fit(job._replace(tcm=None)), fit(job)
    check_paired(without, with_tcm, job.seed)
    return base_scores, scores


def mean_scores(scores: Iterable[Scores]) -> Scores:
    return Scores(*map(statistics.mean, zip(*scores, strict=True)))


def score_folds(jobs: Sequence[Job], processes: int, about: str) -> dict[Job, Scores]:
    """Mean scores of each job, whose fold and seed are not looked at, over all pairs of digits held out."""
    folds = range(len(HELD_OUT))
    each = [job._replace(fold=fold, seed=FIRST_FOLD_SEED + fold) for job in jobs for fold in folds]
    scores = iter(run_all(score, each, processes, about))
    return {job: mean_scores(itertools.islice(scores, len(folds))) for job in jobs}


def choose(steps: Sequence[int], tcm: Sequence[TCM], processes: int) -> dict[tuple[str, str], Choice]:
    """Steps, then margins and weight, for each network and base loss, by the digits held out."""
    both = list(itertools.product(NETWORKS, BASE_LOSSES))
    plain = {pair: [Job(*pair, None, 0, number, None) for number in steps] for pair in both}
    found = score_folds(list(itertools.chain(*plain.values())), processes, "choosing the number of steps")
    best = {pair: max(jobs, key=lambda job: found[job].recall_at_1) for pair, jobs in plain.items()}
    tries = {pair: [job._replace(tcm=one) for one in tcm] for pair, job in best.items()}
    tried = score_folds(list(itertools.chain(*tries.values())), processes, "choosing margins and weight")
    chosen = {}
    for pair, jobs in tries.items():
        without = found[best[pair]]
        job = choose_tcm(without, {job: tried[job] for job in jobs})
        assert job.tcm is not None
        chosen[pair] = Choice(job.steps, job.tcm, without, tried[job])
    return chosen


def choose_tcm(without: Scores, tried: dict[Job, Scores]) -> Job:
    """The lowest OPIS among jobs that cost at most `RECALL_TO_GIVE` of recall@1; the highest recall@1 if all do."""
    kept = [job for job, scores in tried.items() if scores.recall_at_1 >= without.recall_at_1 - RECALL_TO_GIVE]
    if not kept:
        return max(tried, key=lambda job: tried[job].recall_at_1)
    return min(kept, key=lambda job: tried[job].opis)


def measure(chosen: dict[tuple[str, str], Choice], seeds: int, processes: int) -> list[Experiment]:
    """Each network and base loss on the unseen digits, with what was chosen for it."""
    jobs = [
        Job(*pair, None, seed, choice.steps, choice.tcm) for pair, choice in chosen.items() for seed in range(seeds)
    ]
    scores = dict(zip(jobs, run_all(score_pair, jobs, processes, "unseen digits"), strict=True))
    experiments = []
    for network, base_loss in chosen:
        mine = {job.seed: pair for job, pair in scores.items() if (job.network, job.base_loss) == (network, base_loss)}
        sides = [{seed: pair[side] for seed, pair in mine.items()} for side in (0, 1)]
        experiments.append(Experiment(f"{network}, {base_loss}", *sides))
    return experiments


def choice_table(chosen: dict[tuple[str, str], Choice]) -> str:
    """What was chosen, and by which scores, as a Markdown table."""
    lines = [
        "| experiment | steps | m+ | m- | lambda | OPIS x 1000: without | with TCM | recall@1, %: without | with TCM |",
        "|---|" + "--:|" * 8,
    ]
    for (network, base_loss), choice in chosen.items():
        tcm, without, with_tcm = choice.tcm, choice.without, choice.with_tcm
        lines.append(
            f"| {network}, {base_loss} | {choice.steps} | {tcm.margin_plus:g} | {tcm.margin_minus:g} | {tcm.weight:g} "
            f"| {1000 * without.opis:.1f} | {1000 * with_tcm.opis:.1f} "
            f"| {100 * without.recall_at_1:.1f} | {100 * with_tcm.recall_at_1:.1f} |"
        )
    return "\n".join(lines) + "\n"


def as_json(
    chosen: dict[tuple[str, str], Choice], experiments: Sequence[Experiment], steps: Sequence[int], tcm: Sequence[TCM]
) -> dict[str, Any]:
    """Everything that was chosen, from what, and measured."""
    return {
        "machine": {
            "cpu_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pytorch_metric_learning": pytorch_metric_learning.__version__,
            "tcm_fused": __version__,
        },
        "chosen_from": {"steps": steps, "tcm": [one._asdict() for one in tcm]},
        "experiments": [
            {
                "name": experiment.name,
                "chosen": {
                    "steps": choice.steps,
                    **choice.tcm._asdict(),
                    "held_out_without": choice.without._asdict(),
                    "held_out_with_tcm": choice.with_tcm._asdict(),
                },
                "without": {seed: scores._asdict() for seed, scores in experiment.without.items()},
                "with_tcm": {seed: scores._asdict() for seed, scores in experiment.with_tcm.items()},
            }
            for experiment, choice in zip(experiments, chosen.values(), strict=True)
        ],
    }


def main(arguments: Sequence[str] | None = None, tcm: Sequence[TCM] = TCM_GRID) -> None:
    """Choose, measure, print, write."""
    parser = Parser(
        prog="python -m benchmarks.digits",
        description="OPIS and recall@1 of digits unseen in training: three base losses on two networks, without and "
        "with TCM. Margins, weight and steps are chosen on the training digits first.",
        epilog="Takes seven minutes of processor time, on all cores. Writes digits.md, digits.json and digits.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=positive, default=20, help="how often to train each way")
    parser.add_argument(
        "--processes", type=positive, default=len(os.sched_getaffinity(0)), help="trainings that run at a time"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder, made if missing")
    parser.add_argument("--steps", type=positive, nargs="+", default=STEPS, help="numbers of steps to choose from")
    options = parser.parse_args(arguments)
    run(parser, parser.prog, lambda: _work(options, tcm))


def _work(options: argparse.Namespace, tcm: Sequence[TCM]) -> None:
    check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    outputs = {suffix: options.out / f"digits.{suffix}" for suffix in ("md", "json", "png")}
    check_outputs(outputs.values())
    chosen = choose(options.steps, tcm, options.processes)
    experiments = measure(chosen, options.seeds, options.processes)
    text = "\n".join(
        [
            "Digits 5 to 9, upright and turned, unseen in training:\n",
            comparison.markdown(experiments),
            f"Chosen on the digits 0 to 4, mean of {len(HELD_OUT)} pairs of digits held out:\n",
            choice_table(chosen),
        ]
    )
    content = json.dumps(as_json(chosen, experiments, options.steps, tcm), indent=1)
    seeds = f"{options.seeds} seed{'s' * (options.seeds > 1)}"
    picture = comparison.draw(experiments, f"Digits unseen in training, {seeds}, {WIDTH} dimensions")
    write_whole(outputs["md"], lambda path: path.write_text(text, encoding="utf-8"))
    write_whole(outputs["json"], lambda path: path.write_text(content + "\n", encoding="utf-8"))
    write_whole(outputs["png"], lambda path: picture.savefig(path, dpi=150, format="png"))
    print(text)
    print("Written:", *map(printable, outputs.values()))


if __name__ == "__main__":
    main()
