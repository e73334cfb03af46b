"""Hybrid alignment training (Hbat, arXiv 2406.15178) as a collection of Lightning parts."""

from hbat_lightning import quiet  # isort: skip  before the libraries that it silences

quiet.quieten_imports()

# ruff: noqa: E402
from hbat_lightning.adapters import LoraSettings
from hbat_lightning.classifier import ClassifierPolicy
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.source import DataSource
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.hybrid import HybridAlignmentModule
from hbat_lightning.objectives import (
    ClassifierRewardModule,
    DPOModule,
    GRPOModule,
    HingeModule,
    IPOModule,
    KTOModule,
    LanguageModelModule,
    ORPOModule,
    PPOModule,
    RAFTModule,
    REINFORCEModule,
    RewardModule,
    RLOOModule,
    RobustDPOModule,
    RPOModule,
    RRHFModule,
    SFTModule,
    SimPOModule,
)
from hbat_lightning.policy import Policy

__version__ = "0.1.0"

__all__ = [
    "ClassifierPolicy",
    "ClassifierRewardModule",
    "DPOModule",
    "DataSource",
    "GRPOModule",
    "GenerationSettings",
    "HingeModule",
    "HybridAlignmentModule",
    "HybridDataModule",
    "IPOModule",
    "KTOModule",
    "LanguageModelModule",
    "LoraSettings",
    "ORPOModule",
    "PPOModule",
    "Policy",
    "RAFTModule",
    "REINFORCEModule",
    "RLOOModule",
    "RPOModule",
    "RRHFModule",
    "RewardModule",
    "RobustDPOModule",
    "SFTModule",
    "SimPOModule",
    "__version__",
]
