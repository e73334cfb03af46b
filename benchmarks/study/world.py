"""A world of the study: a small model that knows the task's language, and data for it, all from one seed.

The model is a Llama of two layers, pre-trained on posts. An SFT policy of it, trained in full, samples the answers that
preferences are about, two for each prompt; a Bradley-Terry rater who goes by gold prefers one of them, so that some labels
are wrong. A reward model is trained on the same pairs. Everything is made by the package's own parts, once, and kept in a
folder.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import task
import torch
from fits import fit, in_batches
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hbat_lightning import GenerationSettings, Policy

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
LABEL_SHARPNESS = 1.5  # of the rater: P(a is preferred) = sigmoid(1.5 (gold of a - gold of b))
LORA = {"r": 8, "alpha": 16}


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    documents: int = 12000
    pretraining_steps: int = 1200
    instructions: int = 3000
    tldr_share: float = 1 / 3
    pairs: int = 2000
    held_out: int = 64
    validation: int = 256
    test: int = 512


SMOKE = Sizes(documents=400, pretraining_steps=10, instructions=96, pairs=64, held_out=8, validation=16, test=16)


def make_world(folder: Path, seed: int, sizes: Sizes) -> Path:
    """The world of a seed, made where it is not there yet.

    Args:
        folder: Where worlds are.
        seed: Of everything in it.
        sizes: How large it is.

    Returns:
        Its folder, with ``base/``, ``reward/``, ``instruction.jsonl``, ``preference.jsonl``, held-out rows of both, and the
        prompts of both splits.
    """
    world = folder / f"world-{seed}"
    done = world / "world.json"
    made = {"seed": seed, **asdict(sizes)}
    if done.exists():
        if json.loads(done.read_text()) != made:
            raise SystemExit(f"{world} is a world of other sizes: give another --output, or remove it")
        return world
    shutil.rmtree(world, ignore_errors=True)  # what was stopped on the way is made anew: all of it is from one seed
    world.mkdir(parents=True)
    rng = random.Random(f"study {seed}")
    _pretrain(world, rng, seed, sizes)
    for name, count in (("instruction", sizes.instructions), ("instruction-held-out", sizes.held_out)):
        write_rows(world / f"{name}.jsonl", [_instruction(rng, sizes.tldr_share) for _ in range(count)])
    for split, count in (("validation", sizes.validation), ("test", sizes.test)):
        asked = [_exact(rng) for _ in range(count)]
        write_rows(world / f"{split}.jsonl", asked + [_tldr(rng) for _ in range(count)])
    _write_pairs(world, rng, seed, sizes)
    reward = {"data.preference.path": world / "preference.jsonl", "model.optimizer.lr": 3e-3}
    fit(["reward.yaml"], world / "reward-run", seed, {**in_world(world), **held_out(world, "preference"), **reward})
    (world / "reward-run" / "adapter").rename(world / "reward")
    done.write_text(json.dumps(made))
    return world


def in_world(world: Path) -> dict[str, Any]:
    """Settings of every run in a world."""
    return {
        "model.policy.model_name_or_path": world / "base",
        "model.policy.lora": json.dumps(LORA),
        "data.batch_size": 16,
        "data.val_batch_size": 64,
        "data.max_length": 96,
        "trainer.accumulate_grad_batches": 1,
    }


def held_out(world: Path, *names: str) -> dict[str, Any]:
    """Where the rows are that a run validates on."""
    return {f"data.{name}.val_path": world / f"{name}-held-out.jsonl" for name in names}


def tokenizer() -> PreTrainedTokenizerFast:
    """A token per word."""
    words = [*SPECIAL.values(), *task.vocabulary()]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE, **SPECIAL
    )


def _pretrain(world: Path, rng: random.Random, seed: int, sizes: Sizes) -> None:
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(seed)
    start = world / "start"
    LlamaForCausalLM(config).save_pretrained(start)
    words.save_pretrained(start)
    texts = world / "documents.txt"
    for path, count in ((texts, sizes.documents), (world / "documents-held-out.txt", sizes.held_out)):
        path.write_text("".join(task.write_document(rng) + "\n" for _ in range(count)))
    settings = {
        "model.policy.model_name_or_path": start,
        "model.epochs": math.ceil(sizes.pretraining_steps * 64 / sizes.documents),
        "model.optimizer.lr": 3e-3,
        "data.instruction.path": texts,
        "data.batch_size": 64,
        "data.val_batch_size": 64,
        "data.max_length": 96,
        "trainer.accumulate_grad_batches": 1,
        "trainer.max_steps": sizes.pretraining_steps,
    }
    fit([Path(__file__).with_name("pretraining.yaml")], world / "pretraining", seed, settings)
    (world / "pretraining" / "model").rename(world / "base")


def _write_pairs(world: Path, rng: random.Random, seed: int, sizes: Sizes) -> None:
    """Two answers of an SFT policy to each prompt, and which of them a rater prefers."""
    settings = {
        **in_world(world),
        **held_out(world, "instruction"),
        "data.instruction.path": world / "instruction.jsonl",
        "model.optimizer.lr": 1e-3,
    }
    # Of every parameter: pairs of an adapter's samples differ in wrong facts more than in style, and teach next to nothing.
    del settings["model.policy.lora"]
    policy = fit(["sft.yaml", "policy/full.yaml"], world / "sampler", seed, settings).policy
    torch.manual_seed(seed)
    for name, count in (("preference", sizes.pairs), ("preference-held-out", sizes.held_out)):
        write_rows(world / f"{name}.jsonl", _pairs(policy, rng, count))


def _pairs(policy: Policy, rng: random.Random, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompts = [_tldr(rng)["prompt"] for _ in range(64)]
        both = [in_batches(policy, prompts, GenerationSettings(32, temperature=1.0)) for _ in range(2)]
        for prompt, one, other in zip(prompts, *both, strict=True):
            if one == other or not one or not other:
                continue
            facts = task.facts_of(prompt)
            lead = LABEL_SHARPNESS * (task.gold(facts, one) - task.gold(facts, other))
            first = rng.random() < 1 / (1 + math.exp(-lead))
            chosen, rejected = (one, other) if first else (other, one)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows[:count]


def _exact(rng: random.Random) -> dict[str, Any]:
    facts, request = task.draw_facts(rng), rng.choice(task.EXACT)
    return {"prompt": task.write_prompt(rng, facts, request), "completion": facts.answer(request)}


def _tldr(rng: random.Random) -> dict[str, Any]:
    facts = task.draw_facts(rng)
    return {"prompt": task.write_prompt(rng, facts, task.TLDR), "completion": facts.as_people_write(rng)}


def _instruction(rng: random.Random, tldr_share: float) -> dict[str, Any]:
    return _tldr(rng) if rng.random() < tldr_share else _exact(rng)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
