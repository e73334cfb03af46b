"""How many completions each prompt gets: dynamic sampling, after ESRL.

ESRL (Wang et al. 2024, arXiv 2308.02223) trains by reinforcement with less sampling. Its two-stage sampling, completions
without a graph and then one pass with it over all of their tokens, is what every objective on rollouts does here. Its dynamic
sampling spends fewer samples where the policy is capable already, by an estimate of capability from its entropy or its
rewards. That much is the paper's; its equations were not to be had, so how an estimate becomes a number of samples is our own
(:meth:`DynamicSampling.counts`), and the temperature is left as it is.

The flag of that name in the official Hbat code is something else: it drops, after sampling, the share of a batch's completions
that the policy is most confident of. It takes probabilities for log-probabilities there, and averages over the steps behind a
completion's end as well; here entropies are those of the distribution sampled from, over the completion's own tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import torch

from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.policy import Policy

PAD = 0  # masks go by length, so any id will do


class Capability(ABC):
    """How well the policy does on a prompt already, judged by completions of it."""

    @abstractmethod
    def of(
        self, policy: Policy, part: Sequence[Sequence[Rollout]], sampling: GenerationSettings, device: torch.device
    ) -> list[float]:
        """A number for each prompt of a micro-batch; more is better.

        Args:
            policy: The policy that sampled them.
            part: Rewarded completions of every prompt, at least one.
            sampling: How they were sampled.
            device: Where the policy is.
        """


class EntropyCapability(Capability):
    """Minus the entropy per token of what the first completions were sampled from. Costs a forward pass over them."""

    def of(
        self, policy: Policy, part: Sequence[Sequence[Rollout]], sampling: GenerationSettings, device: torch.device
    ) -> list[float]:
        """See :meth:`Capability.of`."""
        plain = [[Rollout(one.prompt, one.completion) for one in completions] for completions in part]
        inputs = collate_rollouts([one for completions in plain for one in completions], PAD)
        entropies = policy.entropy({name: value.to(device) for name, value in inputs.items()}, sampling)
        lengths = [sum(len(one.completion) for one in completions) for completions in part]
        return [-float(own.mean()) for own in torch.split(entropies.cpu(), lengths)]


class RewardCapability(Capability):
    """The mean reward of the first completions. Costs nothing beside them."""

    def of(
        self, policy: Policy, part: Sequence[Sequence[Rollout]], sampling: GenerationSettings, device: torch.device
    ) -> list[float]:
        """See :meth:`Capability.of`."""
        return [sum(one.figures["reward"] for one in completions) / len(completions) for completions in part]


class DynamicSampling:
    """Gives every prompt some completions, looks at them, and gives the rest to the prompts that need them most.

    The number of a cycle's completions is what it would be without it: ``samples`` times its prompts. A micro-batch may hold
    up to ``maximum`` completions of each of its prompts, which is what its memory is measured by. The first completions are
    trained on too: so a prompt whose first ones looked uncertain has more of the mean that the loss is.

    Args:
        capability: Judges a prompt by its first completions; by their entropy when not given.
        minimum: Completions that every prompt gets first.
        maximum: Completions that no prompt gets more of.
    """

    def __init__(self, capability: Capability | None = None, minimum: int = 1, maximum: int = 8) -> None:
        if not 1 <= minimum <= maximum:
            raise ValueError(f"minimum must be from 1 to maximum, got {minimum} and {maximum}")
        self.capability = capability or EntropyCapability()
        self.minimum, self.maximum = minimum, maximum

    def require(self, samples: int) -> None:
        """Refuse an average that cannot be one.

        Raises:
            ValueError: When it is not from minimum to maximum.
        """
        if not self.minimum <= samples <= self.maximum:
            raise ValueError(
                f"samples is the average here, so it must be from dynamic_sampling.minimum to maximum: got {samples}, "
                f"{self.minimum}, {self.maximum}"
            )

    def counts(self, capabilities: Sequence[float], samples: int) -> list[int]:
        """How many completions each prompt of a cycle gets.

        A prompt's need is how far its capability is below the highest one. What is left after the first completions goes out
        one by one, each to the prompt with the most need per completion received (d'Hondt's method): in proportion to needs,
        but for the bounds. Where needs are equal, so are counts, as nearly as can be.

        Args:
            capabilities: Of every prompt.
            samples: Completions per prompt on average.

        Returns:
            Numbers from ``minimum`` to ``maximum`` whose mean is ``samples``.
        """
        most, room = max(capabilities), self.maximum - self.minimum
        needs = [most - capability for capability in capabilities]
        given = [0] * len(needs)
        # Of equal needs the one that has received less comes first, and then the earlier one.
        queue = [(-need, 0, place) for place, need in enumerate(needs) if room]
        heapify(queue)
        for _ in range((samples - self.minimum) * len(needs)):
            _, own, place = heappop(queue)
            given[place] = own + 1
            if given[place] < room:
                heappush(queue, (-needs[place] / (own + 2), own + 1, place))
        return [self.minimum + own for own in given]
