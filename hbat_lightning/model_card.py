"""The model card: what an exported folder tells of its training, for people (README.md) and for programs (hbat.json)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Callback

from hbat_lightning import hub
from hbat_lightning.data import embedded
from hbat_lightning.privacy import without_secret_settings, without_secrets
from hbat_lightning.report import read_switches
from hbat_lightning.switches import PhaseCallback

if TYPE_CHECKING:
    from hbat_lightning.alignment import AlignmentModule

RECORD = "hbat.json"
CARD = "README.md"
_LIBRARIES = ("hbat-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes")
_PAPER = "arxiv:2406.15178"


@dataclass(frozen=True)
class Weights:
    """What kind of weights a folder holds.

    Attributes:
        what: In words.
        library: The library that loads them, as the hub calls it.
        loading: Python code that does; ``{base}`` stands for the base's name.
        pipeline: What the model is for, as the hub calls it.
    """

    what: str
    library: str
    loading: str
    pipeline: str = "text-generation"


_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
ADAPTER = Weights(
    "A LoRA adapter (PEFT)",
    "peft",
    "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
    f'model = PeftModel.from_pretrained(base, "FOLDER")\n{_TOKENIZER}',
)
MODEL = Weights(
    "A whole model",
    "transformers",
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    f'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n{_TOKENIZER}',
)
CLASSIFIER_ADAPTER = Weights(
    "A LoRA adapter (PEFT) of a sequence classifier with one output, a reward model",
    "peft",
    "from peft import PeftModel\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
    'base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1)\n'
    f'model = PeftModel.from_pretrained(base, "FOLDER")\n{_TOKENIZER}',
    "text-classification",
)
CLASSIFIER = Weights(
    "A sequence classifier with one output, a reward model",
    "transformers",
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
    f'model = AutoModelForSequenceClassification.from_pretrained("FOLDER")\n{_TOKENIZER}',
    "text-classification",
)


@dataclass(frozen=True)
class Training:
    """What trained the weights.

    Attributes:
        origin: The module's :attr:`~hbat_lightning.alignment.AlignmentModule.origin`.
        step: Optimizer steps that were made.
        method: What trained, in sentences.
        run_folder: Where the run's ``config.yaml``, ``switches.jsonl`` and ``metrics.csv`` lie, those that there are.
    """

    origin: dict[str, Any]
    step: int
    run_folder: Path
    method: list[str] = field(default_factory=list)


def describe_method(module: AlignmentModule, callbacks: Iterable[Callback]) -> list[str]:
    """What trains, in sentences: the schedule, the objectives, and what callbacks add."""
    added = [callback.describe() for callback in callbacks if isinstance(callback, PhaseCallback)]
    objectives = [f"{name}: {objective.describe()}" for name, objective in module.objectives.items()]
    return [module.schedule.describe(), *objectives, *filter(None, added)]


def write_card(folder: Path, weights: Weights, training: Training, notes: Sequence[str] = ()) -> None:
    """Write ``README.md`` and ``hbat.json`` beside exported weights.

    Args:
        folder: Where the weights are.
        weights: What kind they are.
        training: What trained them.
        notes: Further sentences about the weights.
    """
    card = f"---\n{_metadata(weights, training.origin).to_yaml()}\n---\n\n{_text(weights, training, notes)}"
    ModelCard(without_secrets(card), ignore_metadata_errors=True).save(folder / CARD)
    files = sorted({path.name for path in folder.iterdir()} | {RECORD})
    record = {**training.origin, "step": training.step, "weights": weights.what, "notes": list(notes), "files": files}
    text = without_secrets(json.dumps(record, indent=2, ensure_ascii=False))
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any] | None:
    """The ``hbat.json`` of an exported folder; ``None`` where there is none."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ---- its parts --------------------------------------------------------------------------------------------------------


def _metadata(weights: Weights, origin: dict[str, Any]) -> ModelCardData:
    """What the hub reads. It refuses names that are none of its own, so those of folders stay out."""
    base = origin["policy"]["base"]
    sources = [entry["source"]["path"] for entry in origin["data"].values() if entry["on_hub"]]
    return ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=sorted(set(sources)) or None,
        library_name=weights.library,
        pipeline_tag=weights.pipeline,
        tags=["hbat-lightning", _PAPER, *origin["data"]],
    )


def _is_on_hub(base: str) -> bool:
    return hub.is_id(base) and not embedded.is_embedded(base) and not Path(base).exists()


def _text(weights: Weights, training: Training, notes: Sequence[str]) -> str:
    policy, loading = training.origin["policy"], weights.loading.replace("{base}", training.origin["policy"]["base"])
    lora = "every parameter" if policy["lora_r"] is None else f"LoRA r {policy['lora_r']}, alpha {policy['lora_alpha']}"
    precision = "not quantised" if policy["quantization"] == "none" else f"quantised to {policy['quantization']}"
    base = f"`{policy['base']}`, {precision}, fingerprint `{policy['base_fingerprint']}`"
    facts = [f"Base in training: {base}", f"Trained: {lora}", f"Optimizer steps: {training.step:,}"]
    sections = [
        f"# {training.run_folder.resolve().name}",
        f"{weights.what}, trained with hbat_lightning (Hybrid Alignment Training, arXiv 2406.15178).",
        _list([*facts, f"Seed: {training.origin['seed']}", *notes]),
        f"## Loading\n\n```python\n{loading}\n```",
        f"## Data\n\n{_data_table(training.origin['data'])}",
        f"## Method\n\n{_list(training.method)}",
        f"## Held-out figures\n\n{_metrics(training)}",
        f"## Configuration\n\n{_configuration(training.run_folder / 'config.yaml')}",
        f"## Software\n\n{_list(f'{name} {version(name)}' for name in _LIBRARIES)}",
    ]
    return "\n\n".join(sections) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _data_table(data: dict[str, Any]) -> str:
    if not data:
        return "Not recorded by the version that trained."
    rows = []
    for name, entry in data.items():
        chosen = ", ".join(f"{key} {value}" for key, value in entry["source"].items() if key != "path")
        parts = [f"{part['rows']:,} (`{part['digest']}`)" for part in (entry["training"], entry["held_out"])]
        source = f"`{entry['source']['path']}`" + (f" ({chosen})" if chosen else "")
        rows.append(f"| {name} | {source} | {entry['template']} | {' | '.join(parts)} |")
    heads = ("objective", "source", "prompt template", "training rows (digest)", "held-out rows (digest)")
    return "\n".join([f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads), *rows])


def _metrics(training: Training) -> str:
    """The newest held-out figures that are not from a later step than the weights."""
    step, values = _last_switch(training) or _last_validation(training) or (0, {})
    if not values:
        return "None were kept."
    rows = [f"| `{name}` | {value:.4f} |" for name, value in sorted(values.items())]
    return "\n".join([f"After optimizer step {step:,}:", "", "| figure | value |", "| --- | --- |", *rows])


def _last_switch(training: Training) -> tuple[int, dict[str, float]] | None:
    rows = read_switches(training.run_folder / "switches.jsonl")
    rows = [row for row in rows if row["step"] <= training.step and row["after"]]
    return (rows[-1]["step"], rows[-1]["after"]) if rows else None


def _last_validation(training: Training) -> tuple[int, dict[str, float]] | None:
    """From ``metrics.csv``, whose rows are counted from 0: a run may have no switch yet."""
    path = training.run_folder / "metrics.csv"
    if not path.exists():
        return None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) < training.step]
    found = [
        (int(row["step"]) + 1, {k: float(v) for k, v in row.items() if k.startswith("val/") and v}) for row in rows
    ]
    return next((one for one in reversed(found) if one[1]), None)


def _configuration(path: Path) -> str:
    if not path.exists():
        return "Made from Python, without a configuration file."
    settings = without_secret_settings(yaml.safe_load(path.read_text(encoding="utf-8")))
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()
    return f"<details>\n<summary>config.yaml</summary>\n\n```yaml\n{text}\n```\n\n</details>"
