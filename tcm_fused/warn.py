"""Warnings that name the user's own line."""

import sys
import warnings

_BETWEEN = ("tcm_fused.", "torchmetrics.", "torch.nn.modules.")  # whose lines are not the user's


def warn_caller(message: str) -> None:
    """A `UserWarning` at the nearest caller outside this package. Python shows it once for each such place."""
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").startswith(_BETWEEN):
        level += 1
    warnings.warn(message, stacklevel=level + 1)
