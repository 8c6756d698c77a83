"""Groups within and across which pairs count, and all pairs as the divisor."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.batches import batch
from support.oracle import check, run
from support.refusals import M, N, arguments, refuse
from support.strategies import LABEL_DTYPES
from torch import Tensor

from tcm_fused import CrossBatchMemory, TCMLoss, tcm_loss

# Groups, and all pairs as the divisor.

GROUPED_FORMS = ("symmetric", "reference set", "row_offset")


def grouped(form: str, kind: str, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Sets with a tenth of padding, and their groups: four of uneven size, one, or one for each row."""
    rng = np.random.default_rng(11)
    m, n, offset = (60, 30, 20) if kind == "single" else (330, 130, 100)
    x, y = batch(m, 9, 5, dtype)
    y[::10] = -1
    groups = {
        "four": torch.from_numpy(np.minimum(rng.integers(4, size=m), rng.integers(6, size=m))) - 1,
        "one": torch.full((m,), 7),
        "single": torch.arange(m),
    }[kind]
    if form == "symmetric":
        return (x, y), {"groups": groups}
    part = slice(offset, offset + n)
    call = {"groups": groups[part], "ref_groups": groups, "row_offset": offset if form == "row_offset" else None}
    return (x[part], y[part], x, y), call


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize("kind", ["four", "one", "single"])
@pytest.mark.parametrize("form", GROUPED_FORMS)
def test_groups(backend: str, form: str, kind: str, group_pairs: str, penalty: str) -> None:
    """Against the oracle; and where all pairs are left, or none, the loss without groups, or 0."""
    sets, groups = grouped(form, kind)
    call: dict[str, Any] = {"margin_minus": 0.1, "lambda_plus": 0.3, "penalty": penalty, "row_offset": None}
    for reduction in ("violating", "all"):
        call["reduction"] = reduction
        result = check(backend, *sets, **{**call, **groups}, group_pairs=group_pairs)
        if kind == "four":
            assert result.count.min() > 0
        elif (kind == "one") == (group_pairs == "within"):
            # A row is the only one of its group: across groups, all pairs but those with itself.
            offset = groups.get("row_offset")
            if kind == "single" and form != "symmetric":
                offset = 20
            plain = run(backend, *sets, **{**call, "row_offset": offset})
            assert result.count.tolist() == plain.count.tolist()
            assert result.loss == pytest.approx(plain.loss, rel=1e-6)
        elif form != "reference set":
            assert result.count.tolist() == [0, 0]
            assert result.loss == 0
            assert not result.grad_x.any()


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
@pytest.mark.parametrize("group_pairs", ["within", "across"])
def test_group_dtypes_and_layouts(backend: str, group_pairs: str, dtype: torch.dtype) -> None:
    """Any integers, negative ones too, at any stride; labels at a stride as well."""
    sets, groups = grouped("row_offset", "four")
    if dtype == torch.bool:
        values = torch.tensor([True, False, True, False])
    else:
        info = torch.iinfo(dtype)
        values = torch.from_numpy(np.array([3, 0, info.max, info.min], dtype=str(dtype).removeprefix("torch.")))
    cast: dict[str, Any] = {name: values[groups[name] + 1] for name in ("groups", "ref_groups")}
    plain: dict[str, Any] = {name: value.long() for name, value in cast.items()}
    wide: dict[str, Any] = {name: torch.stack([value, value], 1)[:, 0] for name, value in cast.items()}
    call: dict[str, Any] = {"row_offset": 100, "margin_minus": 0.1, "reduction": "all", "group_pairs": group_pairs}
    expected = check(backend, *sets, **{**plain, **call})
    x, y, ref_x, ref_y = sets
    strided = (x, torch.stack([y, y], 1)[:, 1], ref_x, torch.stack([ref_y, ref_y], 1)[:, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for result in (run(backend, *strided, **{**cast, **call}), run(backend, *strided, **{**wide, **call})):
            assert result.loss == expected.loss
            np.testing.assert_array_equal(result.grad_x, expected.grad_x)
            np.testing.assert_array_equal(result.grad_ref, expected.grad_ref)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize("form", GROUPED_FORMS)
def test_groups_with_a_row_that_is_not_finite(backend: str, form: str, group_pairs: str, value: float) -> None:
    """NaN for all rows that take part, those of other groups and of none too; padding is not looked at."""
    sets, groups = grouped(form, "four")
    if form == "reference set":
        groups["groups"][5] = 99  # a group without columns
    clean = run(backend, *sets, **groups, group_pairs=group_pairs, margin_minus=0.1)
    for padding in (True, False):
        for rows in range(0, len(sets), 2):
            spoiled = [t.clone() for t in sets]
            row = int((spoiled[rows + 1] < 0).nonzero()[3]) if padding else 5
            spoiled[rows][row, 4] = value
            result = run(backend, *spoiled, **groups, group_pairs=group_pairs, margin_minus=0.1)
            grads = [grad for grad in (result.grad_x, result.grad_ref) if grad is not None]
            if padding:
                assert result.loss == clean.loss
                np.testing.assert_array_equal(result.grad_x, clean.grad_x)
                continue
            assert np.isnan(result.loss)
            assert np.isnan(result.violation).all()
            for grad, y in zip(grads, spoiled[1::2], strict=True):
                assert np.isnan(grad[y.numpy() >= 0]).all()


@pytest.mark.parametrize("group_pairs", ["within", "across"])
@pytest.mark.parametrize(("n", "m"), [(0, None), (0, 7), (7, 0), (7, 7)])
def test_groups_without_a_pair(backend: str, n: int, m: int | None, group_pairs: str) -> None:
    """No rows, no columns, no group in common: loss 0, gradients 0 to all that want one, alone or together."""
    sets: tuple[Tensor, ...] = batch(n, 5, 2)
    groups: dict[str, Any] = {"groups": torch.zeros(n, dtype=torch.int64)}
    if m is not None:
        sets = (*sets, *batch(m, 5, 2, seed=1))
        groups["ref_groups"] = torch.full((m,), int(group_pairs == "within"))
    for grad_x, grad_ref in ((True, True), (False, m is not None), (True, False)):
        for reduction in ("violating", "all"):
            call: dict[str, Any] = {"group_pairs": group_pairs, "reduction": reduction, **groups}
            result = check(backend, *sets, grad_x=grad_x, grad_ref=grad_ref, margin_plus=2.0, margin_minus=-2.0, **call)
            assert result.loss == 0
            assert result.count.tolist() == [0, 0]


def test_groups_of_a_bank_add_up(backend: str) -> None:
    """Within and across together are all pairs."""
    sets, groups = grouped("row_offset", "four", torch.float64)
    call: dict[str, Any] = {"margin_minus": 0.1, "reduction": "all", "penalty": "squared"}
    parts = [run(backend, *sets, **{**groups, **call}, group_pairs=pairs) for pairs in ("within", "across")]
    plain = run(backend, *sets, **call, row_offset=100)
    assert (parts[0].count + parts[1].count).tolist() == plain.count.tolist()
    penalty = sum(part.count * part.violation for part in parts)
    np.testing.assert_allclose(penalty, plain.count * plain.violation, rtol=1e-13)


def test_all_pairs_as_divisor(backend: str) -> None:
    """Each side's share of the loss falls with its hard pairs: by hand, and of the same gradient's direction."""
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]], dtype=torch.float64)  # s01 = 0.6, s02 = 0.8, s12 = 0.96
    y = torch.tensor([0, 0, 1])
    options: dict[str, Any] = {"margin_plus": 0.9, "margin_minus": 0.9, "backend": backend}
    assert tcm_loss(x, y, **options).item() == pytest.approx(0.3 + 0.06)
    assert tcm_loss(x, y, reduction="all", **options).item() == pytest.approx(0.3 + 0.06 / 2)
    assert tcm_loss(x, y, penalty="squared", **options).item() == pytest.approx(0.09 + 0.0036)
    everything = tcm_loss(x, y, penalty="squared", reduction="all", lambda_minus=5.0, **options)
    assert everything.item() == pytest.approx(0.09 + 5 * 0.0036 / 2)
    assert tcm_loss(x, y, groups=torch.tensor([0, 1, 1]), **options).item() == pytest.approx(0.06)
    across = tcm_loss(x, y, groups=torch.tensor([0, 1, 1]), group_pairs="across", **options)
    assert across.item() == pytest.approx(0.3)


# Groups that are refused.


def with_groups(**changed: Any) -> dict[str, Any]:
    return {"groups": torch.arange(N), "ref_groups": torch.arange(M), **changed}


@pytest.mark.parametrize("name", ["groups", "ref_groups"])
def test_groups_are_integers(name: str) -> None:
    value: Any
    for value in ([0] * N, np.zeros(N, dtype=np.int64), "text"):
        refuse(TypeError, f"{name} must be a torch.Tensor", type(value).__name__, **with_groups(**{name: value}))
    for dtype in (torch.float32, torch.complex64):
        value = torch.zeros(N if name == "groups" else M, dtype=dtype)
        refuse(TypeError, f"{name} must have an integer dtype", str(dtype), **with_groups(**{name: value}))
    value = torch.arange(N if name == "groups" else M).to_sparse()
    refuse(TypeError, f"{name} must be a dense tensor", "sparse", **with_groups(**{name: value}))


@pytest.mark.parametrize(("name", "size", "other"), [("groups", N, "embeddings"), ("ref_groups", M, "ref_emb")])
def test_shape_and_device_of_groups(name: str, size: int, other: str) -> None:
    for shape in ((), (size, 1), (size - 1,), (size + 1,), (0,)):
        value = torch.zeros(shape, dtype=torch.int64)
        refuse(ValueError, f"{name} must have shape [{size}]", f"got {list(shape)}", **with_groups(**{name: value}))
    meta = torch.arange(size, device="meta")
    refuse(ValueError, f"{name} are on meta", f"{other} on cpu", **with_groups(**{name: meta}))


def test_half_of_the_groups() -> None:
    refuse(ValueError, "group_pairs='across' came without groups", group_pairs="across")
    refuse(ValueError, "groups and ref_emb came without ref_groups", groups=torch.arange(N))
    refuse(ValueError, "ref_groups came without groups and ref_emb", ref_groups=torch.arange(M))
    refuse(ValueError, "ref_groups came without groups and ref_emb", ref_emb=None, ref_labels=None, **with_groups())


def test_pairs_across_groups_without_groups() -> None:
    """All pairs would be another loss than the one that was asked for. In every form, and at the call."""
    x, y = batch(12, 4, 3)
    for criterion in (TCMLoss(group_pairs="across"), CrossBatchMemory(TCMLoss(group_pairs="across"), size=8)):
        with pytest.raises(ValueError, match="group_pairs='across' came without groups"):
            criterion(x, y)
        criterion(x, y, groups=torch.arange(12) % 2)


def test_a_row_is_of_one_group() -> None:
    assert tcm_loss(**arguments(**with_groups(row_offset=0))).item() == 0
    refuse(ValueError, "row_offset=1", "ref_groups differ from groups", **with_groups(row_offset=1))
