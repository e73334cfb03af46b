"""Conflict figures against autograd by hand, and a run that does not notice being watched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hbat_lightning import DataSource, DPOModule, HybridDataModule, KTOModule, LoraSettings, PPOModule, SFTModule
from hbat_lightning.callbacks import GradientConflict, SwitchReport, WindowCheckpoint
from hbat_lightning.conflict import layer_of
from hbat_lightning.data import embedded
from hbat_lightning.data.conflict_task import preference_reward
from hbat_lightning.errors import UserError
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import Interval, Joint
from hbat_lightning.training_data import MicroBatch
from hbat_lightning.values import AdapterValue
from tests.support import Run, instruction_loss, pair_scores, preference_loss, put, same_bits, weights

NOISY = LoraSettings(r=4, alpha=8, dropout=0.1)


def rows_of(folder: Path, name: str = "conflict.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Snapshots(SwitchReport):
    """Parameters after every optimizer step."""

    def __init__(self) -> None:
        super().__init__()
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.last:
            self.after.append(weights(pl_module))


def by_hand(run: Run, at: dict[str, Tensor], start: dict[str, Tensor]) -> dict[str, list[dict[str, Tensor]]]:
    """Gradients of both objectives from even and odd held-out rows, by autograd from all logits of one row at a time."""
    module, found = run.module, {}
    model = module.policy.model
    trained = module.policy.trained_parameters()
    model.eval()
    for name in ("instruction", "preference"):
        held_out, found[name] = run.data.val_sets[name], []
        for half in (0, 1):
            window = [MicroBatch(held_out.collate([row]), name) for row in range(half, min(len(held_out), 6), 2)]
            put(module, start)
            reference = pair_scores(model, window).detach() if name == "preference" else None
            put(module, at)
            loss = (
                instruction_loss(model, window)
                if reference is None
                else preference_loss(pair_scores(model, window), reference, 0.5)
            )
            found[name].append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    return found


def flat(tensors: dict[str, Tensor], layer: str) -> Tensor:
    return torch.cat([value.double().flatten() for name, value in tensors.items() if layer in ("", layer_of(name))])


def test_figures_are_those_of_autograd_by_hand(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    policy, seen = make_policy(double=True, lora=NOISY), Snapshots()
    module = make_hybrid(policy, schedule=Interval(2, 3, 2))
    run = fit(module, GradientConflict(rows=6, every_n_steps=4), seen, num_sanity_val_steps=-1)
    rows = rows_of(tmp_path)
    assert [(row["step"], row["phase"], row["steps"], row["ends"]) for row in rows] == [
        (3, 0, 3, True),
        (4, 1, 1, False),
        (5, 1, 2, True),
        (8, 2, 3, True),
        (10, 3, 2, True),
    ]
    begin = {name: value.clone() for name, value in policy.snapshot("phase_start").items()}
    begin = {name: torch.zeros_like(v) if "lora_B" in name else seen_first(run, name) for name, v in begin.items()}
    starts = {0: begin, 1: seen.after[2], 2: seen.after[4], 3: seen.after[7]}
    last = weights(module)
    moves = {n: {k: seen.after[end - 1][k] - starts[n][k] for k in last} for n, end in enumerate((3, 5, 8, 10))}
    held_out = {name: min(len(run.data.val_sets[name]), 6) for name in ("instruction", "preference")}
    for row in rows:
        assert row["rows"] == held_out
        at = seen.after[row["step"] - 1]
        gradients = by_hand(run, at, begin)
        drift = {name: at[name] - starts[row["phase"]][name] for name in at}
        other = "preference" if row["objective"] == "instruction" else "instruction"
        for layer in ("", *row["layers"]):
            figures = row["layers"][layer] if layer else row["all"]
            a, b, c, d = (flat(half, layer) for name in ("instruction", "preference") for half in gradients[name])
            expected = {
                "plain_cosine": (a + b) @ (c + d) / (a + b).norm() / (c + d).norm(),
                "instruction_agreement": a @ b / a.norm() / b.norm(),
                "preference_agreement": c @ d / c.norm() / d.norm(),
                "interference": sum(flat(half, layer) for half in gradients[other]) @ flat(drift, layer) / 2,
                "drift": flat(drift, layer).square().mean().sqrt(),
            }
            crossed = (a @ c + a @ d + b @ c + b @ d) / 4
            if a @ b > 0:
                expected["instruction_norm"] = (a @ b).sqrt()
            if c @ d > 0:
                expected["preference_norm"] = (c @ d).sqrt()
            if a @ b > 0 and c @ d > 0:
                expected["cosine"] = crossed / ((a @ b) * (c @ d)).sqrt()
            if row["ends"] and row["phase"]:
                one, two = flat(moves[row["phase"]], layer), flat(moves[row["phase"] - 1], layer)
                expected["tug_of_war"] = one @ two / one.norm() / two.norm()
            assert figures == pytest.approx({n: float(v) for n, v in expected.items()}, rel=1e-6, abs=1e-12), layer
        assert row["layers"].keys() == {layer_of(name) for name in at}
    logged = dict(run.log.table("step", "conflict/cosine"))
    assert logged == {row["step"] - 1: row["all"]["cosine"] for row in rows if "cosine" in row["all"]}
    ended = [{"all": row["all"], "layers": row["layers"]} for row in rows if row["ends"]]
    assert [row["conflict"] for row in rows_of(tmp_path, "switches.jsonl")] == ended
    assert (tmp_path / "conflict.png").stat().st_size > 10_000


def seen_first(run: Run, name: str) -> Tensor:
    """What a tensor of the adapter began with: built again from the run's seed."""
    policy = type(run.module.policy)(embedded.TINY_LLAMA, lora=run.module.policy.lora)
    with torch.random.fork_rng():
        from hbat_lightning.stream import stable_seed

        torch.manual_seed(stable_seed(run.module.run_seed, "policy"))
        policy.build(torch.device("cpu"))
    return policy.trained_parameters()[name].detach()


@pytest.mark.parametrize(
    "settings", [{"lora": NOISY, "gradient_checkpointing": True}, {"lora": None}], ids=["lora", "full"]
)
def test_a_run_ends_with_the_same_bits_with_and_without(
    settings: Any,
    make_policy: Any,
    make_hybrid: Any,
    fit: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")

    def run(*callbacks: Any) -> Run:
        module = make_hybrid(make_policy(**settings), schedule=Interval(2, 3, 2), optimizer_state="per_objective")
        torch.manual_seed(3)
        done: Run = fit(module, *callbacks)
        return done

    plain, watched = run(), run(GradientConflict(rows=4, every_n_steps=2))
    assert len(rows_of(tmp_path)) == 7
    assert re.search(r"gradient conflict: 7 measurements took \d+\.\d s", caplog.text)
    assert same_bits(plain.weights, watched.weights)
    for name in ("train/instruction/loss", "train/preference/loss", "val/preference/loss"):
        assert plain.log.column(name) == watched.log.column(name), name


def test_a_run_that_goes_on_measures_what_it_would_have(
    make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    def run(folder: str, **settings: Any) -> None:
        callbacks = [
            GradientConflict(rows=4, every_n_steps=2),
            WindowCheckpoint(1, str(tmp_path / folder / "checkpoints")),
        ]
        module = make_hybrid(make_policy(lora=NOISY), schedule=Interval(2, 3, 2))
        fit(module, *callbacks, enable_checkpointing=True, default_root_dir=tmp_path / folder, **settings)

    run("whole")
    truth = rows_of(tmp_path / "whole")
    assert "tug_of_war" in truth[-1]["all"]
    run("parts", max_steps=6)
    with (tmp_path / "parts" / "conflict.jsonl").open("a") as file:
        file.write(json.dumps(truth[-1]) + "\n")  # of steps that no checkpoint has reached
    run("parts", ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert rows_of(tmp_path / "parts") == truth


def test_rollouts_are_those_at_hand_and_before_there_are_any_nothing_is_measured(
    make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    sampling = GenerationSettings(max_new_tokens=6, temperature=1.0)
    ppo = PPOModule(FunctionReward(preference_reward), AdapterValue(LoraSettings(r=4)), sampling=sampling, lr=2e-3)
    callbacks = [GradientConflict(rows=4), SwitchReport()]
    fit(make_hybrid(preference=ppo, schedule=Interval(2, 2, 2)), *callbacks, num_sanity_val_steps=-1)
    assert [row["step"] for row in rows_of(tmp_path)] == [4, 6, 8]
    assert all({"plain_cosine", "interference"} <= row["all"].keys() for row in rows_of(tmp_path))
    assert "conflict" not in rows_of(tmp_path, "switches.jsonl")[0]


def test_rows_that_are_scored_together_stay_so(make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.25),
        DataSource(embedded.FEEDBACK, limit=20, val_fraction=0.4),
        batch_size=2,
        val_batch_size=4,
    )
    module = make_hybrid(preference=KTOModule(lr=2e-3), schedule=Interval(1, 2, 2))
    fit(module, GradientConflict(rows=8), data=data)
    assert len(rows_of(tmp_path)) == 2
    data.val_batch_size = 8
    with pytest.raises(UserError, match="val_batch_size"):
        fit(make_hybrid(preference=KTOModule(lr=2e-3)), GradientConflict(), data=data)


def test_without_phases_gradients_are_compared_and_nothing_else(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    module = make_hybrid(instruction=SFTModule(), preference=DPOModule(beta=0.5), schedule=Joint())
    fit(module, GradientConflict(rows=4, every_n_steps=2, drift=False), accumulate_grad_batches=2)
    assert all({"cosine", "plain_cosine"} & row["all"].keys() for row in rows_of(tmp_path))
    assert not any({"interference", "drift", "tug_of_war"} & row["all"].keys() for row in rows_of(tmp_path))


def test_what_cannot_be_compared_is_refused(make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any) -> None:
    with pytest.raises(UserError, match="two objectives"):
        fit(SFTModule(make_policy()), GradientConflict())
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.25),
        DataSource(embedded.PREFERENCE, limit=12, val_fraction=0.0),
        batch_size=2,
    )
    with pytest.raises(UserError, match=r"held-out preference rows.*val_fraction"):
        fit(make_hybrid(), GradientConflict(), data=data)
    for settings in ({"rows": 1}, {"every_n_steps": 0}):
        with pytest.raises(ValueError, match="rows must be"):
            GradientConflict(**settings)


def test_layers_are_named_as_in_the_model() -> None:
    assert layer_of("base_model.model.model.layers.3.self_attn.q_proj.lora_A.policy.weight") == "layers.3"
    assert layer_of("base_model.model.lm_head.lora_B.policy.weight") == "lm_head"
    assert layer_of("model.embed_tokens.weight") == "embed_tokens"
    assert layer_of("transformer.h.11.attn.c_attn.weight") == "h.11"
