"""The loss of given pairs, written out pair by pair and differentiated by autograd."""

import torch
import torch.distributed
from torch import Tensor

from support import batches

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(n: int, d: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """float64 embeddings that want a gradient, and labels."""
    x, y = batches.batch(n, d, classes, torch.float64, seed)
    return x.requires_grad_(), y


def written_out(
    x: Tensor, ref: Tensor, pairs: Pairs, penalty: str = "hinge", reduction: str = "violating", **margins: float
) -> Tensor:
    """The loss of the given pairs, by its formula."""
    m = {"margin_plus": 0.9, "margin_minus": 0.5, "lambda_plus": 1.0, "lambda_minus": 1.0} | margins
    x, ref = (torch.nn.functional.normalize(t, eps=1e-300) for t in (x, ref))
    total = torch.zeros((), dtype=torch.float64)
    for a, b, sign, margin, weight in (
        (pairs[0], pairs[1], -1, m["margin_plus"], m["lambda_plus"]),
        (pairs[2], pairs[3], 1, m["margin_minus"], m["lambda_minus"]),
    ):
        violation = sign * ((x[a] * ref[b]).sum(1) - margin)
        hard = violation[violation >= 0]
        divisor = len(hard) if reduction == "violating" else len(violation)
        total = total + weight * (hard**2 if penalty == "squared" else hard).sum() / max(divisor, 1)
    return total


def agree(value: Tensor, expected: Tensor, *leaves: Tensor) -> None:
    """Same value, and same gradient of each leaf, in float64."""
    torch.testing.assert_close(value, expected.to(value.dtype), rtol=1e-12, atol=1e-13)
    found, wanted = (
        torch.autograd.grad(t, leaves, retain_graph=True, materialize_grads=True) for t in (value, expected)
    )
    for leaf, grad, grad_wanted in zip(leaves, found, wanted, strict=True):
        smallest = float(leaf.detach().norm(dim=1).min())
        torch.testing.assert_close(grad, grad_wanted, rtol=1e-11, atol=1e-12 / smallest)


def some_pairs(n: int, m: int, count: int, seed: int) -> Pairs:
    """Rows and columns at random, some of them several times; whether labels agree does not matter to the loss."""
    generator = torch.Generator().manual_seed(seed)
    a1, a2 = (torch.randint(n, (count,), generator=generator) for _ in range(2))
    p, q = (torch.randint(m, (count,), generator=generator) for _ in range(2))
    return a1, p, a2, q
