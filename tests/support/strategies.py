"""Dtypes and options of the loss, as tests draw them."""

from typing import Any

import torch
from hypothesis import strategies as st

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
)


# Random batches.


def options() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "penalty": st.sampled_from(["hinge", "squared"]),
            "reduction": st.sampled_from(["violating", "violating", "all"]),
        }
    )
