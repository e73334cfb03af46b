"""Objectives: one LightningModule per loss."""

from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.objectives.critic_free import GRPOModule, REINFORCEModule, RLOOModule
from hbat_lightning.objectives.dpo import DPOModule, HingeModule, IPOModule, RobustDPOModule, RPOModule
from hbat_lightning.objectives.kto import KTOModule
from hbat_lightning.objectives.language_model import LanguageModelModule
from hbat_lightning.objectives.pairwise import PairwiseModule
from hbat_lightning.objectives.ppo import PPOModule
from hbat_lightning.objectives.raft import RAFTModule
from hbat_lightning.objectives.reference_free import ORPOModule, RRHFModule, SimPOModule
from hbat_lightning.objectives.reward import BradleyTerryModule, ClassifierRewardModule, RewardModule
from hbat_lightning.objectives.sft import SFTModule

__all__ = [
    "BradleyTerryModule",
    "ClassifierRewardModule",
    "DPOModule",
    "GRPOModule",
    "HingeModule",
    "IPOModule",
    "KTOModule",
    "LanguageModelModule",
    "ORPOModule",
    "ObjectiveModule",
    "PPOModule",
    "PairwiseModule",
    "RAFTModule",
    "REINFORCEModule",
    "RLOOModule",
    "RPOModule",
    "RRHFModule",
    "RewardModule",
    "RobustDPOModule",
    "SFTModule",
    "SimPOModule",
]
