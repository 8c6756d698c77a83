"""`python -m benchmarks.speed.gpu_speed RESULT.json`: time and memory of the loss on one GPU, beside its limits.

A figure is a ratio taken in one run: to the time that the flops of a case take at the rate of this card's own 16-bit
matrix product, which alternates with the loss (the floor), or to a peer that alternates with it. Nothing is measured
before the loss is found right.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.speed.gate import DENSITIES, check_fused, check_opis
from benchmarks.speed.peers import PEERS, forward_backward, make_batch, make_classes
from benchmarks.speed.report import Goal, at_least, at_most, goal_table
from tcm_fused import opis, tcm_loss
from tcm_fused.reference import tcm_reference
from tcm_fused.thresholds.opis import OPISResult
from tcm_fused.thresholds.outputs import check_outputs, write_whole
from tcm_fused.thresholds.terminal import Parser, take_any_text

Step = Callable[[], object]
Figures = dict[str, dict[str, Any]]  # name of a case -> what was measured

LARGE = 65_536
SMALL = ((256, 128), (1024, 128), (1024, 512), (4096, 128), (4096, 1024), (256, 1024))
WIDTHS = (64, 128, 256, 768, 1024, 2048)
# The gate's batch has so few rows that some margin is further from every s than sums in tensor cores, which truncate,
# can be off. One wrong pair moves a gradient by 1e-4 of its largest value, a wrong positive by 3e-2 of its 2-norm.
GATE_ROWS, TOLERANCE, HALF_TOLERANCE = 300, 1e-5, 5e-3  # float32; the last for 16-bit embeddings


@dataclass(frozen=True)
class Case:
    """One batch, what runs on it, and how often."""

    n: int
    d: int
    hard: str = "none"  # negatives; all positives are
    precision: str = "fp16"  # of bfloat16 embeddings; "fp32": of float32 embeddings, to full accuracy
    peers: tuple[str, ...] = ()
    runs: int = 11
    memory: bool = False
    captured: bool = False  # time a CUDA graph of the step as well
    side: int = 8192  # of the 16-bit matrices whose product alternates with it; 0: none does
    classes: int = 0  # not the loss: OPIS of so many classes, float32


def cases() -> dict[str, Case]:
    """The most telling first: what the time does not suffice for is left out."""
    found = {f"hard {hard}": Case(LARGE, 512, hard) for hard in ("none", "half", "all", "1e-4", "1e-3")}
    found["fp32"] = Case(LARGE, 512, precision="fp32")
    found["OPIS"] = Case(136_093, 512, precision="fp32", classes=2452, runs=5, memory=True)  # iNaturalist's test set
    found["peers"] = Case(LARGE // 2, 512, peers=("eager", "torch.compile"), runs=5, memory=True)
    found["million"] = Case(2**20, 256, runs=2, memory=True)
    for n, d in SMALL:
        peers = ("eager", "torch.compile")
        found[f"small {n} {d}"] = Case(n, d, peers=peers, runs=51, captured=(n, d) == (1024, 128), side=0)
    found |= {f"width {d}": Case(LARGE, d, runs=5) for d in WIDTHS}
    found["library"] = Case(1024, 512, precision="fp32", peers=("pytorch-metric-learning",), runs=5, memory=True)
    found["other losses"] = Case(LARGE, 512, peers=tuple(OTHER_LOSSES), runs=5, memory=True)
    return found


# Losses of another kind at the same N and D, from packages that may not be there.


def sigmoid_loss(x: Tensor, labels: Tensor) -> Tensor:
    """siglip-kernel's pair-separable loss of the rows with themselves: row i's only positive is column i."""
    from siglip_kernel import fused_siglip_loss

    x_hat = F.normalize(x)
    temperature, bias = x.new_tensor(2.3, dtype=torch.float32), x.new_tensor(-10.0, dtype=torch.float32)
    loss: Tensor = fused_siglip_loss(x_hat, x_hat, temperature, bias)
    return loss


def contrastive_loss(x: Tensor, labels: Tensor) -> Tensor:
    """inf-cl's softmax loss over the columns, likewise."""
    from inf_cl import cal_flash_loss

    x_hat = F.normalize(x)
    loss: Tensor = cal_flash_loss(x_hat, x_hat, scale=10.0).mean()
    return loss


OTHER_LOSSES = {"siglip-kernel (sigmoid loss)": sigmoid_loss, "inf-cl (softmax loss)": contrastive_loss}


# Clocks.


class Clock:
    """Times steps on a device: by its own events on a GPU, by the host's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.gpu = device == "cuda"

    def once(self, step: Step) -> float:
        """Milliseconds of one call, launches included."""
        if not self.gpu:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def alternate(self, steps: dict[str, Step], runs: int) -> dict[str, float]:
        """Median milliseconds of each step, in rounds of A B C A B C ... after three rounds that warm up."""
        times = [{name: self.once(step) for name, step in steps.items()} for _ in range(3 + runs)][3:]
        return {name: statistics.median(row[name] for row in times) for name in steps}

    def peak_bytes(self, step: Step) -> int:
        """Most memory that torch holds during `step` beyond what it held before; 0 where it does not count."""
        if not self.gpu:
            return 0
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = step()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def captured(self, step: Step) -> Step:
        """`step` as a CUDA graph, or as it is where there is none."""
        if not self.gpu:
            return step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay


def product(clock: Clock, side: int) -> Step:
    """The card's own product of two 16-bit matrices [side, side], 2 side^3 flop."""
    dtype = torch.float16 if clock.gpu else torch.float32
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def copy_rate(clock: Clock, size: int = 2**32) -> float:
    """Bytes that a copy of `size` bytes reads and writes in a second."""
    source = torch.randint(100, (size // 8,), device=clock.device)
    target = torch.empty_like(source)
    return 2e3 * size / clock.alternate({"copy": partial(target.copy_, source)}, runs=21)["copy"]


# The loss, and whether it is right.


def loss_of(backend: str, precision: str) -> Callable[..., Any]:
    return partial(tcm_loss, backend=backend, precision=precision)


def opis_of(backend: str) -> Callable[..., OPISResult]:
    return partial(opis, backend="auto" if backend == "triton" else backend)  # which has no kernel that counts


def check(clock: Clock, backend: str) -> None:
    """AssertionError unless loss, gradient and OPIS are those of the definition in float64."""

    def moved(*sets: Tensor, **options: Any) -> Any:
        loss, stats = loss_of(backend, "fp32")(*(t.to(clock.device) for t in sets), **options)
        return loss.cpu(), stats

    for hard in DENSITIES:
        check_fused(moved, hard, GATE_ROWS, tolerance=TOLERANCE)
    for hard in ("none", "all"):  # between them, pairs within rounding of the margin may fall either way
        x, labels = make_batch(GATE_ROWS, 512, hard, seed=1)
        x = x.bfloat16()
        expected, _, count = tcm_reference(wide := x.double().requires_grad_(), labels)
        expected.backward()
        loss, grad = forward_backward(loss_of(backend, "fp16"), x.to(clock.device), labels.to(clock.device))
        assert wide.grad is not None
        error = float((grad.cpu().double() - wide.grad).norm() / wide.grad.norm())
        assert error <= HALF_TOLERANCE, f"16-bit gradient, hard={hard!r}, is off by {error:.1e}"
        assert abs(float(loss / expected.detach()) - 1) <= HALF_TOLERANCE, (
            f"16-bit loss, hard={hard!r}: {loss}, not {expected}"
        )
        assert count.sum() > 0
    check_opis(lambda x, labels, **options: opis_of(backend)(x.to(clock.device), labels.to(clock.device), **options))


# Measuring.


def measure_opis(case: Case, clock: Clock, backend: str) -> dict[str, Any]:
    """OPIS from embeddings on the device to the result on the host; its "hard pairs" are all pairs."""
    x, labels = (t.to(clock.device) for t in make_classes(case.n, case.d, classes=case.classes))
    step = partial(opis_of(backend), x, labels)
    pairs = step().histogram
    return {
        "n": case.n,
        "d": case.d,
        "dtype": "float32",
        "hard_pairs": [int(pairs.positives.sum()), int(pairs.negatives.sum())],
        "ms": clock.alternate({"tcm_fused": step}, case.runs),
        "peak_bytes": {"tcm_fused": clock.peak_bytes(step)},
        "embedding_bytes": x.nbytes,
    }


def measure(case: Case, clock: Clock, backend: str) -> dict[str, Any]:
    """What the case asks for. A peer that fails (no memory, not installed) has its error there instead of a time."""
    if case.classes:
        return measure_opis(case, clock, backend)
    x, labels = make_batch(case.n, case.d, case.hard, device=clock.device)
    x = x if case.precision == "fp32" else x.bfloat16()
    loss = loss_of(backend, case.precision)
    steps: dict[str, Step] = {"tcm_fused": partial(forward_backward, loss, x, labels)}
    figures: dict[str, Any] = {"n": case.n, "d": case.d, "dtype": str(x.dtype).removeprefix("torch.")}
    stats = loss(x, labels, return_stats=True)[1]
    figures["hard_pairs"] = [int(stats.count_plus), int(stats.count_minus)]
    for name in case.peers:
        step = partial(forward_backward, (PEERS | OTHER_LOSSES)[name], x, labels)
        try:
            step()
            steps[name] = step
        except Exception as error:  # whatever a peer may do, the rest is measured
            figures.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if case.captured:
        steps["captured"] = clock.captured(steps["tcm_fused"])
    if case.side:
        steps["product"] = product(clock, case.side)
    figures["ms"] = clock.alternate(steps, case.runs)
    if case.side:
        figures["flops"] = 2e3 * case.side**3 / figures["ms"].pop("product")
        del steps["product"]
    if case.memory:
        figures["peak_bytes"] = {name: clock.peak_bytes(step) for name, step in steps.items()}
        figures["embedding_bytes"] = x.nbytes
    return figures


def floor_ms(figures: dict[str, Any], products: int = 1) -> float | None:
    """Milliseconds of `products` times N^2 D flop at the rate that was measured beside the case; None: none was."""
    return 1e3 * products * figures["n"] ** 2 * figures["d"] / figures["flops"] if "flops" in figures else None


# Goals.


def goals(figures: Figures) -> list[Goal]:
    """Every goal with its figure, None where it was not measured."""
    rows = []
    for name, most, products in (("hard none", 1.35, 1), ("hard all", 1.4, 1), ("hard half", 1.35, 3)):
        against = "N^2 D flop at the product's rate" if products == 1 else f"{products} N^2 D flop at that rate"
        ratio = _floor_ratio(figures.get(name), products)
        rows.append(at_most(f"N = 65,536, D = 512, 16-bit, {_hard(name)}", against, most, ratio, "x"))
    few, half = (_ms(figures.get(f"hard {hard}")) for hard in ("none", "half"))
    for hard in ("1e-4", "1e-3"):
        ms = _ms(figures.get(f"hard {hard}"))
        place = None if ms is None or few is None or half is None else (ms - few) / (half - few)
        subject = f"N = 65,536, D = 512, 16-bit, {hard} of the pairs hard"
        rows.append(at_most(subject, "way from few hard pairs to half of them", 0.5, place, ""))
    rows += _peer_goals(figures.get("peers"))
    exact = _ms(figures.get("fp32"))
    ratio = None if exact is None or few is None else exact / few
    rows.append(at_most("N = 65,536, D = 512, fp32-accurate, few hard pairs", "16-bit", 1.2, ratio, "x"))
    rows += _small_goals(figures) + _million_goals(figures.get("million"))
    ms = _ms(figures.get("OPIS"))
    subject = "OPIS, N = 136,093, D = 512, 2,452 classes, fp32-accurate"
    rows.append(at_most(subject, "the clock", 0.5, None if ms is None else ms / 1e3, " s"))
    for d in WIDTHS:
        ratio = _floor_ratio(figures.get(f"width {d}"), 1)
        rows.append(at_most(f"N = 65,536, D = {d}, 16-bit, few hard pairs", "its own floor", 1.6, ratio, "x"))
    return rows


def _hard(name: str) -> str:
    return {"hard none": "few hard pairs", "hard all": "all pairs hard", "hard half": "half the negatives hard"}[name]


def _ms(figures: dict[str, Any] | None, name: str = "tcm_fused") -> float | None:
    return None if figures is None else figures["ms"].get(name)


def _floor_ratio(figures: dict[str, Any] | None, products: int) -> float | None:
    floor = None if figures is None else floor_ms(figures, products)
    return None if figures is None or floor is None else figures["ms"]["tcm_fused"] / floor


def _faster(figures: dict[str, Any] | None, peer: str) -> float | None:
    """How many times faster than `peer`."""
    theirs, ours = _ms(figures, peer), _ms(figures)
    return None if theirs is None or ours is None else theirs / ours


def _peer_goals(figures: dict[str, Any] | None) -> list[Goal]:
    subject = "N = 32,768, D = 512, 16-bit, few hard pairs"
    rows = [
        at_least(subject, peer, least, _faster(figures, peer)) for peer, least in (("eager", 15), ("torch.compile", 5))
    ]
    peaks = {} if figures is None else figures["peak_bytes"]
    share = 100 * peaks["tcm_fused"] / peaks["eager"] if peaks.get("eager") else None
    return [*rows, at_most(subject, "eager's memory", 1, share, " %")]


def _small_goals(figures: Figures) -> list[Goal]:
    small = [figures[name] for name in (f"small {n} {d}" for n, d in SMALL) if name in figures]
    rows = []
    for peer, least in (("eager", 2.5), ("torch.compile", 1)):
        faster = [factor for factor in (_faster(one, peer) for one in small) if factor is not None]
        worst = min(faster) if len(faster) == len(SMALL) else None
        rows.append(at_least("N = 256 to 4096, D = 128 to 1024, the least", peer, least, worst))
    ms = _ms(figures.get("small 1024 128"), "captured")
    microseconds = None if ms is None else 1e3 * ms
    return [*rows, at_most("N = 1024, D = 128, in a CUDA graph", "the clock", 60, microseconds, " us")]


def _million_goals(figures: dict[str, Any] | None) -> list[Goal]:
    subject = "N = 1,048,576, D = 256, few hard pairs"
    ms, size = (
        _ms(figures),
        None if figures is None else figures["peak_bytes"]["tcm_fused"] + figures["embedding_bytes"],
    )
    return [
        at_most(subject, "the clock", 1, None if ms is None else ms / 1e3, " s"),
        at_most(subject, "memory, embeddings included", 8, None if size is None else size / 1e9, " GB"),
    ]


def time_table(figures: Figures) -> str:
    """Every case with its times and those of its peers, as Markdown."""
    lines = ["| case | N | D | dtype | hard pairs | ms | of N^2 D flop | others, ms | peak memory, MB |"]
    lines.append("|---|--:|--:|---|--:|--:|--:|---|---|")
    for name, one in figures.items():
        others = {peer: f"{ms:.4g}" for peer, ms in one["ms"].items() if peer != "tcm_fused"} | one.get("failed", {})
        ratio = _floor_ratio(one, 1)
        peaks = ", ".join(f"{peer} {size / 1e6:,.0f}" for peer, size in one.get("peak_bytes", {}).items())
        lines.append(
            f"| {name} | {one['n']} | {one['d']} | {one['dtype']} | {sum(one['hard_pairs']):.2e} "
            f"| {one['ms']['tcm_fused']:.4g} | {'-' if ratio is None else f'{ratio:.2f}'} "
            f"| {', '.join(f'{peer} {value}' for peer, value in others.items())} | {peaks} |"
        )
    return "\n".join(lines)


def run(clock: Clock, backend: str, chosen: dict[str, Case], seconds: float) -> dict[str, Any]:
    """The gate, the cases and the rate of a copy, as long as `seconds` suffice for another."""
    start = time.monotonic()
    check(clock, backend)
    figures: Figures = {}
    errors: dict[str, str] = {}
    for name, case in chosen.items():
        if time.monotonic() - start > seconds:
            errors[name] = f"left out: {seconds:.0f} s were over"
            continue
        try:
            figures[name] = measure(case, clock, backend)
        except Exception as error:  # the other cases are still worth having
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        if clock.gpu:
            torch.cuda.empty_cache()
        print(f"{time.monotonic() - start:6.1f} s  {name}: {errors.get(name) or figures[name]['ms']}", flush=True)
    rates = [one["flops"] for one in figures.values() if "flops" in one]
    ceilings = {
        "flops": statistics.median(rates) if rates else None,  # of all cases; a ratio is to its own case's
        "bytes_per_second": copy_rate(clock) if clock.gpu else copy_rate(clock, 2**16),  # that of a rehearsal
    }
    rows = goals(figures)
    return {"ceilings": ceilings, "cases": figures, "errors": errors, "goals": [row._asdict() for row in rows]}


def main() -> int:
    parser = Parser(prog="python -m benchmarks.speed.gpu_speed", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--backend", default="cuda", help="of tcm_loss; 'cuda' unless given")
    parser.add_argument("--seconds", type=float, default=220, help="how many all of it may take")
    arguments = parser.parse_args()
    take_any_text()
    try:
        check_outputs([arguments.result])
    except ValueError as error:
        parser.error(str(error))
    clock = Clock("cpu" if arguments.backend == "cpu" else "cuda")
    if clock.gpu and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    measured = run(clock, arguments.backend, cases(), arguments.seconds - 25)  # so long a case may take
    content = json.dumps(measured, indent=1) + "\n"
    write_whole(arguments.result, lambda part: part.write_text(content, encoding="utf-8"))
    rates = measured["ceilings"]
    if rates["flops"] is not None:
        print(f"\n16-bit product {rates['flops'] / 1e12:.0f} TFLOP/s, copy {rates['bytes_per_second'] / 1e12:.2f} TB/s")
    print(f"\n{time_table(measured['cases'])}\n\n{goal_table([Goal(**row) for row in measured['goals']])}")
    return 1 if measured["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
