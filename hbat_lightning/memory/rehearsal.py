"""Rehearses a run's moments on tensors without values: loading, steps of each objective, switches and validation.

The run's own code does it all: adapters, objectives, EWC, optimizer. So what is counted follows the code.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.callbacks.importance import ImportanceCallback
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.rollouts import collate_rollouts
from hbat_lightning.errors import UserError
from hbat_lightning.memory.allocation import AllocationTracker, Category, Moment, valueless
from hbat_lightning.memory.architecture import build_base
from hbat_lightning.memory.batches import batches, held_out_prompts, is_validated, longest_prompt
from hbat_lightning.memory.optimizers import optimizer_step
from hbat_lightning.memory.precision import chunks_of, lists_of
from hbat_lightning.memory.rewards import own_weights, planned
from hbat_lightning.memory.sampling import generation_of
from hbat_lightning.objective import Objective
from hbat_lightning.objectives.ppo import PPOModule
from hbat_lightning.objectives.rollout import RolloutModule
from hbat_lightning.optimizer_state import OptimizerStateKeeper
from hbat_lightning.values import ModelValue

CUDA_BLOCK = 512  # bytes; the caching allocator rounds every tensor up to a multiple of it
_AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PRECISIONS = tuple(_AUTOCAST)


@dataclass(frozen=True)
class RunSettings:
    """What of a run decides its memory.

    Attributes:
        module: The module, whose policy has no weights yet.
        config: The base's configuration.
        data: The data module; nothing of its data is read.
        penalties: The callbacks that protect the other objective: EWC, freezing.
        precision: The Trainer's, one of :data:`PRECISIONS`.
        accumulate: Micro-batches in a window.
        checkpointing: Whether activations are recomputed.
        clips: Whether gradients are clipped.
        gpu: Whether it runs on a GPU.
    """

    module: AlignmentModule
    config: PretrainedConfig
    data: HybridDataModule
    penalties: Sequence[ImportanceCallback]
    precision: str
    accumulate: int
    checkpointing: bool
    clips: bool
    gpu: bool


def rehearse(settings: RunSettings, tick: Callable[[str], None]) -> list[Moment]:
    """Go through a run's moments.

    Args:
        settings: The run.
        tick: Told of every moment before it begins.

    Returns:
        The moments, each with its highest point.
    """
    vocabulary = settings.config.get_text_config().vocab_size
    fake = valueless()
    tracker = AllocationTracker(CUDA_BLOCK if settings.gpu else 1, vocabulary)
    moments: list[Moment] = []
    settings = _fresh(settings)
    tick("loading")
    with tracker.moment("loading", moments):
        base = build_base(settings.module.policy.spec, settings.config, fake, tracker)
    with fake, tracker, lists_of(settings.gpu), chunks_of(settings.gpu):
        _Rehearsal(settings, tracker, moments, tick).run(base)
    return moments


def _fresh(settings: RunSettings) -> RunSettings:
    """With a module and penalties of its own, so that the same settings can be rehearsed again."""
    module = copy.deepcopy(settings.module)
    module.policy.gradient_checkpointing = settings.checkpointing
    for objective in module.objectives.values():
        if isinstance(objective, RolloutModule):
            objective.reward = planned(objective.reward)
            if objective.dynamic_sampling is not None:  # a micro-batch may hold the most of each of its prompts
                objective.samples, objective.dynamic_sampling = objective.dynamic_sampling.maximum, None
                objective.figures = type(objective).figures
        if isinstance(objective, PPOModule) and isinstance(objective.value, ModelValue):
            raise UserError(
                f"a value function that is a model of its own ({objective.value.model.spec.name}) cannot be planned: plan the "
                "run with --model.preference.value AdapterValue, and add what the model's weights, gradients and moments take"
            )
    return replace(settings, module=module, penalties=copy.deepcopy(settings.penalties))


class _Rehearsal:
    def __init__(
        self, settings: RunSettings, tracker: AllocationTracker, moments: list[Moment], tick: Callable[[str], None]
    ) -> None:
        self.settings, self.tracker, self.moments, self.tick = settings, tracker, moments, tick
        self.module, self.policy = settings.module, settings.module.policy
        self._awaited = 0
        self.keeper = OptimizerStateKeeper(self.module.optimizer_state)
        self.batches = batches(settings.module, settings.data, settings.data.batch_size)
        self.rows = batches(settings.module, settings.data, 1)
        self.held_out = batches(settings.module, settings.data, settings.data.val_batch_size)
        self.held_out |= held_out_prompts(settings.module, settings.data)

    def run(self, base: Any) -> None:
        """The moments in the order of a run."""
        self._prepare(base)
        objectives = self.module.objectives
        with self._moment("first figures"):
            for name, objective in objectives.items():
                if is_validated(self.settings.data, name):
                    self._first_figures(objective, name)
        self.optimizer = self._make_optimizer()
        for name, objective in objectives.items():
            self._roll_out(objective, name)
            self._give_gradients(name)
        if self.module.schedule.rounds > 1:  # have what a run has after its first round: states, importance
            for name in objectives:
                self._give_gradients(name)
                self._optimizer_step()
                if self._after(name) != name:
                    self._switch(name, self._after(name))
        for name, objective in objectives.items():
            self._give_gradients(name)
            if not self.optimizer.state:  # taken away at the switch; from a phase's second window on they are there
                self._optimizer_step()
            if isinstance(objective, RolloutModule):
                with self._moment(f"{name}: rollouts"):
                    self._roll_out(objective, name)
            with self._moment(f"{name}: micro-batch"):
                self._micro_batch(objective, name)
            with self._moment(f"{name}: optimizer step"):
                self._optimizer_step()
            if is_validated(self.settings.data, name):
                with self._moment(f"{name}: validation"):
                    self._validate(objective, name)
            following = self._after(name)
            if following != name and (self.module.schedule.rounds > 1 or name != list(objectives)[-1]):
                with self._moment(f"switch to {following}"):
                    self._switch(name, following)

    @contextlib.contextmanager
    def _moment(self, name: str) -> Iterator[None]:
        self.tick(name)
        with self.tracker.moment(name, self.moments):
            yield

    def _after(self, name: str) -> str:
        names = list(self.module.objectives)
        return names[(names.index(name) + 1) % len(names)]

    # ---- before the first step ------------------------------------------------------------------------------------

    def _prepare(self, base: Any) -> None:
        """Attach the adapter, and take the snapshots that references and anchors need."""
        cast(Any, self.policy)._recomputation = self._recomputing(self.policy._recomputation)
        with self.tracker.category(Category.ADAPTERS):
            self.policy.adopt(base)
            for objective in self.module.objectives.values():
                objective.build(self.policy, torch.device("cpu"))
        for objective in self.module.objectives.values():
            if isinstance(objective, RolloutModule):
                self.tracker.assign(own_weights(objective.reward), Category.REWARD)
        references = {reference for objective in self.module.objectives.values() for reference in objective.references}
        with self.tracker.category(Category.REFERENCE):
            self.policy.add_snapshots(references | ({"phase_start"} if self.settings.penalties else set()))
        for parameter in self._trained():
            cast(Any, parameter).register_post_accumulate_grad_hook(self._received)
        cast(Any, self.policy).generate = generation_of(self.policy, self.tracker)
        self.tracker.weight_shapes = {tuple(p.shape) for p in self.policy.parameters() if p.dim() > 1}
        for layer in self.policy.modules():
            state = getattr(getattr(layer, "weight", None), "quant_state", None)
            if state is not None:
                self.tracker.weight_shapes.add(tuple(state.shape))

    def _recomputing(self, contexts: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        """Contexts of a checkpointed layer's two passes, the second one with the device's lists too."""

        @contextlib.contextmanager
        def second(context: Any) -> Iterator[None]:
            with context, lists_of(self.settings.gpu):
                yield

        def both() -> tuple[Any, Any]:
            first, again = contexts()
            return first, second(again)

        return both

    def _trained(self, *names: str) -> list[Tensor]:
        """What trains in the phases of some objectives, or in any: the policy's parameters and those of their own."""
        objectives = self.module.objectives
        own = [p for name in names or objectives for p in objectives[name].own_parameters(self.policy)]
        return [*self.policy.trained_parameters().values(), *own]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        """With a group for the policy and one for what each objective has of its own, as in a run."""
        own = [list(objective.own_parameters(self.policy)) for objective in self.module.objectives.values()]
        groups = [list(self.policy.trained_parameters().values()), *(group for group in own if group)]
        return self.module.optimizer([{"params": group} for group in groups])

    def _give_gradients(self, name: str) -> None:
        """What an earlier window has left: gradients of all that trains with this objective, and of nothing else."""
        training = {id(parameter) for parameter in self._trained(name)}
        with self.tracker.category(Category.GRADIENTS):
            for parameter in self._trained():
                if id(parameter) not in training:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    @torch.no_grad()
    def _first_figures(self, objective: Objective, name: str) -> None:
        self.policy.eval()
        with self._precision():
            objective.prepare_evaluation(self.policy.score, [self.held_out[name]])

    # ---- moments of a round ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _roll_out(self, objective: Objective, name: str) -> None:
        """Answer a micro-batch of prompts, and see what policy, reference, value and reward say: what a cycle does for each."""
        if not isinstance(objective, RolloutModule):
            return
        self.policy.eval()
        prompts = [
            longest_prompt(self.settings.data, objective, place) for place in range(self.settings.data.batch_size)
        ]
        with self._precision():
            (groups,) = objective.roll_out(self.policy, [prompts], torch.device("cpu"))
        self.batches[name] = collate_rollouts([rollout for group in groups for rollout in group], 0)
        self.rows[name] = collate_rollouts(groups[0], 0)

    def _micro_batch(self, objective: Objective, name: str) -> None:
        """A forward and a backward pass. Lightning frees the window's gradients only between the two."""
        self.policy.set_training(objective.dropout)
        with self._precision():
            loss = objective.loss(self.policy, self.batches[name])["loss"][0]
        self.tracker.cut()
        if self.settings.accumulate == 1:
            self.optimizer.zero_grad()
        self._awaited = len(self._trained(name)) // 2
        torch.autograd.backward(loss)  # as a method it would hide the lists from layers that are computed again

    def _received(self, parameter: Tensor) -> None:
        """Half-way through the backward pass its last layers' activations are gone, its first layers' gradients to come."""
        self.tracker.assign([cast(Tensor, parameter.grad)], Category.GRADIENTS)
        self._awaited -= 1
        if self._awaited == 0:
            self.tracker.cut()

    def _optimizer_step(self) -> None:
        with self.tracker.category(Category.WORK):
            for penalty in self.settings.penalties:
                if penalty.active:
                    penalty.pull(self.module)
                    self.tracker.assign(_tensors(penalty.importance.state_dict()), Category.IMPORTANCE)
            if self.settings.clips:
                clip_grad_norm_(self._trained(), 1.0)
            optimizer_step(self.optimizer, self.settings.gpu)
        self.tracker.assign(_tensors(list(self.optimizer.state.values())), Category.OPTIMIZER)

    def _switch(self, ended: str, begun: str) -> None:
        with self.tracker.category(Category.IMPORTANCE):
            for penalty in self.settings.penalties:
                penalty.weigh(self.module, ended, begun, self._row_gradients(ended, penalty.importance.samples))
        self.keeper.switch(self.optimizer, ended, begun)
        self.policy.take_snapshot()

    def _row_gradients(self, name: str, samples: int) -> Iterator[dict[str, Tensor]]:
        """Of two rows at most: the memory of further ones is that of the second."""
        trained = self.policy.trained_parameters()
        for _ in range(min(2, samples)):
            with torch.enable_grad(), self.tracker.category(Category.ACTIVATIONS), self._precision():
                loss = self.module.objectives[name].loss(self.policy, self.rows[name])["loss"][0]
                gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
            yield {key: g for key, g in zip(trained, gradients, strict=True) if g is not None}

    @torch.no_grad()
    def _validate(self, objective: Objective, name: str) -> None:
        self.policy.eval()
        with self._precision():
            objective.evaluate(self.policy, self.held_out[name])

    def _precision(self) -> Any:
        dtype = _AUTOCAST[self.settings.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
