"""A run that goes on is the run that it was, or says in which way it is not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hbat_lightning import DataSource, DPOModule, HybridDataModule, IPOModule, LoraSettings, SFTModule
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.data.readers import WHOLE, read_rows
from hbat_lightning.data.templates import TextTemplate
from hbat_lightning.errors import UserError
from hbat_lightning.importance import RunningFisher
from hbat_lightning.lr import Constant, Cosine
from hbat_lightning.schedules import Interval, Rounds, Single
from tests.support import Recorder, Run, same_bits

PLAIN = TextTemplate(user="{content}\n", name="mine")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Rows of the embedded task in a file, some of them changed."""
    folder = tmp_path_factory.mktemp("rows")

    def write(objective: str, count: int, changed: bool = False, name: str = "") -> str:
        address = {"instruction": embedded.INSTRUCTION, "preference": embedded.PREFERENCE}[objective]
        rows = [dict(row.values) for row in read_rows(address, None, count, WHOLE)]
        if changed:
            key = "completion" if "completion" in rows[0] else "chosen"
            rows[-1][key] = rows[-2][key] + " yes"
        path = folder / (name or f"{objective}-{count}-{changed}.json")
        path.write_text(json.dumps(rows))
        return str(path)

    return write


@pytest.fixture
def rows(files: Any) -> Callable[..., HybridDataModule]:
    """Data from files: 24 instructions and 12 pairs, a quarter of each held out."""

    def make(
        instruction: tuple[Any, ...] = (24,), preference: tuple[Any, ...] = (12,), **settings: Any
    ) -> HybridDataModule:
        return HybridDataModule(
            DataSource(files("instruction", *instruction), val_fraction=0.25),
            DataSource(files("preference", *preference), val_fraction=0.25),
            **{"batch_size": 2, "template": "alpaca"} | settings,
        )

    return make


@pytest.fixture
def go(make_policy: Any, make_hybrid: Any, rows: Any, fit: Any, tmp_path: Path) -> Callable[..., Run]:
    """Train, from a checkpoint if there is one. The run: two rounds of 5 + 2 and 5 + 3 windows."""

    def run(
        *callbacks: Any,
        base: str = embedded.TINY_LLAMA,
        data: HybridDataModule | None = None,
        ckpt: Path | None = None,
        folder: str = "run",
        module: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> Run:
        made = make_policy(base, lora=LoraSettings(r=4, alpha=8, dropout=0.1), **policy or {})
        built = make_hybrid(made, **{"schedule": Rounds(2, 1, 1)} | (module or {}))
        keep = WindowCheckpoint(1, str(tmp_path / folder))
        return fit(
            built,
            keep,
            *callbacks,
            data=data or rows(),
            ckpt_path=ckpt,
            **{"enable_checkpointing": True, "accumulate_grad_batches": 1} | trainer,
        )

    return run


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a checkpoint lies that several tests go on from."""
    return tmp_path_factory.mktemp("shelf")


@pytest.fixture
def saved(go: Any, tmp_path: Path, shelf: Path) -> Path:
    """A checkpoint inside the first instruction phase, which has five steps: two are done."""
    kept = shelf / "two-steps.ckpt"
    if not kept.exists():
        go(ElasticWeightConsolidation(), max_steps=2)
        shutil.copy(tmp_path / "run" / "last.ckpt", kept)
    return kept


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said of differences."""
    lines: list[str] = []
    monkeypatch.setattr("hbat_lightning.run_record.rank_zero_info", lines.append)
    monkeypatch.setattr("hbat_lightning.run_record.rank_zero_warn", lines.append)
    return lines


def other_tokenizer(folder: Path, base_folder: str) -> str:
    """The embedded model, with a tokenizer that has the ids of the full stop and the colon the other way round."""
    shutil.copytree(base_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {".": 5, ":": 4}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


# ---- refused ------------------------------------------------------------------------------------------------------


def test_one_line_names_every_difference(saved: Path, go: Any, rows: Any) -> None:
    data = rows((24, True), batch_size=3, template="plain")
    with pytest.raises(UserError) as caught:
        go(ckpt=saved, data=data, module={"seed": 5, "schedule": Rounds(2, 2, 1), "preference": IPOModule()})
    line = str(caught.value)
    assert "\n" not in line
    for part in (
        *("instruction template: was alpaca (", "preference template: was alpaca (", ", is plain ("),
        *("instruction data: was ", "-False.json, 24 rows (", "-True.json, 24 rows ("),
        *("seed: was 1234, is 5", "batch_size × devices: was 2, is 3", "preference: was DPOModule, is IPOModule"),
        *("schedule: was Rounds: 2, each on shards of its own: 1 ×", "2 × the instruction shard"),
        "add --accept_changes [objectives,schedule,seed,batch_size,template,data]",
    ):
        assert part in line, (part, line)
    for unchanged in ("tokenizer's", "lora", "preference data", "training rows"):
        assert unchanged not in line, (unchanged, line)


@pytest.mark.parametrize(
    ("settings", "line", "kind"),
    [
        ({"data": {"template": PLAIN}}, r"template: was alpaca \(\w+\), is mine \(\w+\)", "template"),
        ({"data": {"instruction": (23,)}}, r"instruction data: was \S+, 24 rows .* 23 rows \(\w+\)\. R", "data"),
        ({"data": {"preference": (12, True)}}, r"preference data: was \S+, 12 rows", "data"),
        ({"module": {"schedule": Rounds(3, 1, 1)}}, r"schedule: was Rounds: 2, .*, is Rounds: 3, ", "schedule"),
        ({"module": {"seed": 7}}, r"seed: was 1234, is 7\.", "seed"),
        ({"module": {"preference": IPOModule()}}, "preference: was DPOModule, is IPOModule", "objectives"),
        # what cannot change at all
        ({"module": {"schedule": Interval(2, 3, 2)}}, "schedule class: was Rounds, is Interval", None),
        ({"module": {"optimizer": torch.optim.SGD}}, "optimizer: was AdamW, is SGD", None),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: was 1, is 2", None),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_makes_it_another_run_is_refused_by_name(
    settings: dict[str, Any], line: str, kind: str | None, saved: Path, go: Any, rows: Any
) -> None:
    every = ("base", "data", "template", "tokenizer", "schedule", "seed", "batch_size", "objectives", "reward")
    accepted = tuple(one for one in every if one != kind)
    data = rows(**settings.get("data", {}), accept_changes=accepted)
    with pytest.raises(UserError, match=line) as caught:
        go(ckpt=saved, **settings | {"data": data})
    assert ("--accept_changes" in str(caught.value)) == (kind is not None)
    if kind:
        assert f"--accept_changes [{kind}]" in str(caught.value)


def test_another_tokenizer_is_refused_and_cuts_up_what_is_left_where_it_is_accepted(
    saved: Path, go: Any, rows: Any, base_folder: str, tmp_path: Path
) -> None:
    base = other_tokenizer(tmp_path / "other", base_folder)
    with pytest.raises(UserError, match=r"tokenizer's vocabulary: was 103 entries \(\w+\), is 103 entries") as caught:
        go(ckpt=saved, base=base)
    for unchanged in ("data:", "template:", "base:"):  # the weights are the same
        assert unchanged not in str(caught.value)
    assert "--accept_changes [tokenizer]" in str(caught.value)

    before, after = Recorder(), Recorder()
    go(before, ckpt=saved, max_steps=6, folder="before")
    data = rows(accept_changes=("tokenizer",))
    go(after, ckpt=saved, base=base, data=data, max_steps=6, folder="after")
    assert [len(side.windows) for side in (before, after)] == [4, 4]
    for mine, theirs in zip(after.windows, before.windows, strict=True):
        ids, truth = mine[0].inputs["input_ids"], theirs[0].inputs["input_ids"].clone()
        assert mine[0].inputs["index"].tolist() == theirs[0].inputs["index"].tolist()
        assert bool((ids == 4).any())
        stops, colons = truth == 4, truth == 5
        truth[stops], truth[colons] = 5, 4
        assert torch.equal(ids, truth)
    again = go(ckpt=tmp_path / "after" / "last.ckpt", base=base, max_steps=7, folder="after")  # not asked again
    assert again.trainer.global_step == 7


def other_base(folder: Path, base_folder: str, factor: float, *rows: int) -> str:
    """The embedded model with some rows of its input embedding multiplied; all where none are named."""
    shutil.copytree(base_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[list(rows) or slice(None)] *= factor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_another_base_is_refused_and_gone_on_with_where_that_is_accepted(
    saved: Path, go: Any, rows: Any, base_folder: str, tmp_path: Path, said: list[str]
) -> None:
    """One that differs in what no row holds ends with the same bits; another, with others, and is not asked again."""
    unused = AutoTokenizer.from_pretrained(base_folder).convert_tokens_to_ids("<pad>")
    alike = other_base(tmp_path / "alike", base_folder, 2.0, unused)
    unlike = other_base(tmp_path / "unlike", base_folder, 2.0)
    for base in (alike, unlike):
        with pytest.raises(
            UserError, match=rf"base: was embedded://tiny-llama \(\w+\), is {base} \(\w+\)\. "
        ) as caught:
            go(ckpt=saved, base=base)
        assert str(caught.value).endswith("add --accept_changes [base]")
    assert said == []

    def accepted(base: str, folder: str) -> Run:
        return go(ckpt=saved, base=base, data=rows(accept_changes=("base",)), max_steps=6, folder=folder)

    truth = go(ckpt=saved, max_steps=6, folder="truth").weights
    assert same_bits(accepted(alike, "alike run").weights, truth)
    assert not same_bits(accepted(unlike, "unlike run").weights, truth)
    assert sum(line.startswith("accepted, so this is no longer the run that it was: base: was ") for line in said) == 2
    last = tmp_path / "unlike run" / "last.ckpt"
    assert go(ckpt=last, base=unlike, max_steps=7, folder="unlike run").trainer.global_step == 7
    with pytest.raises(UserError, match="quantization: was none, is nf4"):  # with it goes nothing else
        go(ckpt=saved, data=rows(accept_changes=("base",)), policy={"quantization": "nf4"})


@pytest.mark.parametrize("missing", ["run", "hbat"])
def test_a_checkpoint_without_a_record_is_refused(missing: str, saved: Path, go: Any, tmp_path: Path) -> None:
    other = torch.load(saved, weights_only=True)
    if missing == "run":
        del other["hbat"]["run"]
    else:
        del other["hbat"]
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"does not say what its run was made of.*start a new run"):
        go(ckpt=tmp_path / "other.ckpt")


def test_a_setting_that_changes_what_is_trained_is_named_as_the_cause(saved: Path, go: Any, rows: Any) -> None:
    data = rows(max_length=24, truncation="prompt_left")
    with pytest.raises(
        UserError, match=r"training rows: was 18 rows .* is 18 rows .*data\.max_length: was 1024, is 24"
    ):
        go(ckpt=saved, data=data)


def test_an_unknown_kind_of_change_is_refused(saved: Path, go: Any, rows: Any) -> None:
    with pytest.raises(
        UserError, match=r"accept_changes: weather is no kind of change; there are base, data, template, "
    ):
        go(ckpt=saved, data=rows(accept_changes=("weather",)))


def test_another_importance_is_refused(go: Any, saved: Path) -> None:
    with pytest.raises(UserError, match="importance: was DriftImportance per tensor, is RunningFisher per element"):
        go(ElasticWeightConsolidation(importance=RunningFisher()), ckpt=saved)


def test_a_file_that_has_moved_is_the_same_file(saved: Path, go: Any, rows: Any, said: list[str]) -> None:
    done = go(ckpt=saved, data=rows((24, False, "moved.json")), max_steps=3)
    assert done.trainer.global_step == 3
    assert any("data.instruction.path: was" in line and "moved.json" in line for line in said)


def test_evaluation_says_that_texts_are_written_otherwise(
    saved: Path, make_hybrid: Any, make_policy: Any, make_trainer: Any, rows: Any, said: list[str]
) -> None:
    policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
    make_trainer().validate(make_hybrid(policy), rows(template="plain"), ckpt_path=saved, verbose=False)
    (line,) = said
    assert "preference template: was alpaca (" in line
    assert ", is plain (" in line
    said.clear()
    make_trainer().validate(make_hybrid(policy), rows(), ckpt_path=saved, verbose=False)
    assert said == []


# ---- settings of the command line are in force --------------------------------------------------------------------


def test_changed_settings_take_effect_and_are_said(go: Any, tmp_path: Path, said: list[str]) -> None:
    def adamw(**settings: Any) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, **settings)

    before = {"instruction": SFTModule(), "preference": DPOModule(beta=0.5), "lr_schedule": Cosine()}
    go(max_steps=2, module=before | {"optimizer": adamw(lr=1e-3)})
    after = {"instruction": SFTModule(), "preference": DPOModule(beta=0.3, lr=7e-4)}
    after |= {"lr_schedule": Cosine(warmup=0.0), "optimizer": adamw(lr=4e-3, betas=(0.5, 0.6), weight_decay=0.25)}
    ewc = ElasticWeightConsolidation(7.0)
    done = go(ewc, ckpt=tmp_path / "run" / "last.ckpt", module=after, gradient_clip_val=0.5)
    rates = [rate for _, rate in done.log.table("phase/index", "lr")]
    lengths = [phase.windows for phase in done.module.plan.phases]
    peaks = [4e-3, 7e-4] * 2
    expected = [
        peak * 0.5 * (1 + math.cos(math.pi * step / steps))
        for peak, steps in zip(peaks, lengths, strict=True)
        for step in range(steps)
    ]
    assert rates == pytest.approx(expected[2:], rel=1e-6), "from the first step on"
    (group,) = done.trainer.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.25)
    (line,) = [line for line in said if line.startswith("settings differ")]
    for part in (
        *(
            "preference.beta: was 0.5, is 0.3",
            "preference.lr: was nothing, is 0.0007",
            "optimizer.lr: was 0.001, is 0.004",
        ),
        *("optimizer.betas: was [0.9, 0.999], is [0.5, 0.6]", "optimizer.weight_decay: was 0.01, is 0.25"),
        *("callbacks.ElasticWeightConsolidation.strength: was nothing, is 7.0", "gradient_clip_val: was 1.0, is 0.5"),
    ):
        assert part in line, (part, line)


def test_a_changed_rate_trains_by_the_changed_rate(go: Any, tmp_path: Path) -> None:
    """By hand: plain gradient descent without clipping, so a step is the gradient times the rate."""
    module = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=1e-2), "lr_schedule": Constant()}
    module |= {"instruction": SFTModule(), "preference": DPOModule()}
    go(max_steps=2, module=module, gradient_clip_val=None)
    module |= {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.5)}
    watch = Recorder()
    last = tmp_path / "run" / "last.ckpt"
    done = go(watch, ckpt=last, module=module, gradient_clip_val=None, max_steps=3)
    for name, value in done.weights.items():
        assert torch.equal(value, watch.parameters[0][name] - 0.5 * watch.gradients[0][name]), name


def test_moments_kept_for_each_objective_are_let_go_where_the_policy_is_another(go: Any, tmp_path: Path) -> None:
    go(max_steps=6, module={"optimizer_state": "per_objective"})  # in the first preference phase
    last = tmp_path / "run" / "last.ckpt"
    assert torch.load(last, weights_only=True)["hbat"]["idle_optimizer_states"].keys() == {"instruction"}
    done = go(ckpt=last, module={"optimizer_state": "reset"}, max_steps=8)  # in the second instruction phase
    steps = {int(state["step"]) for state in done.trainer.optimizers[0].state.values()}
    assert [phase.windows for phase in done.module.plan.phases] == [5, 2, 5, 3]
    assert steps == {1}


# ---- accepted -----------------------------------------------------------------------------------------------------


def test_changed_data_are_gone_on_with_where_that_is_accepted(go: Any, rows: Any, saved: Path, tmp_path: Path) -> None:
    """The round in hand keeps its steps and goes on in the new rows; the next is laid out for them. Exact, if stopped again."""

    def run(folder: str, ckpt: Path, *accepted: Any, **settings: Any) -> tuple[Run, Recorder]:
        watch, data = Recorder(), rows((40,), accept_changes=accepted)
        return go(ElasticWeightConsolidation(), watch, data=data, ckpt=ckpt, folder=folder, **settings), watch

    done, watch = run("whole", saved, "data")
    assert [phase.windows for phase in done.module.plan.phases] == [5, 2, 8, 3]
    assert [phase.length for phase in done.module.plan.phases] == [5, 2, 8, 3]
    assert done.trainer.global_step == 18 == done.module.plan.total_steps
    seen = [
        [row for batch in window if batch.objective == "instruction" for row in batch.inputs["index"].tolist()]
        for window in watch.windows
    ]
    first, second = done.data.stream.shards["instruction"]
    assert len(seen) == 16
    left = [row for window in seen[:3] for row in window]
    assert len(set(left)) == 6
    assert set(left) <= set(first)
    assert sorted(row for window in seen[5:13] for row in window) == sorted(second)

    run("parts", saved, "data", max_steps=4)
    rest, _ = run("parts", tmp_path / "parts" / "last.ckpt")  # what has been accepted is not asked again
    assert rest.trainer.global_step == 18
    assert same_bits(rest.weights, done.weights)


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"module": {"seed": 9, "preference": IPOModule()}, "data": {"template": "plain"}}, [5, 2, 5, 3]),
        ({"module": {"schedule": Rounds(3, 1, 2)}, "data": {"batch_size": 1}}, [5, 2, 6, 6, 6, 6]),
    ],
    ids=["seed,objectives,template", "schedule,batch_size"],
)
def test_other_changes_are_gone_on_with(
    settings: dict[str, Any], windows: list[int], saved: Path, go: Any, rows: Any, request: Any, said: list[str]
) -> None:
    kinds = request.node.callspec.id.split(",")
    data = rows(**settings.get("data", {}), accept_changes=kinds)
    done = go(ckpt=saved, **settings | {"data": data, "max_steps": 9})
    assert [phase.windows for phase in done.module.plan.phases] == windows
    assert done.trainer.global_step == 9
    assert len(done.log.column("train/preference/loss")) == 2
    assert done.log.column("phase/round")[-1] == 1
    assert any(line.startswith("accepted, so this is no longer the run that it was") for line in said)


def test_a_schedule_that_is_over_is_refused(go: Any, rows: Any, tmp_path: Path) -> None:
    go(max_steps=10)
    data = rows(accept_changes=("schedule", "data"))
    with pytest.raises(UserError, match="the schedule's 1 rounds are over, the checkpoint is in round 2"):
        go(ckpt=tmp_path / "run" / "last.ckpt", data=data, module={"schedule": Rounds(1, 1, 1)})


def test_an_objective_alone_goes_on_over_more_data(fit: Any, files: Any, make_policy: Any, tmp_path: Path) -> None:
    """Its one phase lasts all rounds, so its length and its place in it follow."""

    def run(count: int, epochs: int, accepted: tuple[Any, ...] = (), **settings: Any) -> Run:
        module = SFTModule(make_policy(), epochs=epochs)
        source = DataSource(files("instruction", count), val_fraction=0.25)
        data = HybridDataModule(source, batch_size=2, accept_changes=accepted)
        keep = WindowCheckpoint(1, str(tmp_path / "alone"))
        return fit(module, keep, data=data, enable_checkpointing=True, accumulate_grad_batches=1, **settings)

    run(16, 2, max_steps=8)
    done = run(24, 3, ("data", "schedule"), ckpt_path=tmp_path / "alone" / "last.ckpt")
    assert isinstance(done.module.schedule, Single)
    assert [(phase.windows, phase.offset, phase.length) for phase in done.module.plan.phases] == [
        (6, 0, 21),
        (6, 6, 21),
        (9, 12, 21),
    ]
    assert done.trainer.global_step == 21
