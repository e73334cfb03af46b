from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hbat_lightning.data.formats import (
    INSTRUCTION_FORMATS,
    PREFERENCE_FORMATS,
    InstructionRow,
    Message,
    PreferenceRow,
    parse_instructions,
    parse_preferences,
)
from hbat_lightning.data.readers import RawRow, read_rows
from hbat_lightning.errors import DataError, UserError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
POST = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: long story\n\nTL;DR:"


def raw(*rows: dict[str, Any]) -> list[RawRow]:
    return [RawRow("f.jsonl", number, values) for number, values in enumerate(rows, 1)]


def user(text: str, context: str = "") -> Message:
    return Message("user", text, context)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def role(name: str, text: Any) -> dict[str, Any]:
    return {"role": name, "content": text}


def said(name: str, text: Any) -> dict[str, Any]:
    return {"from": name, "value": text}


INSTRUCTIONS: list[tuple[str, dict[str, Any], tuple[Message, ...]]] = [
    ("alpaca", {"instruction": "i", "input": "x", "output": "o"}, (user("i", "x"), assistant("o"))),
    ("alpaca", {"instruction": "i", "input": None, "output": "o"}, (user("i"), assistant("o"))),
    (
        "alpaca",
        {"instruction": "i", "output": "o", "system": "s"},
        (Message("system", "s"), user("i"), assistant("o")),
    ),
    ("prompt_completion", {"prompt": "p ", "completion": " c"}, (user("p "), assistant(" c"))),
    (
        "prompt_completion",
        {"prompt": [role("user", "p")], "completion": [role("assistant", "c")]},
        (user("p"), assistant("c")),
    ),
    (
        "messages",
        {"messages": [role("system", "s"), role("user", "u"), role("assistant", "a")]},
        (Message("system", "s"), user("u"), assistant("a")),
    ),
    (
        "sharegpt",
        {"conversations": [said("human", "1"), said("gpt", "2"), said("human", "3"), said("gpt", "4")]},
        (user("1"), assistant("2"), user("3"), assistant("4")),
    ),
    (
        "sharegpt",
        {"conversations": [role("user", "1"), role("assistant", "2")], "system": "s"},
        (Message("system", "s"), user("1"), assistant("2")),
    ),
    (
        "tldr",
        {"subreddit": "tifu", "title": "T", "post": "long story", "summary": " short "},
        (user(POST), assistant("short")),
    ),
    ("tldr", {"prompt": POST + "\n", "label": " short"}, (user(POST), assistant("short"))),
]

PREFERENCES: list[tuple[str, dict[str, Any], tuple[Message, ...], str, str]] = [
    ("preference", {"prompt": "p", "chosen": "c", "rejected": "r"}, (user("p"),), "c", "r"),
    ("preference", {"instruction": "p", "input": "x", "chosen": "c", "rejected": "r"}, (user("p", "x"),), "c", "r"),
    (
        "preference",
        {
            "prompt": [role("user", "p")],
            "chosen": [role("assistant", "c")],
            "rejected": [role("assistant", "r")],
        },
        (user("p"),),
        "c",
        "r",
    ),
    (
        "preference",  # the prompt as text, and once more inside both conversations
        {
            "prompt": "p",
            "chosen": [role("system", "s"), role("user", "p"), role("assistant", "c")],
            "rejected": [role("system", "s"), role("user", "p"), role("assistant", "r")],
        },
        (Message("system", "s"), user("p")),
        "c",
        "r",
    ),
    (
        "preference",
        {"prompt": role("user", "p"), "chosen": role("assistant", "c"), "rejected": role("assistant", "r")},
        (user("p"),),
        "c",
        "r",
    ),
    (
        "sharegpt_preference",
        {"conversations": [said("human", "p")], "chosen": said("gpt", "c"), "rejected": said("gpt", "r")},
        (user("p"),),
        "c",
        "r",
    ),
    (
        "transcripts",
        {
            "chosen": "\n\nHuman: a: b\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant: yes",
            "rejected": "\n\nHuman: a: b\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant: no ",
        },
        (user("a: b\n\nc"), assistant("d"), user("e")),
        "yes",
        "no",
    ),
    (
        "transcripts",
        {
            "chosen": [role("user", "p"), role("assistant", "c")],
            "rejected": [role("user", "p"), role("assistant", "r")],
        },
        (user("p"),),
        "c",
        "r",
    ),
    (
        "alpaca_farm",
        {"instruction": "i", "input": "x", "output_1": "a", "output_2": "b", "preference": 2},
        (user("i", "x"),),
        "b",
        "a",
    ),
    (
        "alpaca_farm",
        {"instruction": "i", "input": "", "output_1": "a", "output_2": "b", "preference": "1"},
        (user("i"),),
        "a",
        "b",
    ),
    (
        "comparisons",
        {
            "info": {"post": "long story", "title": "T", "subreddit": "r/tifu"},
            "summaries": [{"text": " one"}, {"text": " two"}],
            "choice": 1,
        },
        (user(POST),),
        "two",
        "one",
    ),
]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "values", "messages"), INSTRUCTIONS)
def test_instruction_formats(name: str, values: dict[str, Any], messages: tuple[Message, ...], given: bool) -> None:
    rows, faults, found = parse_instructions(raw(values), name if given else None)
    assert (rows, faults, found) == ([InstructionRow("f.jsonl", 1, messages)], [], name)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "values", "prompt", "chosen", "rejected"), PREFERENCES)
def test_margins_of_preferences(
    name: str, values: dict[str, Any], prompt: tuple[Message, ...], chosen: str, rejected: str, given: bool
) -> None:
    """In any format; tables give numbers as text, and nothing as an empty one."""
    known = {2: 2.0, 0.5: 0.5, -1.0: -1.0, " 1e-1 ": 0.1, "": 0.0, None: 0.0}
    for margin, number in known.items():
        (row,), faults, _ = parse_preferences(raw(values | {"margin": margin}), name if given else None)
        assert (row, faults) == (PreferenceRow("f.jsonl", 1, prompt, chosen, rejected, number), [])
    for margin in ("high", True, float("nan"), float("inf"), "-inf", [1.0], {"a": 1}):
        rows, (fault,), _ = parse_preferences(raw(values | {"margin": margin}), name if given else None)
        assert rows == []
        assert str(fault).startswith(f"f.jsonl, row 1: 'margin' is {margin!r}, a number was expected. Repair it")


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("name", "values", "prompt", "chosen", "rejected"), PREFERENCES)
def test_preference_formats(
    name: str, values: dict[str, Any], prompt: tuple[Message, ...], chosen: str, rejected: str, given: bool
) -> None:
    rows, faults, found = parse_preferences(raw(values), name if given else None)
    assert (rows, faults, found) == ([PreferenceRow("f.jsonl", 1, prompt, chosen, rejected)], [], name)


def test_every_format_has_an_example() -> None:
    assert {row[0] for row in INSTRUCTIONS} == {kind.name for kind in INSTRUCTION_FORMATS}
    assert {row[0] for row in PREFERENCES} == {kind.name for kind in PREFERENCE_FORMATS}


BAD_INSTRUCTIONS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (INSTRUCTIONS[0][1], {"instruction": "i", "input": "", "output": " \n"}, "'output' is empty"),
    (INSTRUCTIONS[0][1], {"instruction": "", "input": "x", "output": "o"}, "'instruction' is empty"),
    (INSTRUCTIONS[0][1], {"instruction": "i", "input": "", "output": None}, "'output' is null"),
    (INSTRUCTIONS[0][1], {"instruction": "i", "input": ["x"], "output": "o"}, "'input' is a list, text was expected"),
    (INSTRUCTIONS[0][1], {"instruction": "i", "input": ""}, "the column 'output' is missing"),
    (INSTRUCTIONS[0][1], {"instruction": "i", "output": "x\ud83d"}, "half of a surrogate pair"),
    (INSTRUCTIONS[3][1], {"prompt": 3, "completion": "c"}, "'prompt' is a int, text was expected"),
    (INSTRUCTIONS[3][1], {"prompt": "p", "completion": []}, "'completion' is empty"),
    (
        INSTRUCTIONS[3][1],
        {"prompt": "p", "completion": [role("user", "u"), role("assistant", "a")]},
        "'completion' holds more than the one answer",
    ),
    (INSTRUCTIONS[5][1], {"messages": []}, "the conversation is empty"),
    (INSTRUCTIONS[5][1], {"messages": None}, "messages is null, a list was expected"),
    (INSTRUCTIONS[5][1], {"messages": "hello"}, "messages is a str, a list was expected"),
    (INSTRUCTIONS[5][1], {"messages": ["hello"]}, r"messages\[0\] is a str, an object"),
    (INSTRUCTIONS[5][1], {"messages": [{"role": "user"}]}, r"messages\[0\] has no 'content'"),
    (INSTRUCTIONS[5][1], {"messages": [role("user", "u")]}, "ends with a user turn, so there is no answer"),
    (INSTRUCTIONS[5][1], {"messages": [role("assistant", "a")]}, "no user turn comes before the answer"),
    (
        INSTRUCTIONS[5][1],
        {"messages": [role("assistant", "a"), role("user", "u"), role("assistant", "a")]},
        "begins with an assistant turn",
    ),
    (
        INSTRUCTIONS[5][1],
        {"messages": [role("user", "u"), role("assistant", "a"), role("assistant", "b")]},
        "the turn before the answer is the assistant's",
    ),
    (INSTRUCTIONS[5][1], {"messages": [role("tool", "x")]}, "has the role 'tool'. Known roles are system, user"),
    (INSTRUCTIONS[5][1], {"messages": [role("user", "u"), role("assistant", None)]}, r"messages\[1\].content is null"),
    (INSTRUCTIONS[9][1], {"prompt": "no post", "label": "x"}, "does not end in 'TL;DR:'"),
    (INSTRUCTIONS[8][1], {"subreddit": "s", "post": "p", "summary": "x"}, "title is missing"),
]

BAD_PREFERENCES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (PREFERENCES[0][1], {"prompt": "p", "chosen": "a", "rejected": "a"}, "chosen and the rejected answer are equal"),
    (PREFERENCES[0][1], {"prompt": "p", "chosen": "", "rejected": "a"}, "'chosen' is empty"),
    (PREFERENCES[0][1], {"prompt": " ", "chosen": "b", "rejected": "a"}, "'prompt' is empty"),
    (PREFERENCES[0][1], {"prompt": [], "chosen": "b", "rejected": "a"}, "the prompt is empty"),
    (PREFERENCES[0][1], {"prompt": "p", "chosen": None, "rejected": "a"}, "'chosen' is null"),
    (PREFERENCES[0][1], {"prompt": "p", "chosen": role("user", "x"), "rejected": "a"}, "ends with a user turn"),
    (
        PREFERENCES[0][1],
        {
            "prompt": "p",
            "chosen": [role("user", "q"), role("assistant", "c")],
            "rejected": [role("user", "q"), role("assistant", "r")],
        },
        "'prompt' is not the last turn before the answers",
    ),
    (
        PREFERENCES[0][1],
        {"prompt": "p", "chosen": [role("user", "p"), role("assistant", "c")], "rejected": "r"},
        "differ before the last answer",
    ),
    (
        PREFERENCES[5][1],
        {"conversations": [said("human", "p"), said("gpt", "x")], "chosen": "c", "rejected": "r"},
        "the turn before the answer is the assistant's",
    ),
    (
        PREFERENCES[5][1],
        {"conversations": [said("human", "p")], "chosen": [said("human", "x"), said("gpt", "c")], "rejected": "r"},
        "holds more than one turn",
    ),
    (
        PREFERENCES[6][1],
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: c"},
        "share no prompt",
    ),
    (
        PREFERENCES[6][1],
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "'chosen' does not end with an answer",
    ),
    (PREFERENCES[6][1], {"chosen": "just text", "rejected": "other text"}, "does not begin with a turn 'Human:'"),
    (PREFERENCES[8][1], {**PREFERENCES[8][1], "preference": 3}, "'preference' is 3, 1 or 2 was expected"),
    (PREFERENCES[8][1], {**PREFERENCES[8][1], "preference": True}, "'preference' is True"),
    (PREFERENCES[10][1], {**PREFERENCES[10][1], "choice": None}, "'choice' is None, 0 or 1 was expected"),
    (PREFERENCES[10][1], {**PREFERENCES[10][1], "summaries": [{"text": "x"}]}, "'summaries' is not a list of two"),
    (PREFERENCES[10][1], {**PREFERENCES[10][1], "info": "x"}, "'info' is a str"),
    (
        PREFERENCES[10][1],
        {**PREFERENCES[10][1], "info": {"post": None, "title": "T", "subreddit": "s"}},
        "info.post is null",
    ),
]


@pytest.mark.parametrize(("good", "bad", "message"), BAD_INSTRUCTIONS)
def test_a_bad_instruction_row_is_reported_and_the_others_are_kept(
    good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    rows, faults, _ = parse_instructions(raw(good, bad, good))
    assert [row.number for row in rows] == [1, 3]
    check(faults, message)


@pytest.mark.parametrize(("good", "bad", "message"), BAD_PREFERENCES)
def test_a_bad_preference_row_is_reported_and_the_others_are_kept(
    good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    rows, faults, _ = parse_preferences(raw(good, bad, good))
    assert [row.number for row in rows] == [1, 3]
    check(faults, message)


def check(faults: list[DataError], message: str) -> None:
    (fault,) = faults
    assert (fault.source, fault.row) == ("f.jsonl", 2)
    assert fault.remedy
    with pytest.raises(DataError, match=message):
        raise fault


class TestWholeFiles:
    def test_preference_data_given_as_instruction_data(self) -> None:
        for name, values, *_ in PREFERENCES:
            with pytest.raises(DataError, match=rf"this is preference data \(format {name}.*data.preference.path"):
                parse_instructions(raw(values))

    def test_instruction_data_given_as_preference_data(self) -> None:
        for name, values, *_ in INSTRUCTIONS:
            with pytest.raises(DataError, match=rf"this is instruction data \(format {name}.*data.instruction.path"):
                parse_preferences(raw(values))

    def test_unknown_columns(self) -> None:
        with pytest.raises(
            DataError, match=r"no format of instruction data fits the columns body.*alpaca: instruction"
        ):
            parse_instructions(raw({"body": "x"}))

    def test_format_that_the_columns_do_not_fit(self) -> None:
        with pytest.raises(DataError, match=r"the format alpaca needs the columns instruction, output .*found: prompt"):
            parse_instructions(raw({"prompt": "x"}), "alpaca")

    def test_unknown_format(self) -> None:
        with pytest.raises(UserError, match="no format 'alpacca' of instruction data; the names are alpaca, prompt_co"):
            parse_instructions(raw({"prompt": "x"}), "alpacca")

    def test_no_rows(self) -> None:
        with pytest.raises(UserError, match="no rows of preference data"):
            parse_preferences([])

    @pytest.mark.parametrize("parse", [parse_instructions, parse_preferences])
    @pytest.mark.parametrize(
        "values", [{"messages": [], "label": True}, {"prompt": "p", "completion": "c", "label": False}]
    )
    def test_unpaired_feedback_is_neither(self, parse: Any, values: dict[str, Any]) -> None:
        with pytest.raises(DataError, match=r"unpaired feedback .* neither instruction nor preference data"):
            parse(raw(values))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the real data are not at {DATA}")
class TestRealData:
    def test_alpaca(self) -> None:
        rows, faults, name = parse_instructions(read_rows(str(DATA / "alpaca_en_demo.json")))
        assert (len(rows), faults, name) == (999, [], "alpaca")
        assert rows[0].messages[0] == user("Describe a process of making crepes.")

    def test_sharegpt_preference(self) -> None:
        rows, faults, name = parse_preferences(read_rows(str(DATA / "dpo_en_demo.json")))
        assert (len(rows), faults, name) == (300, [], "sharegpt_preference")

    def test_transcripts(self) -> None:
        raw_rows = read_rows(str(DATA / "hh_rlhf_harmless_base_test.jsonl.gz"))
        rows, faults, name = parse_preferences(raw_rows)
        assert name == "transcripts"
        assert len(rows) + len(faults) == 2312
        # the faults, looked up in the file: an empty answer in four rows, conversations that part early in five
        assert [fault.row for fault in faults] == [87, 517, 926, 1104, 1255, 1689, 1951, 1953, 2037]
        by_number = {row.number: row for row in raw_rows}
        for row in rows:  # written back in the publisher's layout it is the same text, blanks aside
            speakers = {"user": "Human", "assistant": "Assistant"}
            said_before = "".join(f"\n\n{speakers[turn.role]}: {turn.content}" for turn in row.prompt)
            for answer, column in ((row.chosen, "chosen"), (row.rejected, "rejected")):
                original = by_number[row.number].values[column]
                assert f"{said_before}\n\nAssistant: {answer}".split() == original.split()

    def test_unpaired_feedback_is_refused(self) -> None:
        rows = read_rows(str(DATA / "kto_en_demo.json"))
        assert len(rows) == 300
        for parse in (parse_instructions, parse_preferences):
            with pytest.raises(DataError, match="unpaired feedback"):
                parse(rows)
