"""Calls of the loss that are good but for one argument, and the errors that they meet with."""

from typing import Any

import pytest
import torch

from tcm_fused import tcm_loss

N, M, D = 6, 8, 3


def arguments(**changed: Any) -> dict[str, Any]:
    """A good call with a reference set, but for what is changed; None leaves an argument out."""
    call = {
        "embeddings": torch.ones(N, D),
        "labels": torch.arange(N),
        "ref_emb": torch.ones(M, D),
        "ref_labels": torch.arange(M),
        **changed,
    }
    return {name: value for name, value in call.items() if value is not None}


def refuse(kind: type[Exception], *parts: str, **changed: Any) -> None:
    """Exactly `kind`, and each of `parts` in the message."""
    with pytest.raises(kind) as caught:
        tcm_loss(**arguments(**changed))
    assert type(caught.value) is kind
    for part in parts:
        assert part in str(caught.value)
