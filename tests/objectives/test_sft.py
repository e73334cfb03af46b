"""SFT: sums that a window's mean is made of, and exact match by teacher forcing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hbat_lightning import GenerationSettings, SFTModule
from hbat_lightning.functional import sft_loss
from tests.support import weights


def test_sums_are_those_of_the_full_logits(make_policy: Any, batches: Any) -> None:
    policy, (batch, _) = make_policy(), batches
    policy.build(torch.device("cpu"))
    total, tokens = SFTModule().loss(policy, batch)["loss"]
    logits = policy.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    truth = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert int(tokens) == int((batch["labels"][:, 1:] != -100).sum())
    assert total.item() == pytest.approx(truth.item(), rel=1e-6)
    assert (total / tokens).item() == pytest.approx(sft_loss(logits, batch["labels"]).item(), rel=1e-6)


def test_a_row_without_labels_counts_for_nothing(make_policy: Any, batches: Any) -> None:
    policy, (batch, _) = make_policy(), batches
    policy.build(torch.device("cpu"))
    policy.eval()
    batch = {name: value.clone() for name, value in batch.items()}
    batch["labels"][0] = -100
    sums = SFTModule().evaluate(policy, batch)
    assert int(sums["exact_match"][1].sum()) == len(batch["labels"]) - 1
    rest = {name: value[1:] for name, value in batch.items()}
    losses = [SFTModule().evaluate(policy, inputs)["loss"][0].sum().item() for inputs in (batch, rest)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_exact_match_of_teacher_forcing_is_that_of_generation(
    make_policy: Any, make_data: Any, fit: Any, make_trainer: Any
) -> None:
    """A model trained halfway: the share of held-out rows that greedy decoding completes word for word, and stops."""
    module = SFTModule(make_policy(), lr=1e-2, epochs=2, generation=GenerationSettings(max_new_tokens=24))
    data = make_data(instruction=800, batch_size=16, val_batch_size=100)
    run = fit(module, data=data, accumulate_grad_batches=1)
    trained = weights(module)
    forced = run.module.validation_results["val/instruction/exact_match"]
    assert 0.1 < forced < 0.9  # else the comparison would show nothing
    generated = make_trainer().test(module, data, verbose=False)[0]
    assert generated["test/exact_match"] == pytest.approx(forced, abs=1e-6)
    assert generated["test/stopped"] >= forced
    assert all(torch.equal(value, weights(module)[name]) for name, value in trained.items())
