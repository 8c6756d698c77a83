"""Threshold-Consistent Margin loss for large-batch metric learning, fused."""

from tcm_fused.loss import TCMLoss, TCMStats, tcm_loss

__version__ = "0.1.0"
__all__ = ["TCMLoss", "TCMStats", "__version__", "tcm_loss"]
