"""Prompts without answers, and plain texts: which files are read as such, and what the audit says of them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hbat_lightning import DataSource, GenerationSettings, HybridDataModule, REINFORCEModule
from hbat_lightning.data import embedded
from hbat_lightning.data.fields import Message, PromptRow, TextRow
from hbat_lightning.data.formats import parse_instructions, parse_preferences, parse_prompts, parse_texts
from hbat_lightning.data.readers import RawRow, read_rows
from hbat_lightning.errors import DataError
from hbat_lightning.inspection import audit
from hbat_lightning.objectives import LanguageModelModule
from hbat_lightning.rewards import FunctionReward

POST = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: long story\n\nTL;DR:"


def raw(*rows: dict[str, Any]) -> list[RawRow]:
    return [RawRow("f.jsonl", number, values) for number, values in enumerate(rows, 1)]


def user(text: str, context: str = "") -> Message:
    return Message("user", text, context)


TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


@pytest.mark.parametrize(
    ("name", "values", "prompt"),
    [
        ("prompt", {"prompt": "p"}, (user("p"),)),
        ("prompt", {"instruction": "i", "input": "x"}, (user("i", "x"),)),
        ("prompt", {"question": "q", "system": "s"}, (Message("system", "s"), user("q"))),
        ("prompt", {"prompt": TALK, "id": 3}, (user("a"), Message("assistant", "b"), user("c"))),
        ("prompt", {"subreddit": "r/tifu", "title": "T", "post": "long story"}, (user(POST),)),
        ("open_messages", {"messages": TALK}, (user("a"), Message("assistant", "b"), user("c"))),
        ("open_messages", {"conversations": [{"from": "human", "value": "h"}]}, (user("h"),)),
    ],
)
def test_prompts_alone(name: str, values: dict[str, Any], prompt: tuple[Message, ...]) -> None:
    rows, faults, found = parse_prompts(raw(values))
    assert (rows, faults, found) == ([PromptRow("f.jsonl", 1, prompt)], [], name)
    assert rows[0].answers == ()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"prompt": "p", "completion": "c", "label": True}, "prompt_completion"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"messages": [*TALK, {"role": "assistant", "content": "d"}]}, "messages"),
        ({"subreddit": "r/a", "title": "t", "post": "p", "summary": "s"}, "tldr"),
        ({"instruction": "i", "output_1": "a", "output_2": "b", "preference": 1}, "alpaca_farm"),
    ],
)
def test_data_with_answers_keep_their_format(values: dict[str, Any], name: str) -> None:
    assert parse_prompts(raw(values))[2] == name


def test_a_row_whose_conversation_does_not_wait_for_an_answer_is_named() -> None:
    answered = {"messages": [*TALK, {"role": "assistant", "content": "d"}]}
    rows, faults, _ = parse_prompts(raw({"messages": TALK}, answered))
    assert len(rows) == 1
    (fault,) = faults
    assert (fault.row, "the assistant's, not the user's" in fault.message) == (2, True)


def test_texts() -> None:
    rows, faults, found = parse_texts(raw({"text": "a b"}, {"text": " "}, {"text": None}, {"text": 3}))
    assert rows == [TextRow("f.jsonl", 1, "a b")]
    assert [fault.row for fault in faults] == [2, 3, 4]
    assert found == "text"


@pytest.mark.parametrize(
    ("parse", "values", "said"),
    [
        (parse_instructions, {"text": "a"}, "LanguageModelModule"),
        (parse_instructions, {"prompt": "a"}, "Add the answers"),
        (parse_preferences, {"prompt": "a"}, "Add two answers"),
        (parse_prompts, {"text": "a"}, "no format of prompt data fits the columns text"),
    ],
)
def test_elsewhere_they_are_refused_with_a_remedy(parse: Any, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse(raw(values))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_every_line_of_a_text_file_is_a_text(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"texts{suffix}"
    content = "one\r\n\n two \u2028 words\n\t\nthree"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith(".gz") else content.encode())
    assert [(row.number, row.values) for row in read_rows(str(path))] == [
        (1, {"text": "one"}),
        (3, {"text": " two \u2028 words"}),
        (5, {"text": "three"}),
    ]


def test_a_text_file_beside_rows_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "LICENSE.txt").write_text("all rights\n")
    assert [row.values for row in read_rows(str(tmp_path))] == [{"text": "all rights"}]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p"}\n')
    assert [row.values for row in read_rows(str(tmp_path))] == [{"prompt": "p"}]


# ---- the whole way ------------------------------------------------------------------------------------------------------


def length(prompt: str, completion: str) -> float:
    return float(len(completion))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "please say where the parcel for anna is " * (1 + number % 3)} for number in range(8)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    return str(path)


def reinforce(policy: Any = None) -> REINFORCEModule:
    sampling = GenerationSettings(max_new_tokens=5, temperature=1.0)
    return REINFORCEModule(FunctionReward(length), sampling=sampling, policy=policy, lr=1e-3)


def test_a_policy_learns_from_prompts_alone(prompts: str, make_policy: Any, fit: Any) -> None:
    data = HybridDataModule(preference=DataSource(prompts, val_fraction=0.25), batch_size=2)
    run = fit(reinforce(make_policy()), data=data)
    assert run.trainer.global_step == 1
    assert len(data.train_sets["preference"]) == 6
    assert {"val/preference/reward", "val/preference/stopped"} <= set(run.module.validation_results)


def test_completions_of_prompts_alone_can_be_written_but_not_compared(prompts: str, make_policy: Any) -> None:
    policy = make_policy()
    data = HybridDataModule(preference=DataSource(prompts, val_fraction=0.25))
    data.expect({"preference": reinforce()})
    assert [prompt.completion for prompt in data.load_prompts(policy.tokenizer, 0, compared=False)] == ["", ""]
    with pytest.raises(DataError, match="no answer that a completion could be compared with"):
        data.load_prompts(policy.tokenizer, 0, compared=True)


def test_the_audit_of_prompts_looks_at_no_answers(prompts: str, make_policy: Any) -> None:
    """Their own answers, where there are any, train nothing; the room for a sampled one counts."""
    tokenizer = make_policy().tokenizer
    data = HybridDataModule(preference=DataSource(prompts, val_fraction=0), max_length=25, truncation="drop")
    data.expect({"preference": reinforce()})
    findings = audit(data, ["preference"], tokenizer, seed=0, examples=1)
    part = findings.sources[0].parts["training"]
    encoder = data.encoder("preference", tokenizer)
    rows = data.read("preference", data.source("preference").training)
    lengths = sorted(len(encoder.encode_prompt(row.prompt)) for row in rows)
    assert (part.lengths["prompt"]["p0"], part.lengths["prompt"]["p100"]) == (lengths[0], lengths[-1])
    assert part.lengths["whole"]["p100"] == lengths[-1] + 5
    assert part.over_length == sum(one + 5 > 25 for one in lengths) == part.dropped > 0
    assert (part.answers, part.ending_in_stop, part.unsupervised) == (0, None, 0)
    (example,) = findings.sources[0].examples
    assert example.ids == encoder.encode_prompt(next(iter(rows)).prompt)
    assert not any("stop token" in line or "no token to learn" in line for line in findings.warnings)


def test_the_audit_of_texts_counts_pieces_as_what_is_learnt(tmp_path: Path, make_policy: Any) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("where is the parcel for anna now\n" + "the parcel is late " * 20 + "\n")
    tokenizer = make_policy().tokenizer
    data = HybridDataModule(instruction=DataSource(str(path), val_fraction=0), max_length=30)
    data.expect({"instruction": LanguageModelModule()})
    findings = audit(data, ["instruction"], tokenizer, seed=0, examples=2)
    part = findings.sources[0].parts["training"]
    assert (part.rows, part.usable, part.over_length, part.invalid) == (2, 2, 0, 0)
    assert part.lengths["whole"]["p100"] == 30
    assert all(all(example.supervised) for example in findings.sources[0].examples)
    assert len(findings.sources[0].examples) > 2


def test_embedded_pairs_still_serve_as_prompts(make_policy: Any) -> None:
    data = HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=4, val_fraction=0))
    data.expect({"preference": reinforce()})
    data.load("preference", make_policy().tokenizer, seed=0)
    assert len(data.train_sets["preference"]) == 4
