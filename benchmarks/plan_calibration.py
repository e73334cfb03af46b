"""Compare ``hbat plan`` with what runs on a CPU allocate, case by case, and write the table.

    python benchmarks/plan_calibration.py                 # all cases, and benchmarks/plan_calibration.md
    python benchmarks/plan_calibration.py --only gpt2     # cases whose name holds this, printed with every moment
    python benchmarks/plan_calibration.py --base FOLDER   # QLoRA on a base of one's own; its row is added to the table

Every case is a small run of ``hbat fit`` in a process of its own: a phase of SFT and one of DPO, or two of each, on
rows of the full length, of a model with random weights. What it allocates is read from torch's profiler, which sees
every allocation of the CPU allocator, those inside kernels too. The plan is made in another process. None of the plan's
code measures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import heap
import torch
from marks import MarkedCLI
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from hbat_lightning.cli import make_cli
from hbat_lightning.data import embedded
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import HEAD_FILE

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "plan_calibration.md"
LAYERS = 8

LLAMA_60M = LlamaConfig(
    vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=LAYERS, num_attention_heads=8
)
LLAMA_8M = LlamaConfig(
    vocab_size=8000, hidden_size=256, intermediate_size=688, num_hidden_layers=LAYERS, num_attention_heads=4
)
QWEN3 = Qwen3Config(
    vocab_size=32000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=LAYERS,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    tie_word_embeddings=True,
)
GEMMA2 = Gemma2Config(
    vocab_size=16000,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=LAYERS,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    sliding_window=128,
)
GPT2 = GPT2Config(vocab_size=16000, n_embd=384, n_layer=LAYERS, n_head=6, n_positions=1024)


@dataclass(frozen=True)
class Case:
    """A run.

    Attributes:
        name: What it shows.
        model: Its architecture, or the folder of a base; the embedded model when not given.
        options: Added to the command.
        length: Tokens of the longest row.
        batch: Rows or pairs in a micro-batch.
        dtype: Of the weights in the file.
        rounds: Of a phase of SFT and one of DPO.
        accumulate: Micro-batches in a window.
        new: Tokens of the longest completion, where the preference phase answers prompts by itself; 0 where it has pairs.
        reward_adapter: Whether an adapter rewards completions, and not a rule.
    """

    name: str
    model: PretrainedConfig | Path | None
    options: tuple[str, ...] = ()
    length: int = 256
    batch: int = 2
    dtype: torch.dtype = torch.float32
    rounds: int = 1
    accumulate: int = 2
    new: int = 0
    reward_adapter: bool = False


FULL = ("--config", str(ROOT / "configs/policy/full.yaml"))
CHECKPOINTED = ("--model.policy.gradient_checkpointing", "true")
MIXED = ("--trainer.precision", "bf16-mixed")
NF4 = ("--model.policy.quantization", "nf4")
NO_EWC = ("--trainer.callbacks", "[]")
GRPO = ("--config", str(ROOT / "configs/reinforcement/grpo.yaml"), "--model.preference.samples", "4")
FISHER = ("--trainer.callbacks.importance", "RunningFisher", "--trainer.callbacks.importance.per_element", "true")

CASES = (
    Case("embedded model, LoRA", None, length=200, batch=4),
    Case("Llama 60M, LoRA", LLAMA_60M),
    Case("Llama 60M, LoRA, checkpointing", LLAMA_60M, CHECKPOINTED),
    Case("Llama 60M, LoRA, 1,024 tokens", LLAMA_60M, length=1024, batch=1),
    Case("Llama 60M, LoRA, 1,024 tokens, checkpointing", LLAMA_60M, CHECKPOINTED, length=1024, batch=1),
    Case("Llama 60M, LoRA, bf16 base, bf16-mixed", LLAMA_60M, MIXED, dtype=torch.bfloat16),
    Case("Llama 60M, LoRA, bf16 base, 32-true", LLAMA_60M, dtype=torch.bfloat16),
    Case("Llama 60M, LoRA, NF4", LLAMA_60M, NF4, dtype=torch.bfloat16),
    Case(
        "Llama 60M, LoRA, NF4, bf16-mixed, checkpointing, 1,024 tokens",
        LLAMA_60M,
        (*NF4, *MIXED, *CHECKPOINTED),
        length=1024,
        batch=1,
        dtype=torch.bfloat16,
    ),
    Case("Llama 60M, LoRA, int8", LLAMA_60M, ("--model.policy.quantization", "int8"), dtype=torch.bfloat16),
    Case("Llama 60M, full fine-tune", LLAMA_60M, FULL),
    Case("Llama 60M, full fine-tune, no EWC", LLAMA_60M, (*FULL, *NO_EWC)),
    Case("Llama 60M, full fine-tune, bf16-mixed, checkpointing", LLAMA_60M, (*FULL, *MIXED, *CHECKPOINTED)),
    Case("Llama 60M, full fine-tune, Fisher per element", LLAMA_60M, (*FULL, *FISHER), length=64, batch=1, rounds=2),
    Case(
        "Llama 60M, full fine-tune, moments per objective",
        LLAMA_60M,
        (*FULL, "--model.optimizer_state", "per_objective"),
        length=64,
        batch=1,
        rounds=2,
    ),
    Case(
        "Llama 60M, full fine-tune, no accumulation",
        LLAMA_60M,
        (*FULL, "--trainer.accumulate_grad_batches", "1"),
        length=64,
        batch=1,
    ),
    Case("Qwen3 (grouped queries, tied embeddings), LoRA", QWEN3),
    Case("Qwen3, full fine-tune, checkpointing", QWEN3, (*FULL, *CHECKPOINTED)),
    Case("Gemma 2 (soft-capped logits), LoRA", GEMMA2),
    Case("GPT-2, LoRA", GPT2),
    Case("GPT-2, LoRA, 1,024 tokens, checkpointing", GPT2, CHECKPOINTED, length=1024, batch=1),
    Case("Llama 8M, PPO with a value and a reward adapter", LLAMA_8M, length=128, new=48, reward_adapter=True),
    Case(
        "Llama 8M, PPO with a value and a reward adapter, NF4, checkpointing",
        LLAMA_8M,
        (*NF4, *CHECKPOINTED),
        length=128,
        dtype=torch.bfloat16,
        new=48,
        reward_adapter=True,
    ),
    Case("Llama 8M, GRPO, 4 samples, checkpointing", LLAMA_8M, (*GRPO, *CHECKPOINTED), length=128, new=48),
)


# ---- a case as files and arguments --------------------------------------------------------------------------------


def prepare(case: Case, folder: Path) -> list[str]:
    """Write model and data, and hand back the arguments behind ``fit`` or ``plan``."""
    windows = 2
    rows = case.batch * case.accumulate * windows * case.rounds
    arguments = ["--config", str(ROOT / "configs" / ("hbat_ppo.yaml" if case.new else "hbat_dpo.yaml"))]
    for name, texts in (("instruction", lines(case, ("completion",))), ("preference", prompts_or_pairs(case))):
        train, held_out = folder / f"{name}.jsonl", folder / f"{name}-val.jsonl"
        train.write_text("".join(islice(texts, rows)))
        held_out.write_text("".join(islice(texts, case.batch)))
        arguments += [f"--data.{name}.path", str(train), f"--data.{name}.val_path", str(held_out)]
    values: dict[str, Any] = {
        "model.policy.model_name_or_path": str(write_model(case, folder)),
        "model.schedule.rounds": case.rounds,
        "model.schedule.instruction_epochs": 1,
        "model.schedule.preference_epochs": 1,
        "data.template": "plain",
        "data.truncation": "prompt_left" if case.new else "completion_right",
        "data.max_length": case.length,
        "data.batch_size": case.batch,
        "data.val_batch_size": case.batch,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": case.accumulate,
        "trainer.default_root_dir": folder / "run",
    }
    if case.new:
        values |= {"model.preference.sampling.max_new_tokens": case.new, "model.preference.passes": 1}
        values |= {"model.preference.rollout_windows": 1}
    if case.reward_adapter:
        reward = write_reward(values["model.policy.model_name_or_path"], folder)
        values |= {"model.preference.reward": "AdapterReward", "model.preference.reward.path": reward}
    given = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    layers = [part for part in case.options if part.endswith(".yaml") or part == "--config"]
    return arguments + layers + given + [part for part in case.options if part not in layers]


def lines(case: Case, fields: tuple[str, ...]) -> Iterator[str]:
    """Rows that are cut at the greatest length; every second one is short of it, so that batches are padded."""
    for number in count():
        row = {"prompt": f"Post {number % 7}" + (" hello" * 16 if case.new else "")}
        for place, field in enumerate(fields):
            # Where prompts are cut and not answers, an answer leaves a little of its prompt.
            long, short = (case.length - 10, case.length - 22) if case.new else (case.length + 8, case.length - 12)
            row[field] = " ".join(["hello"] * (long if (number + place) % 2 == 0 else short))
        yield json.dumps(row) + "\n"


def prompts_or_pairs(case: Case) -> Iterator[str]:
    """Pairs; or prompts that are as long as completions let them, and every second one shorter."""
    if not case.new:
        yield from lines(case, ("chosen", "rejected"))
    for number in count():
        words = case.length + 8 if number % 2 == 0 else case.length - case.new - 12
        yield json.dumps({"prompt": f"Post {number % 7}" + " hello" * words, "completion": "hello"}) + "\n"


def write_reward(base: str, folder: Path) -> Path:
    """The adapter of a reward model on this base, with random weights."""
    policy = Policy(base)
    policy.build(torch.device("cpu"))
    policy.export(folder / "reward")
    save_file({"weight": torch.zeros(1, policy.hidden_size), "bias": torch.zeros(1)}, folder / "reward" / HEAD_FILE)
    return folder / "reward"


def write_model(case: Case, folder: Path) -> Path | str:
    """A model with random weights, and the embedded tokenizer, whose ids any of these models has."""
    if case.model is None:
        return embedded.TINY_LLAMA
    if isinstance(case.model, Path):
        return case.model.resolve()
    path = folder / "base"
    with embedded.materialise(embedded.TINY_LLAMA) as source:
        for file in Path(source).glob("*token*"):
            path.mkdir(exist_ok=True)
            (path / file.name).write_bytes(file.read_bytes())
    AutoModelForCausalLM.from_config(case.model, dtype=case.dtype).save_pretrained(path)
    return path


# ---- what a run allocates -----------------------------------------------------------------------------------------


def measure(arguments: list[str]) -> dict[str, int]:
    """Run ``fit`` under the profiler: the highest allocation of all, and of every moment."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cli = make_cli(["fit", *arguments, "--trainer.enable_progress_bar", "false"], cli=MarkedCLI)
    mapped = mapped_bytes(cli.model)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now, name, peaks = mapped, "loading", {"peak": 0}
    for event in events:
        if event.name().startswith("moment "):
            name = event.name().removeprefix("moment ")
        elif event.name() == "[memory]":
            now += event.nbytes()
            for key in ("peak", name):
                peaks[key] = max(peaks.get(key, 0), now)
    return peaks


def measure_heap(arguments: list[str]) -> dict[str, int]:
    """The same from what malloc says, less what it said before weights were loaded: a long run has too many events."""
    report = heap.watch(["fit", *arguments, "--trainer.enable_progress_bar", "false"])
    print(json.dumps(report), file=sys.stderr)
    peaks = {name: figures["allocated"] - report["before"] for name, figures in report["moments"].items()}
    return {"peak": max(peaks.values())} | peaks


def mapped_bytes(module: torch.nn.Module) -> int:
    """Bytes of weights that lie in a mapped file: the operating system has them in memory, and no allocator knows of it."""
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in [*module.parameters(), *module.buffers()]}
    return sum(storage.nbytes() for storage in storages.values() if storage.filename is not None)


# ---- the table ----------------------------------------------------------------------------------------------------


def run(case: Case, by_heap: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The plan and the measurement of a case, each in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="hbat-calibration-") as name:
        folder = Path(name)
        arguments = prepare(case, folder)
        report = folder / "plan.json"
        python = [sys.executable, "-W", "ignore"]
        subprocess.run(
            [*python, "-m", "hbat_lightning", "plan", *arguments, "--report", str(report)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        script = [*python, __file__, "--measure", json.dumps(arguments), "--report", str(folder / "measured.json")]
        script += ["--heap"] if by_heap else []
        subprocess.run(script, check=True, stdout=subprocess.DEVNULL, cwd=folder)
        return json.loads(report.read_text()), json.loads((folder / "measured.json").read_text())


def compare(case: Case, by_heap: bool) -> tuple[str, dict[str, Any], dict[str, int]]:
    """A case's row of the table, and what it is made of."""
    planned, measured = run(case, by_heap)
    sizes = [f"{one['peak'] / 1e6:,.1f} MB" for one in (planned, measured)]
    return f"| {case.name} | {' | '.join(sizes)} | {planned['peak'] / measured['peak']:.3f} |", planned, measured


def moments_of(planned: dict[str, Any], measured: dict[str, int]) -> str:
    """Every moment of both, in MB."""
    moments = next(iter(planned["plans"].values()))["moments"]
    sizes = ({name: one["peak"] for name, one in moments.items()}, measured)
    return "\n".join(json.dumps({name: round(size / 1e6, 1) for name, size in of.items()}) for of in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="Only cases whose name holds this; writes no table.")
    parser.add_argument("--base", type=Path, help="Folder of a base, such as random_llama.py writes.")
    parser.add_argument("--length", type=int, default=64, help="Tokens of a row, with --base.")
    parser.add_argument("--heap", action="store_true", help="Ask malloc in the place of the profiler, as --base does.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        how = measure_heap if given.heap else measure
        given.report.write_text(json.dumps(how(json.loads(given.measure))))
        return
    if given.base is not None:
        few = ("--trainer.num_sanity_val_steps", "0", "--data.instruction.limit", "1")  # a pass takes minutes
        case = Case(
            f"{given.base.name}, LoRA, NF4, checkpointing, {given.length} tokens",
            given.base,
            (*NF4, *CHECKPOINTED, *few),
            given.length,
            1,
            accumulate=1,
        )
        row, planned, measured = compare(case, by_heap=True)
        TABLE.write_text(TABLE.read_text() + row + "\n")
        print(row, moments_of(planned, measured), sep="\n")
        return
    rows = ["| case | planned | measured | planned / measured |", "| --- | ---: | ---: | ---: |"]
    for case in tqdm([case for case in CASES if given.only.lower() in case.name.lower()], desc="cases"):
        row, planned, measured = compare(case, given.heap)
        rows.append(row)
        tqdm.write(row)
        if given.only:
            tqdm.write(moments_of(planned, measured))
    if not given.only:
        TABLE.write_text(HEAD + "\n".join(rows) + "\n")


HEAD = """# Planned and measured memory

Highest number of allocated bytes in a run, as `hbat plan` says and as torch's profiler counts in the run itself.
`python benchmarks/plan_calibration.py`, 2-core CPU, 2026-11-23, seed 42; PPO and GRPO 2026-11-25. MB are 10⁶ bytes; "Llama
60M" has 8 layers of 512 and a vocabulary of 32,000, "Llama 8M" 8 of 256 and 8,000; there prompts have up to 80 tokens and
completions 48. The plan is of a run with many rounds: an importance per element has its full memory from the
third round on, and the measured run has two. No GPU is in the table. Plans for one take CUDA's lists of what autocast
computes in fp32 (`tests/memory/test_precision.py` holds them against CUDA autocast's own dispatch): at 2 rows of 512 tokens
in bf16-mixed that is 791.9 MB in the place of 702.1 by the CPU's lists for this GPT-2, whose activation function has a
power, and no difference for Llama and Gemma 2.

"""

if __name__ == "__main__":
    main()
