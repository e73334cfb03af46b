"""Metrics as torchmetrics classes; a configuration names those that ``hbat test`` reports."""

from hbat_lightning.metrics.base import CompletionMetric, MeanScore, Surroundings
from hbat_lightning.metrics.bootstrap import MIN_ROWS, Interval, bootstrap, paired_bootstrap
from hbat_lightning.metrics.judge import JudgeWinRate
from hbat_lightning.metrics.models import BARTScore, PreferenceAccuracy, ReferenceKL, RewardScore
from hbat_lightning.metrics.text import Distinct, ExactMatch, Length, Repetition, Rouge, standard_metrics

__all__ = [
    "MIN_ROWS",
    "BARTScore",
    "CompletionMetric",
    "Distinct",
    "ExactMatch",
    "Interval",
    "JudgeWinRate",
    "Length",
    "MeanScore",
    "PreferenceAccuracy",
    "ReferenceKL",
    "Repetition",
    "RewardScore",
    "Rouge",
    "Surroundings",
    "bootstrap",
    "paired_bootstrap",
    "standard_metrics",
]
