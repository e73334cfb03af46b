"""Pure tensor functions: no model, no trainer, no input or output."""

from hbat_lightning.functional.conflict import cosine, split_half_products
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
from hbat_lightning.functional.losses import log1mexp, log_odds, orpo_loss, rrhf_loss, sft_loss, simpo_loss
from hbat_lightning.functional.pull import Pull, add_pull, total_norm
from hbat_lightning.functional.reference_losses import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    robust_dpo_loss,
    rpo_loss,
)
from hbat_lightning.functional.reinforcement import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k1,
    kl_k3,
    leave_one_out_advantages,
    sampling_entropy,
    truncation_log_mass,
    whiten,
)
from hbat_lightning.functional.reward_losses import bradley_terry_loss, preference_calibration

__all__ = [
    "Pull",
    "add_pull",
    "bradley_terry_loss",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cosine",
    "dpo_loss",
    "effective_number",
    "gae",
    "group_advantages",
    "hinge_loss",
    "ipo_loss",
    "kl_k1",
    "kl_k3",
    "kto_loss",
    "kto_reference_point",
    "leave_one_out_advantages",
    "linear_log_probs",
    "literal_weights",
    "log1mexp",
    "log_odds",
    "orpo_loss",
    "preference_calibration",
    "proportional_weights",
    "robust_dpo_loss",
    "rows_per_chunk",
    "rpo_loss",
    "rrhf_loss",
    "sampling_entropy",
    "selected_log_probs",
    "sequence_log_probs",
    "sft_loss",
    "simpo_loss",
    "split_half_products",
    "squared_displacement",
    "token_log_probs",
    "total_norm",
    "truncation_log_mass",
    "whiten",
]
