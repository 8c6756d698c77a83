"""Threshold-Consistent Margin loss for large-batch metric learning, fused."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tcm_fused.calibration import Calibration, Margins, calibrate, suggest_margins
from tcm_fused.loss import TCMLoss, TCMStats, tcm_loss
from tcm_fused.opis import OPISResult, opis

if TYPE_CHECKING:
    from tcm_fused.distributed import DistributedTCMLoss
    from tcm_fused.memory import CrossBatchMemory
    from tcm_fused.metric import OPIS

__version__ = "0.1.0"
__all__ = [
    "OPIS",
    "Calibration",
    "CrossBatchMemory",
    "DistributedTCMLoss",
    "Margins",
    "OPISResult",
    "TCMLoss",
    "TCMStats",
    "__version__",
    "calibrate",
    "opis",
    "suggest_margins",
    "tcm_loss",
]


_LATER = {  # by name the module
    "OPIS": "metric",  # needs torchmetrics
    "CrossBatchMemory": "memory",  # imports torch's compiler, to be left alone by it: seconds
    "DistributedTCMLoss": "distributed",  # likewise
}


def __getattr__(name: str) -> Any:
    """What is imported when it is first used."""
    if name in _LATER:
        return getattr(import_module(f"tcm_fused.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
