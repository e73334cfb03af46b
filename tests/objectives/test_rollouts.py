"""Learning from sampled completions: what the first ratio is, what a window's loss is, and how a run goes on."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hbat_lightning import DataSource, GenerationSettings, HybridDataModule, LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.data.rollouts import one_by_one
from hbat_lightning.errors import UserError
from hbat_lightning.generation import LogProbRecorder
from hbat_lightning.importance import ExactFisher
from hbat_lightning.objectives.critic_free import GRPOModule, REINFORCEModule, RLOOModule
from hbat_lightning.objectives.ppo import PPOModule
from hbat_lightning.objectives.raft import RAFTModule
from hbat_lightning.objectives.rollout import RolloutModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import Interval, Rounds
from hbat_lightning.values import AdapterValue
from tests.support import Recorder, Run, largest_difference, same_bits

SAMPLING = GenerationSettings(max_new_tokens=6, temperature=1.0)
LORA = LoraSettings(r=4, alpha=8)


def letters(prompt: str, completion: str) -> float:
    """A reward that differs from completion to completion."""
    return len(set(completion)) / 10 + 0.01 * (len(prompt) % 7)


def make(kind: type[RolloutModule], **settings: Any) -> RolloutModule:
    defaults: dict[str, Any] = {"sampling": SAMPLING, "lr": 5e-3}
    if kind is PPOModule:
        defaults |= {"value": AdapterValue(LORA), "passes": 1}
    if kind in (RLOOModule, GRPOModule, RAFTModule):
        defaults |= {"samples": 3}
    return kind(FunctionReward(letters), **(defaults | settings))


KINDS = [PPOModule, REINFORCEModule, RLOOModule, GRPOModule]
ALL = [*KINDS, RAFTModule]


def scripted(policy: Any) -> Callable[..., list[list[int]]]:
    """Have a policy complete prompts by a script that knows nothing but a prompt and how often it has come in a batch."""

    def generate(
        input_ids: Tensor, attention_mask: Tensor, settings: Any, stop: int, pad: int, recorder: Any = None
    ) -> list[list[int]]:
        seen: Counter[tuple[int, ...]] = Counter()
        answers = []
        for ids, keep in zip(input_ids, attention_mask.bool(), strict=True):
            prompt = tuple(ids[keep].tolist())
            draw = random.Random(str((prompt, seen[prompt])))
            seen[prompt] += 1
            answer = [draw.randrange(20, 90) for _ in range(draw.randint(1, settings.max_new_tokens))]
            answers.append(answer if draw.random() < 0.5 else [*answer[:-1], stop])
        if recorder is not None:
            recorder.log_probs = [torch.zeros(len(answer)) for answer in answers]
        return answers

    policy.generate = generate
    return generate


@pytest.fixture
def train(make_hybrid: Any, make_policy: Any, fit: Any) -> Callable[..., Run]:
    """A hybrid of SFT and an objective on rollouts."""

    def run(objective: RolloutModule, *callbacks: Any, policy: Any = None, **trainer: Any) -> Run:
        schedule = trainer.pop("schedule", Interval(2, 2, 4))
        data = HybridDataModule(
            DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.1),
            DataSource(embedded.PREFERENCE, limit=24, val_fraction=0.1),
            batch_size=2,
        )
        return fit(
            make_hybrid(policy or make_policy(), preference=objective, schedule=schedule),
            *callbacks,
            data=data,
            **({"accumulate_grad_batches": 2} | trainer),
        )

    return run


# ---- the phase start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "32-true"),
        ({}, "bf16-mixed"),
        ({"quantization": "nf4", "gradient_checkpointing": True}, "32-true"),
        ({"quantization": "nf4", "gradient_checkpointing": True}, "bf16-mixed"),
        ({"quantization": "int8"}, "32-true"),
    ],
    ids=["fp32", "bf16-mixed", "nf4", "nf4 bf16-mixed", "int8"],
)
def test_ratio_is_one_and_divergence_zero_at_every_phase_start(
    kind: Any, settings: Any, precision: str, train: Any, make_policy: Any
) -> None:
    """And the ratio in the first window of every cycle of rollouts. (Lightning has no fp16 on CPUs.)"""
    run = train(make(kind, rollout_windows=2, passes=1), policy=make_policy(**settings), precision=precision)
    firsts = run.first_preference_rows()
    assert len(firsts) == 2
    for row in firsts:
        assert row["train/preference/ratio"] == 1.0
        assert row["train/preference/kl"] == 0.0
        assert row["train/preference/clipped"] == 0.0
    ratios = run.log.column("train/preference/ratio")
    assert len(ratios) == 8  # four windows of a phase, two of a cycle
    assert ratios[::2] == [1.0] * 4
    assert all(ratio != 1.0 for ratio in ratios[1::2])  # the second window of a cycle: the policy has moved since
    assert any(value != 0.0 for value in run.log.column("train/preference/kl"))


@pytest.mark.parametrize("kind", ALL)
def test_ewc_pulls_by_nothing_where_a_phase_begins_and_by_something_after(kind: Any, train: Any) -> None:
    """From SFT to an objective on rollouts and back: penalty and pull of a phase's first step are 0 to the bit."""
    run = train(make(kind), ElasticWeightConsolidation(3.0))
    for name in ("ewc/penalty", "ewc/pull_norm"):
        phases: dict[float, list[float]] = {}
        for row in run.log.rows:
            if name in row:
                phases.setdefault(row["phase/index"], []).append(row[name])
        assert list(phases) == [0, 1, 2, 3]
        assert set(phases[0]) == {0.0}
        for number in (1, 2, 3):
            first, *others = phases[number]
            assert first == 0.0
            assert min(others) > 0.0


def test_the_reference_of_a_phase_is_the_policy_that_instruction_training_left(train: Any) -> None:
    """Were it taken after the first rollouts, or from the run's start, the divergence could not be zero there."""
    run = train(make(REINFORCEModule, reference="base"))
    firsts = run.first_preference_rows()
    assert firsts[0]["train/preference/ratio"] == 1.0
    assert firsts[1]["train/preference/kl"] != 0.0  # the base has not been through the first round


# ---- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_window_s_gradient_does_not_depend_on_its_split(kind: Any, make_policy: Any, fit: Any) -> None:
    """The same rollouts, by a script, in micro-batches of other sizes: in the first pass, and in the second, off policy."""
    found = []
    for batch_size, accumulate in ((8, 1), (3, 3), (1, 8)):
        objective = make(kind, passes=2)
        objective.policy = make_policy(double=True)
        scripted(objective.policy)
        recorder = Recorder()
        data = HybridDataModule(
            preference=DataSource(embedded.PREFERENCE, limit=7, val_fraction=0.0), batch_size=batch_size
        )
        fit(objective, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
        assert len(recorder.gradients) == 2
        found.append(recorder.gradients)
    for step in range(2):
        assert any(float(value.abs().max()) > 1e-3 for value in found[0][step].values())
        for other in found[1:]:
            assert largest_difference(other[step], found[0][step]) < 1e-6


def rows_of(inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, slice]]:
    """Ids and labels of every completion, unpadded, and where its tokens stand among all of them."""
    mask, begin, rows = inputs["attention_mask"].bool(), 0, []
    for ids, labels, keep in zip(inputs["input_ids"], inputs["labels"], mask, strict=True):
        count = int((labels[1:] != -100).sum())
        rows.append((ids[keep], labels[keep], slice(begin, begin + count)))
        begin += count
    return rows


def log_probs_by_hand(policy: Any, ids: Tensor, labels: Tensor, temperature: float) -> Tensor:
    logits = policy.model(input_ids=ids.unsqueeze(0)).logits[0, :-1] / temperature
    kept = labels[1:] != -100
    return torch.log_softmax(logits, -1)[torch.arange(len(ids) - 1), ids[1:]][kept]


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_and_losses_are_the_written_formulas(kind: Any, make_policy: Any) -> None:
    """On rollouts of the objective's own, after the policy has moved away from them."""
    temperature = 0.8
    policy = make_policy(double=True)
    torch.manual_seed(0)
    policy.build(torch.device("cpu"))
    objective = make(kind, sampling=GenerationSettings(max_new_tokens=6, temperature=temperature), kl_coefficient=0.3)
    objective.build(policy, torch.device("cpu"))
    policy.double()
    policy.add_snapshots(["phase_start"])
    shake(policy, 0.03)
    objective._stop = policy.tokenizer.eos_token_id
    data = HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=3, val_fraction=0.0))
    data.expect({"preference": objective})
    data.load("preference", policy.tokenizer, seed=0)
    rows = data.train_sets["preference"]
    rows.answer_with(lambda phase, prompts, seed: objective.roll_out(policy, prompts, torch.device("cpu")))
    with torch.no_grad():
        rows.sample(None, "key", [[0, 1], [2]], 0)
    inputs = rows.collate([0, 1, 2])
    completions = rows_of(inputs)
    old = [log_probs_by_hand(policy, ids, labels, temperature).detach() for ids, labels, _ in completions]
    assert torch.allclose(inputs["old_log_probs"], torch.cat(old), rtol=1e-9)

    policy.train(False)
    shake(policy, 0.05, seed=3)
    new = [log_probs_by_hand(policy, ids, labels, temperature) for ids, labels, _ in completions]
    advantages = [inputs["advantages"][place] for _, _, place in completions]
    reference = [inputs["reference_log_probs"][place] for _, _, place in completions]
    if kind is RLOOModule:
        terms, ratios = [], []
        for one, other, advantage in zip(new, old, advantages, strict=True):
            ratio = (one.sum() - other.sum()).exp()
            ratios.append(ratio)
            terms.append(torch.maximum(-advantage[0] * ratio, -advantage[0] * ratio.clamp(0.8, 1.2)))
        truth, ratio = torch.stack(terms).mean(), torch.stack(ratios)
    else:
        one, other, advantage = torch.cat(new), torch.cat(old), torch.cat(advantages)
        ratio = (one - other).exp()
        truth = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0.8, 1.2)).mean()
    if kind is GRPOModule:
        shift = torch.cat(reference) - torch.cat(new)
        truth = truth + 0.3 * (shift.exp() - shift - 1).mean()
    if kind is PPOModule:
        truth = truth + 0.1 * value_loss_by_hand(objective, policy, inputs)
    sums = objective.loss(policy, inputs)
    figures = {name: float(total / count) for name, (total, count) in sums.items()}
    assert figures["ratio"] == pytest.approx(
        float(ratio.mean()), rel=1e-9
    )  # of what is clipped: tokens, or completions
    assert figures["clipped"] == pytest.approx(float(((ratio - 1).abs() > 0.2).double().mean()))
    loss = sums["loss"][0] / sums["loss"][1]
    trained = list(policy.trained_parameters().values())
    rounding = 1e-6 if kind is PPOModule else 1e-8  # values are in fp32
    assert torch.allclose(loss, truth, rtol=rounding)
    for mine, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(truth, trained), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-10)


def value_loss_by_hand(objective: Any, policy: Any, inputs: dict[str, Tensor]) -> Tensor:
    """With a head that says something, from transformers' own hidden states under PEFT's own switch of adapters."""
    torch.nn.init.normal_(objective.value.head.weight, generator=torch.Generator().manual_seed(0))
    policy.model.set_adapter("value")
    parts = []
    for ids, labels, place in rows_of(inputs):
        hidden = policy.model(input_ids=ids.unsqueeze(0), output_hidden_states=True).hidden_states[-1][0, :-1]
        values = (hidden.float() @ objective.value.head.weight.float().T + objective.value.head.bias.float())[:, 0]
        values, target = values[labels[1:] != -100], inputs["returns"][place]
        old = inputs["old_values"][place]
        near = old + (values - old).clamp(-0.2, 0.2)
        parts.append(0.5 * torch.maximum((values - target) ** 2, (near - target) ** 2))
    policy.model.set_adapter("default")
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(".default." in name or ".value." in name)
    return torch.cat(parts).mean()


@torch.no_grad()
def shake(policy: Any, noise: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trained_parameters().values():
        parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


# ---- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_it_goes_on_bit_identical_from_inside_a_cycle(
    kind: Any, quantization: str, train: Any, make_policy: Any, tmp_path: Path
) -> None:
    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        dropout = LoraSettings(r=4, alpha=8, dropout=0.1)
        return train(
            make(kind, rollout_windows=2, passes=2, **({} if kind is RAFTModule else {"whiten_rewards": True})),
            ElasticWeightConsolidation(2.0),
            WindowCheckpoint(1, str(tmp_path / folder)),
            policy=make_policy(lora=dropout, quantization=quantization),
            schedule=Interval(2, 2, 6),
            enable_checkpointing=True,
            ckpt_path=ckpt_path,
            **trainer,
        )

    whole = run("whole")
    last = tmp_path / "parts" / "last.ckpt"
    parts = []
    for stop in (2 + 3, 8 + 2 + 2):  # the third window of a cycle of four; the second phase's second
        parts.append(run("parts", last if parts else None, max_steps=stop))
    rest = run("parts", last)
    assert rest.trainer.global_step == whole.trainer.global_step == 16
    assert same_bits(whole.weights, rest.weights)
    for name in ("loss", "reward", *(() if kind is RAFTModule else ("kl", "ratio"))):
        pieces = [value for part in (*parts, rest) for value in part.log.column(f"train/preference/{name}")]
        assert pieces == whole.log.column(f"train/preference/{name}") != [], name
    if kind is PPOModule:
        own = [dict(run.module.named_parameters()) for run in (whole, rest)]
        for name, value in own[0].items():
            if ".value." in name:
                assert torch.equal(value, own[1][name]), name


def test_value_parameters_train_in_preference_phases_only_and_ewc_leaves_them_alone(train: Any) -> None:
    objective = make(PPOModule)
    ewc = ElasticWeightConsolidation(1.0)
    states: list[tuple[str, dict[str, Tensor]]] = []

    class Watch(Recorder):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch.last:
                own = {n: p.detach().clone() for n, p in pl_module.named_parameters() if ".value." in n}
                states.append((batch.objective, own))

    run = train(objective, Watch(), ewc, schedule=Interval(2, 3, 3))
    assert any(name.endswith("value.head.weight") for name in states[0][1])
    assert any(".lora_A.value." in name for name in states[0][1])
    moved = [
        any(not torch.equal(before[name], after[name]) for name in after)
        for (_, before), (_, after) in pairwise(states)
    ]
    trained = [objective for objective, _ in states[1:]]
    assert all(not one for one, name in zip(moved, trained, strict=True) if name == "instruction")
    assert any(one for one, name in zip(moved, trained, strict=True) if name == "preference")
    assert all(".value." not in name for held in ewc.state_dict()["held_for"].values() for name in held)
    assert all(".value." not in name for name in run.module.policy.trained_parameters())


def test_statistics_of_rewards_survive_a_switch(train: Any) -> None:
    objective = make(REINFORCEModule, whiten_rewards=True)
    run = train(objective)
    rewards = run.log.column("train/preference/reward")
    sizes = [4, 4, 4, 4, 4, 2, 4, 4]  # 22 prompts, four in a window, and after the sixth window from the beginning
    assert objective.state()["rewards"]["count"] == sum(sizes)
    assert objective.state()["rewards"]["mean"] == pytest.approx(np.average(rewards, weights=sizes), rel=1e-6)


def test_truncated_sampling_is_reported(train: Any) -> None:
    cut = GenerationSettings(max_new_tokens=6, temperature=1.0, top_k=5)
    gaps = train(make(REINFORCEModule, sampling=cut)).log.column("train/preference/truncation")
    assert all(gap > 0 for gap in gaps)
    plain = train(make(REINFORCEModule)).log.column("train/preference/truncation")
    assert set(plain) == {0.0}


@pytest.mark.parametrize(("precision", "low", "high"), [("32-true", 0.0, 1e-5), ("bf16-mixed", 1e-4, 5e-2)])
def test_what_the_sampler_thought_is_reported(
    precision: Any, low: float, high: float, train: Any, monkeypatch: Any
) -> None:
    """Rounding in fp32, more in bf16; and where sampler and policy part, how far, top-k or not."""
    cut = GenerationSettings(max_new_tokens=6, temperature=0.7, top_k=5)
    gaps = train(make(REINFORCEModule, sampling=cut), precision=precision).log.column("train/preference/sampler_gap")
    assert len(gaps) == 8
    # In bf16 both passes may also round alike: a step's few completions then agree as they do in fp32.
    assert all(low <= gap < high or gap < 1e-5 for gap in gaps), gaps
    assert sum(gap >= low for gap in gaps) >= 6, gaps

    def off_by_three_nats(recorder: LogProbRecorder, sampled: Tensor, completions: Any) -> None:
        finish(recorder, sampled, completions)
        recorder.log_probs = [values - 3.0 for values in recorder.log_probs]

    finish = LogProbRecorder.finish
    monkeypatch.setattr(LogProbRecorder, "finish", off_by_three_nats)
    gaps = train(make(REINFORCEModule, sampling=cut)).log.column("train/preference/sampler_gap")
    assert gaps == pytest.approx([3.0] * 8, abs=1e-4)


def test_prompts_of_like_lengths_are_sampled_together(make_policy: Any) -> None:
    objective = make(REINFORCEModule, samples=2)
    policy = make_policy()
    policy.build(torch.device("cpu"))
    widths = []

    def generate(
        ids: Tensor, mask: Tensor, settings: Any, stop: int, pad: int, recorder: LogProbRecorder
    ) -> list[list[int]]:
        widths.append((len(ids), int(mask.sum(1).min()), ids.shape[1]))
        recorder.log_probs = [torch.zeros(2)] * len(ids)
        return [[int(row[-1]), 2] for row in ids]  # an answer that tells whose it is

    policy.generate = generate
    prompts = [[[9] * 7 + [30], [9, 31]], [[9] * 6 + [32], [9] * 2 + [33]], [[9] * 4 + [34]]]
    parts = objective._answer(policy, prompts, torch.device("cpu"), one_by_one)
    assert widths == [(4, 2, 3), (4, 5, 7), (2, 8, 8)]
    assert [[[one.completion[0] for one in group] for group in part] for part in parts] == [
        [[30, 30], [31, 31]],
        [[32, 32], [33, 33]],
        [[34, 34]],
    ]


def test_held_out_prompts_are_completed_greedily(train: Any) -> None:
    run = train(make(RLOOModule))
    module = run.module
    prompts = run.data.val_sets["preference"].rows
    greedy, stop = GenerationSettings(max_new_tokens=6), module.policy.tokenizer.eos_token_id
    answers = [
        module.policy.generate(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), greedy, stop, 0)[0]
        for ids in prompts
    ]
    decode = module.policy.tokenizer.decode
    truth = [
        letters(decode(ids, skip_special_tokens=True).strip(), decode(answer, skip_special_tokens=True).strip())
        for ids, answer in zip(prompts, answers, strict=True)
    ]
    assert run.log.column("val/preference/reward")[-1] == pytest.approx(np.mean(truth), rel=1e-6)


def begins_early(prompt: str, completion: str) -> float:
    """1 where the first letter is one of the first five."""
    return float(completion[:1].lower() in set("abcde"))


@pytest.mark.parametrize("kind", ALL)
def test_a_reward_rises_beyond_its_noise(kind: Any, make_policy: Any, fit: Any) -> None:
    objective = make(kind, policy=make_policy(), epochs=2, passes=1, sampling=GenerationSettings(3, 1.0), lr=1e-2)
    objective.reward = FunctionReward(begins_early)
    prompts = DataSource(embedded.PREFERENCE, limit=240 // objective.samples, val_fraction=0.0)
    data = HybridDataModule(preference=prompts, batch_size=24 // objective.samples)
    rewards = np.array(fit(objective, data=data, accumulate_grad_batches=1).log.column("train/preference/reward"))
    first, last = rewards[:4], rewards[-4:]
    assert len(rewards) == 20
    assert last.mean() - first.mean() > 4 * np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / 4)


def test_one_epoch_trains_on_every_prompt_as_often_as_it_has_passes(make_policy: Any, fit: Any) -> None:
    objective = make(REINFORCEModule, rollout_windows=2, passes=3, policy=make_policy())
    recorder = Recorder()
    data = HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=13, val_fraction=0.0), batch_size=2)
    run = fit(objective, recorder, data=data, accumulate_grad_batches=2)
    assert run.trainer.global_step == 4 * 3  # ceil(13 / 4) windows, three times
    prompts = [tuple(ids[labels == -100].tolist()) for window in recorder.windows for batch in window
               for ids, labels, _ in rows_of(batch.inputs) if (labels != -100).any()]  # fmt: skip
    counts = {prompt: prompts.count(prompt) for prompt in prompts}
    assert len(counts) == 13
    assert set(counts.values()) == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": GenerationSettings(6, 0.0)}, "temperature must be above 0"),
        ({"rollout_windows": 0}, "at least 1"),
        ({"clip": 0.0}, "clip must be above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(REINFORCEModule, **settings)


def test_grpo_has_one_divergence() -> None:
    with pytest.raises(ValueError, match="kl_estimator must be k3, got k1"):
        make(GRPOModule, kl_estimator="k1")


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        make(RLOOModule, samples=1)


def test_rounds_over_shards_sample_each_prompt_once_per_epoch(train: Any) -> None:
    run = train(make(REINFORCEModule), schedule=Rounds(2, 1, 1))
    assert run.trainer.global_step == run.module.plan.total_steps


def test_exact_fisher_after_rollouts_is_of_those_at_hand(train: Any) -> None:
    ewc = ElasticWeightConsolidation(1.0, ExactFisher(samples=3, per_element=True))
    run = train(make(REINFORCEModule), ewc)
    held = ewc.state_dict()["held_for"]["instruction"]
    assert any(bool(value.any()) for value in held.values())
    assert run.trainer.global_step == run.module.plan.total_steps


def test_prompts_are_read_and_encoded_once(train: Any) -> None:
    run = train(make(REINFORCEModule))
    before = run.data.train_sets["preference"]
    run.data.expect(run.module.objectives)
    assert run.data.train_sets["preference"] is before


def test_a_value_function_in_a_full_fine_tune_is_refused_with_what_there_is_instead(
    train: Any, make_policy: Any
) -> None:
    with pytest.raises(UserError, match=r"hbat_lightning\.values\.ModelValue for a value function"):
        train(make(PPOModule), policy=make_policy(lora=None))
    run = train(make(RLOOModule), policy=make_policy(lora=None))
    assert run.first_preference_rows()[0]["train/preference/ratio"] == 1.0
