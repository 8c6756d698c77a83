"""The memory bank: against every pair written out with a plain list of the rows stored, and across checkpoints."""

import copy
import io
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.definition import Set, definition
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from tcm_fused import CrossBatchMemory, TCMLoss

D = 5
Batch = tuple[Tensor, Tensor, Tensor]  # embeddings, labels, groups
BACKENDS = ("cpu", "torch")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"penalty": "squared", "lambda_plus": 2.0},
    {"reduction": "all", "lambda_minus": 0.5},
    {"penalty": "squared", "reduction": "all", "margin_minus": -0.2},
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")  # pytest shows it where a test fails
    torch.manual_seed(seed)


def draw(n: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Embeddings that take a gradient, labels, some of them negative, and groups."""
    return torch.randn(n, D, dtype=dtype).requires_grad_(), torch.randint(-1, 3, (n,)), torch.randint(3, (n,))


def memory(size: int, warm_up: int = 0, **options: Any) -> CrossBatchMemory:
    options = {"margin_plus": 0.3, "margin_minus": 0.1, **options}
    return CrossBatchMemory(TCMLoss(**options), size, warm_up)


def last(size: int, stored: Batch, batch: Batch) -> Batch:
    """`stored`, then the rows of `batch` that have a label: the last `size` of them."""
    keep = batch[1] >= 0
    x, y, groups = (torch.cat([old, new.detach()[keep]]) for old, new in zip(stored, batch, strict=True))
    start = max(len(y) - size, 0)
    return x[start:], y[start:], groups[start:]


def near_unit(x: Tensor) -> Tensor:
    """Rows over the power of two that brings the largest entry into [2, 4)."""
    return x.detach() / 2.0 ** (x.detach().abs().amax(1, keepdim=True).log2().floor() - 1)


EMPTY = Set(
    torch.empty(0, D, dtype=torch.float64), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
)


@pytest.mark.parametrize("grouped", ["", "within", "across"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pair_with_batch_and_bank(backend: str, options: dict[str, Any], grouped: str) -> None:
    """Batches of all sizes, smaller and larger than the bank of 9 and round its end: loss and exact gradient."""
    options = {**options, "group_pairs": grouped or "within"}
    criterion = memory(9, backend=backend, **options)
    stored = draw(0)
    for n in (4, 3, 0, 7, 1, 30, 9, 5, 8):
        x, y, groups = batch = draw(n)
        loss = criterion(x, y, groups if grouped else None)
        columns = [torch.cat(both) for both in zip(batch, stored, strict=True)]
        used = 3 if grouped else 2
        sets = Set(*batch[:used]), Set(*columns[:used])
        wanted = definition(*sets, {"margin_plus": 0.3, "margin_minus": 0.1, **options})
        torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
        grad, wanted_grad = (torch.autograd.grad(value, x)[0] for value in (loss, wanted))
        torch.testing.assert_close(grad, wanted_grad, rtol=1e-10, atol=1e-13)
        stored = last(9, stored, batch)
        in_bank = criterion.labels >= 0
        oldest = int(criterion.position) if in_bank.all() else 0
        assert criterion.embeddings[in_bank].roll(-oldest, 0).equal(near_unit(stored[0]))
        assert criterion.labels[in_bank].roll(-oldest).equal(stored[1])


def test_gradcheck() -> None:
    criterion = memory(6)
    criterion(*draw(8)[:2])
    criterion.eval()
    x, y, _ = draw(7)
    assert torch.autograd.gradcheck(lambda x: criterion(x, y), x)


def test_an_empty_bank_changes_nothing() -> None:
    """In value, gradient and statistics, to the bit: before anything is stored, and while warming up."""
    criterion = memory(16, warm_up=2)
    plain = TCMLoss(margin_plus=0.3, margin_minus=0.1)
    for _ in range(3):
        x, y, _ = draw(6)
        loss, wanted = criterion(x, y), plain(x, y)
        assert loss.equal(wanted)
        assert torch.autograd.grad(loss, x)[0].equal(torch.autograd.grad(wanted, x)[0])
        assert criterion.loss.stats == plain.stats
    assert criterion.filled == 6  # of the third call


def test_statistics_count_pairs_with_the_bank() -> None:
    criterion = memory(4, margin_plus=1.0, margin_minus=-1.0)
    x = torch.eye(2, D)
    criterion(x, torch.tensor([0, 1]))
    criterion(x, torch.tensor([0, 0]))
    assert criterion.loss.stats is not None
    # Of the batch both pairs are positive; row i has one positive and one negative in the bank.
    assert [t.item() for t in criterion.loss.stats[:2]] == [2 + 2, 2]


def test_evaluation_stores_nothing() -> None:
    criterion = memory(8)
    criterion(*draw(5)[:2])
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    with_bank = criterion(*draw(5)[:2])
    assert with_bank.isfinite()
    after = criterion.state_dict()
    assert all(before[name].equal(after[name]) for name in after)


def test_what_is_not_finite_is_not_stored() -> None:
    """One bad step is not a bad bank."""
    criterion = memory(8)
    x, _, _ = draw(4)
    y = torch.arange(4)
    bad = x.detach().clone()
    bad[1, 2] = torch.inf
    bad[3, 0] = torch.nan
    assert criterion(bad, y).isnan()
    assert criterion.labels.tolist() == [0, 2, -1, -1, -1, -1, -1, -1]
    assert criterion(x, y).isfinite()


def test_no_gradient_is_kept_and_changes_after_forward_do_not_matter() -> None:
    """Backward may come after the bank was written again."""
    criterion = memory(4)
    (x, y, _), (z, w, _) = draw(4), draw(4)
    criterion(z, w)
    loss = criterion(x, y)
    (wanted,) = torch.autograd.grad(loss, x, retain_graph=True)
    criterion(z, w)
    assert torch.autograd.grad(loss, x)[0].equal(wanted)
    assert not criterion.embeddings.requires_grad
    with torch.no_grad():
        criterion(x, y)


def test_groups_now_and_then() -> None:
    """A row stored without a group takes no part where there are groups."""
    criterion = memory(8, margin_plus=2.0)
    x = torch.eye(3, D)
    y = torch.arange(3)
    criterion(x, y)
    assert criterion(x, y, y).item() == 0  # each row is alone in its group
    assert criterion(x, y, y).item() == pytest.approx(2.0 - 1.0)  # but for itself, stored with its group
    across = memory(8, margin_plus=2.0)
    across(x, y)
    across.loss.group_pairs = "across"
    assert across(x, y, torch.zeros_like(y)).item() == 0
    assert across(x, y, torch.ones_like(y)).item() == pytest.approx(2.0 - 1.0)


# Saved, loaded, moved, copied.


def steps(criterion: CrossBatchMemory, batches: list[Batch]) -> list[float]:
    return [criterion(x, y).item() for x, y, _ in batches]


def reloaded(criterion: CrossBatchMemory) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


@pytest.mark.parametrize("used", [0, 1, 4], ids=["before the first call", "partly filled", "full"])
def test_a_checkpoint_goes_on_with_the_same_losses(used: int) -> None:
    batches = [draw(4) for _ in range(used + 4)]
    criterion = memory(10, warm_up=1)
    steps(criterion, batches[:used])
    state = reloaded(criterion)
    wanted = steps(criterion, batches[used:])
    fresh, other = memory(10, warm_up=1), memory(10, warm_up=1)
    steps(other, [draw(7), draw(7)])  # has seen something else before
    for loaded in (fresh, other):
        loaded.load_state_dict(state)
        assert steps(loaded, batches[used:]) == wanted


def test_a_checkpoint_of_another_dtype() -> None:
    criterion = memory(10)
    criterion(*draw(6)[:2])
    state = reloaded(criterion)
    single = memory(10)
    single(*draw(6, torch.float32)[:2])
    single.load_state_dict(state)  # which was torch.float32, and stays it
    assert single.embeddings.dtype == torch.float32
    assert single.embeddings.equal(criterion.embeddings.float())
    x, y, _ = draw(6, torch.float32)
    assert single(x, y).item() == pytest.approx(criterion(x.double(), y).item(), rel=1e-5)
    half = copy.deepcopy(single).half()
    assert half.embeddings.dtype == torch.float16
    assert half(x, y).item() == pytest.approx(single(x, y).item(), rel=1e-2)


def test_a_checkpoint_that_does_not_fit() -> None:
    criterion = memory(10)
    criterion(*draw(6)[:2])
    shorter, wider = memory(11), memory(10)
    shorter(torch.ones(3, D), torch.arange(3))
    wider(torch.ones(3, D + 1), torch.arange(3))
    for other in (memory(11), shorter, wider):
        before = copy.deepcopy(other.state_dict())
        message = r"size mismatch for embeddings: a memory of shape \[10, 5\] does not fit into one of shape"
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(criterion.state_dict())
        after = other.state_dict()
        assert all(before[name].equal(after[name]) for name in after)


def test_what_is_filled_follows_from_the_labels() -> None:
    """Where it was not saved, or was lost on the way."""
    criterion, other = memory(10), memory(10)
    criterion(draw(6)[0], torch.arange(6))
    state = reloaded(criterion)
    del state["_extra_state"]
    other.load_state_dict(state, strict=False)
    assert other.filled == 6
    x, y, _ = draw(3)
    assert other(x, y).equal(criterion(x, y))


def test_a_checkpoint_is_of_tensors_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    criterion, other = memory(10, warm_up=1), memory(10, warm_up=1)
    steps(criterion, [draw(4) for _ in range(3)])
    save_file(criterion.state_dict(), tmp_path / "memory.safetensors")
    other.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert (other.calls, other.filled) == (criterion.calls, criterion.filled) == (3, 8)
    batches = [draw(4) for _ in range(3)]
    assert steps(other, batches) == steps(criterion, batches)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_loaded_in_place(tmp_path: Path) -> None:
    """torch.distributed.checkpoint fills tensors that are there: `embedding_size` tells their shape."""
    criterion, other = (CrossBatchMemory(TCMLoss(), 10, embedding_size=D) for _ in range(2))
    batches = [draw(4, torch.float32) for _ in range(6)]
    steps(criterion, batches[:2])
    assert criterion.embeddings.shape == (10, D)
    save(criterion.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    state = other.state_dict()
    load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    assert steps(other, batches[2:]) == steps(criterion, batches[2:])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["copy", "pickle"]
)
def test_copies_go_their_own_way(copied: Any) -> None:
    criterion = memory(6)
    criterion(*draw(4)[:2])
    twin = copied(criterion)
    batches = [draw(4) for _ in range(3)]
    assert steps(twin, batches) == steps(criterion, batches)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_bank_has_the_dtype_of_the_first_batch(dtype: torch.dtype) -> None:
    criterion = memory(6)
    x, y, _ = draw(6, dtype)
    criterion(x, y.abs())
    assert criterion.embeddings.dtype == dtype
    assert criterion.embeddings.equal(near_unit(x))
    wide, y, _ = draw(3, torch.float64)
    criterion(wide, y.abs()).backward()
    assert wide.grad is not None
    assert criterion.embeddings[:3].equal(near_unit(wide).to(dtype))


@pytest.mark.parametrize("bank", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_of_any_scale_fit_into_the_bank(dtype: torch.dtype, bank: torch.dtype) -> None:
    """The loss does not depend on scale, nor does the bank, whatever its dtype; a zero row stays zero."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([[0.6, 0.8], [0.8, -0.6], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]]).to(bank).to(dtype)
    scale = torch.tensor([largest, 1e30, 1e-10, 1.0, 1e5], dtype=dtype)[:, None]
    y = torch.tensor([0, 1, 0, 1, 2])
    losses = []
    for factor in (torch.ones_like(scale), scale):
        criterion = memory(5)
        criterion(torch.zeros(0, 2, dtype=bank), y[:0])  # makes the bank
        criterion(x * factor, y)
        assert criterion.embeddings.dtype == bank and criterion.embeddings.isfinite().all()
        assert not criterion.embeddings[3].any() and criterion.labels.equal(y)
        losses.append(criterion(x.flip(0), y).item())
    assert losses[1] == pytest.approx(losses[0], rel=8 * max(torch.finfo(bank).eps, torch.finfo(dtype).eps))


def test_rows_that_are_stored_keep_their_bits() -> None:
    """16-bit rows are in a 16-bit bank what they were: their directions are not rounded again."""
    x, y, _ = draw(6, torch.float16)
    criterion = memory(6)
    criterion(x, y.abs())
    ratio = criterion.embeddings.double() / x.detach().double()
    assert (ratio == ratio[:, :1]).all()


def test_inference_mode_leaves_a_memory_that_works() -> None:
    criterion, wanted = memory(6), memory(6)
    batches = [draw(4) for _ in range(3)]
    with torch.inference_mode():
        criterion(*batches[0][:2])
    wanted(*batches[0][:2])
    for x, y, _ in batches[1:]:
        loss, wanted_loss = criterion(x, y), wanted(x, y)
        assert loss.equal(wanted_loss)
        loss.backward()
    assert not any(buffer.is_inference() for buffer in criterion.buffers())


# Wrong arguments.


@pytest.mark.parametrize(
    ("kind", "message", "arguments"),
    [
        (TypeError, "loss must be a TCMLoss or a DistributedTCMLoss, got Identity", (torch.nn.Identity(), 4)),
        (TypeError, "size must be an int, got float", (TCMLoss(), 4.0)),
        (TypeError, "size must be an int, got bool", (TCMLoss(), True)),
        (ValueError, "size must be at least 1, got 0", (TCMLoss(), 0)),
        (ValueError, "warm_up must be at least 0, got -1", (TCMLoss(), 4, -1)),
        (TypeError, "embedding_size must be an int, got float", (TCMLoss(), 4, 0, 8.0)),
        (ValueError, "embedding_size must be at least 1, got 0", (TCMLoss(), 4, 0, 0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_construction(kind: type[Exception], message: str, arguments: Any) -> None:
    with pytest.raises(kind, match=message):
        CrossBatchMemory(*arguments)


def test_wrong_calls_store_nothing() -> None:
    criterion = memory(6)
    criterion(*draw(4)[:2])
    before = criterion.embeddings.clone()
    elsewhere = torch.ones(3, D, device="meta")
    for kind, message, x in (
        (ValueError, f"embeddings have D={D + 2}, the memory holds D={D}", torch.ones(3, D + 2)),
        (ValueError, r"embeddings are on meta, the memory on cpu; move the memory with \.to\('meta'\)", elsewhere),
        (TypeError, "embeddings must be a torch.Tensor", [[1.0]]),
    ):
        with pytest.raises(kind, match=message):
            criterion(x, torch.arange(3, device=getattr(x, "device", "cpu")))
    assert criterion.embeddings.equal(before)
    assert (criterion.calls, criterion.filled) == (1, 4)


def test_a_bank_is_made_where_the_embeddings_are() -> None:
    criterion = memory(6, backend="torch")
    criterion(torch.ones(3, D, device="meta"), torch.arange(3, device="meta"))
    assert {buffer.device.type for buffer in criterion.buffers()} == {"meta"}
