"""Metrics as torchmetrics classes."""

from hbat_lightning.metrics.text import CompletionMetrics

__all__ = ["CompletionMetrics"]
