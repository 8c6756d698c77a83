"""Measuring and deploying thresholds."""
