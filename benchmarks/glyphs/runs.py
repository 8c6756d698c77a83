"""The runs of the comparison, in the order of what they tell, in one process or several."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from benchmarks.digits.training import one_thread
from benchmarks.glyphs import plan
from benchmarks.glyphs.plan import Cell, Choice, Result
from benchmarks.retrieval.datasets import Split, load
from benchmarks.retrieval.training import HELD_OUT, Margins, Run, Settings
from tcm_fused import OPISResult, calibrate, opis, suggest_margins
from tcm_fused.thresholds import files

# glibc gives freed memory back, and each step takes it anew, page by page: a fifth of the time.
_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


class Job(NamedTuple):
    """One training: its folder under that of all runs is `variant`."""

    variant: str
    settings: Settings
    score_every: int = 0

    def make(self, root: Path, out: Path) -> Run:
        """The run, without starting it."""
        return Run(
            self.settings,
            split_of(root),
            out / self.variant,
            score_every=self.score_every,
            more=more_scores if self.score_every else None,
        )


@cache
def split_of(root: Path) -> Split:
    """The images, with classes held out."""
    return load("glyphs", root).hold_out(plan.HELD_OUT)


def more_scores(embeddings: Tensor, labels: Tensor) -> dict[str, float]:
    """OPIS over fixed false reject rates, rates at one threshold, and the class that is worst off."""
    by_frr = opis(embeddings, labels, frr_range=(0.05, 0.3))
    found = calibrate(embeddings, labels, far=1e-2)
    at = next(tar for tar in found.tar_at_far if tar.bound == 1e-3)
    return {
        "opis_frr": by_frr.opis,
        "eps_opis_frr": by_frr.eps_opis,
        "tar_at_far_1e-3": at.tar,
        "frr_at_far_1e-2": found.threshold.frr,
        "worst_frr_at_far_1e-2": float(found.class_frr.max()),
        "equal_error_rate": found.equal_error_rate,
    }


def train(root: Path, out: Path, job: Job) -> Result:
    """Run the job, or read it where it is finished."""
    with one_thread():
        return job.make(root, out).go()


class Part(NamedTuple):
    """Of the plan: for several machines, or for what tells most."""

    networks: Sequence[str] = plan.NETWORKS
    bases: Sequence[str] = plan.BASES
    seeds: Sequence[int] = plan.SEEDS
    variants: bool = True


class Comparison:
    """All runs, in the order of what they tell; `part` says which of them."""

    def __init__(self, root: Path, out: Path, processes: int, part: Part) -> None:
        self.root, self.out, self.processes, self.part = root, out, processes, part

    def go(self) -> None:
        """Train what is not finished yet."""
        os.environ |= _KEPT  # read by processes as they start
        if self.processes == 1:
            self.all(partial(map, partial(train, self.root, self.out)))
            return
        with ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as pool:
            self.all(partial(pool.map, partial(train, self.root, self.out)))

    def all(self, each: Callable[[Iterable[Job]], Iterator[Result]]) -> None:
        """Every job, a stage at a time, by `each`, which gives their results."""
        chosen: dict[str, tuple[list[Cell], list[Choice]]] = {}
        for network in self.part.networks:
            cells = [Cell(network, base) for base in self.part.bases]
            chosen[network] = cells, self._choose(cells, each)
            list(each(measured(*chosen[network], self.part.seeds)))
        if self.part.variants and plan.VARIED in chosen:
            list(each(self._variants(*chosen[plan.VARIED])))
            list(each(measured(*chosen[plan.VARIED], plan.MORE_SEEDS)))

    def _choose(self, cells: Sequence[Cell], each: Callable[[Iterable[Job]], Iterator[Result]]) -> list[Choice]:
        """By the rule, which looks at the classes held out."""
        seed = plan.CHOICE_SEED
        jobs = [Job(f"rate {lr:g}", cell.settings(seed, lr, None)) for cell in cells for lr in plan.RATES]
        results = list(each(jobs))
        of_cell = [results[k : k + len(plan.RATES)] for k in range(0, len(results), len(plan.RATES))]
        best = [plan.best_rate(group) for group in of_cell]
        rates = [plan.RATES[k] for k in best]
        margins = [self.suggested(cell, lr, plan.SHARES) for cell, lr in zip(cells, rates, strict=True)]
        jobs = [
            Job(f"weight {weight:g}", cell.settings(seed, lr, plan.with_weight(pair, weight)))
            for cell, lr, pair in zip(cells, rates, margins, strict=True)
            for weight in plan.WEIGHTS
        ]
        results = list(each(jobs))
        choices = []
        for c, (lr, pair) in enumerate(zip(rates, margins, strict=True)):
            group = results[c * len(plan.WEIGHTS) : (c + 1) * len(plan.WEIGHTS)]
            weight = plan.WEIGHTS[plan.best_weight(of_cell[c][best[c]], group)]
            choices.append(Choice(lr, plan.with_weight(pair, weight)))
            print(f"{cells[c].network} {cells[c].base}: {choices[-1]}", flush=True)
        return choices

    def suggested(self, cell: Cell, lr: float, shares: tuple[float, float]) -> tuple[float, float]:
        """Both margins, from the run that had this rate chosen."""
        settings = cell.settings(plan.CHOICE_SEED, lr, None)
        held_out = files.load(self.out / f"rate {lr:g}" / settings.name / HELD_OUT, None)
        found = suggest_margins(held_out.embeddings, held_out.labels, far=shares[0], frr=shares[1])
        return found.margin_plus, found.margin_minus

    def _variants(self, cells: Sequence[Cell], choices: Sequence[Choice]) -> Iterator[Job]:
        """Runs that differ from the measured ones in one thing."""
        pairs = list(zip(cells, choices, strict=True))
        for seed in plan.VARIANT_SEEDS:
            for cell, (lr, tcm) in pairs:
                weight = tcm.lambda_plus
                defaults = plan.with_weight(plan.DEFAULTS, weight)
                yield Job("default margins", cell.settings(seed, lr, defaults))
                for far, frr in plan.OTHER_SHARES:
                    other = plan.with_weight(self.suggested(cell, lr, (far, frr)), weight)
                    yield Job(f"far {far:g} frr {frr:g}", cell.settings(seed, lr, other))
            for cell, (lr, tcm) in pairs:
                for weight in set(plan.WEIGHTS) - {tcm.lambda_plus}:
                    other = plan.with_weight((tcm.margin_plus, tcm.margin_minus), weight)
                    yield Job(f"other weight {weight:g}", cell.settings(seed, lr, other))
            for cell, (lr, tcm) in pairs:
                longer = Cell(cell.network, cell.base, epochs=2 * cell.epochs)
                smaller = Cell(cell.network, cell.base, batch_classes=cell.batch_classes // 2)
                for name, other_cell in (("twice as long", longer), ("half the batch", smaller)):
                    for margins in (None, tcm):
                        yield Job(name, other_cell.settings(seed, lr, margins))
                bank = plan.with_weight((tcm.margin_plus, tcm.margin_minus), tcm.lambda_plus, plan.BANK)
                yield Job("bank", cell.settings(seed, lr, bank))


def measured(cells: Sequence[Cell], choices: Sequence[Choice], seeds: Sequence[int]) -> list[Job]:
    """Without TCM and with it."""
    return [
        Job("measured", cell.settings(seed, choice.lr, tcm), score_every=148)
        for seed in seeds
        for cell, choice in zip(cells, choices, strict=True)
        for tcm in (None, choice.tcm)
    ]


def utility_models(root: Path, out: Path) -> list[tuple[str, OPISResult]]:
    """OPIS of the first measured pair, by name, embedded anew by the networks of their checkpoints."""
    found = []
    for path in sorted((out / "measured").glob("*/result.json")):
        about = json.loads(path.read_text(encoding="utf-8"))["identity"]
        if (about["backbone"], about["base"], about["seed"]) == (plan.NETWORKS[0], plan.BASES[0], plan.SEEDS[0]):
            tcm = None if about["tcm"] is None else Margins(**about["tcm"])
            cell = Cell(about["backbone"], about["base"])
            job = Job("measured", cell.settings(about["seed"], about["lr"], tcm))
            with one_thread():
                embeddings, labels = job.make(root, out).test_embeddings()
                found.append(("without TCM" if tcm is None else "with TCM", opis(embeddings, labels)))
    return sorted(found, key=lambda pair: pair[0], reverse=True)
