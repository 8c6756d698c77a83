"""Warnings that come once, and point at the line of the user's code that they are about."""

import sys
import warnings
from typing import Any

_BETWEEN = ("tcm_fused.", "torch.")  # the user and the place that warns
TOLD: set[Any] = set()  # messages and places so far


def warn_once(message: str, *, per_place: bool = False) -> None:
    """A UserWarning at the caller of the package: one in a process for a message, or for a place in the user's code."""
    if not per_place and message in TOLD:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    key = (frame.f_code.co_filename, frame.f_lineno) if per_place else message
    if key not in TOLD:
        TOLD.add(key)
        warnings.warn(message, stacklevel=level)
