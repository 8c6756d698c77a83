"""The base losses of the retrieval experiment against plain loops."""

import pytest
import torch
from pytorch_metric_learning.losses import SmoothAPLoss
from torch import Tensor

from benchmarks.retrieval.losses import BASES, WITH_WEIGHTS, ArcFace, RecallAtK, SmoothAP, make_base

pytestmark = pytest.mark.usefixtures("one_thread")


# The base losses.


def make_batch(classes: int, per_class: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Embeddings [N, 6] float64 of any length and labels [N] in random order."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(classes).repeat(per_class)[torch.randperm(classes * per_class, generator=generator)] * 3 + 1
    centres = torch.randn(3 * classes + 1, 6, generator=generator, dtype=torch.float64)
    x = centres[y] + torch.randn(len(y), 6, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y


def smooth_ap_by_loops(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    s = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    total = x.new_zeros(())
    for q in range(len(y)):
        mine = [i for i in range(len(y)) if y[i] == y[q]]
        for i in mine:
            rank = rank_in_class = x.new_ones(())
            for j in range(len(y)):
                if j != i:
                    above = torch.sigmoid((s[q, j] - s[q, i]) / temperature)
                    rank = rank + above
                    rank_in_class = rank_in_class + above * (y[j] == y[q])
            total = total + rank_in_class / rank / len(mine)
    return 1 - total / len(y)


def recall_at_k_by_loops(x: Tensor, y: Tensor, ks: tuple[int, ...], temperature: float, cut: float) -> Tensor:
    s = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    total = x.new_zeros(())
    for k in ks:
        for q in range(len(y)):
            mine = [i for i in range(len(y)) if y[i] == y[q] and i != q]
            found = x.new_zeros(())
            for i in mine:
                rank = x.new_ones(())
                for j in range(len(y)):
                    if j not in (i, q):
                        rank = rank + torch.sigmoid((s[q, j] - s[q, i]) / temperature)
                found = found + torch.sigmoid((k - rank) / cut)
            total = total + found.clamp(max=k) / min(k, len(mine))
    return 1 - total / (len(y) * len(ks))


@pytest.mark.parametrize(("classes", "per_class"), [(2, 2), (3, 3), (5, 2), (2, 5), (1, 3)])
@pytest.mark.parametrize("loss", ["smoothap", "recallatk"])
def test_rank_losses_against_loops(loss: str, classes: int, per_class: int) -> None:
    """Value and gradient; a temperature at which neighbours in rank count in part, so that every term tells."""
    x, y = make_batch(classes, per_class, seed=10 * classes + per_class)
    z = x.detach().clone().requires_grad_()
    if loss == "smoothap":
        found, expected = SmoothAP(0.2)(x, y), smooth_ap_by_loops(z, y, 0.2)
    else:
        found, expected = RecallAtK((1, 2, 4), 0.2, 0.7)(x, y), recall_at_k_by_loops(z, y, (1, 2, 4), 0.2, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    found.backward()
    expected.backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-12)
    assert x.grad is not None and (classes == 1 or x.grad.abs().max() > 1e-4)


def test_smooth_ap_is_pytorch_metric_learnings_where_that_is_right() -> None:
    """As many classes as images of each, in order: elsewhere that takes one number for the other."""
    x, y = make_batch(4, 4)
    order = y.argsort(stable=True)
    torch.testing.assert_close(SmoothAP()(x, y), SmoothAPLoss()(x[order], y[order] // 3).to(x.dtype), rtol=1e-6, atol=0)


def test_perfect_and_hopeless_ranks() -> None:
    y = torch.arange(4).repeat_interleave(3)
    perfect = torch.eye(4)[y]
    assert SmoothAP()(perfect, y).item() == pytest.approx(0, abs=1e-6)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    for loss in (SmoothAP(), RecallAtK()):
        assert loss(perfect, y) < loss(x, y) < 1


@pytest.mark.parametrize("loss", [SmoothAP(), RecallAtK()])
def test_classes_of_other_sizes_are_refused(loss: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match=r"equally often in a batch, got \[2, 3\]"):
        loss(torch.randn(5, 4), torch.tensor([0, 0, 1, 1, 1]))


def test_recall_needs_two_of_a_class() -> None:
    with pytest.raises(ValueError, match="raise --batch-images"):
        RecallAtK()(torch.randn(5, 4), torch.arange(5))


def test_arcface_at_a_cosine_of_one() -> None:
    loss = ArcFace(2, 2)
    x = loss.W.detach().T.clone().requires_grad_()
    loss(x, torch.arange(2)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", BASES)
def test_base_losses_take_a_batch(name: str) -> None:
    x, y = make_batch(4, 3)
    base = make_base(name, 13, 6)
    base(x.float(), y).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert bool(list(base.parameters())) == (name in WITH_WEIGHTS)
