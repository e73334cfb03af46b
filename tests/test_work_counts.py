"""How much work a step is, counted and not timed: a guard against losing what makes it fast."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hbat_lightning import DPOModule, Policy, SFTModule, scoring
from hbat_lightning.functional import linear_log_probs
from tests.support import Recorder

Batches = tuple[dict[str, Tensor], dict[str, Tensor]]


class Work:
    """Counts what a policy does: passes, tokens that go through the layers, rows that go through the vocabulary."""

    def __init__(self, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        policy._scorer.packs  # noqa: B018  the trial comes first
        policy._scorer.changes_logits  # noqa: B018
        policy.model.get_input_embeddings().register_forward_pre_hook(self._embed)  # type: ignore[union-attr, operator]
        monkeypatch.setattr(scoring, "linear_log_probs", self._project)

    def _embed(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.counts["passes"] += 1
        self.counts["tokens"] += args[0].numel()

    def _project(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.counts["vocabulary"] += len(hidden)
        return linear_log_probs(hidden, *args, **kwargs)


@pytest.fixture
def policy(make_policy: Any) -> Policy:
    made: Policy = make_policy()
    made.build(torch.device("cpu"))
    made.add_snapshots(["phase_start"])
    made.set_training(dropout=False)
    return made


def supervised(inputs: dict[str, Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


def test_an_sft_step_is_one_pass_of_real_tokens(policy: Policy, batches: Batches, monkeypatch: Any) -> None:
    work, inputs = Work(policy, monkeypatch), batches[0]
    SFTModule().loss(policy, inputs)["loss"][0].backward()
    real = int(inputs["attention_mask"].sum())
    assert real < inputs["input_ids"].numel()
    assert work.counts == {"passes": 1, "tokens": real, "vocabulary": supervised(inputs)}


def test_a_dpo_step_is_two_passes_in_which_prompts_run_once(policy: Policy, batches: Batches, monkeypatch: Any) -> None:
    work, inputs = Work(policy, monkeypatch), batches[1]
    DPOModule().loss(policy, inputs)["loss"][0].backward()
    firsts = (inputs["labels"] != -100).int().argmax(-1)  # rows are padded on the right
    prompts = int(firsts[len(firsts) // 2 :].sum())
    tokens = int(inputs["attention_mask"].sum()) - prompts
    assert prompts > 0
    assert work.counts == {"passes": 2, "tokens": 2 * tokens, "vocabulary": 2 * supervised(inputs)}


def test_a_run_makes_no_more_passes_than_its_steps(fit: Any, make_hybrid: Any, monkeypatch: Any) -> None:
    """One for a micro-batch of instructions, two for one of pairs, and those of validation and its preparation."""
    passes: Counter[str] = Counter()
    for name in ("score", "score_reference"):
        whole = getattr(Policy, name)

        def counted(self: Policy, *args: Any, whole: Any = whole, name: str = name, **kwargs: Any) -> Any:
            passes[f"{name}, {'with' if torch.is_grad_enabled() else 'without'} a graph"] += 1
            return whole(self, *args, **kwargs)

        monkeypatch.setattr(Policy, name, counted)
    recorder = Recorder()
    run = fit(make_hybrid(), recorder)
    batches = Counter(batch.objective for window in recorder.windows for batch in window)
    assert passes["score, with a graph"] == batches["instruction"] + batches["preference"]
    assert passes["score_reference, with a graph"] == batches["preference"]  # called with one, made without
    held_out = sum(len(loader) for loader in run.data.val_dataloader())
    rounds = run.trainer.current_epoch
    assert passes["score, without a graph"] == held_out * 2 * rounds + len(run.data.val_dataloader()[1])


def kept(policy: Policy, inputs: dict[str, Tensor]) -> int:
    """Bytes that a pass keeps for its backward pass, parameters aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    sizes: dict[int, int] = {}
    vocabulary = policy.model.get_output_embeddings().out_features  # type: ignore[union-attr, operator]

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        assert tensor.shape[-1:] != (vocabulary,) or storage.data_ptr() in own
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = policy.score(inputs)
    assert scores.log_probs.requires_grad
    return sum(sizes.values())


def rows(count: int, prompt: int, answer: int, padding: int = 0) -> dict[str, Tensor]:
    """Prompts that differ, and answers."""
    ids = torch.randint(4, 100, (count, prompt + answer + padding), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, prompt + answer :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_what_is_kept_for_the_backward_pass(policy: Policy) -> None:
    """By tokens and not by padding; for a supervised token its hidden states, and nothing of the vocabulary's size."""
    base = kept(policy, rows(4, 20, 12))
    assert kept(policy, rows(4, 20, 12, padding=50)) == base
    assert kept(policy, rows(8, 20, 12)) == pytest.approx(2 * base, rel=0.02)
    more = kept(policy, rows(4, 12, 20)) - base  # as many tokens, 32 more of them supervised
    assert 4 * policy.hidden_size <= more / 32 <= 4 * policy.hidden_size + 64  # one row of fp32, and where it is


def test_scoring_walks_over_no_modules(policy: Policy, batches: Batches, monkeypatch: Any) -> None:
    """Switching between policy and reference is by a list of layers made once."""
    DPOModule().loss(policy, batches[1])
    walks = []
    whole = nn.Module.named_modules
    monkeypatch.setattr(
        nn.Module, "named_modules", lambda self, *args, **kwargs: walks.append(1) or whole(self, *args, **kwargs)
    )
    DPOModule().loss(policy, batches[1])
    assert walks == []
