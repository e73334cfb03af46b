"""RAFT: supervised training on the best of several sampled completions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.objectives.rollout import RolloutModule
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import Reward
from hbat_lightning.sums import Sums


class RAFTModule(RolloutModule):
    """Reward-ranked fine-tuning (Dong et al. 2023, arXiv 2304.06767): of each prompt's completions the best is trained on.

    The loss is the negative log-likelihood, a mean over the window's tokens of kept completions. There is no reference, no
    ratio and no value function, so nothing beside the policy is kept in memory, and sampling is followed by no scoring pass.
    One cycle is one of the paper's iterations: ``rollout_windows`` windows of prompts, trained on ``passes`` times.

    As in the paper, ranking is within a prompt. The authors' code trains on the whole text, prompt included; here the prompt
    is masked, as everywhere else.

    ``reward``, ``length`` and ``stopped`` are means over all samples; ``kept_reward`` is that of the kept ones.

    Args:
        reward: Scores completions.
        samples: Completions of each prompt, of which one is kept: the paper's K. In the authors' code it is 5.
        settings: See :class:`RolloutModule`; ``missing_stop_penalty`` counts when completions are ranked.
    """

    dropout = True  # it is supervised training; no probability is compared with an earlier one
    figures = (*RolloutModule.figures, "kept_reward")

    def __init__(self, reward: Reward, samples: int = 5, **settings: Any) -> None:
        if samples < 2:
            raise ValueError(f"samples must be at least 2, got {samples}: the best of one completion is any completion")
        super().__init__(reward, samples=samples, **settings)
        if self.dynamic_sampling is not None and self.dynamic_sampling.minimum < 2:
            raise ValueError(
                "dynamic_sampling.minimum must be at least 2: the best of one completion is any completion"
            )

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return f"RAFT: likelihood of the best of {self.samples} samples, {self.cycle.passes} passes"

    def keep(self, completions: list[Rollout]) -> list[Rollout]:
        """The one with the highest reward; of equal ones the first."""
        best = max(completions, key=self._worth)
        figures = {
            name: sum(rollout.figures[name] for rollout in completions) / len(completions) for name in best.figures
        }
        return [Rollout(best.prompt, best.completion, figures=figures | {"kept_reward": best.figures["reward"]})]

    def _worth(self, rollout: Rollout) -> float:
        return rollout.figures["reward"] - self.missing_stop_penalty * (1 - rollout.figures["stopped"])

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`."""
        log_probs = policy.score(inputs).log_probs
        count = torch.tensor(len(log_probs), device=log_probs.device)
        return {"loss": (-log_probs.sum(), count)} | self.figure_sums(inputs)
