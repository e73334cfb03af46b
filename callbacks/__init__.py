"""Lightning callbacks, installed as ``hbat_lightning.callbacks``."""

if __name__ != "hbat_lightning.callbacks":
    # From the repository root `import callbacks` would load a second copy of every class, and isinstance checks would
    # fail between the two.
    raise ImportError("import hbat_lightning.callbacks; this folder is not a package of its own")

from hbat_lightning.callbacks.checkpoint import WindowCheckpoint
from hbat_lightning.callbacks.evaluation_rows import EvaluationRows
from hbat_lightning.callbacks.ewc import ElasticWeightConsolidation
from hbat_lightning.callbacks.export import PolicyExport
from hbat_lightning.callbacks.freeze import ImportanceFreeze
from hbat_lightning.callbacks.gradient_conflict import GradientConflict
from hbat_lightning.callbacks.non_finite import NonFiniteGuard
from hbat_lightning.callbacks.predictions import PredictionWriter
from hbat_lightning.callbacks.progress import PhaseProgressBar
from hbat_lightning.callbacks.resources import ResourceMonitor
from hbat_lightning.callbacks.samples import SampleGenerations
from hbat_lightning.callbacks.switch_report import SwitchReport

__all__ = [
    "ElasticWeightConsolidation",
    "EvaluationRows",
    "GradientConflict",
    "ImportanceFreeze",
    "NonFiniteGuard",
    "PhaseProgressBar",
    "PolicyExport",
    "PredictionWriter",
    "ResourceMonitor",
    "SampleGenerations",
    "SwitchReport",
    "WindowCheckpoint",
]
