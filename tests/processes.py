"""Runs that several processes train together, and one process by itself at the same global batch.

``torchrun --nproc-per-node 2 -m tests.processes FOLDER begin`` runs all of :data:`RUNS`, each rank leaving what it ended
with in FOLDER, then the command line three times; the last run is killed on the way. With ``go_on`` in the place of
``begin`` that run goes on. The tests that start both are in ``test_several_processes.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from hbat_lightning import (
    DataSource,
    DPOModule,
    HybridAlignmentModule,
    HybridDataModule,
    KTOModule,
    LoraSettings,
    Policy,
    PPOModule,
    SFTModule,
)
from hbat_lightning.callbacks import ElasticWeightConsolidation, GradientConflict, ImportanceFreeze, NonFiniteGuard
from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from hbat_lightning.data.conflict_task import preference_reward
from hbat_lightning.errors import UserError
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.importance import ExactFisher, RunningFisher
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import Interval, Joint, MaxGap, RandomMix, Rounds
from hbat_lightning.values import AdapterValue
from tests.support import DoublePolicy, MemoryLogger

WORLD = 2
BATCH, ACCUMULATE = 2, 2  # on each of two devices; one device accumulates twice as many
SAVED = 4  # optimizer steps, in the middle of the second instruction phase
BETWEEN_PASSES = 3  # of PPO: its rollouts have been trained on once, and wait for the second time
LORA = LoraSettings(r=4, alpha=8)
DOUBLE = ("--trainer.precision", "64-true")
NOISY = LoraSettings(r=4, alpha=8, dropout=0.1)


class Save(Callback):
    """Keeps a checkpoint from after so many optimizer steps.

    Args:
        step: How many.
        file: Where it goes.
    """

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch.last:
            trainer.save_checkpoint(self.file)


class Kill(Callback):
    """Ends the process without a word in the middle of the window after so many optimizer steps.

    Args:
        step: How many.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and batch.last:
            os.kill(os.getpid(), signal.SIGKILL)


def fails_on_rank_1(prompt: str, completion: str) -> float:
    """A reward that one process cannot give."""
    return float("nan") if os.environ.get("RANK") == "1" else 0.0


class BadRow(SFTModule):
    """A row whose loss is no number in training: only one process meets it."""

    def __init__(self, row: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.row = row

    def loss(self, policy: Policy, inputs: dict[str, torch.Tensor]) -> Any:
        sums = super().loss(policy, inputs)
        bad = self.row in inputs["index"].tolist() and torch.is_grad_enabled()
        return sums | {"loss": (sums["loss"][0] * float("nan"), sums["loss"][1])} if bad else sums


def ppo(reward: Callable[[str, str], float] = preference_reward, **settings: Any) -> PPOModule:
    sampling = GenerationSettings(max_new_tokens=8, temperature=1.0)
    return PPOModule(
        FunctionReward(reward),
        AdapterValue(LORA),
        sampling=sampling,
        rollout_windows=2,
        passes=2,
        whiten_rewards=True,
        **settings,
    )


def hybrid(policy: Policy, preference: Any = None, **settings: Any) -> HybridAlignmentModule:
    settings.setdefault("schedule", Rounds(2, 1, 1))
    preference = preference or DPOModule(beta=0.5, lr=2e-3)
    instruction = settings.pop("instruction", None) or SFTModule(lr=settings.pop("lr", 5e-3))
    return HybridAlignmentModule(policy, instruction, preference, **settings)


def double(**settings: Any) -> Policy:
    return DoublePolicy(embedded.TINY_LLAMA, **({"lora": LORA} | settings))


def ewc(importance: Any = None) -> ElasticWeightConsolidation:
    return ElasticWeightConsolidation(strength=1.0, importance=importance)


RUNS: dict[str, Callable[[], tuple[Any, list[Callback]]]] = {
    "single precision": lambda: (hybrid(Policy(embedded.TINY_LLAMA, lora=LORA)), [ewc()]),
    "double precision": lambda: (hybrid(double()), [ewc(), GradientConflict(rows=5, every_n_steps=2)]),
    "dropout, and steps left out": lambda: (
        hybrid(
            double(lora=NOISY, gradient_checkpointing=True),
            instruction=BadRow(4, lr=5e-3),
            optimizer_state="per_objective",
        ),
        [ewc(RunningFisher()), NonFiniteGuard("skip")],
    ),
    "every parameter": lambda: (hybrid(double(lora=None)), [ewc(ExactFisher(samples=3))]),
    "kto": lambda: (hybrid(double(), KTOModule(lr=2e-3)), [ImportanceFreeze(0.2), GradientConflict(rows=4)]),
    "ppo": lambda: (hybrid(double(), ppo(lr=2e-3)), [ewc()]),
    "random mix": lambda: (hybrid(double(), DPOModule(beta=0.5), lr=None, schedule=RandomMix(1, 6, 0.5, seed=3)), []),
    "max gap": lambda: (
        hybrid(double(), DPOModule(beta=0.5), lr=None, schedule=MaxGap(1, 5, preference_weight=0.9, refresh=2)),
        [],
    ),
    "joint": lambda: (hybrid(double(), DPOModule(beta=0.5), lr=None, schedule=Joint(1.0, 0.5)), []),
}


def train(name: str, folder: Path, world: int = WORLD, batch_size: int = BATCH, **fit: Any) -> dict[str, Any]:
    """One of :data:`RUNS`; what this rank ended with, in plain types and tensors."""
    torch.set_num_threads(1)
    seed_everything(1234, verbose=False)
    module, callbacks = RUNS[name]()
    preference = embedded.FEEDBACK if name == "kto" else embedded.PREFERENCE
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.25),
        DataSource(preference, limit=18, val_fraction=0.3),
        batch_size=batch_size,
        val_batch_size=2,
    )
    log = MemoryLogger()
    shares = WORLD * BATCH // (world * batch_size)
    trainer = Trainer(
        default_root_dir=folder / f"{name} {world}",
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        accumulate_grad_batches=ACCUMULATE * shares,
        callbacks=[*callbacks, Save(BETWEEN_PASSES if name == "ppo" else SAVED, folder / f"{name}.ckpt")]
        if world > 1
        else callbacks,
        enable_checkpointing=False,
        logger=log,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        log_every_n_steps=1,
        reload_dataloaders_every_n_epochs=1,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, data, **fit)
    own = {key: p.detach().clone() for key, p in module.named_parameters() if p.requires_grad}
    snapshots = {kind: dict(module.policy.snapshot(kind) or {}) for kind in ("phase_start", "initial")}
    return {
        "weights": own,
        "callbacks": {type(callback).__name__: callback.state_dict() for callback in callbacks},
        "snapshots": {kind: {n: v.detach().clone() for n, v in tensors.items()} for kind, tensors in snapshots.items()},
        "moments": trainer.optimizers[0].state_dict()["state"],
        "objectives": {slot: objective.state() for slot, objective in module.objectives.items()},
        "stream": data.stream.state_dict(),
        "figures": dict(module.validation_results),
        "log": log.rows,
        "steps": trainer.global_step,
    }


def fail(folder: Path) -> str:
    """How a run ends here whose reward fails on another rank."""
    RUNS["failing"] = lambda: (hybrid(double(), ppo(fails_on_rank_1), schedule=Interval(1, 1, 1)), [])
    try:
        train("failing", folder)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "did not"


def fit_arguments(folder: Path, world: int) -> list[str]:
    """``hbat fit`` of a short run; the same global batch for any number of processes."""
    return [
        *("fit", "--config", "configs/hbat_dpo.yaml", "--trainer.default_root_dir", str(folder)),
        *("--model.schedule.rounds", "2", "--model.policy.lora.r", "4", "--model.policy.lora.dropout", "0.1"),
        *("--model.instruction.lr", "5e-3", "--model.preference.lr", "2e-3", "--data.batch_size", str(BATCH)),
        *("--data.instruction.limit", "24", "--data.instruction.val_fraction", "0.25", "--data.val_batch_size", "2"),
        *("--data.preference.limit", "18", "--data.preference.val_fraction", "0.3", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", str(world), "--trainer.strategy", "ddp" if world > 1 else "auto"),
        *(
            "--trainer.accumulate_grad_batches",
            str(ACCUMULATE * WORLD // world),
            "--trainer.enable_progress_bar",
            "false",
        ),
        *("--trainer.callbacks+=WindowCheckpoint", "--trainer.callbacks.every_n_train_steps", "3"),
        *("--trainer.callbacks+=ResourceMonitor",),
    ]


def begin(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    for name in RUNS:
        torch.save(train(name, folder), folder / f"{name}.{rank}.pt")
    (folder / f"failing.{rank}.txt").write_text(fail(folder))
    main(fit_arguments(folder / "whole", WORLD))
    main([*fit_arguments(folder / "double", WORLD), *DOUBLE])
    killed = ["--trainer.callbacks+=tests.processes.Kill", "--trainer.callbacks.step", "5"]
    main(fit_arguments(folder / "killed", WORLD) + killed)


def go_on(folder: Path) -> None:
    rank, again = os.environ["RANK"], folder / "again"
    torch.save(train("ppo", again, ckpt_path=folder / "ppo.ckpt"), folder / f"ppo, gone on.{rank}.pt")
    atexit.register(write_group, folder / f"group.{rank}.txt")  # the first to be registered runs last
    with contextlib.suppress(SystemExit):
        main([*fit_arguments(folder / "killed", WORLD), "--ckpt_path", "last", "--seed_everything", "7"])
    main([*fit_arguments(folder / "killed", WORLD), "--ckpt_path", "last"])
    for command in ("test", "predict"):
        main([command, "--config", str(folder / "killed" / "config.yaml"), "--ckpt_path", "last"])


def write_group(file: Path) -> None:
    """Whether there still is a process group."""
    file.write_text(str(torch.distributed.is_initialized()))


if __name__ == "__main__":
    # This module runs as __main__ here, and configurations name its callbacks as tests.processes.
    from tests import processes

    torch.set_num_threads(1)
    {"begin": processes.begin, "go_on": processes.go_on}[sys.argv[2]](Path(sys.argv[1]))
