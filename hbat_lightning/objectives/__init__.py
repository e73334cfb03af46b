"""Objectives: one LightningModule per loss."""

from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.objectives.dpo import DPOModule, HingeModule, IPOModule, RobustDPOModule, RPOModule
from hbat_lightning.objectives.kto import KTOModule
from hbat_lightning.objectives.pairwise import PairwiseModule
from hbat_lightning.objectives.reference_free import ORPOModule, RRHFModule, SimPOModule
from hbat_lightning.objectives.sft import SFTModule

__all__ = [
    "DPOModule",
    "HingeModule",
    "IPOModule",
    "KTOModule",
    "ORPOModule",
    "ObjectiveModule",
    "PairwiseModule",
    "RPOModule",
    "RRHFModule",
    "RobustDPOModule",
    "SFTModule",
    "SimPOModule",
]
