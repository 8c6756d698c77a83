"""The CPU loss whose pairs are decided by codes in eight bits, on a processor that multiplies them, and without.

A pair counts by the product in float64 of its two unit rows in float32, rounded to float32, in every mode, tile and
block.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import KINDS, embeddings, margins
from support.oracle import Array, check, check_sides, oracle_of, two
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")  # but where `threads` says otherwise


@pytest.fixture(params=["codes", "float"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether every tile is looked at in codes, or none."""
    monkeypatch.setenv("TCM_FUSED_PRODUCTS", request.param)
    return str(request.param)


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCM_FUSED_PRODUCTS", "codes")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Against the definition.

SIZES = [(1, 1, 1), (2, 3, 7), (64, 65, 64), (65, 130, 1), (127, 193, 65), (260, 65, 130)]
SHARES = [0.0, 0.002, 0.3, 0.97]


def batch(kind: str, n: int, d: int, classes: int, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows and labels; one row in nine is left out, one in seven is zero."""
    rng = np.random.default_rng(seed)
    y = rng.integers(classes, size=n)
    x = torch.from_numpy(embeddings(kind, y, d, rng)).to(dtype)
    x[3::7] = 0
    y[4::9] = -1
    return [x, torch.from_numpy(y)]


@pytest.mark.filterwarnings("ignore:margin_plus=")
@pytest.mark.parametrize(
    ("products", "threads"), [("codes", 1), ("codes", 3), ("float", 1)], indirect=["products", "threads"]
)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("form", ["symmetric", "reference", "offset"])
def test_every_form(form: str, share: float, products: str, threads: int) -> None:
    """All kinds of rows and sizes around the edges of tiles; both gradients; squared; the penalties apart."""
    for k, (n, m, d) in enumerate(SIZES):
        kind = KINDS[(k + SHARES.index(share)) % len(KINDS)]
        classes = (1, 4, 100)[k % 3]
        sets = batch(kind, n, d, classes, k)
        of_pairs: dict[str, Any] = {}
        if form == "reference":
            sets += batch(kind, m, d, classes, k + 50)
        elif form == "offset":
            sets += [torch.cat([t[:5], t, t[:3]]) for t in sets]
            of_pairs = {"row_offset": min(n, 5)}
        options = {**of_pairs, **margins(oracle_of(*sets, **of_pairs), share)}
        check("cpu", *sets, **options)
        check("cpu", *sets, **options, penalty="squared")
        check_sides("cpu", *sets, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, codes: None) -> None:
    """16-bit rows are computed in float32; float64 has no codes."""
    for kind, share in (("random", 0.01), ("cone", 0.5), ("classes", 0.9)):
        sets = batch(kind, 130, 70, 10, 1, dtype)
        options = margins(oracle_of(*sets), share)
        check("cpu", *sets, **options)
        check("cpu", *sets, *batch(kind, 70, 70, 10, 2, dtype), **options)


@pytest.mark.parametrize("margin", [-3.0, -1.5, -1.0, 1.0, 1.5, 3.0])
@pytest.mark.filterwarnings("ignore:margin_")
def test_margins_at_the_ends_and_beyond(margin: float, products: str) -> None:
    for kind in ("random", "line"):
        sets = batch(kind, 80, 33, 5, 3)
        for penalty in ("hinge", "squared"):
            check("cpu", *sets, margin_plus=margin, margin_minus=-margin, penalty=penalty, exact=abs(margin) > 1)


@pytest.mark.parametrize("classes", [1, 9])
def test_margins_that_are_not_finite(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In compiled code nobody refuses them: counts are the same with codes and without, for NaN none."""
    x, y = batch("classes", 200, 40, classes, 1)
    for bad in (np.nan, np.inf, -np.inf, 1e300):
        for margin in ((bad, 0.3), (0.5, bad)):
            found = []
            for products in ("codes", "float"):
                monkeypatch.setenv("TCM_FUSED_PRODUCTS", products)
                found.append(loss(x, y, margin=margin)[-1].tolist())
            assert found[0] == found[1]
            assert not np.isnan(bad) or found[0][margin.index(bad)] == 0


def mixed(n: int, d: int) -> list[Tensor]:
    """Large classes: some whose pairs are all hard, some far apart, some scattered around a margin of 0.3."""
    rng = np.random.default_rng(4)
    y = np.sort(rng.integers(6, size=n))
    centre = rng.standard_normal((6, d))
    centre[1] = centre[0]
    noise = np.array([0.05, 0.05, 0.1, 1.5, 1.5, 4.0])[y, None]
    return [torch.from_numpy(centre[y] + noise * rng.standard_normal((n, d))).float(), torch.from_numpy(y)]


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
def test_tiles_of_every_kind_side_by_side(penalty: str, codes: None, threads: int) -> None:
    """Full tiles of 256 rows (one thread), each decided in its own way; the same bits at every run."""
    x, y = mixed(1600 if threads == 1 else 900, 24)
    check("cpu", x, y, margin_plus=0.9, margin_minus=0.3, penalty=penalty)
    check("cpu", x, y, x[:300], y[:300], margin_plus=-0.2, margin_minus=-0.5, penalty=penalty)
    first, *others = (loss(x, y, margin=(0.9, 0.3), squared=penalty == "squared") for _ in range(3))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_codes_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen by the kernel, or not, for few hard pairs and for many."""
    monkeypatch.delenv("TCM_FUSED_PRODUCTS", raising=False)
    x, y = batch("classes", 700, 60, 70, 5)
    for share in (0.001, 0.5):
        check("cpu", x, y, **margins(oracle_of(x, y), share))


# Pair by pair, however near the margin.


def loss(x: Tensor, y: Tensor, *reference: Any, margin: tuple[float, float], squared: bool = False) -> list[Tensor]:
    """The operator's loss, gradient, penalty and count; reference: columns, their labels, the column of row 0."""
    ref_x, ref_y, offset = reference or (None, None, None)
    found = torch.ops.tcm_fused.loss(
        x, y, ref_x, ref_y, offset, two(*margin), two(1, 1), squared, False, True, ref_x is not None
    )
    return [t for t in found if t is not None]


def unit(x: Tensor) -> Array:
    """Rows of unit length in float32, as float64."""
    wide = x.double().numpy()
    norm: Array = np.sqrt((wide**2).sum(1, keepdims=True))
    return (wide / np.maximum(norm, 1e-12)).astype(np.float32).astype(np.float64)


def similarities(x: Tensor, ref_x: Tensor) -> Array:
    """[N, M] by which pairs are decided."""
    s: Array = unit(x) @ unit(ref_x).T
    return s.astype(np.float32)


def hard(s: Array, y: Tensor, ref_y: Tensor, margin: tuple[float, float], offset: int | None) -> list[Array]:
    """Masks of the hard positives and negatives."""
    plus, minus = np.float32(margin[0]), np.float32(margin[1])
    valid = (y >= 0).numpy()[:, None] & (ref_y >= 0).numpy()
    if offset is not None:
        rows = np.arange(len(y))
        valid[rows, offset + rows] = False
    same = y.numpy()[:, None] == ref_y.numpy()
    return [valid & same & (s <= plus), valid & ~same & (s >= minus)]


def assert_decided(x: Tensor, y: Tensor, s: Array, margin: tuple[float, float]) -> None:
    """Counts and gradients are those of the decisions: symmetric; against all rows; in blocks, as ranks have them."""
    masks = hard(s, y, y, margin, 0)
    count = [int(mask.sum()) for mask in masks]
    assert loss(x, y, margin=margin)[-1].tolist() == count
    gradient = loss(x, y, x, y, 0, margin=margin)[1].double().numpy()
    u, norm = unit(x), x.double().norm(dim=1, keepdim=True).numpy()
    g = masks[1] @ u / max(count[1], 1) - masks[0] @ u / max(count[0], 1)
    wanted = np.where(norm > 0, (g - (g * u).sum(1, keepdims=True) * u) / np.maximum(norm, 1e-12), 0)
    assert (np.abs(gradient - wanted) * np.maximum(norm, 1e-12)).max() < 2e-5  # a pair more or less: 1 / count
    assert 2e-5 * max(count) < 0.5
    third = len(x) // 3
    blocks = [loss(x[a:b], y[a:b], x, y, a, margin=margin)[-1] for a, b in ((0, third), (third, len(x)))]
    assert torch.stack(blocks).sum(0).tolist() == count
    # Without row_offset the pairs of rows with themselves are positives too.
    every = [int(mask.sum()) for mask in hard(s, y, y, margin, None)]
    columns = [loss(x, y, x[a:b], y[a:b], None, margin=margin)[-1] for a, b in ((0, third), (third, len(x)))]
    assert torch.stack(columns).sum(0).tolist() == every


def aligned(n: int, d: int, rng: np.random.Generator) -> Array:
    """Partners 2k and 2k + 1 whose rounding errors are 0.49 of a step in every component, along the other row."""
    x = np.empty((n, d))
    base = rng.choice([-1.0, 1.0], d)
    for k in range(0, n - 1, 2):
        here = base * rng.choice([-1.0, 1.0], d, p=[0.1, 0.9])
        there = here * rng.choice([-1.0, 1.0], d, p=[0.3, 0.7])
        toward = rng.choice([-0.49, 0.49])
        x[k], x[k + 1] = rng.integers(5, 100) * here + toward * there, rng.integers(5, 100) * there + toward * here
        x[k, 0], x[k + 1, 1] = 127 * here[0], 127 * there[1]
    return x


def misleading(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Rows that are hard to decide by codes."""
    rng = np.random.default_rng(6)
    noise = rng.standard_normal((n, d))
    x = noise + rng.standard_normal(d)
    if kind == "aligned":
        x = aligned(n, d, rng)
    elif kind == "ragged":
        x = np.sign(x) * np.exp(3 * noise)
    elif kind == "huge entry":
        x[::2, 3] *= 1e4
    elif kind == "denormal":
        x[::2] *= 1e-40
    elif kind == "exact":
        x = np.sign(x) * rng.choice([127, 127, 1, 0], (n, d))
    elif kind == "alike":
        x = rng.standard_normal(d) + 1e-3 * noise
    y = np.arange(n) // 2 % 7
    y[5::11] = -1
    return torch.from_numpy(x).float(), torch.from_numpy(y)


BESIDE = [0.0, 1e-7, -1e-7, 1e-6, -1e-6, 1e-5, -1e-5]


@pytest.mark.parametrize("kind", ["random", "aligned", "ragged", "huge entry", "denormal", "exact", "alike"])
def test_margins_beside_a_similarity(kind: str, products: str) -> None:
    """At some pair's similarity, the least of a side, the largest, and beside it; of several widths."""
    for d in (16, 200):
        x, y = misleading(kind, 90, d)
        s = similarities(x, x)
        sides = [np.sort(s[mask]) for mask in hard(s, y, y, (2, -2), 0)]
        for k, away in enumerate(BESIDE):
            places = [(0, len(side) // 2, len(side) - 1)[k % 3] for side in sides]
            margin = [float(np.float32(side[place] + away)) for side, place in zip(sides, places, strict=True)]
            assert_decided(x, y, s, (margin[0], margin[1]))


@pytest.mark.parametrize("opposite", [False, True])
def test_the_bound_is_reached(opposite: bool, products: str) -> None:
    """The errors add up to e_i + e_j + e_i e_j in each of 64 columns: those are hard whose similarity is the margin."""
    d, sign = 4096, -1 if opposite else 1
    steps = np.full((2, d), 20 - 0.49)
    steps[0, 0] = steps[1, 1] = 127
    x, ref_x = torch.from_numpy(steps[:1]).float(), sign * torch.from_numpy(steps[1:]).float().repeat(64, 1)
    s = float(similarities(x, ref_x)[0, 0])
    for same in (True, False):
        labels = torch.zeros(1, dtype=torch.int64), torch.full((64,), 0 if same else 1)
        for beyond, count in ((0.0, 64), (1.0, 0)):
            margin = float(np.nextafter(np.float32(s), np.float32(s + (beyond if not same else -beyond))))
            found = loss(x, labels[0], ref_x, labels[1], None, margin=(margin, margin))[-1]
            assert found.tolist() == ([count, 0] if same else [0, count])


def lossy(d: int, lanes: int) -> Tensor:
    """A row whose product with itself loses all but the first `lanes` of its terms where sums have so many parts."""
    x = np.zeros(d)
    first = 1.0001 / (lanes + 1)
    half = 2.0 ** (np.floor(np.log2(first)) - 24)  # of the last place of a sum that begins with it
    x[np.arange(d) % (2 * lanes + 2) < lanes] = np.sqrt(0.98 * half)
    x[:lanes] = np.sqrt(first)
    x[2 * lanes + 1] = np.sqrt(1 - (x**2).sum())
    return torch.from_numpy(x).float()


@pytest.mark.parametrize("lanes", [7, 15, 31])
@pytest.mark.parametrize("d", [255, 4096, 65535, 65536])
def test_long_sums_are_decided_exactly(d: int, lanes: int, products: str) -> None:
    """Products in float32 of these rows are off by up to 1e-4, in sums as long as the rows allow."""
    x, y = lossy(d, lanes).repeat(3, 1), torch.arange(3)
    s = float(similarities(x, x)[0, 1])
    for away in (0.0, *np.geomspace(1e-7, 2e-4, 12)):
        margin = float(np.float32(s - away))
        assert loss(x, y, margin=(0, margin))[-1].tolist() == [0, 6], f"{s} is hard at {margin}"


# A processor that does not multiply codes.

WITHOUT_CODES = """
import os, torch
from test_codes import batch, loss
x, y = batch("classes", 600, 64, 60, 7)
bits = []
for products in ("float", "codes", ""):
    os.environ["TCM_FUSED_PRODUCTS"] = products
    bits.append(loss(x, y, margin=(0.95, 0.3)))
assert bits[0][-1].sum() > 0
for other in bits[1:]:
    assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True))
"""


def test_processor_without_products_of_codes() -> None:
    """All is as with products in float32, and nothing is said."""
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TCM_FUSED_PRODUCTS"},
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "PYTHONPATH": os.pathsep.join([tests, os.path.dirname(__file__), *sys.path]),
    }
    command = [sys.executable, "-c", WITHOUT_CODES]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
