"""`python -m benchmarks.speed.report RESULT.json`: the goals and figures of one run as Markdown, and its drawings.

Reads what `pytest benchmarks/speed --benchmark-json=RESULT.json` wrote; the drawings go beside it, named after it.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tcm_fused.thresholds.outputs import check_outputs
from tcm_fused.thresholds.terminal import Parser, printable, run

Infos = dict[str, dict[str, Any]]  # name of a benchmark -> what it recorded in `extra_info`

# What multiplies codes in eight bits -> hard pairs -> (most of one product's time, least speed-up over eager),
# at N = 8192, D = 512
DENSITY_GOALS: dict[str, dict[str, tuple[float, float | None]]] = {
    "": {"few": (0.52, 12.0), "all": (0.56, 11.0), "half": (1.5, 4.5)},
    "VNNI": {"few": (0.18, 35.0), "1e-3": (0.22, None), "1e-2": (0.4, None), "half": (1.0, None), "all": (0.2, None)},
    "AMX": {"few": (0.1, 60.0), "1e-3": (0.14, None), "1e-2": (0.28, None), "half": (0.6, None), "all": (0.12, None)},
}
LIBRARY_SPEED_UP = 1000.0
SMALL_SPEED_UP = 2.0
MEMORY_FACTOR = {"": 5.0, "VNNI": 3.0, "AMX": 3.0}
SLOPES = {"time": 2.1, "memory": 1.1}  # N^2 and N; less where parts that grow more slowly count
OPIS_PRODUCTS = {"": 0.63, "VNNI": 0.63, "AMX": 0.4}
LARGE_STEP_SHARE = 3.0  # %, of a step at N = 16,384
OPIS_SPEED_UP = 3.0
OPIS_MEMORY_GB = 2.0


class Goal(NamedTuple):
    """One row of the table: a goal, and the figure reached, None where the run did not measure it."""

    subject: str
    against: str
    goal: str
    figure: str | None
    met: bool


def goals(infos: Infos, codes: str) -> list[Goal]:
    """Every goal with its figure. codes: what multiplies them, "AMX", "VNNI" or "", as `machine_info` has it."""
    loss = [*_density_goals(infos, codes), *_peer_goals(infos), *_memory_goals(infos, codes), *_slope_goals(infos)]
    return [*loss, *_opis_goals(infos, codes), *_step_goals(infos)]


def _density_goals(infos: Infos, codes: str) -> list[Goal]:
    rows = []
    for hard, (most, least) in DENSITY_GOALS[codes].items():
        subject = f"N = 8192, D = 512, {hard} of the negatives hard"
        ratio = infos.get(f"test_density[{hard}]", {}).get("ratio", {})
        rows.append(at_most(subject, "one product X^ X^T", most, ratio.get("product"), " of it"))
        if least is not None:
            rows.append(at_least(subject, "eager", least, _inverse(ratio.get("eager"))))
    return rows


def _peer_goals(infos: Infos) -> list[Goal]:
    library = infos.get("test_library[1024]", {}).get("ratio", {}).get("pytorch-metric-learning")
    small = [info["ratio"]["eager"] for name, info in infos.items() if name.startswith("test_small")]
    return [
        at_least("N = 1024, D = 512", "pytorch-metric-learning", LIBRARY_SPEED_UP, _inverse(library)),
        at_least("N = 64 to 1024, D = 128, the least", "eager", SMALL_SPEED_UP, _inverse(max(small, default=None))),
    ]


def _memory_goals(infos: Infos, codes: str) -> list[Goal]:
    rows = []
    dense = [(hard, f"dense_pairs[{hard}]") for hard in ("1e-3", "1e-2", "half", "all")]
    for hard, name in (("few", "test_growth[65536]"), *dense):
        info = next((info for full_name, info in infos.items() if full_name.endswith(name)), None)
        factor = info["peak_bytes"]["tcm_fused"] / info["embedding_bytes"] if info else None
        subject = f"N = 65,536, D = 128, {hard} of the negatives hard"
        rows.append(at_most(subject, "the embeddings' bytes", MEMORY_FACTOR[codes], factor, "x"))
    return rows


def _slope_goals(infos: Infos) -> list[Goal]:
    subject = "N = 4096 to 65,536, D = 128"
    return [
        at_most(subject, f"growth of {quantity}", most, growth_slope(infos, quantity), "")
        for quantity, most in SLOPES.items()
    ]


def _opis_goals(infos: Infos, codes: str) -> list[Goal]:
    small, large = (infos.get(f"test_opis[{n}]", {}) for n in (8192, 60000))
    blocked = small.get("ratio", {}).get("blocked PyTorch")
    products = large.get("ratio", {}).get("product")
    peak = large["peak_bytes"]["tcm_fused"] / 1e9 if large else None
    subject = "OPIS, N = 60,000, D = 512, 11,316 classes"
    return [
        at_most(subject, "the symmetric product", OPIS_PRODUCTS[codes], products, " of it"),
        at_most(subject, "memory beyond the embeddings", OPIS_MEMORY_GB, peak, " GB"),
        at_least("OPIS, N = 8192, D = 512, 1545 classes", "blocked PyTorch", OPIS_SPEED_UP, _inverse(blocked)),
    ]


def _step_goals(infos: Infos) -> list[Goal]:
    share = infos.get("test_cost[16384]", {}).get("share", {}).get("tcm_fused")
    percent = None if share is None else 100 * share
    return [at_most("N = 16,384, a small network", "a training step", LARGE_STEP_SHARE, percent, " %")]


def growth_slope(infos: Infos, quantity: str) -> float | None:
    """Least-squares slope of log(time or memory) over log(N), None unless the largest batch was measured."""
    grown = [info for name, info in infos.items() if name.startswith("test_growth")]
    if len(grown) < 2 or max(info["n"] for info in grown) < 65536:
        return None
    read = {
        "time": lambda info: info["seconds"]["tcm_fused"]["median"],
        "memory": lambda info: info["peak_bytes"]["tcm_fused"],
    }[quantity]
    return statistics.linear_regression(
        [math.log(info["n"]) for info in grown], [math.log(read(info)) for info in grown]
    ).slope


def at_most(subject: str, against: str, most: float, figure: float | None, unit: str) -> Goal:
    shown = None if figure is None else f"{figure:.2f}{unit}"
    return Goal(subject, against, f"at most {most:g}{unit}", shown, figure is not None and figure <= most)


def at_least(subject: str, against: str, least: float, figure: float | None) -> Goal:
    shown = None if figure is None else f"{figure:,.1f}x" if figure < 100 else f"{figure:,.0f}x"
    return Goal(subject, against, f"at least {least:g}x faster", shown, figure is not None and figure >= least)


def _inverse(ratio: float | None) -> float | None:
    return None if ratio is None else 1 / ratio


def goal_table(rows: list[Goal]) -> str:
    """The goals as a Markdown table."""
    lines = ["| case | against | goal | figure | |", "|---|---|---|---|---|"]
    for row in rows:
        state = "not measured" if row.figure is None else "met" if row.met else "missed"
        lines.append(f"| {row.subject} | {row.against} | {row.goal} | {row.figure or '-'} | {state} |")
    return "\n".join(lines)


def time_table(infos: Infos) -> str:
    """Median times of every benchmark, with peak memory where it was taken, as a Markdown table."""
    columns = ("tcm_fused", "eager", "torch.compile", "pytorch-metric-learning", "product")
    lines = [
        f"| N | M | D | hard negatives | {' | '.join(columns)} | peak memory, same order |",
        "|--:|--:|--:|" + "--:|" * (len(columns) + 2),
    ]
    for info in infos.values():
        if "hard_negatives" not in info:  # not of the loss
            continue
        n, m = info["n"], info.get("m", info["n"])
        seconds, peaks = info.get("seconds", {}), info.get("peak_bytes", {})
        times = [_time(seconds[name]) if name in seconds else "" for name in columns]
        memory = ", ".join(_memory(peaks[name]) for name in columns if name in peaks)
        lines.append(f"| {n} | {m} | {info['d']} | {info['hard']} | {' | '.join(times)} | {memory} |")
    return "\n".join(lines)


def opis_table(infos: Infos) -> str:
    """Median times of OPIS and its peers, and peak memory, as a Markdown table."""
    columns = ("tcm_fused", "product", "blocked PyTorch")
    lines = [f"| N | D | classes | {' | '.join(columns)} | peak memory |", "|--:|--:|--:|" + "--:|" * 4]
    for info in _opis_infos(infos):
        seconds = info.get("seconds", {})
        times = " | ".join(_time(seconds[name]) if name in seconds else "" for name in columns)
        memory = _memory(info["peak_bytes"]["tcm_fused"])
        lines.append(f"| {info['n']} | {info['d']} | {info['classes']} | {times} | {memory} |")
    return "\n".join(lines)


def cost_table(infos: Infos) -> str:
    """What TCM takes of a training step, by each way to compute it, as a Markdown table."""
    ways = ("tcm_fused", "eager", "pytorch-metric-learning")
    lines = ["| N | network | base loss | " + " | ".join(f"TCM: {way}" for way in ways) + " |", "|--:" * 6 + "|"]
    for info in _cost_infos(infos):
        seconds = info["seconds"]
        cells = [f"{info['n']}", _time(seconds["network"]), _time(seconds["base loss"])]
        for way in ways:
            share = f"{_time(seconds[way])}: {100 * info['share'][way]:.2g} %" if way in seconds else ""
            cells.append(share or info["left_out"][way])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cost_infos(infos: Infos) -> list[dict[str, Any]]:
    return [info for name, info in infos.items() if name.startswith("test_cost[") and "seconds" in info]


def _opis_infos(infos: Infos) -> list[dict[str, Any]]:
    return [info for name, info in infos.items() if name.startswith("test_opis[")]


def _time(reading: dict[str, float]) -> str:
    """Milliseconds, or seconds from ten on, and the number of runs where it is less than five."""
    count, time = reading["runs"], reading["median"]
    runs = "" if count >= 5 else f" ({count:g} run{'s' if count > 1 else ''})"
    return (f"{1e3 * time:,.4g} ms" if time < 10 else f"{time:,.4g} s") + runs


def _memory(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def hardware(machine: dict[str, Any]) -> str:
    """One line that says what the figures hold for."""
    return (
        f"{machine['cpu']} ({machine['instruction_set']}), {machine['threads']} threads, "
        f"{machine['memory_gib']:.0f} GiB; torch {machine['torch']}, fp32"
    )


def read(path: Path) -> dict[str, Any]:
    """What pytest-benchmark wrote. ValueError: the file is not that; the message names it."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for benchmark in result["benchmarks"]:
            dict(benchmark["extra_info"])
        hardware(result["machine_info"])
        return result
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} holds no results of `make bench`: {error!r}") from error


def report(path: Path) -> None:
    """Print the tables of a run and draw its pictures beside it."""
    from benchmarks.speed.figures import draw_cost, draw_growth, draw_speed  # the table alone needs no matplotlib

    result = read(path)
    infos: Infos = {benchmark["name"]: benchmark["extra_info"] for benchmark in result["benchmarks"]}
    machine = result["machine_info"]
    pictures = {"speed": draw_speed, "growth": draw_growth}
    if _cost_infos(infos):
        pictures["cost"] = draw_cost
    targets = {name: path.with_name(f"{path.stem}_{name}.png") for name in pictures}
    check_outputs(targets.values(), [path])
    commit = result["commit_info"]["id"][:12]
    print(f"{hardware(machine)}; load before the run {machine['load_before']:g}; commit {commit}")
    print("\nLoss and gradient, median of alternating runs in one process.\n")
    print(goal_table(goals(infos, machine.get("codes", ""))), time_table(infos), sep="\n\n")
    if _opis_infos(infos):
        print("\nOPIS: the whole result, beside the symmetric similarity product alone.\n", opis_table(infos), sep="\n")
    if _cost_infos(infos):
        print("\nA training step: time of its parts, and the share of TCM.\n", cost_table(infos), sep="\n")
    for name, draw in pictures.items():
        draw(infos, hardware(machine), targets[name])
        print(f"\ndrew {printable(targets[name])}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it; exit code 2 and a message on stderr for bad input."""
    parser = Parser(prog="python -m benchmarks.speed.report", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="what pytest-benchmark wrote")
    options = parser.parse_args(arguments)
    run(parser, parser.prog, lambda: report(options.result))


if __name__ == "__main__":
    main()
