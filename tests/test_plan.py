"""``hbat plan``: against a measured run, its advice, its answers, and what it never reads."""

from __future__ import annotations

import gc
import json
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
)

from hbat_lightning.cli import main, make_cli
from hbat_lightning.errors import UserError
from hbat_lightning.memory.advice import advise, possible_changes
from hbat_lightning.memory.allocation import Category, Moment, Peak
from hbat_lightning.memory.plan import MemoryPlan, make_plan
from hbat_lightning.memory.rehearsal import RunSettings
from hbat_lightning.plan_command import parse, parse_size
from hbat_lightning.rewards import Reward
from tests.conftest import ROOT

CONFIG = ["--config", str(ROOT / "configs/hbat_dpo.yaml")]
SMALL = ["--data.max_length", "96", "--data.batch_size", "2", "--data.val_batch_size", "2"]
FULL = ["--config", str(ROOT / "configs/policy/full.yaml")]
PPO = ["--config", str(ROOT / "configs/hbat_ppo.yaml"), "--model.preference.rollout_windows", "1"]
TRAINED = 69_632 * 4  # bytes of the adapter on the embedded model
SIZES: dict[str, Any] = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


def plan(folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of a plan."""
    report = folder / "plan.json"
    main(["plan", *CONFIG, *SMALL, *arguments, "--report", str(report)])
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def model_folder(folder: Path, config: PretrainedConfig) -> list[str]:
    """A folder with a configuration and nothing else, as an option."""
    config.save_pretrained(folder / "model")
    return ["--model.policy.model_name_or_path", str(folder / "model")]


def moments(report: dict[str, Any], heading: str = "without checkpointing") -> dict[str, Any]:
    found: dict[str, Any] = report["plans"][heading]["moments"]
    return found


def settings(*arguments: str) -> RunSettings:
    """What a command's arguments come to."""
    return parse([*CONFIG, *SMALL, "--trainer.accelerator", "cpu", *arguments]).run_settings


def parts(*arguments: str, moment: str = "preference: micro-batch") -> dict[Category, int]:
    """What a moment's highest point consists of, without the command's other plans."""
    made = make_plan(settings(*arguments), every_layer=False, tick=lambda name: None)
    return next(one.peak.parts for one in made.moments if one.name == moment)


# ---- against a run ------------------------------------------------------------------------------------------------


def profiled_fit(arguments: list[str]) -> int:
    """Highest number of allocated bytes of a run, by torch's profiler."""
    gc.collect()  # what an earlier run has left would be released inside this one
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cli = make_cli(["fit", *arguments])
    now = sum(p.untyped_storage().nbytes() for p in cli.model.parameters() if p.untyped_storage().filename)
    peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def long_rows(name: str, ppo: bool) -> list[dict[str, str]]:
    """Rows that are cut at 96 tokens: their ends, or with PPO the beginnings of their prompts."""
    if ppo and name == "preference":
        return [{"prompt": " ".join(["hello"] * (60, 110)[n % 2]), "completion": "hello"} for n in range(11)]
    fields = ["completion"] if name == "instruction" else ["chosen", "rejected"]
    words = [" ".join(["hello"] * length) for length in ((86, 70) if ppo else (110, 80))]
    prompt = "Post" + " hello" * (20 if ppo else 1)
    return [{"prompt": f"{prompt} {n}", **{f: words[(n + k) % 2] for k, f in enumerate(fields)}} for n in range(11)]


@pytest.mark.parametrize("more", [[], FULL, PPO], ids=["LoRA", "full", "PPO"])
def test_a_small_run_needs_what_was_planned(more: list[str], tmp_path: Path) -> None:
    arguments = [*(more if more is PPO else [*CONFIG, *more]), *SMALL]
    for name in ("instruction", "preference"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in long_rows(name, more is PPO)))
        arguments += [f"--data.{name}.path", str(path), f"--data.{name}.val_fraction", "0.25"]
    cut = "prompt_left" if more is PPO else "completion_right"
    arguments += ["--data.template", "plain", "--data.truncation", cut, "--model.schedule.rounds", "1"]
    arguments += ["--model.schedule.instruction_epochs", "1", "--trainer.accumulate_grad_batches", "2"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    arguments += ["--trainer.default_root_dir", str(tmp_path / "run")]
    main(["plan", *arguments, "--report", str(tmp_path / "plan.json")])
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert planned["peak"] == pytest.approx(profiled_fit(arguments), rel=0.1)


# ---- what it says -------------------------------------------------------------------------------------------------


def test_moments_and_parts_add_up(tmp_path: Path) -> None:
    report = plan(tmp_path, "--trainer.accelerator", "cpu")
    found = moments(report)
    assert list(found)[:2] == ["loading", "first figures"]
    assert {"instruction: micro-batch", "preference: optimizer step", "switch to instruction"} <= found.keys()
    assert report["peak"] == max(moment["peak"] for moment in found.values())
    for moment in found.values():
        assert moment["peak"] == sum(moment["parts"].values())
    highest = found["preference: micro-batch"]["parts"]
    assert [highest[name] for name in ("adapters", "reference and anchor", "gradients")] == [TRAINED] * 3
    assert highest["optimizer state"] == 2 * TRAINED + 28 * 4  # and a step count per tensor


@pytest.mark.parametrize(
    ("config", "more", "checkpointing"),
    [
        (LlamaConfig(**SIZES, num_hidden_layers=6, dtype="bfloat16"), FULL, True),
        (Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, num_hidden_layers=11, sliding_window=32), [], False),
    ],
    ids=["llama, full, checkpointing", "gemma2, LoRA"],
)
def test_few_layers_say_what_many_need(
    config: PretrainedConfig, more: list[str], checkpointing: bool, tmp_path: Path
) -> None:
    options = [*model_folder(tmp_path, config), *more, "--trainer.accumulate_grad_batches", "1"]
    run = replace(settings(*options), checkpointing=checkpointing)
    few, every = (make_plan(run, every_layer, lambda name: None) for every_layer in (False, True))
    assert len(few.rehearsed) == 2
    assert every.rehearsed == (config.num_hidden_layers,)
    peaks = {moment.name: moment.peak.total for moment in few.moments}
    assert peaks == pytest.approx({moment.name: moment.peak.total for moment in every.moments}, rel=1e-3)


def test_checkpointing_saves_activations_and_nothing_else(tmp_path: Path) -> None:
    options = model_folder(tmp_path, LlamaConfig(**SIZES, num_hidden_layers=4))
    report = plan(tmp_path, *options)
    without = moments(report)["preference: micro-batch"]["parts"]
    checkpointed = moments(report, "with checkpointing")["preference: micro-batch"]["parts"]
    assert checkpointed["activations"] < 0.5 * without["activations"]
    assert checkpointed["base weights"] == without["base weights"]


def test_precision_and_quantisation_change_what_they_should(tmp_path: Path) -> None:
    options = model_folder(tmp_path, LlamaConfig(**SIZES, num_hidden_layers=2, dtype="float32"))
    plain, mixed = parts(*options), parts(*options, "--trainer.precision", "bf16-mixed")
    assert mixed[Category.ACTIVATIONS] < 0.8 * plain[Category.ACTIVATIONS]
    packed = parts(*options, "--model.policy.quantization", "nf4")
    # Embedding and output layer stay; of the rest, in 16 bits beside them, four bits do.
    ends, rest = 2 * 512 * 64, plain[Category.BASE] // 4 - 2 * 512 * 64
    assert packed[Category.BASE] == pytest.approx(2 * ends + 0.5 * rest, rel=0.02)
    in_bytes = parts(*options, "--model.policy.quantization", "int8")
    assert in_bytes[Category.BASE] == pytest.approx(2 * ends + rest, rel=0.02)


def test_an_importance_per_element_costs_tensors_of_the_trained_sizes() -> None:
    step = {"moment": "preference: optimizer step"}
    per_element = parts("--trainer.callbacks.importance.per_element", "true", **step)
    assert per_element[Category.IMPORTANCE] >= 2 * TRAINED  # what is held for the phase, and its factors
    assert parts(**step)[Category.IMPORTANCE] < 10_000


def test_no_reference_and_no_ewc_need_no_snapshot() -> None:
    assert Category.REFERENCE not in parts("--trainer.callbacks", "[]", "--model.preference.reference", "base")
    assert parts("--trainer.callbacks", "[]")[Category.REFERENCE] == TRAINED


def test_moments_per_objective_are_kept_twice() -> None:
    both = parts("--model.optimizer_state", "per_objective")
    assert both[Category.OPTIMIZER] == 2 * parts()[Category.OPTIMIZER]


def test_an_objective_alone_is_planned_too(tmp_path: Path) -> None:
    report = tmp_path / "plan.json"
    main(["plan", "--config", str(ROOT / "configs/sft.yaml"), *SMALL, "--report", str(report)])
    assert "preference: micro-batch" not in moments(json.loads(report.read_text()))


# ---- objectives on rollouts ----------------------------------------------------------------------------------------


def rollout_plan(*arguments: str) -> dict[str, Moment]:
    """Moments of PPO with prompts of 72 tokens and completions of 24, on a Llama of which everything is known."""
    made = make_plan(
        parse([*PPO, *SMALL, "--trainer.accelerator", "cpu", *arguments]).run_settings, True, lambda _: None
    )
    return {moment.name: moment for moment in made.moments}


def test_the_cache_has_keys_and_values_of_every_token_but_the_last(tmp_path: Path) -> None:
    llama = LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=3)
    model = [*model_folder(tmp_path, llama), "--data.val_batch_size", "64"]
    prompt, last, _ = rollout_plan(*model)["preference: validation"].stretches
    token = 64 * 2 * 16 * 4  # keys or values of a layer: rows, heads, width, bytes
    assert prompt.parts[Category.CACHE] == 2 * 3 * 72 * token
    # The last token is not looked back on; when the last values are appended, those before them are still there.
    assert last.parts[Category.CACHE] == (2 * 3 * (72 + 24 - 1) + 72 + 24 - 2) * token


def test_a_sliding_window_bounds_the_cache(tmp_path: Path) -> None:
    gemma = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16, num_hidden_layers=2, sliding_window=32)
    model = [*model_folder(tmp_path, gemma), "--data.val_batch_size", "64"]
    _, last, _ = rollout_plan(*model)["preference: validation"].stretches
    assert last.parts[Category.CACHE] == (2 * 32 + 2 * 95) * 64 * 2 * 16 * 4  # the first layer slides


def test_value_and_reward_are_adapters_and_only_the_value_trains() -> None:
    reward = ["--model.preference.reward", "AdapterReward", "--model.preference.reward.path", "/nowhere"]
    value, heads = ["--model.preference.value.lora.r", "8"], 129 * 4  # a map from the 128 hidden values, and a bias
    of = rollout_plan(*value, *reward, "--model.preference.reward.lora.r", "4")["preference: micro-batch"].peak.parts
    assert of[Category.ADAPTERS] == TRAINED + TRAINED // 2 + TRAINED // 4 + 2 * heads
    assert of[Category.GRADIENTS] == TRAINED + TRAINED // 2 + heads
    assert of[Category.OPTIMIZER] == 2 * of[Category.GRADIENTS] + (28 + 28 + 2) * 4
    supervised = rollout_plan(*value)["instruction: micro-batch"].peak.parts
    assert supervised[Category.GRADIENTS] == TRAINED  # the value function stands still there


def test_a_classifier_is_a_model_of_its_own(tmp_path: Path) -> None:
    config = LlamaConfig(**SIZES, num_hidden_layers=2, num_labels=1, pad_token_id=0, dtype="bfloat16")
    config.save_pretrained(tmp_path / "classifier")
    reward = ["--model.preference.reward", "ClassifierReward"]
    reward += ["--model.preference.reward.model_name_or_path", str(tmp_path / "classifier")]
    made = rollout_plan(*reward)
    real = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    held = sum(tensor.nbytes for tensor in [*real.parameters(), *real.buffers()])
    assert made["preference: rollouts"].peak.parts[Category.REWARD] == held
    run = parse([*PPO, *SMALL, *reward]).run_settings
    change = next(one for one in possible_changes(run) if "AdapterReward" in one.options)
    assert rollout_plan(*reward, *change.options)["loading"].peak == made["loading"].peak  # it parses


def test_a_single_objective_names_its_own_options(tmp_path: Path) -> None:
    for config in ("dpo.yaml", "sft.yaml"):
        run = parse(["--config", str(ROOT / "configs" / config), "--trainer.callbacks", "[]"]).run_settings
        options = [change.options for change in possible_changes(run)]
        assert (("--model.reference", "base") in options) == (config == "dpo.yaml")


class OwnReward(Reward):
    """Of somebody else."""

    def score(self, policy: Any, rollouts: Any, device: Any) -> torch.Tensor:
        """Nothing."""
        return torch.zeros(len(rollouts))


def test_ppo_at_7b_is_planned_below_12_gb(tmp_path: Path) -> None:
    """Prompts and completions of 512 tokens, and four adapters on one NF4 base."""
    llama = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        dtype="float16",
    )
    layers = [f"--config={ROOT / 'configs' / layer}" for layer in ("policy/qlora.yaml", "trainer/gpu.yaml")]
    reward = ["--model.preference.reward", "AdapterReward", "--model.preference.reward.path", "reward"]
    sizes = ["--model.preference.sampling.max_new_tokens", "512", "--data.max_length", "1024"]
    batch = ["--data.batch_size", "1", "--data.val_batch_size", "1", "--trainer.default_root_dir", str(tmp_path)]
    main(["plan", *PPO, *layers, *model_folder(tmp_path, llama), *reward, *sizes, *batch, "--budget", "12GB"])
    plans = json.loads((tmp_path / "plan.json").read_text())
    assert 5e9 < plans["peak"] < 8e9, plans["peak"]


def test_what_of_rollouts_cannot_be_planned() -> None:
    with pytest.raises(UserError, match="OwnReward is a reward of your own"):
        rollout_plan("--model.preference.reward", f"{OwnReward.__module__}.OwnReward")
    with pytest.raises(UserError, match="no room for a prompt"):
        rollout_plan("--model.preference.sampling.max_new_tokens", "96")
    with pytest.raises(UserError, match=r"model of its own .* cannot be planned"):
        rollout_plan("--config", str(ROOT / "configs/reinforcement/value_model.yaml"))


def test_dynamic_sampling_is_planned_at_its_most() -> None:
    """ESRL's layer gives a prompt up to ``maximum`` completions, and any micro-batch may be of such prompts."""
    layer = ("--config", str(ROOT / "configs/reinforcement/esrl.yaml"))
    most = ("--model.preference.dynamic_sampling.maximum", "6")
    dynamic = rollout_plan(*layer, *most, "--model.preference.samples", "2")
    assert dynamic == rollout_plan("--model.preference.samples", "6")


# ---- bases that are quantised already, and devices -------------------------------------------------------------------


def test_gpus_compute_some_operations_in_fp32(tmp_path: Path) -> None:
    """GPT-2's activation function has a power: CUDA autocast keeps it in fp32, and CPU autocast does not."""
    model = model_folder(tmp_path, GPT2Config(vocab_size=512, n_embd=64, n_layer=2, n_head=4, dtype="bfloat16"))
    mixed = [*model, "--trainer.precision", "bf16-mixed"]
    parts(*mixed, "--trainer.accelerator", "gpu", "--model.policy.gradient_checkpointing", "true")  # equal both times
    on_cpu, on_gpu = (parts(*mixed, "--trainer.accelerator", device) for device in ("cpu", "gpu"))
    powers = 2 * 2 * 2 * 96 * 4 * 64  # two layers, four texts, of which the power of one tensor is taken
    assert on_gpu[Category.ACTIVATIONS] - on_cpu[Category.ACTIVATIONS] > 2 * powers


# ---- answers and advice -------------------------------------------------------------------------------------------


def test_a_budget_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = ["--config", str(ROOT / "configs/sft.yaml"), *SMALL, "--trainer.accelerator", "gpu"]
    report = tmp_path / "plan.json"
    main(["plan", *sft, "--report", str(report), "--budget", "24GB"])
    assert json.loads(report.read_text())["fits"]
    assert "fits into 24.00 GB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["plan", *sft, "--report", str(report), "--budget", "400MB"])
    assert ended.value.code == 1
    found = json.loads(report.read_text())
    assert not found["fits"]
    assert found["advice"]
    assert "does not fit into 0.40 GB" in capsys.readouterr().out


def test_advice_is_in_order_of_gain_and_its_options_do_what_they_promise(tmp_path: Path) -> None:
    def peak(options: Sequence[str] = ()) -> MemoryPlan:
        return make_plan(settings(*model, *options), every_layer=False, tick=lambda name: None)

    model = model_folder(tmp_path, LlamaConfig(**SIZES, num_hidden_layers=2))
    before = peak()
    found = advise(settings(*model), before, peak, wanted=1)
    alone, together = found[:-1], found[-1]
    assert [one.gain for one in alone] == sorted((one.gain for one in alone), reverse=True)
    assert all(one.gain > before.peak / 1000 for one in alone)
    assert {"--data.max_length", "--model.policy.gradient_checkpointing"} <= {one.change.options[0] for one in alone}
    assert peak(alone[0].change.options).peak == alone[0].peak == before.peak - alone[0].gain
    assert together.gain > alone[0].gain


def test_advice_that_gains_next_to_nothing_is_none() -> None:
    run = settings(*FULL, "--model.optimizer_state", "per_objective")
    before = make_plan(run, every_layer=False, tick=lambda name: None)

    def gaining(share: float) -> int:
        def less(options: Sequence[str]) -> MemoryPlan:
            return replace(before, moments=[Moment("all", [Peak(round(before.peak * (1 - share)), {})], 0)])

        return len(advise(run, before, less, wanted=None))

    assert gaining(0.0005) == 0
    assert gaining(0.002) == len(list(possible_changes(run)))


def test_a_full_fine_tune_is_advised_an_adapter() -> None:
    full = settings("--config", str(ROOT / "configs/policy/full.yaml"))
    assert next(possible_changes(full)).options == ("--model.policy.lora.r", "16")
    assert settings(
        "--config", str(ROOT / "configs/policy/full.yaml"), "--model.policy.lora.r", "16"
    ).module.policy.lora


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24 * 10**9), ("16GiB", 16 * 2**30), ("8", 8 * 10**9), ("1.5 gb", 1_500_000_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "24TBs", "-3GB", "0GB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        parse_size(text)


# ---- what it reads, and mistakes ----------------------------------------------------------------------------------


def test_nothing_but_the_configuration_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    nowhere = [f"--data.{name}.path={tmp_path / 'nowhere.jsonl'}" for name in ("instruction", "preference")]
    report = plan(tmp_path, *model_folder(tmp_path, LlamaConfig(**SIZES, num_hidden_layers=2)), *nowhere)
    assert report["peak"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "plan.json"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.policy.model_name_or_path", "/nowhere/at/all"], "no such folder"),
        (["--trainer.precision", "bf16-true"], "bf16-true cannot be planned"),
        (["--budget", "plenty"], "give a size such as 24GB"),
        (["--report", "/proc/none/plan.json"], "give --report FILE"),
    ],
)
def test_mistakes_end_in_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *CONFIG, *SMALL, *options])
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("hbat: error:")
    assert said in line


def test_freezing_needs_what_ewc_needs() -> None:
    freeze = ["--config", str(ROOT / "configs/hbat_freeze.yaml"), "--model.preference.reference", "base"]
    assert parts(*freeze)[Category.REFERENCE] == TRAINED
    fisher = ["--trainer.callbacks.importance", "RunningFisher", "--trainer.callbacks.importance.per_element", "true"]
    assert parts(*freeze, *fisher)[Category.IMPORTANCE] >= 2 * TRAINED


def test_logits_are_told_where_they_are_not_at_the_highest_point(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = plan(tmp_path)
    said = capsys.readouterr().out
    tokens, vocabulary = (96 - 1) + (95 - 1), settings().config.vocab_size
    assert moments(report)["instruction: micro-batch"]["most_logits"] == tokens * vocabulary * 4  # in one chunk
    most = max(moment["most_logits"] for moment in moments(report).values())
    assert f"logits            at most {most / 1e6:.1f} MB, in " in said


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="allocated memory is told on Linux only")
def test_the_overhead_is_what_the_process_has_allocated() -> None:
    held = torch.ones(2**28 // 4)  # a high mark that is gone by the time of the plan
    del held
    gc.collect()
    status = Path("/proc/self/status").read_text()
    allocated = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")))
    overhead = make_plan(settings(), every_layer=False, tick=lambda name: None).overhead
    assert overhead == pytest.approx(allocated, rel=0.15)
