"""TRL and this package side by side: the same model, rows, batches, precision, LoRA and optimizer, steps in turns.

    python benchmarks/against_trl.py FOLDER --tokenizer TOKENIZER.model --instructions ALPACA.json --pairs HH.jsonl.gz

Each library trains in a process of its own, by its own trainer, and stands still while the other makes a step (A B A B);
a step is all that its loop does between two steps' ends, reading of rows and logging included. Both get the same texts, of
which only those are taken whose ids are the same in both. The loss of every step must agree, or the script fails. Memory
is the highest resident size (on a GPU: of allocated memory) above what interpreter, libraries and model took before.

The limit is what the matrix products would take that cannot be left out (no padding, shared prompts once, the vocabulary
where a token is trained, no gradient of frozen weights) at the rate at which this machine multiplies 2048² matrices.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded from a hub, nor told to one
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import torch
from random_llama import SIZES, make_config, write
from trl_sides import ALPHA, RANK, Case, as_written, ours, run, slot, theirs

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of the loss of a step


# ---- rows -------------------------------------------------------------------------------------------------------------


def choose_rows(kind: str, file: str, base: str, count: int, max_length: int) -> tuple[list[dict[str, str]], list[Any]]:
    """Rows of a file in Alpaca's wording, whose ids are the same in both libraries; and their encoded forms."""
    from transformers import AutoTokenizer

    from hbat_lightning import DataSource, HybridDataModule
    from hbat_lightning.data.tokenization import Encoder

    tokenizer = AutoTokenizer.from_pretrained(base)
    name = slot(kind)
    data = HybridDataModule(
        **{name: DataSource(file, val_fraction=0.0)}, template="alpaca", max_length=max_length, invalid_rows="drop"
    )
    rows, _ = data.split(name, 0)
    wording = data.encoder(name, tokenizer).template
    encoder = Encoder(tokenizer, as_written(), max_length, "drop")
    chosen, encoded = [], []
    for row in rows:
        prompt = "".join(segment.text for segment in wording.segments(row.prompt)).removeprefix(tokenizer.bos_token)
        fields = ["completion"] if kind == "sft" else ["chosen", "rejected"]
        texts = dict(zip(fields, row.answers, strict=True))
        own = data.kinds[name].encode(encoder, _plain(row, prompt))
        if own is None or not all(texts.values()):
            continue
        sides = [own] if kind == "sft" else [own.chosen, own.rejected]
        both = zip(sides, texts.values(), strict=True)
        if all(_same_ids(side, tokenizer, prompt, text) for side, text in both):
            chosen.append({"prompt": prompt, **texts})
            encoded.append(sides)
        if len(chosen) == count:
            return chosen, encoded
    raise SystemExit(f"{file}: {len(chosen)} rows of at most {max_length} tokens, {count} are needed: lower --steps")


def _plain(row: Any, prompt: str) -> Any:
    """The row with a prompt that is a text."""
    from hbat_lightning.data.fields import InstructionRow, Message, PreferenceRow

    asked = Message("user", prompt)
    if isinstance(row, PreferenceRow):
        return PreferenceRow(row.source, row.number, (asked,), row.chosen, row.rejected)
    return InstructionRow(row.source, row.number, (asked, Message("assistant", row.answers[0])))


def _same_ids(own: Any, tokenizer: Any, prompt: str, text: str) -> bool:
    """Whether TRL would make the same ids and mask: it tokenises prompt and answer as one text."""
    whole, before = (tokenizer(one)["input_ids"] for one in (prompt + text + tokenizer.eos_token, prompt))
    return bool(
        own.input_ids.tolist() == whole
        and whole[: own.prompt_length] == before
        and own.supervised[own.prompt_length :].all()
        and not own.supervised[: own.prompt_length].any()
    )


def training_order(kind: str, count: int) -> list[int]:
    """The rows in the order in which this package trains on them."""
    from hbat_lightning.stream import make_shards, permutation

    class _Rows:
        source, digest = "", ""

        def __len__(self) -> int:
            return count

    (shard,) = make_shards(_Rows(), slot(kind), 1, 0)  # type: ignore[arg-type]
    return [shard[place] for place in permutation(count, 0, slot(kind), 0, 0)]


# ---- the limit --------------------------------------------------------------------------------------------------------


def matrix_rate(precision: str, device: str, threads: int) -> float:
    """Floating-point operations per second in products of 2048² matrices, the median of 20."""
    torch.set_num_threads(threads)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    one, other = (torch.randn(2048, 2048, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        product = one @ other
        float(product[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - begin)
    return 2 * 2048**3 / median(times)


def needed_work(size: str, kind: str, sides: list[Any]) -> float:
    """Floating-point operations of a step on a row or pair that cannot be left out."""
    config = make_config(size)
    hidden, middle, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    frozen = layers * (4 * hidden * hidden + 3 * hidden * middle)
    lora = layers * RANK * (4 * 2 * hidden + 3 * (hidden + middle))
    prompt = sides[0].prompt_length
    answers = [len(side.input_ids) - prompt for side in sides]
    tokens, supervised = prompt + sum(answers), sum(int(side.supervised.sum()) for side in sides)
    seen = prompt * prompt / 2 + sum(answer * (prompt + answer / 2) for answer in answers)  # pairs in attention
    attention = 4 * hidden * layers * seen
    head = 2 * config.vocab_size * hidden * supervised
    forward = 2 * (frozen + lora) * tokens + attention + head
    backward = (2 * frozen + 4 * lora) * tokens + 2 * attention + head
    return forward + backward + (forward if kind == "dpo" else 0)


# ---- the comparison ---------------------------------------------------------------------------------------------------


def compare(case: Case) -> list[tuple[Any, Any]]:
    """Train by both, a step of one and a step of the other: (TRL's, ours), each (seconds, loss, bytes, processor seconds)."""
    context = multiprocessing.get_context("spawn")
    sides = []
    for side in (theirs, ours):  # one after the other, so that neither loads beside the other
        here, there = context.Pipe()
        process = context.Process(target=run, args=(side, case, there), daemon=True)
        process.start()
        sides.append((process, here))
        _received(here)
    steps = []
    for number in range(case.steps):
        pair = []
        for _, pipe in sides:
            pipe.send("go")
            pair.append(_received(pipe))
        steps.append((pair[0], pair[1]))
        _require_equal_losses(case, number, *steps[-1])
        took = ", ".join(f"{one[0]:.2f} s ({one[3]:.2f} s of processors)" for one in pair)
        print(f"{case.kind} {case.precision} step {number}: {took}", flush=True)
    for process, _ in sides:
        process.kill()
        process.join()
    return steps


def _received(pipe: Connection) -> Any:
    got = pipe.recv()
    if isinstance(got, Exception):
        raise got
    return got


def _require_equal_losses(case: Case, number: int, theirs: Any, ours: Any) -> None:
    if abs(theirs[1] - ours[1]) > TOLERANCE[case.precision] * abs(theirs[1]):
        raise SystemExit(f"{case.kind} {case.precision}, step {number}: the losses are {theirs[1]} and {ours[1]}")


def summarise(case: Case, steps: list[tuple[Any, Any]], warm_up: int, work: list[float], rate: float) -> str:
    """A line of the table."""
    counted = steps[warm_up:]
    ratios = sorted(one[0] / other[0] for one, other in counted)
    quarter = len(ratios) // 4
    times = [median(pair[side][0] for pair in counted) for side in (0, 1)]
    memory = [max(pair[side][2] for pair in steps) / 1e9 for side in (0, 1)]
    limit = [
        median(one / rate / pair[side][0] for one, pair in zip(work[warm_up:], counted, strict=True)) for side in (0, 1)
    ]
    difference = max(abs(one[1] - other[1]) / abs(one[1]) for one, other in steps)
    cells = [
        case.kind,
        case.precision,
        f"{times[0]:.2f} s",
        f"{times[1]:.2f} s",
        f"**{median(ratios):.2f}** ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})",
        f"{memory[0]:.2f} GB",
        f"{memory[1]:.2f} GB",
        f"{memory[1] / memory[0]:.2f}",
        f"{limit[0]:.0%}",
        f"{limit[1]:.0%}",
        f"{difference:.0e}",
    ]
    return f"| {' | '.join(cells)} |"


HEAD = """\
| objective | precision | TRL, a step | ours | TRL / ours (middle half) | TRL, memory | ours | ours / TRL | TRL, of the limit \
| ours | losses differ by |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def prepare(args: argparse.Namespace, kind: str) -> tuple[str, str, str, list[float]]:
    """Write model, adapter and rows where they are not: their places, and the work of every step."""
    from hbat_lightning import LoraSettings, Policy

    base, adapter = args.folder / args.size, args.folder / f"{args.size}-adapter"
    if not (base / "config.json").exists():
        write(args.size, base, args.tokenizer)
    if not adapter.exists():
        torch.manual_seed(0)
        policy = Policy(str(base), lora=LoraSettings(r=RANK, alpha=ALPHA))
        policy.build(torch.device("cpu"))
        policy.export(adapter)
    count = args.batch * (args.steps + args.warm_up)
    file = args.instructions if kind == "sft" else args.pairs
    rows, encoded = choose_rows(kind, file, str(base), count, args.max_length)
    order = training_order(kind, count)
    for name, numbers in (("ours", range(count)), ("trl", order)):
        lines = "".join(json.dumps(rows[number]) + "\n" for number in numbers)
        (args.folder / f"{kind}-{name}.jsonl").write_text(lines)
    work = [needed_work(args.size, kind, encoded[number]) for number in order]
    steps = [sum(work[begin : begin + args.batch]) for begin in range(0, count, args.batch)]
    return str(base), str(adapter), str(args.folder / kind), steps


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where model and rows are written")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model of Llama-2")
    parser.add_argument("--instructions", required=True, help="a file of instructions")
    parser.add_argument("--pairs", required=True, help="a file of pairs")
    parser.add_argument("--kinds", nargs="+", choices=["sft", "dpo"], default=["sft", "dpo"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="that are counted")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for kind in args.kinds:
        base, adapter, rows, work = prepare(args, kind)
        for precision in args.precisions:
            rate = matrix_rate(precision, args.device, args.threads)
            common = (args.batch, args.steps + args.warm_up, args.max_length, args.device, args.threads)
            case = Case(kind, precision, base, adapter, rows, *common, args.quantization, args.checkpointing)
            lines.append(summarise(case, compare(case), args.warm_up, work, rate))
            print(f"{precision}: this machine multiplies at {rate / 1e12:.2f} TFLOP/s", flush=True)
    print("\n".join([HEAD, *lines]))


if __name__ == "__main__":
    main()
