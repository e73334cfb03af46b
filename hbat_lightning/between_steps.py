"""What a run computes between its training steps, at the parameters as they are: rollouts, progress, gradients of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hbat_lightning.data.rollouts import Prompts, RollOut, Rollout, RolloutSet, SharedWork
from hbat_lightning.phases import Progress
from hbat_lightning.sums import Totals, pool
from hbat_lightning.switches import PhaseKey
from hbat_lightning.training_data import MicroBatch

if TYPE_CHECKING:
    from hbat_lightning.alignment import AlignmentModule


@torch.no_grad()
def roll_out(
    module: AlignmentModule, objective: str, answer: RollOut, phase: PhaseKey, prompts: Prompts, seed: int
) -> list[list[list[Rollout]]]:
    """Have an objective answer prompts; see :data:`~hbat_lightning.data.rollouts.Sampler`.

    The stream asks outside of any hook, and for a phase's first rollouts before its first batch is announced: so the phase
    begins here, and with it the reference.

    Args:
        module: The module in training.
        objective: Name of the objective that learns from them.
        answer: Its way to answer.
        phase: The phase that they are for.
        prompts: What to answer.
        seed: Of the sampling.
    """
    module.begin_phase(phase)
    module.policy.eval()
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), module.trainer.precision_plugin.forward_context():
        rollouts = answer(module.policy, prompts, module.device, SharedWork(module.ranks, seed))
    module.train_mode(objective)
    return rollouts


@torch.no_grad()
def measure_progress(module: AlignmentModule, phase: PhaseKey, batches: Sequence[MicroBatch]) -> Progress:
    """What a window shows, without dropout; see :data:`~hbat_lightning.stream.Measure`.

    Asked for between training steps, at the start of a phase before its first batch is announced.
    """
    module.begin_phase(phase)
    module.without_dropout()
    totals, objective = Totals(), module.objectives[batches[0].objective]
    for batch in batches:
        inputs = module.transfer_batch_to_device(batch, module.device, 0).inputs
        with module.trainer.precision_plugin.forward_context():
            totals.add(objective.loss(module.policy, inputs))
    pool([totals], module.ranks, module.device)
    return objective.progress(totals.means())


def row_gradients(module: AlignmentModule, phase: PhaseKey, count: int) -> Iterator[dict[str, Tensor]]:
    """Gradients of single training rows of a phase's shard, at the current parameters, without dropout.

    Args:
        module: The module in training.
        phase: The phase whose shard is asked.
        count: How many rows; fewer where the shard has fewer, or of prompts fewer have rollouts at hand.

    Yields:
        Gradient of the row's summed loss (of its negative log-likelihood, or of its pair's loss) by parameter name;
        ``.grad`` is left alone.
    """
    stream, objective = module.data.stream, phase.objective
    shard = next(part.shard for part in module.plan.phases if part.index == phase.number)
    trained = module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    data, rows = stream.data[objective], stream.shards[objective][shard]
    if isinstance(data, RolloutSet):
        rows = tuple(row for row in rows if row in data.at_hand)
    for row in rows[:count]:
        batch = MicroBatch(data.collate([row]), objective)
        inputs = module.transfer_batch_to_device(batch, module.device, 0).inputs
        with torch.enable_grad(), module.trainer.precision_plugin.forward_context():
            loss = module.objectives[objective].loss(module.policy, inputs)["loss"][0]
        gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        yield {name: g for name, g in zip(trained, gradients, strict=True) if g is not None}
    module.train_mode(objective)
