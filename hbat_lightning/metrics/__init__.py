"""Metrics as torchmetrics classes."""

from hbat_lightning.metrics.base import CompletionMetric, MeanScore, Surroundings
from hbat_lightning.metrics.text import Distinct, ExactMatch, Length, Repetition, Rouge, standard_metrics

__all__ = [
    "CompletionMetric",
    "Distinct",
    "ExactMatch",
    "Length",
    "MeanScore",
    "Repetition",
    "Rouge",
    "Surroundings",
    "standard_metrics",
]
