"""Warnings that point at the line of the user's code that they are about."""

import sys
import warnings
from typing import Any

_BETWEEN = ("tcm_fused.", "torch.", "torchmetrics.")  # the user and the place that warns
TOLD: set[Any] = set()  # messages and places so far


def warn_once(message: str, *, per_place: bool = False) -> None:
    """A UserWarning at the caller of the package: one in a process for a message, or for a place in the user's code."""
    if not per_place and message in TOLD:
        return
    frame, level = _caller()
    key = (frame.f_code.co_filename, frame.f_lineno) if per_place else message
    if key not in TOLD:
        TOLD.add(key)
        warnings.warn(message, stacklevel=level)


def warn_caller(message: str) -> None:
    """A UserWarning at the caller of the package, each time: Python shows it once for a place, or as the user says."""
    warnings.warn(message, stacklevel=_caller()[1])


def _caller() -> tuple[Any, int]:
    """The first frame that is the user's, and its level for `warnings.warn` in the caller of this."""
    frame, level = sys._getframe(2), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    return frame, level
