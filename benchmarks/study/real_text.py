"""SFT, two stages and Hbat on real text, as far as a CPU goes.

    python benchmarks/study/real_text.py DATA

DATA holds ``wiki_demo.txt``, ``alpaca_en_demo.json``, ``dpo_en_demo.json`` and ``hh_rlhf_harmless_base_test.jsonl.gz``.
A Llama of 6 million parameters, with a vocabulary of 4,096 made of the same text, is given some language by the articles of
``wiki_demo.txt``, by Alpaca rows of its own, and by questions and chosen answers of ``dpo_en_demo.json``. Then
every system trains adapters of it on other Alpaca rows and on pairs of HH-RLHF, at rates that were not tuned; a seed is
another draw of rows, their order, and other adapters. Rows of more than 384 tokens are left out. The table has, over seeds,
the loss per token of held-out instructions and what all preference phases together have added to it (forgetting), and
accuracy and loss of held-out pairs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import shutil
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fits import fit
from report import interval
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from workers import Workers
from world import write_rows

HERE = Path(__file__).parent
EWC = str(HERE / "ewc.yaml")
BASELINE = "two-stage DPO"
ROUNDS = {"model.schedule.rounds": 2}


def _drift(strength: float) -> dict[str, Any]:
    return {"trainer.callbacks.strength": strength}


SYSTEMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    BASELINE: (["two_stage_dpo.yaml"], {}),
    "two-stage DPO, drift 0.1": (["two_stage_dpo.yaml", EWC], _drift(0.1)),
    "two-stage DPO, drift 1": (["two_stage_dpo.yaml", EWC], _drift(1)),
    "Hbat-DPO, none": (["hbat_dpo.yaml", EWC], ROUNDS | _drift(0)),
    "Hbat-DPO, drift 0.1": (["hbat_dpo.yaml", EWC], ROUNDS | _drift(0.1)),
    "Hbat-DPO, drift 1": (["hbat_dpo.yaml", EWC], ROUNDS | _drift(1)),
}
RATES = (2e-4, 1e-3)
ROWS = ("instruction", "preference")
INSTRUCTION_RATE = 2e-3


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    width: int = 256
    layers: int = 6
    vocabulary: int = 4096
    pretraining_epochs: int = 10
    language: int = 300  # rows of Alpaca, and conversations
    instructions: int = 480
    pairs: int = 960
    held_out: int = 160
    letters: int = 10**6  # of each article


SMOKE = Sizes(32, 2, 512, 1, 16, 16, 16, 8, 2000)


@dataclass(frozen=True)
class Job:
    """A run that is to be made."""

    system: str
    rate: float
    seed: int
    base: Path
    rows: Path
    folder: Path


def make_base(data: Path, folder: Path, sizes: Sizes) -> Path:
    """The model that every run begins from, made where it is not there yet.

    Args:
        data: Folder of the files that the module names.
        folder: Where the model and what it has read are kept.
        sizes: How large it is.

    Returns:
        The model's folder.
    """
    base = folder / "base"
    if _made(folder, asdict(sizes)):
        return base
    shutil.rmtree(base, ignore_errors=True)  # of a start that was stopped before it was whole
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_one_line(row, "instruction", "input", "output") for row in _alpaca(data)[: sizes.language]]
    talks = json.loads((data / "dpo_en_demo.json").read_text())[: sizes.language]
    rows += [
        _one_line(talk["conversations"][-1] | {"answer": talk["chosen"]["value"]}, "value", "answer") for talk in talks
    ]
    articles = [article[: sizes.letters] for article in (data / "wiki_demo.txt").read_text().splitlines()]
    texts = articles + rows
    random.Random("real text").shuffle(texts)
    (folder / "documents.txt").write_text("\n".join(texts))
    start = folder / "start"
    _tokenizer(texts, sizes.vocabulary).save_pretrained(start)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=8 * sizes.width // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=max(1, sizes.width // 64),
        num_key_value_heads=max(1, sizes.width // 64),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(start)
    settings = {
        "model.policy.model_name_or_path": start,
        "model.epochs": sizes.pretraining_epochs,
        "model.optimizer.lr": 1e-3,
        "model.optimizer.weight_decay": 0.1,
        "data.instruction.path": folder / "documents.txt",
        "data.batch_size": 16,
        "data.max_length": 256,
        "trainer.accumulate_grad_batches": 1,
    }
    fit([HERE / "pretraining.yaml"], folder / "pretraining", 1, settings)
    (folder / "pretraining" / "model").rename(base)
    (folder / "made.json").write_text(json.dumps(asdict(sizes)))
    return base


def make_rows(data: Path, folder: Path, seed: int, sizes: Sizes) -> Path:
    """Rows of a seed, written where they are not there yet: to train on and held out, from places that the base has not read.

    Args:
        data: Folder of the files that the module names.
        folder: Where they are kept.
        seed: Of their draw.
        sizes: How many.

    Returns:
        The folder.
    """
    made = {"seed": seed, **asdict(sizes)}
    if _made(folder, made):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(data / "hh_rlhf_harmless_base_test.jsonl.gz", "rt") as lines:
        pairs = [json.loads(line) for line in lines]
    rng = random.Random(f"real text {seed}")
    for name, rows, count in (
        ("instruction", _alpaca(data)[sizes.language :], sizes.instructions),
        ("preference", pairs, sizes.pairs),
    ):
        rng.shuffle(rows)
        write_rows(folder / f"{name}-held-out.jsonl", rows[: sizes.held_out])
        write_rows(folder / f"{name}.jsonl", rows[sizes.held_out : sizes.held_out + count])
    (folder / "made.json").write_text(json.dumps(made))
    return folder


def _made(folder: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder is finished; it must not be of other sizes."""
    done = folder / "made.json"
    if not done.exists():
        return False
    if json.loads(done.read_text()) != facts:
        raise SystemExit(f"{folder} is of other sizes: give another --output, or remove it")
    return True


def _alpaca(data: Path) -> list[Any]:
    """Alpaca's rows in an order that is the same for all seeds."""
    rows: list[Any] = json.loads((data / "alpaca_en_demo.json").read_text())
    random.Random("real text").shuffle(rows)
    return rows


def _one_line(row: Mapping[str, str], *fields: str) -> str:
    return " ".join(" ".join(row[field] for field in fields).split())


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the text."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def run(job: Job) -> dict[str, Any]:
    """Train, and read what came of it; kept in ``result.json``, which is read where it is there already."""
    kept = job.folder / "result.json"
    layers, settings = _settings(job)
    made_by = [*layers, sorted((key, str(value)) for key, value in settings.items())]
    if not kept.exists() or json.loads(kept.read_text())["made_by"] != json.loads(json.dumps(made_by)):
        data = fit(layers, job.folder, job.seed, settings).data
        rows = {name: len(data.train_sets[name]) for name in ROWS}
        facts = {"system": job.system, "rate": job.rate, "seed": job.seed, "rows": rows, "made_by": made_by}
        kept.write_text(json.dumps(facts | _read(job.folder)))
        shutil.rmtree(job.folder / "checkpoints", ignore_errors=True)
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def _settings(job: Job) -> tuple[list[str], dict[str, Any]]:
    layers, options = SYSTEMS[job.system]
    settings: dict[str, Any] = {
        "model.policy.model_name_or_path": job.base,
        "model.policy.lora": '{"r": 16, "alpha": 32}',
        **{f"data.{name}.path": job.rows / f"{name}.jsonl" for name in ROWS},
        **{f"data.{name}.val_path": job.rows / f"{name}-held-out.jsonl" for name in ROWS},
        "data.batch_size": 8,
        "data.max_length": 384,
        "data.truncation": "drop",
        "data.invalid_rows": "drop",
        "trainer.accumulate_grad_batches": 2,
        "model.instruction.lr": INSTRUCTION_RATE,
        "model.preference.lr": job.rate,
    }
    return layers, settings | options


def _read(folder: Path) -> dict[str, Any]:
    """Held-out figures at the end, those after the first instruction phase, and what preference phases did to instructions."""
    switches = [json.loads(line) for line in (folder / "switches.jsonl").read_text().splitlines()]
    names = ("val/instruction/loss", "val/preference/loss", "val/preference/accuracy")
    return {
        "steps": switches[-1]["step"],
        "end": {name: switches[-1]["after"][name] for name in names},
        "SFT": {name: switches[0]["after"][name] for name in names},
        "forgetting": sum(row["change"][names[0]] for row in switches if row["objective"] == "preference"),
    }


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds; differences are paired by seed with two stages at the same rate."""
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = defaultdict(list)
    for one in results:
        groups[one["rate"], one["system"]].append(one)
    lines = [
        "| rate | system | instruction loss | to two stages | forgetting | pair accuracy | to two stages | steps | pair loss |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    starts = groups[RATES[0], BASELINE]
    lines.append(
        f"| – | SFT | {_spread(_all(starts, 'SFT', 'instruction/loss'))} | | | "
        f"{_spread(_all(starts, 'SFT', 'preference/accuracy'))} | | | {_spread(_all(starts, 'SFT', 'preference/loss'))} |"
    )
    for (rate, system), own in groups.items():
        cells = [f"{rate:g}", system]
        for name in ("instruction/loss", "preference/accuracy"):
            values, baseline = (_all(some, "end", name) for some in (own, groups[rate, BASELINE]))
            paired = [one - other for one, other in zip(values, baseline, strict=True)]
            cells += [_spread(values), "" if system == BASELINE or len(paired) < 2 else interval(paired)]
            if name == "instruction/loss":
                cells.append(_spread([one["forgetting"] for one in own]))
        cells.append(f"{own[0]['steps']}")
        lines.append(f"| {' | '.join([*cells, _spread(_all(own, 'end', 'preference/loss'))])} |")
    return "\n".join(lines)


def _all(results: Sequence[Mapping[str, Any]], when: str, name: str) -> list[float]:
    return [one[when][f"val/{name}"] for one in sorted(results, key=lambda one: one["seed"])]


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two systems on a tiny model, which learn nothing")
    given = parser.parse_args()
    seeds, sizes = ((1,), SMOKE) if given.smoke else (range(1, given.seeds + 1), Sizes())
    rates, systems = (RATES[:1], (BASELINE, "Hbat-DPO, drift 1")) if given.smoke else (RATES, tuple(SYSTEMS))
    base = make_base(given.data, given.output / "language", sizes)
    rows = {seed: make_rows(given.data, given.output / "rows" / str(seed), seed, sizes) for seed in seeds}
    results = Workers(given.workers).all(
        "systems",
        run,
        [
            Job(
                system,
                rate,
                seed,
                base,
                rows[seed],
                given.output / "runs" / system.replace(", ", "/") / f"{rate:g}-{seed}",
            )
            for seed in seeds
            for rate in rates
            for system in systems
        ],
    )
    (given.output / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
