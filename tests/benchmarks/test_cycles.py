"""The model of the kernels' cycles: that it counts as it says, and that no prediction has become worse."""

import pytest
from ptx_machine.build import nvcc

from benchmarks.speed import cycles, sass
from benchmarks.speed.ptxas import ROOT
from benchmarks.speed.sass import Instruction, cycles_of, pipe_cycles


def one(name: str, stall: int = 1, write: int = 7, wait: int = 0, read: int = 7) -> Instruction:
    return Instruction(name, stall, write, read, wait, ())


@pytest.fixture
def disassembler() -> None:
    """nvdisasm, which `requirements.txt` brings with Triton; `make gpu` uses the Python that is there."""
    if sass.nvdisasm() is None:
        pytest.skip("nvdisasm is neither on the PATH nor in Triton, and no machine code can be read without it")


@pytest.mark.usefixtures("disassembler")
def test_no_prediction_is_worse_than_the_table() -> None:
    """By more than 3 %. If a kernel has to be slower, run `make registers` and say why in the commit."""
    found, before = cycles.whole_table(nvcc()), cycles.TABLE.read_text()
    compiler = next(word for word in before.split() if word.count(".") >= 2 and word[0].isdigit())
    if f"nvcc {compiler}" not in found:
        # Another compiler makes other code of the same kernels: its cycles say nothing about a change of ours.
        pytest.skip(f"{cycles.TABLE.name} was written with nvcc {compiler}, which is not the one here")
    assert cycles.worse(cycles.recorded(found), cycles.recorded(before)) == []
    assert cycles.recorded(found).keys() == cycles.recorded(before).keys(), "run `make registers`"


@pytest.mark.usefixtures("disassembler")
def test_every_phase_has_code() -> None:
    """A function that is renamed would leave the predictions without its cycles, and in silence."""
    for card in (cycles.H100, cycles.A100):
        kernels = cycles.compiled(card, nvcc())
        for name in (*cycles.PHASES["few"], *cycles.PHASES["half"], *cycles.HIDDEN, "write_pairs"):
            assert kernels.phase((name,)), (card.name, name)
        assert {call[0] for one in kernels.phase(cycles.SCREEN) for call in one.calls} >= set(cycles.SCREEN)
        assert kernels.item()
        assert card.hopper or kernels.step()


@pytest.mark.parametrize(
    ("code", "warps", "expected"),
    [
        ([one("FADD")] * 10, 1, 10),  # an instruction a cycle
        ([one("FADD")] * 10, 2, 20),
        ([one("FMNMX")] * 10, 1, 19),  # a pipe of half the lanes
        ([one("FADD", stall=4)] * 10, 1, 37),  # each waits for the one before
        ([one("FADD", stall=4)] * 10, 2, 38),  # and another warp goes on meanwhile
        ([one("SHFL", write=0), one("FADD", wait=1)], 1, 26),  # a result that is waited for
        ([one("SHFL", write=0), one("FADD", wait=2)], 1, 25),  # and one that is not, but has to come
        ([one("BAR")], 2, 3),
        ([one("BAR"), one("FADD")], 1, 26),
        ([one("BAR"), one("FADD")], 2, 29),  # the second arrives two cycles later, and goes on one later
    ],
)
def test_cycles_of_a_few_instructions(code: list[Instruction], warps: int, expected: int) -> None:
    assert cycles_of(code, warps, True) == expected


def test_least_cycles_are_those_of_the_busiest_pipe() -> None:
    code = [one("FADD")] * 30 + [one("FMNMX")] * 20 + [one("POPC")]
    assert pipe_cycles(code, 1, True) == 51
    assert pipe_cycles(code, 2, False) == 2 * 60, "half the lanes on an A100"
    assert pipe_cycles([], 2, True) == 0


def test_table_is_read_as_it_is_written() -> None:
    columns = {"H100": {"few": 1.25, "cycles of something": 1234.0}, "A100": {"few": 1.5, "cycles of something": 7.0}}
    text = cycles.table(columns, "nvcc 1.2.3")
    assert "not a measurement" in text
    assert cycles.recorded(text) == {"few": [1.25, 1.5], "cycles of something": [1234.0, 7.0]}


def test_worse_is_more_than_three_percent() -> None:
    before = {"few": [1.0, 2.0], "gone": [3.0]}
    assert cycles.worse({"few": [1.03, 1.0], "new": [9.0]}, before) == []
    assert cycles.worse({"few": [1.0, 2.07]}, before) == ["few: [1.0, 2.07], was [1.0, 2.0]"]


def test_teams_take_turns() -> None:
    """One multiplies while the other looks, as long as that is not longer than the steps by which it is behind."""
    assert cycles.teams_cycles(8, 512, 0) == pytest.approx(8192, rel=0.01)
    assert cycles.teams_cycles(8, 512, 900) < 1.02 * 8192
    assert cycles.teams_cycles(8, 512, 900, lead=0) == pytest.approx(8192 + 900, rel=0.02), "both look at once"
    assert cycles.teams_cycles(1, 512, 3000) == pytest.approx(3512, rel=0.01), "a team's own step, and its look"
    assert cycles.teams_cycles(8, 512, 3000) < 0.93 * (8192 + 3000)


def test_sizes_are_those_of_the_sources() -> None:
    sources = (ROOT / "csrc/cuda/tile.cuh").read_text()
    assert f"kRing = {cycles.RING};" in sources
    assert f"kLead = {cycles.LEAD};" in sources
