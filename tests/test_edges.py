"""Uses off the beaten track: a second fit, other held-out rows, none at all, a pairs-only run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from hbat_lightning import DataSource, DPOModule, HybridDataModule
from hbat_lightning.callbacks import ElasticWeightConsolidation, SwitchReport
from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.functional import dpo_loss
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.importance import RunningFisher
from hbat_lightning.metrics_logger import MetricsLogger

CONFIGS = Path(__file__).parents[1] / "configs"


def test_other_held_out_pairs_are_compared_with_the_initial_policy(
    make_hybrid: Any, make_data: Any, make_trainer: Any
) -> None:
    module = make_hybrid()
    make_trainer().fit(module, make_data())
    other = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24),
        DataSource(embedded.PREFERENCE, limit=12, val_path=embedded.PREFERENCE_VALIDATION),
        batch_size=32,
    )
    make_trainer().validate(module, datamodule=other, verbose=False)

    module.policy.eval()
    losses = []
    for batch in other.val_dataloader()[1]:
        with torch.no_grad():
            now = module.policy.score(batch.inputs).row_sums().view(2, -1)
            with module.policy.model.disable_adapter():  # PEFT's own way to the base, which a new adapter starts from
                first = module.policy.score(batch.inputs).row_sums().view(2, -1)
        losses.append(dpo_loss(now[0], now[1], first[0], first[1], beta=0.5)[0])
    expected = torch.cat(losses).mean().item()
    assert module.validation_results["val/preference/loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(expected - 0.6931) > 1e-3


def test_a_learning_rate_of_zero_is_zero(make_hybrid: Any, make_data: Any, make_trainer: Any) -> None:
    module = make_hybrid(preference=DPOModule(lr=0.0))
    make_trainer().fit(module, make_data())
    factor = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    for step in range(module.plan.total_steps):
        phase, _ = module.plan.at(step)
        assert (factor(step) == 0.0) == (phase.objective == "preference")


def test_a_penalty_in_the_base_s_own_generation_settings_is_not_inherited(make_policy: Any) -> None:
    policy = make_policy()
    policy.build(torch.device("cpu"))
    ids = torch.randint(4, 100, (2, 6))
    call = (ids, torch.ones_like(ids), GenerationSettings(max_new_tokens=12), 2, 0)
    plain = policy.generate(*call)
    policy.model.generation_config.repetition_penalty = 50.0
    policy.model.get_base_model().generation_config.repetition_penalty = 50.0
    assert policy.generate(*call) == plain
    assert policy.model.get_base_model().generation_config.repetition_penalty == 50.0  # and given back


def test_held_out_rows_are_those_of_the_named_split(tmp_path: Path) -> None:
    rows = {"train": ["a", "b", "c"], "validation": ["x", "y"]}
    for split, answers in rows.items():
        lines = [json.dumps({"prompt": "p", "completion": answer}) for answer in answers]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    source = DataSource(str(tmp_path), split="train", val_split="validation", limit=2)
    train, held_out = HybridDataModule(instruction=source).split("instruction", seed=0)
    assert [row.messages[-1].content for row in train] == ["a", "b"]
    assert [row.messages[-1].content for row in held_out] == ["x", "y"]  # the limit is for training rows
    with pytest.raises(UserError, match="held-out rows would be the training rows"):
        DataSource(str(tmp_path), val_path=str(tmp_path))


def test_without_held_out_rows_switches_are_still_kept(
    make_hybrid: Any, make_trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=12, val_fraction=0.0),
        DataSource(embedded.PREFERENCE, limit=8, val_fraction=0.0),
        batch_size=2,
    )
    trainer = make_trainer(callbacks=[SwitchReport(), ElasticWeightConsolidation()])
    trainer.fit(make_hybrid(), data)
    rows = [json.loads(line) for line in (tmp_path / "switches.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == [0, 1, 2, 3]
    assert all(max(row["drift"].values()) > 0 for row in rows)
    assert all("ewc/pull_norm" in row["ewc"] for row in rows[1:])
    assert "no held-out rows" in capsys.readouterr().out


def test_a_second_fit_starts_from_nothing(make_hybrid: Any, make_data: Any, make_trainer: Any, tmp_path: Path) -> None:
    module, data, importance = make_hybrid(), make_data(), RunningFisher()
    observed: list[int] = []

    class Count(SwitchReport):
        def on_switch(self, trainer: Trainer, module: Any, ended: Any, begun: Any) -> None:
            observed.append(importance._steps)

    for _ in range(2):
        report = Count()
        trainer = make_trainer(callbacks=[report, ElasticWeightConsolidation(importance=importance)])
        trainer.fit(module, data)
    assert observed[:4] == observed[4:]
    assert observed[0] == 0
    assert len((tmp_path / "switches.jsonl").read_text().splitlines()) == 4


def test_few_sanity_batches_are_no_figures_before(
    make_hybrid: Any, make_data: Any, make_trainer: Any, tmp_path: Path
) -> None:
    make_trainer(callbacks=[SwitchReport()], num_sanity_val_steps=1).fit(make_hybrid(), make_data())
    rows = [json.loads(line) for line in (tmp_path / "switches.jsonl").read_text().splitlines()]
    assert rows[0]["before"] == {}
    assert rows[1]["before"] == rows[0]["after"]


def test_a_pairs_only_run_is_stopped_tested_and_predicted(tmp_path: Path) -> None:
    shared = ["--config", str(CONFIGS / "dpo.yaml"), "--trainer.default_root_dir", str(tmp_path)]
    shared += ["--data.init_args.preference.limit", "40", "--model.init_args.generation.max_new_tokens", "4"]
    main(["fit", *shared, "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"])
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "stopped"
    for command in ("test", "predict"):
        main([command, *shared, "--ckpt_path", "last", "--trainer.enable_progress_bar", "false"])
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    held_out = {row["chosen"] for row in embedded.rows(embedded.PREFERENCE)[:40]}
    assert rows
    assert all(row["reference"] in held_out and "<bos>" not in row["prompt"] for row in rows)
    with (tmp_path / "evaluation.csv").open(newline="") as file:
        assert "test/rougeL" in next(csv.reader(file))


def test_rows_of_steps_to_be_done_again_are_dropped_from_the_log(tmp_path: Path) -> None:
    logger = MetricsLogger(str(tmp_path))
    for step in range(5):
        logger.log_metrics({"loss": float(step)}, step=step)
    MetricsLogger(str(tmp_path)).forget_from(3)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["0", "1", "2"]
