"""Pure tensor functions: no model, no trainer, no input or output."""

from hbat_lightning.functional.importance import (
    effective_number,
    literal_weights,
    proportional_weights,
    squared_displacement,
)
from hbat_lightning.functional.log_probs import (
    linear_log_probs,
    rows_per_chunk,
    selected_log_probs,
    sequence_log_probs,
    token_log_probs,
)
from hbat_lightning.functional.losses import dpo_loss, sft_loss

__all__ = [
    "dpo_loss",
    "effective_number",
    "linear_log_probs",
    "literal_weights",
    "proportional_weights",
    "rows_per_chunk",
    "selected_log_probs",
    "sequence_log_probs",
    "sft_loss",
    "squared_displacement",
    "token_log_probs",
]
