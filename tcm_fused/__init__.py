"""Threshold-Consistent Margin loss for large-batch metric learning, fused."""

from typing import TYPE_CHECKING, Any

from tcm_fused.distributed import DistributedTCMLoss
from tcm_fused.loss import TCMLoss, TCMStats, tcm_loss
from tcm_fused.memory import CrossBatchMemory
from tcm_fused.schedule import TCMSchedule
from tcm_fused.thresholds.calibration import Calibration, Margins, calibrate, suggest_margins
from tcm_fused.thresholds.evaluation import Evaluation, evaluate
from tcm_fused.thresholds.opis import OPISResult, opis
from tcm_fused.thresholds.probability import MatchProbability, match_probability
from tcm_fused.thresholds.retrieval import Retrieval, retrieval
from tcm_fused.thresholds.threshold import Threshold
from tcm_fused.thresholds.trials import TrialResult, evaluate_trials

if TYPE_CHECKING:
    from tcm_fused.thresholds.metric import OPIS

__version__ = "0.1.0"
__all__ = [
    "OPIS",
    "Calibration",
    "CrossBatchMemory",
    "DistributedTCMLoss",
    "Evaluation",
    "Margins",
    "MatchProbability",
    "OPISResult",
    "Retrieval",
    "TCMLoss",
    "TCMSchedule",
    "TCMStats",
    "Threshold",
    "TrialResult",
    "__version__",
    "calibrate",
    "evaluate",
    "evaluate_trials",
    "match_probability",
    "opis",
    "retrieval",
    "suggest_margins",
    "tcm_loss",
]


def __getattr__(name: str) -> Any:
    """`OPIS` is imported when it is first asked for, since torchmetrics takes its time."""
    if name == "OPIS":
        from tcm_fused.thresholds.metric import OPIS

        return OPIS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
