"""Calls of the loss in each form and with each option, with half of all pairs hard, and their oracle."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.batches import embeddings, margins
from support.oracle import Result, oracle_of
from tcm_fused import tcm_loss

FORMS = ("symmetric", "reference set", "row_offset")
OPTIONS: dict[str, dict[str, Any]] = {
    "squared": {"penalty": "squared"},
    "all": {"reduction": "all"},
    "within": {"group_pairs": "within"},
    "across": {"group_pairs": "across", "penalty": "squared", "reduction": "all"},
}


def make(form: str, n: int, m: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Arguments of `tcm_loss` with half of all pairs hard; every tenth row and column is padding."""
    rng = np.random.default_rng(seed)
    y = rng.integers(4, size=n + m)
    x = torch.from_numpy(embeddings("random", y, d, rng)).to(dtype)
    y[::10] = -1
    labels = torch.from_numpy(y)
    call: dict[str, Any] = {"embeddings": x[:n].clone(), "labels": labels[:n].clone()}
    if form != "symmetric":
        call.update(ref_emb=x[n:].clone(), ref_labels=labels[n:].clone())
        call["row_offset"] = (m - n) // 2 if form == "row_offset" else None
    call.update(margins(oracle(call), 0.5), lambda_plus=0.7, lambda_minus=1.3)
    return call


def oracle(call: dict[str, Any]) -> Any:
    names = ("embeddings", "labels", "ref_emb", "ref_labels")
    options = {name: value for name, value in call.items() if name not in names}
    return oracle_of(*(call[name] for name in names if name in call), **options)


def leaves(call: dict[str, Any]) -> list[Tensor]:
    """The embeddings of `call`, made to require gradients."""
    return [call[name].requires_grad_() for name in ("embeddings", "ref_emb") if name in call]


def result_of(loss: Tensor, call: dict[str, Any], grads: list[Tensor]) -> Result:
    """`loss` and `grads`, with counts and violations from a call of their own."""
    stats = tcm_loss(**call, backend="torch", return_stats=True)[1]
    arrays = [grad.double().numpy() for grad in grads]
    return Result(
        loss=loss.item(),
        count=torch.stack(stats[:2]).numpy(),
        violation=torch.stack(stats[2:]).double().numpy(),
        grad_x=arrays[0],
        grad_ref=arrays[1] if len(arrays) > 1 else None,
    )


def with_options(call: dict[str, Any], name: str) -> dict[str, Any]:
    """`call` with one of OPTIONS; where there are groups, three."""
    call = {**call, **OPTIONS[name]}
    if "group_pairs" in call:
        m = len(call.get("ref_labels", call["labels"]))
        offset = call.get("row_offset") or 0
        groups = torch.arange(m) % 3
        call["groups"] = groups[offset : offset + len(call["labels"])]
        if "ref_emb" in call:
            call["ref_groups"] = groups
    return call
