"""Objectives: one LightningModule per loss."""

from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.objectives.dpo import DPOModule
from hbat_lightning.objectives.sft import SFTModule

__all__ = ["DPOModule", "ObjectiveModule", "SFTModule"]
