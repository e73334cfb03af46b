"""The language-model loss on texts: every token counts once, whatever the text's length, alone and beside PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from hbat_lightning import DataSource, DPOModule, HybridDataModule, LanguageModelModule, SFTModule
from hbat_lightning.data import embedded
from hbat_lightning.errors import DataError
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Joint
from tests.support import Recorder, largest_difference, put
from tests.test_joint import joined, of, ppo

WORDS = "is the parcel for anna late . please say where it is now , thanks a lot and good day to you all"


def text(length: int, start: int = 0) -> str:
    words = WORDS.split()
    return " ".join(words[(start + place) % len(words)] for place in range(length))


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Texts of 3 to 40 words, a line each."""
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(text(3 + (11 * number) % 38, number) for number in range(12)) + "\n")
    return str(path)


def data(path: str, **settings: Any) -> HybridDataModule:
    return HybridDataModule(
        instruction=DataSource(path, val_fraction=0.25),
        preference=DataSource(embedded.PREFERENCE, limit=8, val_fraction=0.25),
        **({"max_length": 24, "batch_size": 2, "truncation": "drop"} | settings),
    )


def mean_over_every_token(module: Any, batches: list[Any]) -> torch.Tensor:
    """From full logits, one row at a time, without looking at labels."""
    losses = []
    for batch in batches:
        for ids, mask in zip(batch.inputs["input_ids"], batch.inputs["attention_mask"].bool(), strict=True):
            own = ids[mask]
            logits = module.policy.model(input_ids=own.unsqueeze(0)).logits[0, :-1]
            losses.append(cross_entropy(logits, own[1:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_is_that_of_the_mean_over_all_tokens_of_a_window(
    accumulate: int, texts: str, make_policy: Any, fit: Any
) -> None:
    recorder = Recorder()
    module = LanguageModelModule(make_policy(double=True), lr=1e-2)
    run = fit(module, recorder, data=data(texts), accumulate_grad_batches=accumulate, gradient_clip_val=None)
    trained = module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    for step, window in enumerate(recorder.windows):
        real = [batch for batch in window if batch.inputs["index"][0] >= 0]
        put(module, recorder.parameters[step])
        loss = mean_over_every_token(module, real)
        truth = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-12
        assert run.log.column("train/instruction/loss")[step] == pytest.approx(loss.item(), rel=1e-6)
    assert set(module.validation_results) == {"val/instruction/loss"}


def test_pieces_hold_every_token_of_every_text_once(texts: str, make_policy: Any) -> None:
    policy, source = make_policy(), data(texts)
    source.expect({INSTRUCTION: LanguageModelModule()})
    source.load(INSTRUCTION, policy.tokenizer, seed=0)
    pieces = [*source.train_sets[INSTRUCTION].rows, *source.val_sets[INSTRUCTION].rows]
    assert all(len(piece.input_ids) <= 24 and piece.supervised.all() for piece in pieces)
    assert max(len(piece.input_ids) for piece in pieces) == 24
    bos, eos = policy.tokenizer.bos_token_id, policy.tokenizer.eos_token_id
    found = []
    for piece in pieces:
        ids = piece.input_ids.tolist()
        assert ids[:1] == [bos]
        assert bos not in ids[1:]
        found += ids[1:]
    lines = [line for line in Path(texts).read_text().splitlines() if line]
    plain = [policy.tokenizer.encode(line, add_special_tokens=False) for line in lines]
    assert sorted(found) == sorted([*(number for ids in plain for number in ids), *[eos] * len(lines)])


def test_special_token_strings_in_a_text_stay_text(tmp_path: Path, make_policy: Any) -> None:
    policy = make_policy()
    eos = policy.tokenizer.eos_token
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": f"the parcel {eos} is late"}) + "\n")
    source = data(str(path), max_length=200)
    source.sources[INSTRUCTION] = DataSource(str(path), val_fraction=0)
    source.expect({INSTRUCTION: LanguageModelModule()})
    source.load(INSTRUCTION, policy.tokenizer, seed=0)
    (piece,) = source.train_sets[INSTRUCTION].rows
    assert piece.input_ids.tolist().count(policy.tokenizer.eos_token_id) == 1
    assert piece.input_ids[-1] == policy.tokenizer.eos_token_id


def test_prompts_of_other_data_are_texts_as_generation_starts_from_them(make_policy: Any) -> None:
    policy, source = make_policy(), data(embedded.INSTRUCTION, max_length=200)
    source.sources[INSTRUCTION] = DataSource(embedded.INSTRUCTION, limit=6, val_fraction=0)
    source.expect({INSTRUCTION: LanguageModelModule()})
    source.load(INSTRUCTION, policy.tokenizer, seed=0)
    rows, _ = source.split(INSTRUCTION, seed=0)
    encoder = source.encoder(INSTRUCTION, policy.tokenizer)
    trained = [piece.input_ids.tolist() for piece in source.train_sets[INSTRUCTION].rows]
    assert trained == [encoder.encode_prompt(row.prompt) for row in rows]


def test_beside_ppo_the_gradient_is_the_weighted_sum_of_both(
    texts: str, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """PPO-ptx: at the first step, against PPO alone and the written loss of the window's texts."""
    alone = Recorder()
    fit(ppo(policy=make_policy()), alone, data=data(texts, max_length=200), accumulate_grad_batches=1, max_steps=1)
    recorder = Recorder()
    module = joined(make_hybrid, make_policy(), Joint(27.8, 1.0), ppo(), instruction=LanguageModelModule())
    run = fit(module, recorder, data=data(texts, max_length=200), accumulate_grad_batches=2, max_steps=1)
    trained = module.policy.trained_parameters()
    put(module, recorder.parameters[0])
    module.policy.set_training(dropout=False)
    loss = mean_over_every_token(module, of(recorder.windows[0], INSTRUCTION))
    first = torch.autograd.grad(loss, list(trained.values()))
    truth = {name: 27.8 * value + alone.gradients[0][name] for name, value in zip(trained, first, strict=True)}
    assert largest_difference(recorder.gradients[0], truth) < 1e-5
    assert max(float(value.abs().max()) for value in alone.gradients[0].values()) > 1e-4
    assert run.log.column("train/preference/ratio") == [1.0]
    assert of(recorder.windows[0], PREFERENCE)


def test_texts_have_no_prompts_to_complete(texts: str, make_policy: Any, make_hybrid: Any) -> None:
    """``test`` and ``predict`` take the pairs' prompts then."""
    module = make_hybrid(instruction=LanguageModelModule(), preference=DPOModule())
    source = data(texts)
    source.expect(module.objectives)
    assert source.prompt_source == PREFERENCE
    assert source.load_prompts(module.policy.tokenizer, seed=0, compared=True)


def test_plain_texts_are_no_instructions(texts: str, make_policy: Any) -> None:
    source = data(texts)
    source.expect({INSTRUCTION: SFTModule()})
    with pytest.raises(DataError, match="LanguageModelModule"):
        source.load(INSTRUCTION, make_policy().tokenizer, seed=0)
