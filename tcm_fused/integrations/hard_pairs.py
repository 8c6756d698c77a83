"""What callbacks log of the TCM losses in a model: how many pairs are hard, and by how much."""

from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.loss import TCMStats

KEYS = ("hard_positives", "hard_negatives", "violation_positives", "violation_negatives")  # TCMStats, in its order


def criteria(*roots: object) -> dict[str, nn.Module]:
    """All modules within `roots` that keep the stats of their last call, by name; what is no module has none."""
    found: dict[str, nn.Module] = {}
    for root in roots:
        for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if hasattr(module, "stats") and not any(module is other for other in found.values()):
                found[name or type(module).__name__] = module
    return found


def hard_pairs(losses: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The stats of the last call of each, as 0-d float32 tensors on its device: "tcm/hard_positives", and so on.

    Where several were called, with their names: "tcm/NAME/hard_positives". Nothing waits for the device.
    """
    stats: dict[str, Any] = {name: module.stats for name, module in losses.items()}
    called = {name: value for name, value in stats.items() if isinstance(value, TCMStats)}
    return {
        f"tcm/{key}" if len(called) == 1 else f"tcm/{name}/{key}": value.detach().to(torch.float32)
        for name, values in called.items()
        for key, value in zip(KEYS, values, strict=True)
    }
