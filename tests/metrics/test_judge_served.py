"""The judge against ``transformers serve``, with a small model that has learnt its verdicts, told apart by plain generation."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from hbat_lightning.completions import Completed
from hbat_lightning.metrics import JudgeWinRate, Surroundings
from tests.tiny_models import byte_tokenizer

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="transformers serve needs fastapi, uvicorn and openai: the extra `test`"
)

QUESTION = "{prompt} {first} {second}"
# What the model learns to say of (first, second): one answer wins, loses, contradicts itself, ties, and is not judged.
SAYS = {
    "q1 x y": "so [[A]]",
    "q1 y x": "so [[B]]",
    "q2 x y": "[[B]]",
    "q2 y x": "[[A]]",
    "q3 x y": "[[A]]",
    "q3 y x": "[[A]]",
    "q4 x y": "[[C]]",
    "q4 y x": "[[C]]",
    "q5 x y": "no",
    "q5 y x": "[[A]]",
}
TEMPLATE = "{% for one in messages %}{{ one.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def taught(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A Llama of two layers that says what it should, saved in a folder."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = [tokenizer(f"{asked}>{said}")["input_ids"] for asked, said in SAYS.items()]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    places = torch.arange(longest)
    begins = torch.tensor([len(asked) + 1 for asked in SAYS])[:, None]
    labels = ids.masked_fill((places < begins) | (ids == 1), -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(input_ids=ids, attention_mask=(ids != 1).long(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder; by plain greedy generation it says what the table has."""
    folder = tmp_path_factory.mktemp("judge")
    model, tokenizer = taught(folder)
    for asked, said in SAYS.items():
        ids = torch.tensor([tokenizer(f"{asked}>", add_special_tokens=False)["input_ids"]])
        found = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True) == said
    return folder


@pytest.fixture(scope="module")
def address(judge_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``transformers serve`` on this machine, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(judge_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_verdicts_of_a_served_model(address: str, judge_model: Path, tmp_path: Path) -> None:
    """A win, a loss, a contradiction, a tie and a refusal; a second reading of the same answers asks nothing."""

    def judged() -> tuple[JudgeWinRate, list[Completed]]:
        metric = JudgeWinRate(address, str(judge_model), question=QUESTION, max_tokens=12)
        metric.build(Surroundings(cast(Any, None), cast(Any, None), tmp_path))
        answers = [Completed(f"q{number}", "x", "y", 1, True) for number in range(1, 6)]
        metric.update(answers)
        return metric, answers

    metric, answers = judged()
    won = [answer.scores.get("judge_win_rate") for answer in answers]
    assert won == [1.0, 0.0, 0.5, 0.5, None]
    assert [answer.scores["judge_flip"] for answer in answers] == [0, 0, 1, 0, 0]
    assert [answer.scores["judge_refusal"] for answer in answers] == [0, 0, 0, 0, 1]
    figures = metric.compute()
    assert figures["judge_win_rate"].item() == 0.5
    assert figures["judge_tie"].item() == pytest.approx(2 / 5)
    (told,) = metric.notes()
    assert told.startswith("judge: 10 requests, 0 answers from judge.jsonl, 0 retries")
    again, answers = judged()
    assert [answer.scores.get("judge_win_rate") for answer in answers] == won
    assert again.notes()[0].startswith("judge: 0 requests, 10 answers from judge.jsonl")
