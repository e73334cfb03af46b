"""Whatever a file holds, it is read as it stands or refused in one line that names it; `tests/conftest.py` says how often."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hbat_lightning.data.formats import parse_feedback, parse_instructions, parse_preferences, parse_prompts
from hbat_lightning.data.readers import RawRow, open_rows, read_rows
from hbat_lightning.errors import DataError, UserError
from tests.fuzzing import texts

FREE = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])
PARSERS: dict[str, Callable[..., Any]] = {
    "instructions": parse_instructions,
    "preferences": parse_preferences,
    "feedback": parse_feedback,
    "prompts": parse_prompts,
}

# ---- what is drawn ------------------------------------------------------------------------------------------------

surrogates = st.sampled_from(["\ud800", "x\udfff", "\udc80y"])
broken_numbers = st.sampled_from([math.nan, math.inf, -math.inf, 10**400, -0.0, 1e308, 2**63])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), broken_numbers, texts(3), surrogates, st.just("")
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts(2), inner, max_size=3)),
    max_leaves=8,
)
roles = st.one_of(st.sampled_from(["user", "human", "assistant", "gpt", "system", "tool", "", "USER"]), scalars)


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    role, content = draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "value")]))
    return {role: draw(roles), content: draw(st.one_of(texts(3), scalars))}


conversations = st.one_of(st.lists(turns(), max_size=4), st.just([]))
good_conversations = st.tuples(texts(2), texts(2)).map(
    lambda two: [{"role": "user", "content": two[0]}, {"role": "assistant", "content": two[1]}]
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "label": st.one_of(st.booleans(), st.sampled_from(["true", "False", "1.0", 0, 2, "maybe"])),
    "kto_tag": st.booleans(),
    "preference": st.sampled_from([1, 2, "1", 2.0, 3, True]),
    "choice": st.sampled_from([0, 1, "0", 5]),
    "margin": st.one_of(st.floats(), st.integers(), st.sampled_from(["", "0.5", "much", 10**400])),
    "info": st.dictionaries(st.sampled_from(["subreddit", "title", "post"]), texts(2)),
    "summaries": st.lists(st.one_of(texts(2), texts(2).map(lambda text: {"text": text})), max_size=3),
    "messages": st.one_of(good_conversations, conversations),
    "conversations": st.one_of(good_conversations, conversations),
}
LAYOUTS = [
    ("instruction", "input", "output"),
    ("prompt", "completion"),
    ("messages",),
    ("conversations", "system"),
    ("subreddit", "title", "post", "summary"),
    ("prompt", "label"),
    ("prompt", "chosen", "rejected", "margin"),
    ("conversations", "chosen", "rejected"),
    ("chosen", "rejected"),
    ("instruction", "output_1", "output_2", "preference"),
    ("info", "summaries", "choice"),
    ("prompt", "completion", "label"),
    ("messages", "kto_tag"),
]


@st.composite
def rows(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows of a layout, most of them whole."""
    layout, drawn = draw(st.sampled_from(LAYOUTS)), []
    for _ in range(draw(st.integers(1, 4))):
        row = {column: draw(VALUES.get(column, texts(3))) for column in layout}
        if draw(st.integers(0, 2)) == 0:
            row[draw(st.sampled_from([*layout, "system", "more"]))] = draw(anything)
        if draw(st.integers(0, 9)) == 0:
            row.pop(draw(st.sampled_from(layout)))
        drawn.append(row)
    return drawn


damage = st.one_of(
    st.just(lambda data: data),
    st.just(lambda data: data),
    st.integers(0, 400).map(lambda at: lambda data: data[:at]),
    st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)).map(
        lambda two: lambda data: data[: two[0]] + two[1] + data[two[0] :]
    ),
    st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"[" * 3000, b"\n \n"]).map(
        lambda head: lambda data: head + data
    ),
    st.just(lambda data: data.replace(b"\n", b"\r\n")),
    st.just(lambda data: data.replace(b"\n", b"\r")),
    st.just(lambda data: data.replace(b'"', b"", 1)),
)


def written(kind: str, content: list[dict[str, Any]]) -> bytes:
    """A file as its publisher would have written it."""
    if kind == "json":
        return json.dumps(content).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in content).encode()
    columns = list(dict.fromkeys(column for row in content for column in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, delimiter="\t" if kind == "tsv" else ",")
    table.writeheader()
    table.writerows(content)
    return text.getvalue().encode("utf-8", "surrogatepass")


def put(folder: str, name: str, data: bytes) -> str:
    path = Path(folder, name)
    path.write_bytes(data)
    return str(path)


def check_line(error: UserError, path: str) -> None:
    """One line that names the file, short, and that any terminal can show."""
    line = str(error)
    assert isinstance(error, DataError)
    assert line.startswith(path)
    assert line.isprintable()
    assert len(error.message) < 1000  # what stands in the data is cut; the remedy is ours


def read(path: str) -> list[RawRow] | None:
    """What is read, or None where the file was refused as it should be."""
    try:
        found = read_rows(path)
    except UserError as error:
        check_line(error, path)
        return None
    assert found
    assert list(open_rows(path)) == found or "nan" in repr(found)
    return found


def check_parsing(path: str, found: list[RawRow]) -> None:
    """Every row is either canonical, with the texts that stand in it, or has a fault that names it."""
    for name, parse in PARSERS.items():
        try:
            good, faults, _ = parse(found)
        except UserError as error:
            check_line(error, path)
            continue
        assert len(good) + len(faults) == len(found)
        for fault in faults:
            check_line(fault, path)
            assert fault.row in {row.number for row in found}, name
        for row in good:
            (raw,) = (one for one in found if one.number == row.number)
            inside = set(strings(raw.values))
            for said in [*row.answers, *(message.content for message in row.prompt if message.content)]:
                assert said.strip()
                assert any(said.strip() in text for text in inside) or "POST: " in said, "a text that is not in the row"


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [text for part in parts for text in strings(part)]


# ---- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz"])
@given(content=rows(), broken=damage, inside=st.booleans())
@FREE
def test_text_files(kind: str, content: list[dict[str, Any]], broken: Callable[[bytes], bytes], inside: bool) -> None:
    data = written(kind.removesuffix(".gz"), content)
    pack = gzip.compress if kind.endswith(".gz") else bytes
    data = pack(broken(data)) if inside else broken(pack(data))  # the text is damaged, or what it was packed into
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"f.{kind}", data)
        found = read(path)
        if found is not None:
            check_parsing(path, found)


@pytest.mark.parametrize("kind", ["json", "jsonl", "json.gz", "jsonl.gz"])
@given(content=rows())
@FREE
def test_whole_json_is_read_as_it_was_written(kind: str, content: list[dict[str, Any]]) -> None:
    data = written(kind.removesuffix(".gz"), content)
    with tempfile.TemporaryDirectory() as folder:
        found = read(put(folder, f"f.{kind}", gzip.compress(data) if kind.endswith(".gz") else data))
    assert found is not None
    assert repr([row.values for row in found]) == repr(json.loads(json.dumps(content)))
    assert [row.number for row in found] == list(range(1, len(content) + 1))


def objects(value: Any) -> list[dict[str, Any]]:
    """All objects in a value that have a key, itself included."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) and value else []), *(one for part in parts for one in objects(part))]


@pytest.mark.parametrize("kind", ["json", "jsonl", "json.gz", "jsonl.gz"])
@given(content=rows(), again=anything, chosen=st.randoms(use_true_random=False))
@FREE
def test_a_key_that_stands_twice_anywhere_is_refused(kind: str, content: list[Any], again: Any, chosen: Any) -> None:
    """In a row, or in what lies in it; whatever stands there the second time, the same value too."""
    number = chosen.randrange(len(content))
    row = json.loads(json.dumps(content[number]))
    where = chosen.choice(objects(row) or [row.setdefault("messages", {"role": "user"})])
    key = chosen.choice(sorted(where))
    where["\0 again"] = chosen.choice([again, where[key]])
    lines = [json.dumps(one) for one in content]
    lines[number] = json.dumps(row).replace(json.dumps("\0 again"), json.dumps(key))
    data = ("".join(f"{line}\n" for line in lines) if kind.startswith("jsonl") else f"[{', '.join(lines)}]").encode()
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"f.{kind}", gzip.compress(data) if kind.endswith(".gz") else data)
        with pytest.raises(DataError, match="stands twice in one object") as caught:
            read_rows(path)
        check_line(caught.value, path)
        assert f", row {number + 1}: " in str(caught.value)


cells = st.one_of(texts(3), st.sampled_from(["", "nan", "NaN", '"', "a\nb", "a\r\nb", "a,b", "x" * 140_000]))


@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz"])
@given(content=st.lists(st.fixed_dictionaries({"prompt": cells, "completion": cells}), min_size=1, max_size=4))
@FREE
def test_whole_tables_are_read_as_they_were_written(kind: str, content: list[dict[str, str]]) -> None:
    data = written(kind.removesuffix(".gz"), content)
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"f.{kind}", gzip.compress(data) if kind.endswith(".gz") else data)
        found = read(path)
        assert found is not None
        check_parsing(path, found)
    assert [row.values for row in found] == content
    lines = io.StringIO(gzip.decompress(data).decode() if data[:2] == b"\x1f\x8b" else data.decode(), newline="")
    reader = csv.reader(lines, delimiter="\t" if kind == "tsv" else ",")
    before = csv.field_size_limit(10**6)
    starts = [1, *(reader.line_num + 1 for _ in reader)]
    csv.field_size_limit(before)
    assert before == 131_072, "the limit of the process is put back"
    assert [row.number for row in found] == starts[1:-1]
    usable = [row for row in content if all(cell.strip() and cell.strip().lower() != "nan" for cell in row.values())]
    assert len(parse_instructions(found)[0]) == len(usable)


COLUMNS = st.sampled_from(
    [
        pa.array(["a", None]),
        pa.array([b"\xff", b"a"]),
        pa.array([["a"], None]),
        pa.array([{"role": "user", "content": "a"}, None]),
        pa.array([[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], []]),
        pa.array([1.5, math.nan]),
        pa.array([10**9, -1], pa.timestamp("s")),
        pa.array([2**62, 1], pa.timestamp("us")),
        pa.array(["a", "b"]).dictionary_encode(),
        pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
        pa.nulls(2),
        pa.StringArray.from_buffers(2, pa.py_buffer(b"\x00\0\0\0\x01\0\0\0\x02\0\0\0"), pa.py_buffer(b"\xff\xfe")),
    ]
)
NAMES = st.sampled_from(["prompt", "completion", "chosen", "rejected", "label", "messages", "\x1b[31m", ""])


@given(columns=st.lists(st.tuples(NAMES, COLUMNS), min_size=1, max_size=4), broken=damage)
@FREE
def test_parquet(columns: list[tuple[str, Any]], broken: Callable[[bytes], bytes]) -> None:
    sink = io.BytesIO()
    names = [name for name, _ in columns]
    pq.write_table(pa.table([values for _, values in columns], names=names), sink)
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, "f.parquet", broken(sink.getvalue()))
        found = read(path)
        if found is not None:
            assert len(set(names)) == len(names)
            check_parsing(path, found)


@given(
    data=st.one_of(st.binary(max_size=200), texts().map(str.encode)),
    kind=st.sampled_from(sorted({"json", "jsonl", "csv", "tsv", "json.gz", "jsonl.gz", "csv.gz", "parquet"})),
)
@FREE
def test_noise(data: bytes, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = put(folder, f"f.{kind}", data)
        found = read(path)
        if found is not None:
            check_parsing(path, found)


@given(path=st.one_of(texts(2), st.just("~nobody/x.json"), st.just("x" * 5000 + ".json"), st.just("a\0b.csv")))
@FREE
def test_paths_of_nothing(path: str) -> None:
    with pytest.raises(UserError) as caught:
        read_rows(f"/nowhere/{path}" if path[:1] not in "~ax" else path)
    assert str(caught.value).isprintable()
