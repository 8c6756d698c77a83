"""The loss with every pair written out, in plain PyTorch and with all options: parts of a batch must add up to it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Set(NamedTuple):
    x: Tensor  # [N, D]
    y: Tensor  # [N]
    groups: Tensor | None = None  # [N]


def definition(rows: Set, columns: Set, options: dict[str, Any]) -> Tensor:
    """The loss of `rows`, which are the first of `columns`; differentiable by both. `options` are those of TCMLoss."""
    valid = (rows.y >= 0)[:, None] & (columns.y >= 0) & ~torch.eye(len(rows.y), len(columns.y), dtype=torch.bool)
    if rows.groups is not None and columns.groups is not None:
        together = rows.groups[:, None] == columns.groups
        valid &= together if options.get("group_pairs", "within") == "within" else ~together
    same = rows.y[:, None] == columns.y
    s = normalize(rows.x) @ normalize(columns.x).T
    loss = torch.zeros((), dtype=s.dtype)
    for side, pairs, violation in (
        ("plus", valid & same, options.get("margin_plus", 0.9) - s),
        ("minus", valid & ~same, s - options.get("margin_minus", 0.5)),
    ):
        chosen = pairs & (violation >= 0)
        if side == "minus" and (most := options.get("hardest_negatives")) is not None:
            order = torch.where(chosen, s.detach(), -torch.inf).sort(dim=1, descending=True, stable=True).indices
            chosen &= torch.zeros_like(chosen).scatter(1, order[:, :most], True)
        hard = violation[chosen]
        penalty = (hard**2 if options.get("penalty") == "squared" else hard).sum()
        divisor = int(pairs.sum()) if options.get("reduction") == "all" else len(hard)
        loss = loss + options.get(f"lambda_{side}", 1.0) * penalty / max(divisor, 1)
    return loss
