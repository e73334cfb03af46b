"""What the soak trains: small runs of every kind, drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
POLICY = "--model.init_args.policy.init_args"
SCHEDULE = "--model.init_args.schedule"


@dataclass(frozen=True)
class Scenario:
    """A run to be stopped.

    Attributes:
        name: What is special about it.
        arguments: Of ``hbat fit``, without the run folder.
    """

    name: str
    arguments: tuple[str, ...]


def _config(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(CONFIGS / f"{name}.yaml"))]


def _rows(*objectives: str, held_out: bool = True) -> list[str]:
    """Few rows, and rounds of unequal length."""
    rows = {"instruction": 22, "preference": 15}
    fraction = "0.2" if held_out else "0.0"
    return [
        part
        for name in objectives
        for key, value in (("limit", str(rows[name])), ("val_fraction", fraction))
        for part in (f"--data.init_args.{name}.{key}", value)
    ]


_BOTH = ("instruction", "preference")
_ROUNDS = [f"{SCHEDULE}.init_args.rounds", "2", f"{SCHEDULE}.init_args.instruction_epochs", "1"]
_RATES = ["--model.init_args.instruction.init_args.lr", "5e-3", "--model.init_args.preference.init_args.lr", "2e-3"]
_SAMPLING = ["--model.preference.sampling.max_new_tokens", "6", "--model.preference.rollout_windows", "2"]
_MIXED = [f"{SCHEDULE}.init_args.rounds", "2", f"{SCHEDULE}.init_args.steps", "4"]
_GROUPS = ["--model.preference.samples", "2"]
_DYNAMIC = "--model.preference.dynamic_sampling"


def _importance(name: str, *more: str) -> list[str]:
    return ["--trainer.callbacks.importance", name, "--trainer.callbacks.strength", "20", *more]


# Every schedule and every kind of objective; those with phases take each kind of EWC in turn.
KINDS: dict[str, list[str]] = {
    "SFT": [*_config("sft"), *_rows("instruction"), "--model.init_args.epochs", "2"],
    "DPO": [*_config("dpo"), *_rows("preference"), "--model.init_args.epochs", "2"],
    "reward": [*_config("reward"), *_rows("preference"), "--model.init_args.epochs", "2"],
    "Rounds DPO": [*_config("hbat_dpo"), *_rows(*_BOTH), *_ROUNDS, *_RATES],
    "Rounds DPO, no held-out rows": [*_config("hbat_dpo"), *_rows(*_BOTH, held_out=False), *_ROUNDS, *_RATES],
    "Interval DPO": [
        *_config("hbat_dpo"),
        *_rows(*_BOTH),
        *_RATES,
        *[SCHEDULE, "Interval", f"{SCHEDULE}.init_args.rounds", "2"],
        *[f"{SCHEDULE}.init_args.instruction_steps", "3", f"{SCHEDULE}.init_args.preference_steps", "2"],
    ],
    "Rounds PPO": [*_config("hbat_ppo"), *_rows(*_BOTH), *_ROUNDS, *_RATES, *_SAMPLING],
    "Rounds GRPO": [
        *_config("hbat_ppo", "reinforcement/grpo"),
        *_rows(*_BOTH),
        *_ROUNDS,
        *_RATES,
        *_SAMPLING,
        *_GROUPS,
    ],
    "Rounds RAFT": [
        *_config("hbat_ppo", "reinforcement/raft"),
        *_rows(*_BOTH),
        *_ROUNDS,
        *_RATES,
        *_SAMPLING,
        *_GROUPS,
    ],
    "Rounds PPO, dynamic sampling": [
        *_config("hbat_ppo", "reinforcement/esrl"),
        *_rows(*_BOTH),
        *_ROUNDS,
        *_RATES,
        *_SAMPLING,
        *[f"{_DYNAMIC}.maximum", "3"],
    ],
    "RandomMix DPO": [*_config("two_stage_dpo", "alright"), *_rows(*_BOTH), *_MIXED],
    "MaxGap DPO": [
        *_config("two_stage_dpo", "maxright"),
        *_rows(*_BOTH),
        *_MIXED,
        f"{SCHEDULE}.init_args.refresh",
        "3",
    ],
    "Joint DPO": [*_config("two_stage_dpo", "joint"), *_rows(*_BOTH), f"{SCHEDULE}.init_args.epochs", "2"],
    "Joint PPO": [
        *_config("hbat_ppo", "joint"),
        *_rows(*_BOTH),
        *_SAMPLING,
        *[f"{SCHEDULE}.init_args.epochs", "1"],
    ],
}
IMPORTANCES: dict[str, list[str]] = {
    "drift": _importance("DriftImportance"),
    "drift per element": _importance("DriftImportance", "--trainer.callbacks.importance.per_element", "true"),
    "running Fisher": _importance("RunningFisher"),
    "exact Fisher": _importance("ExactFisher", "--trainer.callbacks.importance.samples", "4"),
    "random": _importance("RandomImportance"),
    "uniform": _importance("UniformImportance"),
    "literal": _importance("DriftImportance", "--trainer.callbacks.weights", "LiteralWeights"),
    "Freeze": _config("hbat_freeze"),
}


STATES = ("reset", "shared", "per_objective")


class Dealer:
    """Draws scenarios; of each setting every value comes up before one comes up again.

    Args:
        rng: Draws.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._decks: dict[tuple[str, ...], list[str]] = {}

    def draw(self, kind: str) -> Scenario:
        """A scenario: one of each kind of setting.

        Args:
            kind: One of :data:`KINDS`.
        """
        arguments, names = list(KINDS[kind]), [kind]
        if kind.startswith(("Rounds", "Interval")):
            importance, state = self._deal(*IMPORTANCES), self._deal(*STATES)
            arguments += [*IMPORTANCES[importance], "--model.init_args.optimizer_state", state]
            names += [importance, state]
        accumulate = self._rng.choice([2, 3] if kind.startswith("Joint") else [1, 2, 3])
        every = self._rng.choice([None, 1, 2, 3])
        dropout, base = self._deal("0.0", "0.1", "0.1 "), self._deal("none", "none ", "nf4")
        names += [
            f"accumulate {accumulate}",
            f"checkpoint every {every or 'switch'}",
            f"dropout {dropout}",
            f"base {base}",
        ]
        arguments += [f"{POLICY}.lora.r", "4", f"{POLICY}.lora.dropout", dropout, f"{POLICY}.quantization", base]
        arguments += ["--data.init_args.batch_size", "2", "--trainer.accumulate_grad_batches", str(accumulate)]
        arguments += ["--data.init_args.max_length", "128", "--model.init_args.generation.max_new_tokens", "4"]
        if every is not None:
            arguments += ["--trainer.callbacks+=WindowCheckpoint", f"--trainer.callbacks.every_n_train_steps={every}"]
        arguments += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
        return Scenario(", ".join(names), tuple(arguments))

    def _deal(self, *values: str) -> str:
        deck = self._decks.setdefault(values, [])
        if not deck:
            deck.extend(self._rng.sample(values, len(values)))
        return deck.pop().strip()
