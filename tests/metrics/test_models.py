"""Metrics that ask a model, against the model's own logits one text at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartForConditionalGeneration

from hbat_lightning import GenerationSettings, SFTModule
from hbat_lightning.completions import Completed
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.errors import UserError
from hbat_lightning.metrics import (
    MIN_ROWS,
    BARTScore,
    Distinct,
    ExactMatch,
    PreferenceAccuracy,
    ReferenceKL,
    RewardScore,
    Surroundings,
    bootstrap,
)
from hbat_lightning.rewards import FunctionReward
from tests.support import shake
from tests.tiny_models import byte_tokenizer, save_bart

CPU = torch.device("cpu")


def test_bartscore_is_a_mean_log_likelihood_by_hand(tmp_path: Path) -> None:
    save_bart(tmp_path)
    model, tokenizer = BartForConditionalGeneration.from_pretrained(tmp_path).eval(), byte_tokenizer()

    @torch.no_grad()
    def by_hand(source: str, target: str) -> float:
        ids, labels = (torch.tensor([tokenizer(text)["input_ids"]]) for text in (source, target))
        begun = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), labels[:, :-1]], 1)
        scores = model(input_ids=ids, decoder_input_ids=begun).logits[0].log_softmax(-1)
        return float(sum(scores[place, token] for place, token in enumerate(labels[0].tolist())) / labels.shape[1])

    answers = [
        Completed("what is it", "a lamp", "the lamp is old", 2, True),
        Completed("who", "a very long answer indeed", "", 5, True),
        Completed("where is it then", "", "here", 0, True),
    ]
    metric = BARTScore(str(tmp_path), batch_size=2)
    metric.load(CPU)
    metric.update(answers)
    for answer in answers:
        expected = {"bartscore_faithfulness": by_hand(answer.prompt, answer.completion)}
        if answer.reference:
            expected["bartscore_precision"] = by_hand(answer.reference, answer.completion)
            expected["bartscore_recall"] = by_hand(answer.completion, answer.reference)
            expected["bartscore_f"] = (expected["bartscore_precision"] + expected["bartscore_recall"]) / 2
        assert answer.scores == pytest.approx(expected, rel=1e-4)
    mean = sum(answer.scores["bartscore_faithfulness"] for answer in answers) / 3
    assert metric.compute()["bartscore_faithfulness"].item() == pytest.approx(mean)


def test_bartscore_cuts_what_its_model_has_no_positions_for(tmp_path: Path) -> None:
    save_bart(tmp_path)  # 256 positions; the tokenizer's end mark takes one
    metric = BARTScore(str(tmp_path))
    metric.load(CPU)
    assert metric.log_likelihoods(["a" * 400], ["b" * 300]) == metric.log_likelihoods(["a" * 255], ["b" * 255])


def test_without_a_model_bartscore_says_so(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no sequence-to-sequence model"):
        BARTScore(str(tmp_path)).load(CPU)


def completed(policy: Any) -> list[Completed]:
    texts = [("post : my name is anna", "anna"), ("post : it rained", "it rained today")]
    return [
        Completed(
            *pair, "anna", 3, True, policy.tokenizer(pair[0])["input_ids"], policy.tokenizer(pair[1])["input_ids"]
        )
        for pair in texts
    ]


def test_kl_is_the_log_ratio_of_policy_and_base(make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy()
    policy.build(CPU)
    answers, metric = completed(policy), ReferenceKL()
    metric.build(Surroundings(policy, CPU, tmp_path))
    metric.update(answers)
    assert [answer.scores["kl_base"] for answer in answers] == [0.0, 0.0]  # nothing is trained yet
    shake(policy.trained_parameters())
    metric.reset()
    metric.update(answers)

    @torch.no_grad()
    def log_prob(answer: Completed) -> float:
        ids = torch.tensor([answer.prompt_ids + answer.completion_ids])
        scores = policy.model(ids).logits[0].log_softmax(-1)
        begin = len(answer.prompt_ids)
        return float(sum(scores[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])))

    trained = [log_prob(answer) for answer in answers]
    with policy.model.disable_adapter():
        base = [log_prob(answer) for answer in answers]
    expected = [a - b for a, b in zip(trained, base, strict=True)]
    assert [answer.scores["kl_base"] for answer in answers] == pytest.approx(expected, rel=1e-3)
    assert metric.compute()["kl_base"].item() == pytest.approx(sum(expected) / 2, rel=1e-3)


@torch.no_grad()
def test_kl_of_a_full_fine_tune_is_to_the_base_as_its_files_have_it(make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy(lora=None)
    policy.build(CPU)
    inputs = collate_rollouts([Rollout(one.prompt_ids, one.completion_ids) for one in completed(policy)], 0)
    before = policy.score(inputs).row_sums()
    shake(policy.trained_parameters())
    answers, metric = completed(policy), ReferenceKL()
    metric.build(Surroundings(policy, CPU, tmp_path))
    metric.update(answers)
    expected = policy.score(inputs).row_sums() - before
    assert bool((expected.abs() > 1e-3).all())
    assert [answer.scores["kl_base"] for answer in answers] == pytest.approx(expected.tolist(), rel=1e-4)
    assert not [name for name in metric.state_dict() if "model" in name], "the base is no part of the metric"


def test_kl_to_what_the_run_began_with(make_policy: Any, adapter: str, tmp_path: Path) -> None:
    """A policy on the adapter of an earlier run: 0 until it trains, and not so to the base; without one the base again."""
    policy = make_policy(adapter_path=adapter)
    policy.build(CPU)

    def kls(reference: Any) -> list[float]:
        answers, metric = completed(policy), ReferenceKL(reference)
        metric.build(Surroundings(policy, CPU, tmp_path))
        metric.update(answers)
        return [answer.scores[f"kl_{reference}"] for answer in answers]

    to_base = kls("base")
    assert kls("initial") == [0.0, 0.0]
    assert all(abs(value) > 1e-3 for value in to_base)
    before = policy.score(
        collate_rollouts([Rollout(one.prompt_ids, one.completion_ids) for one in completed(policy)], 0)
    )
    shake(policy.trained_parameters())
    after = policy.score(
        collate_rollouts([Rollout(one.prompt_ids, one.completion_ids) for one in completed(policy)], 0)
    )
    assert kls("initial") == pytest.approx((after.row_sums() - before.row_sums()).tolist(), rel=1e-4)
    assert kls("base") == pytest.approx([one + two for one, two in zip(kls("initial"), to_base, strict=True)], rel=1e-4)
    policy = make_policy()
    policy.build(CPU)
    shake(policy.trained_parameters())
    assert kls("initial") == kls("base") != [0.0, 0.0]


def test_scores_say_what_they_depend_on(make_policy: Any, adapter: str, tmp_path: Path) -> None:
    """Base and initial policy, two rewards, two opponents: not the same measure; the same asked again is."""
    policy = make_policy(adapter_path=adapter)
    policy.build(CPU)
    other = tmp_path / "predictions.jsonl"

    def scales(metric: Any) -> dict[str, str]:
        answers = completed(policy)
        metric.build(Surroundings(policy, CPU, tmp_path))
        metric.update(answers)
        assert [answer.row()["scales"] for answer in answers] == [answers[0].scales] * len(answers)
        return answers[0].scales

    other.write_text(
        "".join(json.dumps({"prompt": one.prompt, "completion": "it"}) + "\n" for one in completed(policy))
    )
    base, initial = scales(ReferenceKL()), scales(ReferenceKL("initial"))
    assert [list(base), list(initial)] == [["kl_base"], ["kl_initial"]]
    assert base == scales(ReferenceKL())
    assert adapter in initial["kl_initial"]
    assert adapter not in base["kl_base"]
    first, second = scales(RewardScore(FunctionReward(_words))), scales(RewardScore(FunctionReward(_letters)))
    assert first == scales(RewardScore(FunctionReward(_words)))
    assert all(first[name] != second[name] for name in ("reward", "opponent_reward", "reward_win_rate"))
    against = scales(RewardScore(FunctionReward(_words), against=str(other)))
    assert against["reward"] == first["reward"]
    assert against["reward_win_rate"] != first["reward_win_rate"]
    assert scales(ExactMatch()) == {}


def _words(prompt: str, completion: str) -> float:
    return float(len(completion.split()))


def _letters(prompt: str, completion: str) -> float:
    return float(len(completion))


def test_two_metrics_of_one_name_are_refused(make_policy: Any) -> None:
    with pytest.raises(ValueError, match="more than one of them gives kl_base"):
        SFTModule(make_policy(), metrics=[ReferenceKL(), ExactMatch(), ReferenceKL("base")])
    SFTModule(make_policy(), metrics=[ReferenceKL(), ReferenceKL("initial")])
    with pytest.raises(ValueError, match="gives distinct2"):
        SFTModule(make_policy(), metrics=[Distinct(), Distinct([2, 3])])


def test_reward_win_rate_counts_ties_half_and_takes_another_runs_answers(make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy()
    policy.build(CPU)
    length = FunctionReward(lambda prompt, completion: float(len(completion.split())))
    answers, metric = completed(policy), RewardScore(length)
    metric.build(Surroundings(policy, CPU, tmp_path))
    metric.update(answers)
    assert [answer.scores for answer in answers] == [
        {"reward": 1.0, "opponent_reward": 1.0, "reward_win_rate": 0.5},
        {"reward": 3.0, "opponent_reward": 1.0, "reward_win_rate": 1.0},
    ]
    assert metric.compute()["reward_win_rate"].item() == 0.75
    assert metric.compute().keys() == {"reward", "opponent_reward", "reward_win_rate"}, "too few for an interval"
    for _ in range(4):
        metric.update(completed(policy))
    spread = bootstrap([0.5, 1.0] * 5)
    ends = [metric.compute()[f"reward_win_rate_{end}"].item() for end in ("low", "high")]
    assert ends == pytest.approx([spread.low, spread.high])
    metric.reset()
    assert metric.compute() == {}
    other = tmp_path / "predictions.jsonl"
    rows = [{"prompt": answer.prompt, "completion": "it rained"} for answer in answers]
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metric = RewardScore(length, against=str(other))
    metric.build(Surroundings(policy, CPU, tmp_path))
    metric.update(answers)
    assert metric.compute()["reward_win_rate"].item() == 0.5
    other.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match="no completion of the prompt"):
        _scored(length, other, policy, answers)


def _scored(reward: Any, other: Path, policy: Any, answers: list[Completed]) -> None:
    metric = RewardScore(reward, against=str(other))
    metric.build(Surroundings(policy, CPU, other.parent))
    metric.update(answers)


def test_preference_accuracy_is_a_share_with_half_ties() -> None:
    metric = PreferenceAccuracy(tolerance=0.1)
    metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    metric.update(torch.tensor([0.5]), torch.tensor([0.45]))
    assert metric.compute().item() == pytest.approx(1.5 / 3)


def test_test_and_predict_use_the_metrics_that_were_given(
    make_policy: Any, make_data: Any, make_trainer: Any, tmp_path: Path
) -> None:
    reward = RewardScore(FunctionReward(lambda prompt, completion: float(len(completion))))
    module = SFTModule(
        make_policy(), generation=GenerationSettings(max_new_tokens=4), metrics=[ExactMatch(), reward, ReferenceKL()]
    )
    data = make_data(val_batch_size=4)
    tested = make_trainer().test(module, data, verbose=False)[0]
    rows = [row for batch in make_trainer().predict(module, data) for row in batch]
    assert len(rows) < MIN_ROWS
    assert set(tested) == {f"test/{name}" for name in rows[0]["scores"]}
    for name in rows[0]["scores"]:
        mean = sum(row["scores"][name] for row in rows) / len(rows)
        assert tested[f"test/{name}"] == pytest.approx(mean, rel=1e-5, abs=1e-6)
    assert {row["scores"]["reward"] for row in rows} == {float(len(row["completion"])) for row in rows}
