"""RAFT: which completion is kept, what is learnt from it, and what is not done beside that."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hbat_lightning import DataSource, GenerationSettings, HybridDataModule
from hbat_lightning.data import embedded
from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.objectives.raft import RAFTModule
from hbat_lightning.rewards import FunctionReward
from tests.objectives.test_rollouts import letters, scripted
from tests.support import Recorder, instruction_loss, largest_difference, put

SAMPLING = GenerationSettings(max_new_tokens=6, temperature=1.0)


def make(**settings: Any) -> RAFTModule:
    return RAFTModule(FunctionReward(letters), **({"sampling": SAMPLING, "samples": 4, "lr": 5e-3} | settings))


def answer(number: int, reward: float, stopped: float = 1.0) -> Rollout:
    return Rollout([1, 2], [number] * number, figures={"reward": reward, "length": float(number), "stopped": stopped})


def test_the_best_is_kept_and_of_equal_ones_the_first() -> None:
    (kept,) = make().keep([answer(1, 0.5), answer(2, 2.0), answer(3, 2.0), answer(4, -1.0)])
    assert kept.completion == [2, 2]
    assert kept.figures == {"reward": 0.875, "length": 2.5, "stopped": 1.0, "kept_reward": 2.0}
    assert not kept.tokens


def test_what_did_not_stop_ranks_lower() -> None:
    completions = [answer(1, 1.0), answer(2, 1.5, stopped=0.0)]
    assert make().keep(completions)[0].completion == [2, 2]
    (kept,) = make(missing_stop_penalty=1.0).keep(completions)
    assert kept.completion == [1]
    assert kept.figures["kept_reward"] == 1.0
    assert kept.figures["reward"] == 1.25  # as it was given


def test_the_best_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        make(samples=1)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(4, 1), (1, 4), (3, 2)])
def test_it_is_supervised_training_on_the_best_of_each_prompt(
    batch_size: int, accumulate: int, make_policy: Any, fit: Any
) -> None:
    """fp64: completions by a script, the best of them found here, the likelihood row by row from all logits."""
    policy, recorder = make_policy(double=True), Recorder()
    generate = scripted(policy)
    data = HybridDataModule(
        preference=DataSource(embedded.PREFERENCE, limit=11, val_fraction=0.0), batch_size=batch_size
    )
    objective = make(policy=policy, passes=2, rollout_windows=2)
    run = fit(objective, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
    stop, decode = objective._stop, policy.tokenizer.decode
    best: dict[tuple[int, ...], tuple[list[int], float, float]] = {}
    for ids in run.data.train_sets["preference"].rows:
        inputs = torch.tensor([ids] * 4)
        answers = generate(inputs, torch.ones_like(inputs), SAMPLING, stop, 0)
        rewards = [
            letters(decode(ids, skip_special_tokens=True).strip(), decode(one, skip_special_tokens=True).strip())
            for one in answers
        ]
        place = rewards.index(max(rewards))
        best[tuple(ids)] = (answers[place], sum(rewards) / 4, max(rewards))
    assert len({len(one) for one, _, _ in best.values()}) > 1
    model, trained = policy.model, policy.trained_parameters()
    policy.set_training(dropout=False)
    figures = run.log.table("train/preference/loss", "train/preference/reward", "train/preference/kept_reward")
    met: list[tuple[int, ...]] = []
    for step, window in enumerate(recorder.windows):
        rows = [
            (tuple(ids[keep & (labels == -100)].tolist()), labels[labels != -100].tolist())
            for batch in window
            for ids, labels, keep in zip(
                batch.inputs["input_ids"], batch.inputs["labels"], batch.inputs["attention_mask"].bool(), strict=True
            )
            if (labels != -100).any()
        ]
        assert all(best[prompt][0] == completion for prompt, completion in rows)
        met += [prompt for prompt, _ in rows]
        put(objective, recorder.parameters[step])
        loss = instruction_loss(model, window)
        truth = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-12
        means = [sum(best[prompt][place] for prompt, _ in rows) / len(rows) for place in (1, 2)]
        assert figures[step] == pytest.approx((loss.item(), *means), rel=1e-6)
    assert {met.count(prompt) for prompt in best} == {2}


def test_nothing_is_made_or_computed_that_it_does_not_need(
    make_policy: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scoring pass per micro-batch, with a graph; none after sampling, no reference, no frozen adapter."""
    policy, passes = make_policy(), []
    monkeypatch.setattr(policy, "score_reference", None)
    monkeypatch.setattr(policy, "truncation_log_mass", None)
    score = policy.score
    monkeypatch.setattr(policy, "score", lambda inputs: passes.append(torch.is_grad_enabled()) or score(inputs))
    data = HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=8, val_fraction=0.0), batch_size=2)
    run = fit(make(policy=policy), data=data, accumulate_grad_batches=2)
    assert passes == [True] * 4
    assert run.module.references == ()
    assert run.module.own_parameters(policy) == ()
    assert policy.snapshot() is None
    assert all("lora" not in name or ".default." in name for name, _ in policy.named_parameters())
