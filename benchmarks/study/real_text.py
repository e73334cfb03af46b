"""SFT, two stages and Hbat on real text, as far as a CPU goes.

    python benchmarks/study/real_text.py DATA

DATA holds ``llama2_tokenizer.model``, ``wiki_demo.txt``, ``alpaca_en_demo.json`` and ``hh_rlhf_harmless_base_test.jsonl.gz``.
For every seed a Llama of 5 million parameters is given some language by the beginnings of the articles in ``wiki_demo.txt`` and
as many Alpaca rows as are trained on afterwards; then every system trains adapters of it on other Alpaca rows and pairs of
HH-RLHF, at rates that were not tuned. Rows of more than 192 tokens are left out. The table has, over seeds, the loss per token
of held-out instructions and what all preference phases together have added to it (forgetting), and accuracy and loss of
held-out pairs.
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
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fits import fit
from report import interval
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer
from workers import Workers
from world import write_rows

HERE = Path(__file__).parent
EWC = str(HERE / "ewc.yaml")
BASELINE = "two-stage DPO"
NO_EWC = {"trainer.callbacks.strength": 0}
DRIFT = {"trainer.callbacks.strength": 0.1}
ROUNDS = {"model.schedule.rounds": 2}
SYSTEMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    BASELINE: (["two_stage_dpo.yaml"], {}),
    "two-stage DPO, EWC, drift": (["two_stage_dpo.yaml", EWC], DRIFT),
    "Hbat-DPO, none": (["hbat_dpo.yaml"], ROUNDS | NO_EWC),
    "Hbat-DPO, drift": (["hbat_dpo.yaml"], ROUNDS | DRIFT),
}
RATES = (2e-4, 1e-3)
ROWS = ("instruction", "preference")
PRECISION = {"trainer.precision": "bf16-mixed"}  # most of a step is matrix products, which AMX speeds up
INSTRUCTION_RATE = 2e-3


@dataclass(frozen=True)
class Sizes:
    """How much of everything there is."""

    width: int = 128
    pretraining_epochs: int = 4
    instructions: int = 256
    pairs: int = 320
    held_out: int = 64
    letters: int = 6000  # of each article


SMOKE = Sizes(32, 1, 16, 16, 8, 2000)


@dataclass(frozen=True)
class Job:
    """A run that is to be made."""

    system: str
    rate: float
    seed: int
    world: Path
    folder: Path


def make_world(data: Path, folder: Path, seed: int, sizes: Sizes) -> Path:
    """Base model and data of a seed, made where they are not there yet.

    Args:
        data: Folder of the files that the module names.
        folder: Where worlds are.
        seed: Of the order of rows, and of the model.
        sizes: How large it is.

    Returns:
        Its folder.
    """
    world = folder / f"world-{seed}"
    made, done = {"seed": seed, **asdict(sizes)}, world / "world.json"
    if done.exists():
        if json.loads(done.read_text()) != made:
            raise SystemExit(f"{world} is of other sizes: give another --output, or remove it")
        return world
    world.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"real text {seed}")
    rows = json.loads((data / "alpaca_en_demo.json").read_text())
    rng.shuffle(rows)
    held_out, kept, rest = _cut(rows, sizes.held_out, sizes.instructions)
    write_rows(world / "instruction.jsonl", kept)
    write_rows(world / "instruction-held-out.jsonl", held_out)
    with gzip.open(data / "hh_rlhf_harmless_base_test.jsonl.gz", "rt") as lines:
        pairs = [json.loads(line) for line in lines]
    rng.shuffle(pairs)
    held_out, kept, _ = _cut(pairs, sizes.held_out, sizes.pairs)
    write_rows(world / "preference.jsonl", kept)
    write_rows(world / "preference-held-out.jsonl", held_out)
    texts = [" ".join(row[key] for key in ("instruction", "input", "output")).replace("\n", " ") for row in rest]
    articles = [article[: sizes.letters] for article in (data / "wiki_demo.txt").read_text().splitlines()]
    (world / "documents.txt").write_text("\n".join(articles[: sizes.instructions] + texts[: sizes.instructions]))
    _pretrain(data, world, seed, sizes)
    done.write_text(json.dumps(made))
    return world


def _cut(rows: list[Any], *counts: int) -> list[list[Any]]:
    rest = iter(rows)
    return [*(list(islice(rest, count)) for count in counts), list(rest)]


def _pretrain(data: Path, world: Path, seed: int, sizes: Sizes) -> None:
    start = world / "start"
    start.mkdir(exist_ok=True)
    shutil.copy(data / "llama2_tokenizer.model", start / "tokenizer.model")
    LlamaTokenizer.from_pretrained(start, add_bos_token=True).save_pretrained(start)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=sizes.width,
        intermediate_size=8 * sizes.width // 3,
        num_hidden_layers=4,
        num_attention_heads=sizes.width // 32,
        num_key_value_heads=sizes.width // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(start)
    settings = {
        "model.policy.model_name_or_path": start,
        "model.epochs": sizes.pretraining_epochs,
        "model.optimizer.lr": 1e-3,
        "data.instruction.path": world / "documents.txt",
        "data.batch_size": 16,
        "data.max_length": 128,
        "trainer.accumulate_grad_batches": 1,
        **PRECISION,
    }
    fit([HERE / "pretraining.yaml"], world / "pretraining", seed, settings)
    (world / "pretraining" / "model").rename(world / "base")


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
        "model.policy.model_name_or_path": job.world / "base",
        "model.policy.lora": '{"r": 16, "alpha": 32}',
        **{f"data.{name}.path": job.world / f"{name}.jsonl" for name in ROWS},
        **{f"data.{name}.val_path": job.world / f"{name}-held-out.jsonl" for name in ROWS},
        "data.batch_size": 8,
        "data.max_length": 192,
        "data.truncation": "drop",
        "data.invalid_rows": "drop",
        "trainer.accumulate_grad_batches": 2,
        "model.instruction.lr": INSTRUCTION_RATE,
        "model.preference.lr": job.rate,
        **PRECISION,
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
    rates, systems = (RATES[:1], (BASELINE, "Hbat-DPO, drift")) if given.smoke else (RATES, tuple(SYSTEMS))
    workers = Workers(given.workers)
    jobs = [(given.data, given.output / "worlds", seed, sizes) for seed in seeds]
    worlds = workers.all("language", make_world, jobs)
    results = workers.all(
        "systems",
        run,
        [
            Job(system, rate, seed, world, given.output / "runs" / system.replace(", ", "/") / f"{rate:g}-{seed}")
            for rate in rates
            for system in systems
            for seed, world in zip(seeds, worlds, strict=True)
        ],
    )
    (given.output / "table.md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
