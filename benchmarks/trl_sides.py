"""The two sides of against_trl.py: the same training by Lightning and this package, and by TRL, each waiting for its turn."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

BETA, RATE, RANK, ALPHA = 0.1, 1e-4, 16, 32
GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        kind: ``sft`` or ``dpo``.
        precision: ``fp32``, or ``bf16`` by autocast over an fp32 model (bf16 weights beside quantised ones).
        base: Folder of the model.
        adapter: Folder of the adapter that both begin from.
        rows: Beginning of the names of two files of the same rows, TRL's in the order in which ours are trained on.
        batch: Rows or pairs in a step.
        steps: How many steps, warm-up included.
        max_length: Tokens of the longest row.
        device: ``cpu`` or ``cuda``.
        threads: Threads of each library.
        quantization: ``none`` or ``nf4``.
        checkpointing: Recompute activations in the backward pass.
    """

    kind: str
    precision: str
    base: str
    adapter: str
    rows: str
    batch: int
    steps: int
    max_length: int
    device: str
    threads: int
    quantization: str
    checkpointing: bool


def slot(kind: str) -> str:
    return "instruction" if kind == "sft" else "preference"


def as_written() -> Any:
    """Prompts and answers one behind the other."""
    from hbat_lightning.data.templates import TextTemplate

    return TextTemplate(user="{content}", name="as written")


class Baton:
    """Makes a training loop wait for its turn after every step, and hands on how long the step took.

    Args:
        pipe: To the process that says whose turn it is.
        device: Where it trains.
    """

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.begin = self.begin_cpu = 0.0
        self.before = 0

    def ready(self) -> None:
        """The model is there and nothing else: measure memory from here, and wait for the first turn."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew
            self.before = _status("VmRSS")
        self.pipe.send("ready")
        self._wait()

    def stepped(self, loss: float) -> None:
        """A step is over."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - self.begin
        self.pipe.send((took, loss, self._peak() - self.before, time.process_time() - self.begin_cpu))
        self._wait()

    def _wait(self) -> None:
        self.pipe.recv()
        self.begin, self.begin_cpu = time.perf_counter(), time.process_time()

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of the process's own status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def ours(case: Case, pipe: Connection) -> None:
    """Train by Lightning's Trainer and this package's modules."""
    from functools import partial

    from lightning.pytorch import Callback, Trainer

    from hbat_lightning import DataSource, DPOModule, HybridDataModule, LoraSettings, Policy, SFTModule
    from hbat_lightning.lr import Constant

    torch.set_num_threads(case.threads)
    baton = Baton(pipe, case.device)
    policy = Policy(
        case.base,
        quantization=case.quantization,  # type: ignore[arg-type]
        lora=LoraSettings(r=RANK, alpha=ALPHA),
        adapter_path=case.adapter,
        gradient_checkpointing=case.checkpointing,
        dtype="float32" if case.quantization == "none" else "auto",
    )
    policy.build(torch.device(case.device))
    policy.to(case.device)

    class Turns(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            baton.stepped(float(outputs["loss"]))

    settings: dict[str, Any] = {
        "policy": policy,
        "optimizer": partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0),
        "lr_schedule": Constant(),
        "seed": 0,
    }
    module = SFTModule(**settings) if case.kind == "sft" else DPOModule(beta=BETA, **settings)
    source = DataSource(f"{case.rows}-ours.jsonl", val_fraction=0.0)
    data = HybridDataModule(
        **{slot(case.kind): source}, template=as_written(), max_length=case.max_length, batch_size=case.batch
    )
    trainer = Trainer(
        accelerator="gpu" if case.device == "cuda" else "cpu",
        devices=1,
        precision="32-true" if case.precision == "fp32" else "bf16-mixed",
        max_epochs=1,
        gradient_clip_val=GRADIENT_CLIP,
        logger=False,
        callbacks=[Turns()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        log_every_n_steps=1,
    )
    baton.ready()
    trainer.fit(module, data)


def theirs(case: Case, pipe: Connection) -> None:
    """Train by TRL's trainers."""
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(case.threads)
    baton = Baton(pipe, case.device)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        case.base,
        dtype=torch.float32 if case.quantization == "none" else torch.bfloat16,
        device_map={"": case.device},
        **({} if case.quantization == "none" else {"quantization_config": quantised}),
    )
    model = PeftModel.from_pretrained(base, case.adapter, is_trainable=True)
    rows = [json.loads(line) for line in Path(f"{case.rows}-trl.jsonl").read_text().splitlines()]
    config: type[Any] = SFTConfig if case.kind == "sft" else DPOConfig
    trainer_class: type[Any] = SFTTrainer if case.kind == "sft" else DPOTrainer
    more: dict[str, Any] = {"beta": BETA} if case.kind == "dpo" else {"completion_only_loss": True}

    class Turns(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    from transformers import TrainerCallback

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            baton.stepped(float(trainer.last_loss))

    settings = config(
        output_dir=f"{case.rows}-trl",
        use_cpu=case.device == "cpu",
        bf16=case.precision == "bf16",
        per_device_train_batch_size=case.batch,
        max_length=case.max_length,
        num_train_epochs=1,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=GRADIENT_CLIP,
        gradient_checkpointing=case.checkpointing,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    baton.ready()
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    trainer = Turns(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Ends()],
    )
    trainer.train()


def run(side: Any, case: Case, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    try:
        side(case, pipe)
    except BaseException as error:
        pipe.send(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise
