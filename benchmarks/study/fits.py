"""Runs of ``hbat fit`` inside this process, and completions of what they have trained."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hbat_lightning import GenerationSettings, Policy
from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.cli import make_cli
from hbat_lightning.data.sets import pad_id, pad_left

CONFIGS = Path(__file__).parents[2] / "configs"


def fit(layers: Sequence[str | Path], folder: Path, seed: int, options: Mapping[str, Any]) -> AlignmentModule:
    """Carry out a run; what is there of an earlier try is removed.

    Args:
        layers: Configurations, by their name in ``configs/`` or as files.
        folder: The run folder.
        seed: Of the run.
        options: Further settings by dotted name.

    Returns:
        The trained module.
    """
    shutil.rmtree(folder, ignore_errors=True)
    quiet = {
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "seed_everything": seed,
    }
    arguments = [part for layer in layers for part in ("--config", str(CONFIGS / layer))]
    arguments += [part for key, value in (quiet | dict(options)).items() for part in (f"--{key}", str(value))]
    with _without_notes(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module = make_cli(["fit", *arguments]).model
    assert isinstance(module, AlignmentModule)
    return module


@contextlib.contextmanager
def _without_notes() -> Iterator[None]:
    """Lightning's notes are not shown meanwhile; whoever calls may want them afterwards."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def in_batches(policy: Policy, prompts: Sequence[str], settings: GenerationSettings) -> list[str]:
    """Completions of prompts, as text."""
    words = policy.tokenizer
    found: list[str] = []
    for begin in range(0, len(prompts), 256):
        some = prompts[begin : begin + 256]
        ids = [
            words.apply_chat_template([{"role": "user", "content": prompt}], return_dict=True)["input_ids"]
            for prompt in some
        ]
        inputs = pad_left(ids, pad_id(words))
        completions = policy.generate(
            inputs["input_ids"], inputs["attention_mask"], settings, words.eos_token_id, pad_id(words)
        )
        found += [words.decode(completion, skip_special_tokens=True).strip() for completion in completions]
    return found
