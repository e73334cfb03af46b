"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.precision import MixedPrecision

from hbat_lightning import DataSource, DPOModule, HybridDataModule, SFTModule
from hbat_lightning.callbacks import ElasticWeightConsolidation, ImportanceFreeze, NonFiniteGuard, WindowCheckpoint
from hbat_lightning.errors import UserError
from hbat_lightning.importance import ExactFisher, RawWeights, RunningFisher
from hbat_lightning.objectives import REINFORCEModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import Interval, MaxGap, Single
from tests.support import Recorder, Run, same_bits, weights


class BadRow(SFTModule):
    """A row whose loss is no number in training."""

    def __init__(self, row: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.row = row

    def loss(self, policy: Any, inputs: dict[str, torch.Tensor]) -> Any:
        sums = super().loss(policy, inputs)
        if self.row in inputs["index"].tolist() and torch.is_grad_enabled():
            total, count = sums["loss"]
            sums["loss"] = (total * math.nan, count)
        return sums


class BadPairs(DPOModule):
    """Pairs whose loss is no number, whoever asks."""

    def loss(self, policy: Any, inputs: dict[str, torch.Tensor]) -> Any:
        sums = super().loss(policy, inputs)
        return sums | {"loss": (sums["loss"][0] * math.nan, sums["loss"][1])}


class Poison(Callback):
    """Makes a tensor's gradient infinite in single micro-batches."""

    def __init__(self, *steps: int, micro_batch: int = 1) -> None:
        self.steps, self.micro_batch, self._number = steps, micro_batch, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self.steps and self._number == self.micro_batch:
            parameter = list(pl_module.policy.trained_parameters().values())[3]
            handle = parameter.register_hook(lambda gradient: gradient.fill_(math.inf) * 1)
            self._handle: Any = handle
        self._number = 0 if batch.last else self._number + 1

    def on_train_batch_end(self, *args: Any) -> None:
        self.__dict__.pop("_handle", _Nothing).remove()


class _Nothing:
    @staticmethod
    def remove() -> None:
        """No hook is there."""


class ByHand(Callback):
    """Leaves out the steps that it is told, without looking at any gradient."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        ewc = next(one for one in trainer.callbacks if isinstance(one, ElasticWeightConsolidation))
        pull = ewc.pull
        ewc.pull = lambda module: {} if trainer.global_step in self.steps else pull(module)  # type: ignore[method-assign]

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step in self.steps:
            for parameter in pl_module.parameters():
                parameter.grad = None


def bits(run: Run, ewc: ElasticWeightConsolidation) -> dict[str, torch.Tensor]:
    """Weights, moments, learning rate and EWC's state."""
    state, optimizer = ewc.state_dict(), run.trainer.optimizers[0]
    held = {f"{o}.{name}": value for o, tensors in state["held_for"].items() for name, value in tensors.items()}
    moments = {
        f"{number}.{key}": torch.as_tensor(value)
        for number, parameter in enumerate(optimizer.param_groups[0]["params"])
        for key, value in optimizer.state[parameter].items()
    }
    return run.weights | held | state["importance"] | moments | {"lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def test_a_run_that_skips_steps_is_the_run_without_them(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """Of three micro-batches, with clipping, EWC by running Fisher, moments that run on; in both objectives' phases.

    Whatever the order of callbacks.
    """
    bad = (1, 3)

    def run(*before: Callback, after: tuple[Callback, ...] = ()) -> tuple[Run, dict[str, torch.Tensor]]:
        ewc = ElasticWeightConsolidation(3.0, RunningFisher())
        module = make_hybrid(schedule=Interval(2, 2, 2), optimizer_state="shared")
        done = fit(module, *before, ewc, *after)
        return done, bits(done, ewc)

    by_hand, truth = run(ByHand(*bad))
    for order in ((NonFiniteGuard("skip"), Poison(*bad)), (Poison(*bad),)):
        done, found = run(*order, after=() if len(order) == 2 else (NonFiniteGuard("skip"),))
        assert same_bits(found, truth)
        assert done.trainer.global_step == by_hand.trainer.global_step == 8
        assert done.log.column("lr") == by_hand.log.column("lr")
        made = [row for row in by_hand.log.table("step", "ewc/penalty", "ewc/pull_norm") if row[0] not in bad]
        assert done.log.table("step", "ewc/penalty", "ewc/pull_norm") == made
        lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
        assert [(line["step"], line["objective"]) for line in lines] == [(1, "instruction"), (3, "preference")]
        assert len(made) == 6


def test_weights_and_moments_stay_to_the_last_bit(make_hybrid: Any, fit: Any) -> None:
    class Before(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                self.weights, self.moments = (
                    weights(pl_module),
                    copy.deepcopy(trainer.optimizers[0].state_dict()["state"]),
                )

    before = Before()
    module = make_hybrid(
        schedule=Interval(1, 4, 1), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1)
    )
    done = fit(module, NonFiniteGuard("skip"), Poison(2), before, ImportanceFreeze(), max_steps=3)
    assert same_bits(done.weights, before.weights)
    for number, state in done.trainer.optimizers[0].state_dict()["state"].items():
        assert all(torch.equal(value, before.moments[number][key]) for key, value in state.items())


def test_going_on_after_a_skipped_step_is_exact(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> tuple[Run, dict[str, torch.Tensor]]:
        ewc = ElasticWeightConsolidation(3.0, RunningFisher())
        keep = WindowCheckpoint(1, str(tmp_path / folder))
        module = make_hybrid(schedule=Interval(2, 2, 2))
        done = fit(module, ewc, NonFiniteGuard("skip"), Poison(1, 3), keep, enable_checkpointing=True, **settings)
        return done, bits(done, ewc)

    _, truth = run("whole")
    file = (tmp_path / "nonfinite.jsonl").read_text()
    for stop in (2, 4):  # right behind each
        run("parts", max_steps=stop, ckpt_path=tmp_path / "parts" / "last.ckpt" if stop > 2 else None)
    _, found = run("parts", ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert same_bits(found, truth)
    assert (tmp_path / "nonfinite.jsonl").read_text() == file


def test_a_line_that_was_torn_as_it_was_written_is_dropped(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """A process that was killed leaves half a line; the step is done again by the run that goes on."""

    def run(**settings: Any) -> None:
        keep = WindowCheckpoint(1, str(tmp_path / "kept"))
        callbacks = (NonFiniteGuard("skip"), Poison(0, 2), keep)
        fit(make_hybrid(), *callbacks, enable_checkpointing=True, **settings)

    run(max_steps=1)
    file = tmp_path / "nonfinite.jsonl"
    before = file.read_text()
    file.write_text(before + '{"step": 2, "pha')
    run(max_steps=2, ckpt_path=tmp_path / "kept" / "last.ckpt")
    assert file.read_text() == before


def test_steps_in_a_row_end_the_run_and_are_counted_over_a_resume(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    def run(*bad: int, **settings: Any) -> Run:
        keep = WindowCheckpoint(1, str(tmp_path / "kept"))
        guard = NonFiniteGuard("skip", limit=3)
        return fit(
            make_hybrid(schedule=Interval(1, 8, 1)), guard, Poison(*bad), keep, enable_checkpointing=True, **settings
        )

    run(0, 1, 3, 4, max_steps=5)  # never three in a row
    with pytest.raises(
        UserError, match=r"^3 steps in a row were not finite, in the last the gradient of 1 tensors .*step 5"
    ):
        run(5, ckpt_path=tmp_path / "kept" / "last.ckpt")


# ---- what is said and written -------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path) -> HybridDataModule:
    """Rows that tell their own number; rows 3 and 8 are dropped, so that places and indices differ."""
    words = ["the", "post", "is", "my", "name", "david", "camera", "airport", "week", "long"]
    usable = [{"prompt": f"post : {a} {b}", "completion": f"{b} {a}"} for a in words[:6] for b in words[6:]]
    usable[2], usable[7] = {"prompt": "post", "completion": None}, {"prompt": "", "completion": "x"}  # type: ignore[dict-item]
    (tmp_path / "rows.json").write_text(json.dumps(usable))
    pairs = [{"prompt": f"post : {a}", "chosen": f"{a} please", "rejected": f"{a} no"} for a in words]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return HybridDataModule(
        DataSource(str(tmp_path / "rows.json"), val_fraction=0.0),
        DataSource(str(tmp_path / "pairs.json"), val_fraction=0.0),
        template="plain",
        batch_size=2,
        invalid_rows="drop",
    )


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(
    make_policy: Any, rows: HybridDataModule, fit: Any, tmp_path: Path
) -> None:
    module = BadRow(11, policy=make_policy(), lr=1e-3)
    watch = Recorder()
    with pytest.raises(UserError) as caught:
        fit(module, watch, NonFiniteGuard(), data=rows)
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    bad = next(n for n, part in enumerate(line["micro_batches"]) if any(row["index"] == 11 for row in part["rows"]))
    named = line["micro_batches"][bad]["rows"]
    assert [part["loss"] for part in line["micro_batches"]].count("nan") == 1
    assert line["micro_batches"][bad]["loss"] == "nan"
    # index 11 is the twelfth usable row; two before it were dropped
    file = json.loads((tmp_path / "rows.json").read_text())
    numbers = {row["index"]: row["row"] for row in named}
    assert numbers[11] == 14
    assert all(row["file"] == str(tmp_path / "rows.json") for row in named)
    for row in named:
        (text,) = row["texts"]
        answer = [token for token, label in zip(text["input_ids"], text["labels"], strict=True) if label != -100]
        said = module.policy.tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert said == file[row["row"] - 1]["completion"]
    said = str(caught.value)
    assert "\n" not in said
    assert f"the loss is not finite at optimizer step {line['step']} (round 1, phase 0, instruction)" in said
    assert (
        f"in micro-batch {bad + 1} of 3: {tmp_path}/rows.json, row {', '.join(str(row['row']) for row in named)}"
        in said
    )
    assert f"{tmp_path}/nonfinite.jsonl has its rows" in said
    assert (line["action"], line["round"], line["phase"], line["objective"]) == ("stop", 0, 0, "instruction")
    assert line["learning_rates"] == [pytest.approx(module.trainer.optimizers[0].param_groups[0]["lr"])]
    assert set(line["gradient_norms"]) == {f"policy.model.{name}" for name in module.policy.trained_parameters()}
    assert all(bool(p.isfinite().all()) for p in module.policy.trained_parameters().values()), "the step was not made"
    assert len(watch.gradients) == line["step"]


def test_of_a_bad_gradient_all_rows_and_the_tensors_are_named(
    make_policy: Any, rows: HybridDataModule, fit: Any, tmp_path: Path
) -> None:
    module = DPOModule(policy=make_policy(), lr=1e-3)
    with pytest.raises(
        UserError, match=r"the gradient of 1 tensors \(\S+ first\) is not finite at .*pairs\.json, row \d"
    ):
        fit(module, NonFiniteGuard(), Poison(0), data=rows)
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    name = list(module.policy.trained_parameters())[3]
    assert line["gradient_norms"] == {f"policy.model.{name}": "inf"}
    assert [len(part["rows"]) for part in line["micro_batches"]] == [2, 2, 2]
    decode = module.policy.tokenizer.decode
    for row in (row for part in line["micro_batches"] for row in part["rows"]):
        answers = [
            decode([t for t, label in zip(text["input_ids"], text["labels"], strict=True) if label != -100])
            for text in row["texts"]
        ]
        assert "please" in answers[0]
        assert "please" not in answers[1]
        assert "no" in answers[1] or "<unk>" in answers[1]
        assert row["margin"] == 0.0
        assert row["row"] == row["index"] + 1


def test_rollouts_are_named_by_their_prompts(
    make_policy: Any, rows: HybridDataModule, fit: Any, tmp_path: Path
) -> None:
    module = REINFORCEModule(FunctionReward(lambda prompt, completion: 1.0), policy=make_policy(), samples=2, lr=1e-3)
    with pytest.raises(UserError, match=r"pairs\.json, row \d"):
        fit(module, NonFiniteGuard(), Poison(0), data=rows, accumulate_grad_batches=2)
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    for part in line["micro_batches"]:
        assert [row["index"] for row in part["rows"]] == [row["row"] - 1 for row in part["rows"]]
        assert len(part["rows"]) == 4
        assert all(row["reward"] == 1.0 and len(row["texts"]) == 1 for row in part["rows"])


def test_a_dry_run_writes_nothing(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite"):
        fit(make_hybrid(), NonFiniteGuard(), Poison(0, micro_batch=0), fast_dev_run=3)
    assert not (tmp_path / "nonfinite.jsonl").exists()


# ---- fp16 -----------------------------------------------------------------------------------------------------------


def half(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000))


def test_in_fp16_the_scaler_finds_its_scale_undisturbed(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """Infinite gradients at a scale that is too large are no fault; and Fisher information is not fed with them."""

    def run(*callbacks: Callback) -> tuple[Run, dict[str, torch.Tensor]]:
        ewc = ElasticWeightConsolidation(3.0, RunningFisher())
        done = fit(make_hybrid(schedule=Interval(1, 3, 2)), ewc, *callbacks, plugins=half(2.0**33))
        return done, bits(done, ewc)

    guarded, found = run(NonFiniteGuard())
    plain, truth = run()
    assert plain.trainer.precision_plugin.scaler.get_scale() < 2.0**33, "there were infinite gradients"
    assert guarded.trainer.precision_plugin.scaler.get_scale() == plain.trainer.precision_plugin.scaler.get_scale()
    assert same_bits(found, truth)
    assert not (tmp_path / "nonfinite.jsonl").exists()


def test_in_fp16_a_bad_loss_is_a_fault_and_left_out(make_policy: Any, rows: Any, fit: Any, tmp_path: Path) -> None:
    seen = Recorder()
    done = fit(BadRow(11, policy=make_policy(), lr=1e-3), seen, NonFiniteGuard("skip"), data=rows, plugins=half(4.0))
    (line,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert line["micro_batches"][0]["loss"] == "nan" or "nan" in [part["loss"] for part in line["micro_batches"]]
    after = seen.parameters[line["step"] + 1] if line["step"] + 1 < len(seen.parameters) else done.weights
    assert same_bits(after, seen.parameters[line["step"]])
    with pytest.raises(UserError, match="the gradient of 1 tensors"):  # nothing left to find at a scale of 1
        fit(BadRow(-2, policy=make_policy(), lr=1e-3), NonFiniteGuard(), Poison(0), data=rows, plugins=half(1.0))


# ---- what must not be fed -------------------------------------------------------------------------------------------


def test_a_schedule_by_losses_does_not_hear_of_it(make_hybrid: Any, fit: Any, make_data: Any) -> None:
    heard: list[float] = []

    class Listen(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            heard.extend(value for value, _ in pl_module.plan.state_dict()["progress"].values())

    module = make_hybrid(instruction=BadRow(2), preference=DPOModule(beta=0.5), schedule=MaxGap(1, 9, refresh=100))
    done = fit(module, NonFiniteGuard("skip", limit=100), Listen(), data=make_data())
    assert any(math.isnan(loss) for loss in done.log.column("train/instruction/loss"))
    assert all(map(math.isfinite, heard))


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_bad_measurement_of_a_schedule_by_losses_is_heard_in_the_window_that_trains_next(
    action: Any, make_hybrid: Any, fit: Any, make_data: Any, tmp_path: Path
) -> None:
    """Measured at step 0, where instructions have by far the larger gap."""
    module = make_hybrid(
        instruction=SFTModule(), preference=BadPairs(), schedule=MaxGap(1, 6, 0.01, instruction_best=-9.0, refresh=100)
    )
    settings = {"data": make_data(), "accumulate_grad_batches": 1}
    if action == "stop":
        with pytest.raises(UserError, match=r"not finite at optimizer step 0 \(.*preference\), .*row \d"):
            fit(module, NonFiniteGuard(), **settings)
        return
    done = fit(module, NonFiniteGuard("skip", limit=3), max_steps=2, **settings)
    lines = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1], "until the loss is finite, or the limit is reached"
    assert all(part["objective"] == "preference" for line in lines for part in line["micro_batches"])
    assert done.log.column("gap/preference") == [math.inf] * 2


def test_exact_fisher_leaves_bad_rows_out() -> None:
    good = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 0.0])}]
    rows = [good[0], {"w": torch.tensor([math.inf, 1.0])}, good[1]]
    after = {"w": torch.zeros(2)}
    assert torch.equal(ExactFisher().measure(after, after, iter(rows))["w"], torch.tensor([5.0, 2.0]))


def test_weights_that_are_not_finite_are_refused() -> None:
    ewc = ElasticWeightConsolidation(1e30, weights=RawWeights())
    with pytest.raises(UserError, match="weights that RawWeights makes of DriftImportance are not finite"):
        ewc.protect({"w": torch.tensor(1e30)})


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1"):
        NonFiniteGuard(limit=0)


def test_the_guard_is_a_standard_callback() -> None:
    from hbat_lightning.cli import make_cli

    config = ["--config", str(Path(__file__).parents[2] / "configs" / "sft.yaml"), "--trainer.accelerator", "cpu"]
    cli = make_cli(config, run=False)
    (guard,) = [one for one in cli.trainer.callbacks if isinstance(one, NonFiniteGuard)]
    assert guard.action == "stop"
    asked = ["--trainer.callbacks+=NonFiniteGuard", "--trainer.callbacks.action=skip"]
    own = make_cli([*config, *asked], run=False).trainer.callbacks
    assert [one.action for one in own if isinstance(one, NonFiniteGuard)] == ["skip"]
    assert isinstance(cli.model.schedule, Single)
