"""Queries against a gallery, and pairs within or across groups: counts equal to a double loop, in every function."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import batches
from support.oracle import Array
from support.pair_list import FORMS, NEAR, PairList, arguments, oracle_of, two_sets

from tcm_fused import calibrate, evaluate, opis, suggest_margins, tcm_loss
from tcm_fused.backends import blocked_between
from tcm_fused.thresholds import pairing
from tcm_fused.thresholds.pairing import NothingToMeasure
from tcm_fused.thresholds.rates import HALF, Pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def cells(s: Array, bits: int) -> Array:
    return np.bincount(np.floor(s * 2**bits).clip(-(2**bits), 2**bits).astype(int) + 2**bits, minlength=(2 << bits) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tiles", [None, (512, 2048), (7, 5)], ids=["kernel", "blocked", "small blocks"])
@given(seed=st.integers(0, 2**32), classes=st.integers(0, 9), number=st.integers(0, 4))
@settings(max_examples=15)
def test_tables_equal_the_double_loop(
    tiles: tuple[int, int] | None, dtype: torch.dtype, seed: int, classes: int, number: int
) -> None:
    """Similarities are multiples of 1/4 here, exact in any arithmetic: so is every entry."""
    rng = np.random.default_rng(seed)
    n, m = rng.choice([*range(40), 63, 64, 65, 130], size=2)
    x, ref = batches.dyadic(n, 6, rng), batches.dyadic(m, 6, rng)
    y, ref_y = rng.integers(-1, 9, size=n), rng.integers(-1, 9, size=m)
    t = np.sort(rng.choice([-1.1, -1, -0.75, -0.5, 0, 0.25, 0.5, 1], size=number, replace=False))
    before = blocked_between.ROWS, blocked_between.COLUMNS
    blocked_between.ROWS, blocked_between.COLUMNS = tiles or before
    operator = torch.ops.tcm_fused.counts if tiles is None else torch.ops.tcm_fused.counts_blocked
    try:
        counts, class_counts, best, ref_best = operator(
            torch.from_numpy(x).to(dtype),
            torch.from_numpy(y),
            torch.from_numpy(ref).to(dtype),
            torch.from_numpy(ref_y),
            classes,
            torch.from_numpy(t).to(dtype),
            4,
            None,
        )
    finally:
        blocked_between.ROWS, blocked_between.COLUMNS = before
    pairs = PairList.of(x, y, ref, ref_y)
    s = np.rint(pairs.s * 4) / 4
    for side, mine in enumerate((pairs.same, ~pairs.same)):
        assert counts[side].tolist() == cells(s[mine], 4).tolist()
        expected = np.zeros((classes + 1, len(t)), dtype=int)
        for value, first, second in zip(s[mine], pairs.first[mine], pairs.second[mine], strict=True):
            at = np.searchsorted(t.astype(np.float32 if dtype == torch.float32 else float), value, side="right") - 1
            for c in (first,) if side == 0 else (first, second):
                if at >= 0:
                    expected[min(c, classes), at] += 1
        assert class_counts[side].tolist() == expected.tolist()
        for found, rows, length in ((best, pairs.i, n), (ref_best, pairs.j, m)):
            want = np.full(length, -np.inf)
            np.maximum.at(want, rows[mine], s[mine])
            assert np.allclose(found[side].numpy(), want, rtol=0, atol=1e-6)


def test_progress_is_written() -> None:
    x, y = batches.batch(600, 4, 5)
    for operator in (torch.ops.tcm_fused.counts, torch.ops.tcm_fused.counts_blocked):
        done = torch.zeros(2, dtype=torch.int64)
        operator(x, y, x, y, 5, torch.empty(0), 5, done)
        assert done[0] == done[1] >= 2


@pytest.mark.parametrize("classes", [3, 900, 20_000])
def test_kernel_over_many_blocks(classes: int) -> None:
    """Blocks of full size, few and many columns for each; classes that only one set has. Similarities are exact."""
    rng = np.random.default_rng(classes)
    t = torch.tensor([-0.5, -0.25, 0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    for n, m in ((2300, 4700), (4700, 70), (70, 4700)):
        x, ref = (torch.from_numpy(batches.dyadic(k, 12, rng)) for k in (n, m))
        y, ref_y = (torch.from_numpy(rng.integers(-1, classes, size=k)) for k in (n, m))
        blocked = torch.ops.tcm_fused.counts_blocked(x, y, ref, ref_y, classes // 2, t, 4, None)
        in_float32 = torch.ops.tcm_fused.counts(x.float(), y, ref.float(), ref_y, classes // 2, t.float(), 4, None)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            kernel = torch.ops.tcm_fused.counts(x, y, ref, ref_y, classes // 2, t, 4, None)
            for ours, theirs, single in zip(kernel, blocked, in_float32, strict=True):
                assert torch.equal(ours, theirs)
                assert torch.equal(ours, single.to(ours.dtype))
        assert int(kernel[0].sum()) == int((y >= 0).sum()) * int((ref_y >= 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernel_and_blocked_form_agree(dtype: torch.dtype) -> None:
    """On similarities that are not exact: a pair may move by one cell, and then only near its edge."""
    (x, y), (ref, ref_y) = batches.batch(1100, 24, 90, dtype, seed=3), batches.batch(1900, 24, 90, dtype, seed=4)
    arguments = x, y, ref, ref_y, 90, torch.linspace(-0.2, 0.8, 33, dtype=dtype), 10, None
    kernel, blocked = torch.ops.tcm_fused.counts(*arguments), torch.ops.tcm_fused.counts_blocked(*arguments)
    for ours, theirs in zip(kernel[:2], blocked[:2], strict=True):
        moved = (ours.cumsum(-1) - theirs.cumsum(-1)).abs().max()
        assert moved <= (1100 * 1900 * 2e-6 if dtype == torch.float32 else 0)
    assert torch.equal(kernel[0].sum(1), blocked[0].sum(1))
    # Sums of 24 products in another order: either may be off by sqrt(24) / 2 eps in one deviation, and largest values
    # of 1900 rows are compared: 2 deviations of the two.
    for ours, theirs in zip(kernel[2:], blocked[2:], strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_every_time(dtype: torch.dtype) -> None:
    """Whichever thread takes which tile."""
    (x, y), (ref, ref_y) = batches.batch(700, 40, 30, dtype, seed=5), batches.batch(900, 40, 30, dtype, seed=6)
    t = torch.linspace(-0.2, 0.8, 33, dtype=dtype)
    torch.set_num_threads(3)
    first, *others = (torch.ops.tcm_fused.counts(x, y, ref, ref_y, 30, t, 17, None) for _ in range(4))
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


@pytest.mark.parametrize("form", FORMS)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(batches.KINDS))
@settings(max_examples=6)
def test_every_function_against_the_double_loop(form: str, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    call = arguments(form, two_sets(rng, n=25, m=30, kind=kind))
    pairs = oracle_of(call)
    try:
        found = calibrate(**call, frr=0.3)
    except NothingToMeasure:
        assert not pairs.same.any() or pairs.same.all()
        return
    assert found.pairs == (pairs.same.sum(), (~pairs.same).sum())
    assert found.class_ids.tolist() == pairs.classes.tolist()
    t = pairs.clear(rng)
    result = evaluate(**call, threshold=t)
    assert result.far == pytest.approx(pairs.far(t), abs=1e-12)
    assert result.frr == pytest.approx(pairs.frr(t), abs=1e-12)
    for k, c in enumerate(pairs.classes):
        positives, negatives = pairs.of_class(c)
        assert (result.class_positives[k], result.class_negatives[k]) == (len(positives), len(negatives))
        assert result.class_frr[k] == pytest.approx((positives < t).mean(), abs=1e-12)
        assert result.class_far[k] == pytest.approx((negatives >= t).mean() if len(negatives) else 0, abs=1e-12)
    best = pairs.best(form.startswith("two"))
    known, nearest = np.isfinite(best[0]), np.maximum(*best)
    tie = bool((np.abs(best[0][known] - best[1][known]) < NEAR).any())
    if not tie:
        assert result.recall_at_1 == pytest.approx((best[0] > best[1])[known].mean())
        assert result.detection_rate == pytest.approx(((best[0] > best[1]) & (best[0] >= t))[known].mean())
    strangers = ~known & np.isfinite(nearest)
    assert result.queries == (known.sum(), strangers.sum())
    assert result.coverage == pytest.approx((nearest >= t)[np.isfinite(nearest)].mean())
    if strangers.any():
        assert result.false_alarm_rate == pytest.approx((nearest >= t)[strangers].mean())
    ts = np.sort([t, pairs.clear(rng, t), pairs.clear(rng, -1, t)])
    if (np.diff(ts) > 1e-4).all() and not all(len(pairs.of_class(c)[1]) == 0 for c in pairs.classes):
        curve = opis(**call, thresholds=ts, distance="cosine")
        assert np.allclose(curve.far, [pairs.far(v) for v in ts], rtol=0, atol=1e-12)
        assert np.allclose(curve.frr, [pairs.frr(v) for v in ts], rtol=0, atol=1e-12)
        phi = [[(pairs.of_class(c)[0] >= v).mean() for v in ts] for c in pairs.classes]
        assert np.allclose(curve.sensitivity, phi, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:far=.*margin_plus")
@pytest.mark.parametrize("form", FORMS)
def test_margins_mine_what_the_loss_mines(form: str, rng: np.random.Generator) -> None:
    call = arguments(form, two_sets(rng, n=60, m=90))
    found = suggest_margins(**call, far=0.2, frr=0.3)
    tensors: Any = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in call.items()}
    _, stats = tcm_loss(
        **tensors, margin_plus=found.margin_plus, margin_minus=found.margin_minus, return_stats=True, backend="torch"
    )
    assert (found.count_plus, found.count_minus) == (int(stats.count_plus), int(stats.count_minus))
    assert 0 < found.share_plus <= 0.3
    assert 0 < found.share_minus <= 0.2


def test_opis_of_the_range_is_found_in_two_sets(rng: np.random.Generator) -> None:
    call = arguments("two", two_sets(rng, n=150, m=200))
    result = opis(**call, num_thresholds=21)
    pairs = oracle_of(call)
    assert result.far.max() <= 0.1
    assert result.far.min() >= 0.01
    clear = [k for k, t in enumerate(result.similarity) if (np.abs(pairs.s - t) > NEAR).all()]
    assert len(clear) > 3
    assert np.allclose(result.far[clear], [pairs.far(result.similarity[k]) for k in clear], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_text_labels_and_groups_mean_the_same(form: str, rng: np.random.Generator) -> None:
    sets = two_sets(rng)
    text: dict[str, Any] = {}
    for name, value in sets.items():
        if name in ("labels", "ref_labels"):
            sets[name] = value.clip(0)  # text has no rows that are left out
            text[name] = [f"class {v}" for v in sets[name]]
        else:
            text[name] = [f"camera {v}" for v in value] if "groups" in name else value
    expected = evaluate(**arguments(form, sets), threshold=0.3)
    found = evaluate(**arguments(form, text), threshold=0.3)
    assert (found.far, found.frr, found.class_far.tolist()) == (expected.far, expected.frr, expected.class_far.tolist())
    assert found.class_names is not None
    assert found.class_names.tolist() == [f"class {c}" for c in expected.class_ids]
    if found.groups is not None:
        assert found.groups.names is not None
        assert found.groups.names.tolist() == ["camera 0", "camera 1", "camera 2"]


@pytest.mark.parametrize("form", ["one within", "two within", "two across"])
def test_rates_of_groups(form: str, rng: np.random.Generator) -> None:
    sets = two_sets(rng)
    call = arguments(form, sets)
    groups = evaluate(**call, threshold=0.2).groups
    assert groups is not None
    pairs = oracle_of(call)
    assert groups.positives.sum() == pairs.same.sum()
    for k, g in enumerate(groups.ids):
        mine = sets["groups"][pairs.i] == g
        negative = pairs.s[mine & ~pairs.same]
        assert groups.negatives[k] == len(negative)
        assert groups.far[k] == pytest.approx((negative >= 0.2).mean())
        assert groups.frr[k] == pytest.approx((pairs.s[mine & pairs.same] < 0.2).mean())


def test_one_set_against_itself_by_halves(rng: np.random.Generator) -> None:
    """The pairs of a set are those within two halves and those between them."""
    x, y = batches.batch(300, 8, 9)
    half = torch.arange(300) % 2
    every = Pairs(x, y, "torch", False).count(np.empty(0)).rates
    parts = [
        Pairs(x, y, "torch", False, groups=half, group_pairs=how).count(np.empty(0)).rates
        for how in ("within", "across")
    ]
    for name in ("accepted_positives", "accepted_negatives"):
        total = sum(getattr(part, name) for part in parts)
        assert np.abs(getattr(every, name) - total).max() <= 1  # one rounding of a product near an edge of a cell


@pytest.mark.parametrize("form", FORMS)
def test_backends(form: str, rng: np.random.Generator) -> None:
    call = arguments(form, two_sets(rng))
    t = oracle_of(call).clear(rng)
    found = [evaluate(**call, threshold=t, backend=backend) for backend in ("auto", "cpu", "torch")]
    assert len({(result.accepted, result.class_far.tobytes(), result.coverage) for result in found}) == 1


def test_a_set_as_its_own_gallery() -> None:
    """Counted as it was asked for, as the loss does, with a warning."""
    x, y = batches.batch(30, 4, 3)
    with pytest.warns(UserWarning, match="ref_emb is embeddings itself") as caught:
        found = evaluate(x, y, x, y, threshold=0.3)
    assert caught[0].filename == __file__
    one = evaluate(x, y, threshold=0.3)
    assert found.pairs == (2 * one.pairs[0] + 30, 2 * one.pairs[1])
    assert found.accepted == (2 * one.accepted[0] + 30, 2 * one.accepted[1])


def test_panels_of_a_memory_map(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Walked in panels, each form counts the same as in memory."""
    sets = two_sets(rng, n=60, m=70)
    mapped = dict(sets)
    for name in ("embeddings", "ref_emb"):
        np.save(tmp_path / f"{name}.npy", sets[name])
        mapped[name] = np.load(tmp_path / f"{name}.npy", mmap_mode="r")
    expected = {form: evaluate(**arguments(form, sets), threshold=0.2) for form in FORMS}
    monkeypatch.setattr(pairing, "room", lambda: 4 * 6 * 16 * 48)  # 48 panels of 16 rows
    monkeypatch.setattr(pairing, "_COPIES", 100)
    for form in FORMS:
        found = evaluate(**arguments(form, mapped), threshold=0.2)
        assert found.to_dict()["far"] == expected[form].far
        assert found.class_far.tolist() == expected[form].class_far.tolist()
        assert (found.coverage, found.recall_at_1) == (expected[form].coverage, expected[form].recall_at_1)
        groups, want = found.groups, expected[form].groups
        assert groups is want is None or (groups and want and groups.far.tolist() == want.far.tolist())
    assert len(Pairs(mapped["embeddings"], sets["labels"], "auto", False)._blocks) == 10
    for dtype in (np.float16, np.float32):
        np.save(tmp_path / "narrow.npy", sets["embeddings"].astype(dtype))
        narrow = np.load(tmp_path / "narrow.npy", mmap_mode="r")
        whole = evaluate(sets["embeddings"].astype(dtype), sets["labels"], threshold=0.2, backend="torch")
        assert evaluate(narrow, sets["labels"], threshold=0.2).far == pytest.approx(whole.far, abs=1e-3)
    broken = sets["embeddings"].copy()
    broken[45, 2] = np.nan
    np.save(tmp_path / "broken.npy", broken)
    with pytest.raises(NothingToMeasure, match="1 of 60 rows hold NaN or infinity, the first is row 45"):
        evaluate(np.load(tmp_path / "broken.npy", mmap_mode="r"), sets["labels"].clip(0), threshold=0.1)


def test_progress_of_several_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = batches.batch(400, 8, 5)
    shown = evaluate(x, y, threshold=0.3, groups=torch.arange(400) % 3, group_pairs="across", progress=True)
    assert shown.far == evaluate(x, y, threshold=0.3, groups=torch.arange(400) % 3, group_pairs="across").far
    assert "pairs: 100%" in capsys.readouterr().err


# Bad input.

X = np.eye(4)
Y = np.array([0, 0, 1, 1])
CALLS: dict[str, Any] = {
    "opis": opis,
    "calibrate": lambda *a, **k: calibrate(*a, far=0.1, **k),
    "suggest_margins": lambda *a, **k: suggest_margins(*a, far=0.1, frr=0.1, **k),
    "evaluate": lambda *a, **k: evaluate(*a, threshold=0.1, **k),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("sets", "error", "message"),
    [
        ({"ref_emb": X}, ValueError, "ref_emb came without ref_labels"),
        ({"ref_labels": Y}, ValueError, "ref_labels came without ref_emb"),
        ({"ref_emb": X[:, :3], "ref_labels": Y}, ValueError, "ref_emb has D=3, embeddings have D=4"),
        ({"ref_emb": X, "ref_labels": Y[:3]}, ValueError, r"ref_labels must have shape \[4\]"),
        ({"ref_emb": X, "ref_labels": ["a", "a", "b", "b"]}, TypeError, "labels are integers, ref_labels are text"),
        ({"ref_emb": X, "ref_labels": Y + 2}, NothingToMeasure, "no class is in both sets"),
        ({"ref_emb": X, "ref_labels": Y * 0 - 1}, NothingToMeasure, "ref_emb has no row that takes part"),
        ({"ref_emb": X[:0], "ref_labels": Y[:0]}, NothingToMeasure, "ref_emb has no row that takes part"),
        ({"ref_emb": X * np.nan, "ref_labels": Y}, NothingToMeasure, "ref_emb must be finite"),
        ({"groups": Y[:3]}, ValueError, r"groups must have shape \[4\]"),
        ({"groups": Y + 0.5}, TypeError, "groups must hold integer or text"),
        ({"groups": np.arange(4)}, NothingToMeasure, "no class has two samples, as the groups pair them"),
        ({"groups": Y}, NothingToMeasure, "no pair is negative"),
        ({"groups": Y, "group_pairs": "between"}, ValueError, "group_pairs='between' is not known"),
        ({"groups": Y, "ref_emb": X, "ref_labels": Y}, ValueError, "groups and ref_emb came without ref_groups"),
        ({"group_pairs": "across"}, ValueError, "group_pairs='across' came without groups"),
        ({"ref_groups": Y}, ValueError, "ref_groups came without groups and ref_emb"),
        ({"ref_emb": X, "ref_labels": Y, "backend": "triton"}, RuntimeError, "backend='triton' is not available"),
    ],
)
def test_bad_sets(call: str, sets: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CALLS[call](X, Y, **sets)


def test_grid_is_that_of_one_set() -> None:
    assert calibrate(X + 0.1, Y, X + 0.2, Y, frr=0.5).threshold.similarity * HALF % 1 == 0
