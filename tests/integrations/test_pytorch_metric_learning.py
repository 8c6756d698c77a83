"""The adapter for pytorch-metric-learning: called by everything of the library that calls a loss.

Its own class is the oracle where it is right: without `ref_emb`. Elsewhere the definition is written out here, pair by
pair, and differentiated by autograd.
"""

import copy
import itertools
import math
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers, trainers
from pytorch_metric_learning.utils import distributed, loss_and_miner_utils
from support import batches
from support.given_pairs import Pairs, agree, batch, some_pairs, written_out
from support.parts import Pools
from torch import Tensor

from tcm_fused import TCMStats, tcm_loss
from tcm_fused.integrations import pytorch_metric_learning as adapter
from tcm_fused.integrations.given_pairs import pair_loss
from tcm_fused.integrations.pytorch_metric_learning import (
    AllPairs,
    CrossBatchMemory,
    ThresholdConsistentMarginLoss,
    recognise_all_pairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([2, 17, 40]),
    mined=st.sampled_from(["none", "pairs", "triplets"]),
    margins=st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5), st.floats(0, 10), st.floats(0, 10)),
)
def test_agrees_with_the_class_of_the_library(
    seed: int, n: int, mined: str, margins: tuple[float, float, float, float]
) -> None:
    """Both take the same positional arguments, and pairs that come twice count twice.

    No row is paired with itself: a similarity of 1 to within rounding would lie on either side of a margin of 1.
    """
    x, y = batch(n, 5, 4, seed)
    indices: tuple[Tensor, ...] | None = None
    if mined != "none":
        a1, shift, a2, other_shift = some_pairs(n, n - 1, 3 * n, seed)
        indices = a1, (a1 + 1 + shift) % n, a2, (a2 + 1 + other_shift) % n
        indices = indices if mined == "pairs" else (a1, indices[1], (a1 + 1 + other_shift) % n)
    m_plus, m_minus, *weights = margins
    classes: list[Any] = [ThresholdConsistentMarginLoss, losses.ThresholdConsistentMarginLoss]
    mine, peer = (cls(*weights, m_plus, m_minus) for cls in classes)
    agree(mine(x, y, indices), peer(x, y, indices), x)


@pytest.mark.parametrize("penalty", ["hinge", "squared"])
@pytest.mark.parametrize("reduction", ["violating", "all"])
@pytest.mark.parametrize("triplets", [False, True])
def test_pairs_with_a_reference_set(triplets: bool, reduction: str, penalty: str) -> None:
    """Anchors are rows, positives and negatives columns; both sets get their gradient; more pairs than one chunk."""
    (x, y), (ref, ref_y) = batch(30, 6, 5, seed=1), batch(47, 6, 5, seed=2)
    pairs = some_pairs(30, 47, 2 * 4096 + 5, seed=3)
    expected_pairs = (pairs[0], pairs[1], pairs[0], pairs[2] % 47) if triplets else pairs
    indices = expected_pairs[:2] + expected_pairs[3:] if triplets else pairs
    options: dict[str, Any] = {"margin_plus": 0.3, "margin_minus": 0.1, "lambda_plus": 0.7}
    criterion = ThresholdConsistentMarginLoss(penalty=penalty, reduction=reduction, **options)
    expected = written_out(x, ref, expected_pairs, penalty, reduction, **options)
    agree(criterion(x, y, indices, ref, ref_y), expected, x, ref)
    agree(criterion(x, indices_tuple=indices, ref_emb=ref), expected, x, ref)  # labels are not needed
    assert isinstance(criterion.stats, TCMStats)
    s = torch.nn.functional.cosine_similarity(x[pairs[0]], ref[pairs[1]])
    assert criterion.stats.count_plus.item() == int((s <= 0.3).sum())


def test_all_pairs_with_a_reference_set() -> None:
    """A row is left out of its own comparisons where columns are the rows, and only there."""
    (x, y), (ref, ref_y) = batch(30, 6, 5, seed=4), batch(47, 6, 5, seed=5)
    criterion = ThresholdConsistentMarginLoss(margin_plus=1.5, margin_minus=-0.5)  # a pair of a row with itself is hard
    every: dict[str, Any] = {"margin_plus": 1.5, "margin_minus": -0.5}
    other = x.detach().flip(0).requires_grad_()
    agree(criterion(x, y, None, ref, ref_y), tcm_loss(x, y, ref, ref_y, **every), x, ref)
    agree(criterion(x, y, None, x, y), tcm_loss(x, y, **every), x)
    agree(criterion(x, y, None, x, y.clone()), tcm_loss(x, y, **every), x)
    # Labels of its own for the second view, as when some of it is not to be compared: those count.
    other_y = torch.where(torch.arange(len(y)) % 3 == 0, -1, y.roll(1))
    agree(criterion(x, y, None, x, other_y), tcm_loss(x, y, x, other_y, row_offset=0, **every), x)
    # The library takes one label tensor for both to mean that the columns are the rows, here a second view of them.
    agree(criterion(x, y, None, other, y), tcm_loss(x, y, other, y, row_offset=0, **every), x, other)
    agree(criterion(x, y, None, other, y.clone()), tcm_loss(x, y, other, y, **every), x, other)
    pairs = loss_and_miner_utils.get_all_pairs_indices(y, y)
    agree(criterion(x, y, None, other, y), written_out(x, other, pairs, **every), x, other)


def all_of(y: Tensor, ref_y: Tensor, own: int | None) -> Pairs:
    """All pairs as the library lists them, and without those of a row i with column (own + i) mod M."""
    pairs = loss_and_miner_utils.get_all_pairs_indices(y, ref_y)
    if own is None:
        return pairs
    columns = (own + torch.arange(len(y))) % len(ref_y)
    return loss_and_miner_utils.remove_self_comparisons(pairs, columns, len(ref_y))


@pytest.mark.parametrize("own", [None, 0, 3, 11])
def test_lists_of_all_pairs_are_recognised(own: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take the fused pass, with the same result; own = 11 of 14 columns goes round the end of a memory."""
    (x, y), (ref, ref_y) = batch(6, 4, 3, seed=6), batch(14, 4, 3, seed=7)
    if own is not None:
        ref_y[(own + torch.arange(6)) % 14] = y
    pairs = all_of(y, ref_y, own)
    assert recognise_all_pairs(pairs, y, ref_y) == AllPairs(own)
    criterion = ThresholdConsistentMarginLoss(margin_plus=1.5, margin_minus=-0.5)
    expected = written_out(x, ref, pairs, margin_plus=1.5, margin_minus=-0.5)
    monkeypatch.setattr(adapter, "pair_loss", None)
    agree(criterion(x, y, pairs, ref, ref_y), expected, x, ref)
    triplet = (torch.tensor([0]), pairs[1][:1], pairs[3][:1])
    with pytest.raises(TypeError, match="not callable"):
        criterion(x, y, triplet, ref, ref_y)


@pytest.mark.parametrize("own", [None, 2])
def test_what_is_not_all_pairs_is_not_taken_for_it(own: int | None) -> None:
    """As many pairs as there must be, but one is another: in each place, and of each kind."""
    y, ref_y = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0, 1, 0, 5])
    pairs = all_of(y, ref_y, own)
    assert recognise_all_pairs(pairs, y, ref_y) == AllPairs(own)
    changed = 0
    for side in range(4):
        for place, value in itertools.product(range(len(pairs[side])), range(-1, 7)):
            other = tuple(t.clone() for t in pairs)
            if other[side][place] != value:
                other[side][place] = value
                assert recognise_all_pairs(other, y, ref_y) is None
                changed += 1
    assert changed > 100
    swapped = (pairs[2], pairs[3], pairs[0], pairs[1])
    assert recognise_all_pairs(swapped, y, ref_y) is None  # positives and negatives in each other's place
    assert recognise_all_pairs(pairs, y, torch.tensor([0, 1, 0, 1, 5, 0])) is None
    ascending = tuple(t.flip(0) for t in pairs)
    assert recognise_all_pairs(ascending, y, ref_y) is None
    negative = torch.tensor([-1, 1, -1]), torch.tensor([-1, 1, -1, 1, -1, 5])  # a class of its own in the library
    assert recognise_all_pairs(pairs, *negative) is None
    assert recognise_all_pairs(pairs, None, None) is None


@pytest.mark.parametrize(
    ("y", "ref_y"), [([0, 1], [0, 1]), ([0, 1], [0, 0]), ([0], [0, 1, 0, 2]), ([0, 0], [0, 0, 0]), ([0, 1, 0], [0, 1])]
)
def test_every_list_of_as_many_pairs(y: list[int], ref_y: list[int]) -> None:
    """Ascending lists with any pairs, repeated ones too, as positives and negatives in any way: against the meaning."""
    n, m = len(y), len(ref_y)
    places = list(itertools.product(range(n), range(m)))
    meant: dict[Any, AllPairs] = {}
    for own in [None, *(range(m) if n <= m else ())]:
        left = [(i, j) for i, j in places if own is None or j != (own + i) % m]
        sides = [tuple((i, j) for i, j in left if (y[i] == ref_y[j]) is same) for same in (True, False)]
        meant[tuple(sides)] = AllPairs(own)
    found = set()
    for length in (n * m - n, n * m):
        for listed in itertools.combinations_with_replacement(places, length):
            for split in itertools.product((True, False), repeat=length) if length < 5 else [(True,) * length]:
                sides = [
                    tuple(p for p, side in zip(listed, split, strict=True) if side is one) for one in (True, False)
                ]
                indices = [torch.tensor(side, dtype=torch.int64).reshape(-1, 2).T for side in sides]
                pairs = (*indices[0], *indices[1])
                result = recognise_all_pairs(pairs, torch.tensor(y), torch.tensor(ref_y))
                assert result == meant.get(tuple(sides)), sides
                found.add(result)
    reachable = {all_pairs for sides, all_pairs in meant.items() if len(sides[0]) + len(sides[1]) < 5 or not sides[1]}
    assert found == {None} | reachable


class ByPairs(losses.CrossBatchMemory):
    """The library's memory with nothing of ours but the name in its list: it lists all pairs."""

    @staticmethod
    def supported_losses() -> list[str]:
        return ["ThresholdConsistentMarginLoss"]


@pytest.mark.parametrize("miner", [None, "pairs", "triplets"])
@pytest.mark.parametrize("batch_size", [4, 7, 23])
def test_cross_batch_memory(batch_size: int, miner: str | None) -> None:
    """Batch for batch as the library's own, through several turns of a memory that no whole number of batches fills."""
    mine: Any = (
        miners.PairMarginMiner(pos_margin=0.8, neg_margin=0.2) if miner == "pairs" else miners.TripletMarginMiner()
    )
    criterion = ThresholdConsistentMarginLoss(margin_plus=1.5, margin_minus=-0.2)
    memory, peer = (
        cls(criterion, embedding_size=5, memory_size=23, miner=mine if miner else None)
        for cls in (CrossBatchMemory, ByPairs)
    )
    seen = [torch.empty(0, 5, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    for step in range(9):
        x, y = batch(batch_size, 5, 4, seed=step)
        loss = memory(x, y)
        agree(loss, peer(x, y), x)
        if miner is None:  # from the definition: the last 23 rows, of which the last are the batch itself
            for part, new in zip(seen, (x.detach(), y), strict=True):
                part.append(new)
            bank, bank_y = (torch.cat(part)[-23:] for part in seen)
            offset = len(bank) - batch_size
            agree(loss, tcm_loss(x, y, bank, bank_y, row_offset=offset, margin_plus=1.5, margin_minus=-0.2), x)
    assert torch.equal(memory.embedding_memory, peer.embedding_memory)
    restored = CrossBatchMemory(criterion, embedding_size=5, memory_size=23).double()
    restored.load_state_dict(memory.state_dict())
    assert torch.equal(restored.embedding_memory, memory.embedding_memory)


def test_cross_batch_memory_makes_no_list_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = CrossBatchMemory(ThresholdConsistentMarginLoss(), embedding_size=5, memory_size=40)
    x, y = batch(8, 5, 3, seed=0)
    indices = miners.MultiSimilarityMiner()(x, y)
    memory(x, y, indices)  # as in the library: all pairs, and then those given
    other = losses.ContrastiveLoss()
    theirs = CrossBatchMemory(other, embedding_size=5, memory_size=40)
    assert torch.equal(theirs(x, y), losses.CrossBatchMemory(other, embedding_size=5, memory_size=40)(x, y))
    monkeypatch.setattr(loss_and_miner_utils, "get_all_pairs_indices", None)
    memory(x, y)


def test_cross_batch_memory_with_enqueue_mask() -> None:
    """Rows that go into the memory, and rows that are compared with it: none of them with itself."""
    criterion = ThresholdConsistentMarginLoss(margin_plus=1.5, margin_minus=-0.2)
    memory, peer = (cls(criterion, embedding_size=5, memory_size=9) for cls in (CrossBatchMemory, ByPairs))
    for step in range(5):
        x, y = batch(8, 5, 3, seed=step)
        mask = torch.arange(8) % 2 == 0
        agree(memory(x, y, enqueue_mask=mask), peer(x, y, enqueue_mask=mask), x)


def test_multiple_losses_miners_and_regularizers() -> None:
    """As in the library's documentation of `MultipleLosses`, with each argument of its losses."""
    x, y = batch(40, 5, 4, seed=1)
    base, miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
    plain = ThresholdConsistentMarginLoss()
    both = losses.MultipleLosses(
        {"metric": base, "tcm": plain}, miners={"tcm": miner}, weights={"metric": 1, "tcm": 0.5}
    )
    agree(both(x, y), base(x, y) + 0.5 * plain(x, y, miner(x, y)), x)

    regularizer = regularizers.LpRegularizer()
    with_regularizer = ThresholdConsistentMarginLoss(embedding_regularizer=regularizer, embedding_reg_weight=0.3)
    agree(with_regularizer(x, y), plain(x, y) + 0.3 * x.norm(dim=1).mean(), x)
    assert with_regularizer.sub_loss_names() == ["loss", "embedding_reg_loss"]

    for reducer in (reducers.MeanReducer(), reducers.SumReducer(), reducers.AvgNonZeroReducer()):
        agree(ThresholdConsistentMarginLoss(reducer=reducer)(x, y), plain(x, y), x)
    parts = ThresholdConsistentMarginLoss(reducer=reducers.DoNothingReducer(), collect_stats=True)(x, y)
    agree(parts["loss"]["losses"], plain(x, y), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_documented_sizes(dtype: torch.dtype) -> None:
    """Four points in the plane whose similarities are 0.9, 0.71, 0.94 and less: by hand."""
    x = torch.tensor([[0.0, 1.0], [0.43, 0.90], [1.0, 0.0], [0.5, 0.5]], dtype=dtype, requires_grad=True)
    y = torch.tensor([0, 0, 1, 1])
    diagonal = 0.5**0.5
    hand = (0.9 - diagonal) + ((diagonal - 0.5) + (1.33 * diagonal / math.hypot(0.43, 0.9) - 0.5)) / 2
    for indices in (None, loss_and_miner_utils.get_all_pairs_indices(y)):
        value = ThresholdConsistentMarginLoss()(x, y, indices)
        assert value.item() == pytest.approx(hand, abs=4 * torch.finfo(dtype).eps)
        (grad,) = torch.autograd.grad(value, x)
        assert grad.dtype == dtype
        assert grad.isfinite().all()


def test_pairs_at_the_margin_zero_rows_and_nan() -> None:
    """Inequalities are inclusive; a zero row has similarity 0 and no gradient; NaN is not lost, unless in no pair."""
    x = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 0.0], [torch.nan, 1.0]], requires_grad=True)
    one = torch.tensor([0])
    criterion = ThresholdConsistentMarginLoss(margin_plus=0.6, margin_minus=0.6)
    none = torch.empty(0, dtype=torch.int64)
    value = criterion(x, None, (one, one + 1, none, none))
    assert value.item() == 0
    assert criterion.stats is not None
    assert criterion.stats.count_plus.item() == 1
    (grad,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(grad[:2], torch.tensor([[0.0, -0.8], [-0.128, 0.096]]))
    assert not grad[2:].any()
    value = criterion(x, None, (one, one + 2, one, one + 2))
    assert value.item() == pytest.approx(0.6)
    assert not torch.autograd.grad(value, x)[0][2].any()
    value = criterion(x, None, (one, one + 3, one, one + 1))
    assert value.isnan()
    assert torch.autograd.grad(value, x)[0][[0, 1, 3]].isnan().all()
    value = criterion(x, None, (none, none, none, none))
    assert value.item() == 0
    assert not torch.autograd.grad(value, x)[0].any()


def test_pair_loss_is_differentiated_once_and_keeps_little() -> None:
    """gradcheck; then a million pairs, for which only the gradients [N, D] are kept, and a few chunks are held."""
    x, ref = torch.randn(7, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    options = ThresholdConsistentMarginLoss(margin_plus=0.4, margin_minus=0.1, penalty="squared").options
    pairs = some_pairs(7, 9, 40, seed=2)
    torch.autograd.gradcheck(
        lambda a, b: pair_loss(a, b, pairs, options)[0], (x.requires_grad_(), ref.requires_grad_())
    )
    (grad,) = torch.autograd.grad(pair_loss(x, ref, pairs, options)[0], x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum() + x.sum(), x)

    n, d, count = 1000, 64, 1_000_000
    x = torch.randn(n, d, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    pairs = some_pairs(n, n, count // 2, seed=1)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        value, _ = pair_loss(x, x, pairs, options)
    assert sum(t.nbytes for t in kept) == 2 * n * d * 4
    value.backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak < 4 * (8 * n * d) + 6 * 4 * 4096 * d  # 2 unit vectors, 4 sums, 2 gradients; and blocks of [CHUNK, D]


def test_only_backward_differentiates_given_pairs() -> None:
    """Other derivatives are refused; nothing of them is dropped in silence."""
    x, index, options = torch.eye(4), torch.arange(4), ThresholdConsistentMarginLoss().options

    def loss(x: Tensor) -> Tensor:
        return pair_loss(x, x, (index, index.flip(0), index, index.roll(1)), options)[0]

    for derivative in (lambda: torch.func.jvp(loss, (x,), (x,)), lambda: torch.func.grad(loss)(x)):
        with pytest.raises(RuntimeError, match="neither forward-mode derivatives"):
            derivative()


def test_as_the_library_trains(tmp_path: Path) -> None:
    """Its trainer, sampler and miner, as in its examples; the loss is copied and saved with the model."""
    x, y = batches.batch(64, 6, 4, torch.float32, seed=2)
    trunk = torch.nn.Linear(6, 5)
    criterion = losses.MultipleLosses([losses.TripletMarginLoss(), ThresholdConsistentMarginLoss()])
    before = criterion(trunk(x), y).item()
    trainers.MetricLossOnly(
        models={"trunk": trunk},
        optimizers={"trunk_optimizer": torch.optim.Adam(trunk.parameters(), lr=0.02)},
        batch_size=16,
        loss_funcs={"metric_loss": criterion},
        mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        dataset=torch.utils.data.TensorDataset(x, y),
        sampler=samplers.MPerClassSampler(y, m=4, length_before_new_iter=64),
        dataloader_num_workers=0,
    ).train(num_epochs=3)
    assert criterion(trunk(x), y).item() < before
    for again in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert again(trunk(x), y).item() == criterion(trunk(x), y).item()
    assert criterion.state_dict() == {}


N, WORLD = 12, 2


def _worker(rank: int) -> None:
    """One rank with its part of one batch, of which every rank knows all to compare with."""
    x, y = batch(N * WORLD, 5, 4, seed=0)
    x = x.detach()
    own = slice(rank * N, rank * N + N)
    order = [*range(N * WORLD)[own], *(i for i in range(N * WORLD) if i not in range(N * WORLD)[own])]
    margins: dict[str, Any] = {"margin_plus": 1.5, "margin_minus": -0.2}
    criterion = ThresholdConsistentMarginLoss(**margins)
    mine = x[own].clone().requires_grad_()
    everyone = torch.cat([mine, x[order[N:]]])  # own rows first, as the library gathers them

    plain = distributed.DistributedLossWrapper(criterion)(mine, y[own])
    agree(plain, WORLD * tcm_loss(everyone, y[order], **margins), mine)
    # Averaged over the ranks, as DDP does, it is the gradient of the loss of the whole batch.
    whole = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(tcm_loss(whole, y, **margins), whole)
    torch.testing.assert_close(torch.autograd.grad(plain, mine)[0] / WORLD, grad[own])

    efficient = distributed.DistributedLossWrapper(criterion, efficient=True)(mine, y[own])
    agree(efficient, WORLD * tcm_loss(mine, y[own], everyone, y[order], row_offset=0, **margins), mine)

    memory = distributed.DistributedLossWrapper(CrossBatchMemory(criterion, embedding_size=5, memory_size=30))
    agree(memory(mine, y[own]), WORLD * tcm_loss(everyone, y[order], x[order], y[order], row_offset=0, **margins), mine)
    miner = distributed.DistributedMinerWrapper(miners.PairMarginMiner(0.8, 0.2), efficient=True)
    pairs = miner(mine, y[own])
    mined = distributed.DistributedLossWrapper(criterion, efficient=True)(mine, y[own], pairs)
    agree(mined, WORLD * written_out(mine, everyone, pairs, **margins), mine)


def test_distributed_wrappers(pools: Pools) -> None:
    pools[WORLD].run(_worker)


def test_wrapper_in_one_process() -> None:
    x, y = batch(20, 5, 4, seed=0)
    criterion = ThresholdConsistentMarginLoss()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = distributed.DistributedLossWrapper(criterion)(x, y)
    agree(value, criterion(x, y), x)


def test_errors_say_what_to_do() -> None:
    x, y = batch(20, 5, 4, seed=0)
    for distance in (distances.LpDistance(), distances.DotProductSimilarity(), distances.CosineSimilarity(power=2)):
        with pytest.raises(ValueError, match=r"distance must be CosineSimilarity.*leave the argument out"):
            ThresholdConsistentMarginLoss(distance=distance)
    ThresholdConsistentMarginLoss(distance=distances.CosineSimilarity())
    criterion = ThresholdConsistentMarginLoss()
    with pytest.raises(ValueError, match="labels and indices_tuple cannot both be None"):
        criterion(x)
    with pytest.raises(ValueError, match="ref_emb came without ref_labels"):
        criterion(x, y, None, x.clone())
    index = torch.tensor([3, 20])
    with pytest.raises(ValueError, match="positives must be from 0 to 19, got 3 to 20"):
        criterion(x, y, (y[:2], index, y[:2], y[:2]))
    with pytest.raises(ValueError, match="anchors of negatives must be from 0 to 19, got -1"):
        criterion(x, y, (y[:2], y[:2], y[:2] * 0 - 1, y[:2]))
    with pytest.raises(ValueError, match=r"one of each for a pair.* got 2 anchors of negatives and 3 negatives"):
        criterion(x, y, (y[:2], y[:2], y[:2], y[:3]))
    with pytest.raises(ValueError, match=r"one of each for a pair.* got 0 anchors of positives and 1 positives"):
        criterion(x, y, (y[:0], y[:1], y[:2], y[:2]))
    with pytest.raises(ValueError, match="one of each for a pair"):  # as many as all pairs are
        criterion(x[:2], y[:2], (y[:1] * 0, y[:2] * 0, y[:1] * 0, y[:1] * 0))
    for options, words in (({"penalty": "cubic"}, "penalty='cubic'"), ({"margin_plus": float("nan")}, "margin_plus")):
        for indices in (None, (index[:1],) * 4):
            with pytest.raises(ValueError, match=words):
                ThresholdConsistentMarginLoss(**options)(x, y, indices)
    with pytest.raises(TypeError, match="ignores ref_emb"):
        CrossBatchMemory(losses.ThresholdConsistentMarginLoss(), embedding_size=5)
    with pytest.raises(Exception, match="not supported for ArcFaceLoss"):
        CrossBatchMemory(losses.ArcFaceLoss(3, 5), embedding_size=5)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "pytorch_metric_learning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, adapter.__name__)
    with pytest.raises(ImportError, match=r"pip install pytorch-metric-learning$"):
        __import__(adapter.__name__)


@pytest.mark.parametrize("replaced", ["CrossBatchMemory", "ThresholdConsistentMarginLoss"])
def test_in_the_place_of_the_librarys_classes(replaced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """People put ours where code that they do not own looks for the library's: neither loops nor is refused."""
    ours = {"CrossBatchMemory": CrossBatchMemory, "ThresholdConsistentMarginLoss": ThresholdConsistentMarginLoss}
    theirs = losses.ThresholdConsistentMarginLoss()
    monkeypatch.setattr(losses, replaced, ours[replaced])
    memory = losses.CrossBatchMemory if replaced == "CrossBatchMemory" else CrossBatchMemory
    loss = losses.ThresholdConsistentMarginLoss() if replaced != "CrossBatchMemory" else ThresholdConsistentMarginLoss()
    assert memory.supported_losses().count("ThresholdConsistentMarginLoss") == 1
    x, y = torch.eye(4)[[0, 0, 1, 1]], torch.tensor([0, 0, 1, 1])
    assert memory(loss, embedding_size=4)(x, y).isfinite()
    assert memory(losses.TripletMarginLoss(), embedding_size=4)(x, y).isfinite()
    with pytest.raises(TypeError, match="ignores ref_emb"):
        memory(theirs, embedding_size=4)
