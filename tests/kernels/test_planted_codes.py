"""Faults put into the codes of the CPU kernels: the harness that asserts every decision finds each.

All are compiled into one program, which is told which of them to have. Not here, since nothing tells them from the code
as it is:
- an error e rounded down: by a millionth of itself at most, and the slack of 2e-6 is more than that;
- `>` in place of `>=` in code_mask: likewise;
- codes that are not the nearest, or of a wrong peak: e is that of the codes as they are, so every decision holds;
- a row's bound without e_i e_j: it is reached only by a row whose opposite fills a block of 64 columns, and a thousand
  random batches have none that also lies on a margin; test_codes.py has such a batch;
- the limits on pairs in question: they choose between two ways to the same result;
- another tile's products looked at on the diagonal: fewer rows are left out early, and the result is the same.
"""

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BATCHES = 4000


@dataclass(frozen=True)
class Fault:
    """An expression or a statement of a source, which occurs once, and what is in its place where the fault is."""

    file: str
    text: str
    replacement: str

    def either(self, number: int, rest: str) -> str:
        """Code that has fault `number` or else is `rest`."""
        if self.text.endswith(";"):
            return f"if (planted_fault == {number}) {{ {self.replacement} }} else {{ {rest} }}"
        return f"(planted_fault == {number} ? ({self.replacement}) : ({rest}))"


def in_file(name: str) -> Callable[[str, str], Fault]:
    return lambda text, replacement: Fault(name, text, replacement)


loss, pairs, decide, codes, loops = map(in_file, ("loss.cpp", "pairs.h", "decide.h", "codes.h", "pair_loops.cpp"))
ROW_ERROR, COLUMN_ERROR = "sign * (error + kCodeSlack)", "sign * (1 + error)"
BOUND = "error + (1.0 + error) * panel.error + kCodeSlack"
HALF = "(sum - row_codes_.panel[t.i].squares) / 2"
COLUMNS = "columns_.add_masked(t.j, rows_, t.i, side, most, listed, "
IS_HARD = "pairs_.violation_of(side, s) >= 0"
FAULTS = {
    # The bound, pair by pair.
    "pair: no e_i": decide(ROW_ERROR, "sign * kCodeSlack"),
    "pair: no slack": decide(ROW_ERROR, "sign * error"),
    "pair: no e_j": decide(COLUMN_ERROR, "0.0f"),
    "pair: no e_i e_j": decide(COLUMN_ERROR, "sign"),
    "pair: error of another row": decide("a.error.get()[i]", "a.error.get()[pairs_.rows.begin(t.i)]"),
    "pair: sure negatives by the upper bound": decide(
        "reach(kMinus, -1, must[kMinus])", "reach(kMinus, 1, must[kMinus])"
    ),
    "pair: possible negatives by the lower bound": decide(
        "reach(kMinus, 1, may[kMinus])", "reach(kMinus, -1, may[kMinus])"
    ),
    "pair: sure positives by the lower bound": decide("reach(kPlus, 1, must[kPlus])", "reach(kPlus, -1, must[kPlus])"),
    "pair: possible positives by the upper bound": decide(
        "reach(kPlus, -1, may[kPlus])", "reach(kPlus, 1, may[kPlus])"
    ),
    # The bound of a whole row.
    "row: no e_i": decide(BOUND, "(1.0 + error) * panel.error + kCodeSlack"),
    "row: no e_j": decide(BOUND, "error + kCodeSlack"),
    "row: scales exchanged above": decide(
        "(most > 0 ? panel.most_scale : panel.least_scale)", "(most > 0 ? panel.least_scale : panel.most_scale)"
    ),
    "row: scales exchanged below": decide(
        "(least > 0 ? panel.least_scale : panel.most_scale)", "(least > 0 ? panel.most_scale : panel.least_scale)"
    ),
    "row: surely hard by the upper bound": decide("low - bound >= m", "low + bound >= m"),
    "row: left out with its positives": decide("high + bound < m && first == last", "high + bound < m"),
    # Which pairs there are.
    "pairs: a row with itself": decide("~(uint64_t{1} << own % 64)", "~uint64_t{0}"),
    "pairs: positives among possible negatives": decide(
        "may[kMinus][word] &= all[word] & ~positive[word]", "may[kMinus][word] &= all[word]"
    ),
    "pairs: positives among sure negatives": decide(
        "must[kMinus][word] &= all[word] & ~positive[word]", "must[kMinus][word] &= all[word]"
    ),
    "pairs: no products below the first block": decide(
        "pairs_.is_diagonal(t) ? j + kCodeBlock : tile", "pairs_.is_diagonal(t) ? kCodeBlock : tile"
    ),
    # Codes and their products.
    "codes: error of 99 %": codes("rest * (1 + 1e-6)", "rest * 0.99"),
    "codes: largest scale of a panel's last row": codes(
        "panel[p].most_scale = std::max(panel[p].most_scale, scale.get()[k]);",
        "panel[p].most_scale = scale.get()[k];",
    ),
    "codes: signs not turned": codes("line[w] ^ 0x80808080", "line[w]"),
    "codes: no shift of a pair": loops("static_cast<float>(p[j] - shift[j])", "static_cast<float>(p[j])"),
    "codes: no shift of a row": loops("product[j] - shift[j]", "product[j]"),
    # Decisions near a margin.
    "near: product not settled": loss("std::abs(s[j] - m) <= pairs_.near", "false"),
    "near: similarity not settled": pairs("std::abs(s - margin(side)) > near", "true"),
    "near: settled in float32": loops("static_cast<double>(x[k]) * y[k]", "static_cast<double>(x[k] * y[k])"),
    # Sums where most are surely hard.
    "sure: others not subtracted": decide("sum -= s;", ""),
    "sure: hard ones subtracted": decide(
        "hard[row * kWords + column / 64] |= bit, ++count;",
        "hard[row * kWords + column / 64] |= bit, ++count, sum -= s;",
    ),
    "sure: others never hard": decide(IS_HARD, "false"),
    "sure: others always hard": decide(IS_HARD, "true"),
    "sure: pairs of the diagonal": decide(HALF, "sum / 2"),
    "sure: both halves of the diagonal": decide(HALF, "sum - row_codes_.panel[t.i].squares"),
    "sure: sides exchanged": decide(
        "side == kPlus ? m * count - sum : sum - m * count", "side == kMinus ? m * count - sum : sum - m * count"
    ),
    "sure: squared penalties": decide("(pairs_.p.squared || all - sure[side] > most)", "all - sure[side] > most"),
    # Pairs that are decided one by one.
    "possible: mask of another tile": decide("std::fill_n(hard, pairs_.rows.tile * kWords, 0);", ""),
    "possible: no similarity for weights": decide("t.s[row * t.stride + column] = s;", ""),
    "possible: all of them": decide("!(violation >= 0)", "false"),
    "possible: never squared": decide("pairs_.p.squared ? violation * violation : violation", "violation"),
    "gradient: mask not transposed": loss(f"{COLUMNS}scratch.transposed);", f"{COLUMNS}scratch.mask);"),
}


def plant(folder: Path) -> None:
    """The sources, with each place that has faults replaced by a choice."""
    for path in (ROOT / "csrc").glob("*.h"):
        (folder / "csrc" / path.name).write_text(path.read_text())
    for path in (ROOT / "csrc/cpu").iterdir():
        source = path.read_text()
        found: dict[str, str] = {}
        for number, fault in enumerate(FAULTS.values(), 1):
            if fault.file != path.name:
                continue
            assert source.count(fault.text) == 1, f"{path.name} has {source.count(fault.text)} of {fault.text!r}"
            found[fault.text] = fault.either(number, found.get(fault.text, fault.text))
        for text, choice in found.items():
            assert source.count(text) == 1, f"{text!r} overlaps with another"
            source = source.replace(text, choice)
        (folder / "csrc/cpu" / path.name).write_text(f"extern int planted_fault;\n{source}")
    (folder / "fault.cpp").write_text(
        '#include <cstdlib>\nint planted_fault = std::atoi(std::getenv("PLANTED_FAULT"));\n'
    )


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness with all faults."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "csrc/cpu").mkdir(parents=True)
    plant(folder)
    harness = ROOT / "tests/kernels/sanitize/decisions.cpp"
    sources = [harness, *(folder / name for name in ("csrc/cpu/loss.cpp", "csrc/cpu/pair_loops.cpp", "fault.cpp"))]
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O2", "-fopenmp-simd", "-pthread", "-Wno-psabi"]

    def made(source: Path) -> str:
        out = folder / f"{source.stem}.o"
        subprocess.run([*compiler, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(made, sources))
    subprocess.run([*compiler, *objects, "-o", str(folder / "decisions")], check=True)
    return folder / "decisions"


def run(program: Path, fault: int, seed: int) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PLANTED_FAULT": str(fault)}
    command = [str(program), str(BATCHES), str(seed)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_nothing_is_found_without_a_fault(program: Path) -> None:
    result = run(program, 0, 1)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{BATCHES} batches agree" in result.stdout


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str, program: Path) -> None:
    result = run(program, 1 + list(FAULTS).index(name), 1)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "wanted" in result.stdout
