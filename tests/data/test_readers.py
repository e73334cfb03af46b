from __future__ import annotations

import csv
import gzip
import inspect
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from hbat_lightning import hub
from hbat_lightning.data import embedded, files
from hbat_lightning.data.formats import parse_instructions, recognise_instructions
from hbat_lightning.data.readers import HubSelection, RawRow, open_rows, read_rows
from hbat_lightning.data.rows import parse_file
from hbat_lightning.errors import DataError, UserError

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "é\u2028x", "completion": "line\nend"}]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def json_lines(rows: list[dict[str, str]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def values(path: str, **options: object) -> list[dict[str, object]]:
    return [row.values for row in read_rows(path, **options)]


def fault(path: str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    message = str(caught.value)
    assert message.startswith(str(caught.value.source))
    assert "\n" not in message
    assert caught.value.remedy
    return message


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpaca_en_demo.json", 999),
        ("dpo_en_demo.json", 300),
        ("kto_en_demo.json", 300),
        ("hh_rlhf_harmless_base_test.jsonl.gz", 2312),
    ],
)
def test_real_files_are_read_whole(name: str, count: int) -> None:
    if not DATA.is_dir():
        pytest.skip(f"the real data are not at {DATA}")
    rows = read_rows(str(DATA / name))
    assert len(rows) == count
    assert [row.number for row in rows] == list(range(1, count + 1))
    assert {row.source for row in rows} == {str(DATA / name)}


class TestKindsOfFiles:
    def test_json_lines_count_physical_lines_and_keep_unicode_line_separators(self, tmp_path: Path) -> None:
        first, second = json_lines(ROWS).splitlines(keepends=False)[0], json.dumps(ROWS[1], ensure_ascii=False)
        path = write(tmp_path / "a.jsonl", f"\n{first}\n\n{second}\r\n")
        assert read_rows(path) == [RawRow(path, 2, ROWS[0]), RawRow(path, 4, ROWS[1])]

    @pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
    def test_json_array(self, tmp_path: Path, name: str) -> None:
        text = json.dumps(ROWS, indent=2).encode()
        path = write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
        assert read_rows(path) == [RawRow(path, 1, ROWS[0]), RawRow(path, 2, ROWS[1])]

    def test_json_object_with_one_list(self, tmp_path: Path) -> None:
        assert values(write(tmp_path / "a.json", json.dumps({"version": 1, "data": ROWS}))) == ROWS

    @pytest.mark.parametrize("name", ["a.ndjson", "a.jsonl.gz", "A.JSONL"])
    def test_json_lines_by_other_names(self, tmp_path: Path, name: str) -> None:
        text = json_lines(ROWS).encode()
        assert values(write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)) == ROWS

    @pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
    def test_tables_number_rows_by_the_line_they_start_on(self, tmp_path: Path, name: str, delimiter: str) -> None:
        text = f'prompt{delimiter}completion\n"two\nlines"{delimiter}b\n\n"c, ""d"""{delimiter}e\n'.encode()
        path = write(tmp_path / name, gzip.compress(text) if name.endswith("gz") else text)
        expected = [
            RawRow(path, 2, {"prompt": "two\nlines", "completion": "b"}),
            RawRow(path, 5, {"prompt": 'c, "d"', "completion": "e"}),
        ]
        assert read_rows(path) == expected

    def test_a_long_field_is_read_and_the_csv_limit_is_put_back(self, tmp_path: Path) -> None:
        before = csv.field_size_limit()
        assert values(write(tmp_path / "a.csv", "p\n" + "x" * 200_000)) == [{"p": "x" * 200_000}]
        assert csv.field_size_limit() == before

    def test_parquet(self, tmp_path: Path) -> None:
        datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
        assert values(str(tmp_path / "a.parquet")) == ROWS

    def test_byte_order_mark_is_not_part_of_the_first_column(self, tmp_path: Path) -> None:
        assert values(write(tmp_path / "a.csv", b"\xef\xbb\xbfp,q\n1,2\n")) == [{"p": "1", "q": "2"}]

    def test_embedded_rows(self) -> None:
        rows = read_rows(embedded.INSTRUCTION, limit=3)
        assert [row.values for row in rows] == embedded.rows(embedded.INSTRUCTION)[:3]
        assert rows[0] == RawRow(embedded.INSTRUCTION, 1, embedded.rows(embedded.INSTRUCTION)[0])

    def test_limit_does_not_look_behind_itself(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json_lines(ROWS) + "{broken")
        assert values(path, limit=2) == ROWS
        with pytest.raises(UserError, match="at least one row"):
            read_rows(path, limit=0)


class TestFolders:
    def test_saved_dataset_and_nothing_is_unpickled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
        for name in ("load", "loads", "Unpickler", "_Unpickler"):
            monkeypatch.setattr(pickle, name, lambda *_, **__: pytest.fail("something was unpickled"))
        assert values(str(tmp_path / "saved")) == ROWS

    def test_saved_dataset_with_splits(self, tmp_path: Path) -> None:
        splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
        assert values(str(tmp_path)) == ROWS
        assert values(str(tmp_path), split="test") == ROWS[:1]
        assert "no split 'dev'" in (message := fault(str(tmp_path), split="dev"))
        assert "train, test" in message

    def test_damaged_saved_dataset(self, tmp_path: Path) -> None:
        write(tmp_path / "state.json", "{}")
        assert "cannot be read" in fault(str(tmp_path))

    def test_folder_of_files_in_order_without_hidden_ones(self, tmp_path: Path) -> None:
        write(tmp_path / "b.jsonl", '{"n": 2}')
        write(tmp_path / "a.json", '[{"n": 1}]')
        write(tmp_path / "README.md", "text")
        write(tmp_path / ".cache" / "c.jsonl", '{"n": 3}')
        assert read_rows(str(tmp_path)) == [
            RawRow(str(tmp_path / "a.json"), 1, {"n": 1}),
            RawRow(str(tmp_path / "b.jsonl"), 1, {"n": 2}),
        ]

    def test_splits_in_a_folder_are_never_mixed(self, tmp_path: Path) -> None:
        write(tmp_path / "train-00000.jsonl", '{"n": 1}')
        write(tmp_path / "test.jsonl", '{"n": 2}')
        assert "several splits (test, train)" in fault(str(tmp_path))
        assert values(str(tmp_path), split="train") == [{"n": 1}]
        assert "no file of the split 'dev'" in fault(str(tmp_path), split="dev")

    def test_folder_without_data(self, tmp_path: Path) -> None:
        write(tmp_path / "notes.doc", "x")
        assert "holds no data files" in fault(str(tmp_path))


class TestHub:
    def test_a_name_that_is_not_on_disk_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def load_dataset(name: str, **options: object) -> datasets.Dataset:
            asked.append((name, options))
            return datasets.Dataset.from_list(ROWS)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        assert read_rows("owner/name")[0] == RawRow("owner/name", 1, ROWS[0])
        read_rows("squad", split="test")
        assert asked == [("owner/name", {"split": "train"}), ("squad", {"split": "test"})]

    def test_a_converted_data_set_is_read_by_its_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Folders as in the hub's conversions, read by the real `load_dataset`; only the id is taken from it."""
        for subset in ("axis", "comparisons"):
            for split in ("train", "validation"):
                (tmp_path / subset / split).mkdir(parents=True)
                rows = [{subset: f"{split} {number}"} for number in range(5)]
                datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / subset / split / "0000.parquet"))
        asked, load_dataset = [], datasets.load_dataset

        def from_disk(name: str, **options: object) -> datasets.Dataset:
            inspect.signature(load_dataset).bind(name, **options)
            asked.append((name, options.pop("revision")))
            return load_dataset(str(tmp_path), cache_dir=str(tmp_path / "cache"), **options)

        monkeypatch.setattr(datasets, "load_dataset", from_disk)
        files = {split: f"comparisons/{split}/*.parquet" for split in ("train", "validation")}
        selection = HubSelection(revision=hub.CONVERTED, data_files=files)
        assert len(values("owner/name", selection=selection)) == 5
        held_out = values("owner/name", split="validation[:2]", selection=selection)
        assert held_out == [{"comparisons": "validation 0"}, {"comparisons": "validation 1"}]
        assert asked == [("owner/name", "refs/convert/parquet")] * 2
        message = fault("owner/name", split="test", selection=selection)
        assert "the split 'test', revision 'refs/convert/parquet', data_files" in message

    def test_a_subset_is_asked_for_by_its_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[object] = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *name, **options: asked.append((name, options)) or [{"a": "b"}]
        )
        read_rows("owner/name", "test", selection=HubSelection(subset="main"))
        assert asked == [(("owner/name",), {"split": "test", "name": "main"})]

    @pytest.mark.parametrize(
        ("choice", "said"),
        [
            ({"split": "test"}, "split 'test'"),
            ({"selection": HubSelection(subset="main")}, "subset 'main'"),
            (
                {"split": "test", "selection": HubSelection(revision="v1", data_files={"test": "*"})},
                "revision 'v1', data_",
            ),
        ],
    )
    @pytest.mark.parametrize("path", ["a.json", embedded.INSTRUCTION])
    def test_one_file_holds_no_choice(
        self, choice: dict[str, object], said: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "a.json", json.dumps(ROWS))
        with pytest.raises(UserError) as caught:
            read_rows(path, **choice)
        assert said in str(caught.value)
        assert "set to null those of split" in str(caught.value)

    def test_a_folder_holds_splits_and_nothing_else(self, tmp_path: Path) -> None:
        write(tmp_path / "test.jsonl", '{"n": 2}')
        assert values(str(tmp_path), split="test") == [{"n": 2}]
        with pytest.raises(UserError, match="no subset 'main' to choose in it, only in a hub data set;"):
            read_rows(str(tmp_path), "test", selection=HubSelection(subset="main"))

    def test_failure_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(name: str, **options: object) -> None:
            raise ConnectionError("no route\nto host")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = fault("owner/name")
        assert "ConnectionError: no route" in message
        assert "Check the path or the id, the split, the network" in message

    @pytest.mark.parametrize("path", ["nowhere/a.jsonl", "./name", "/no/such/place", "a/b/c"])
    def test_paths_never_reach_the_hub(self, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
        assert "no such file or folder" in fault(path)


class TestFaults:
    def test_missing_file_suggests_its_neighbour(self, tmp_path: Path) -> None:
        write(tmp_path / "alpaca.jsonl", "{}")
        assert f"Did you mean {tmp_path / 'alpaca.jsonl'}?" in fault(str(tmp_path / "alpacca.jsonl"))

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
    def test_empty_file(self, tmp_path: Path, name: str) -> None:
        assert "the file is empty" in fault(write(tmp_path / name, " \n"))

    @pytest.mark.parametrize(("name", "text"), [("a.json", "[]"), ("a.csv", "p,q\n")])
    def test_file_without_rows(self, tmp_path: Path, name: str, text: str) -> None:
        assert "holds no rows" in fault(write(tmp_path / name, text))

    def test_broken_json_array_names_line_and_element(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.json", '[\n {"a": [1, 2]},\n {"a": 2},\n {"a": }\n]'))
        assert "row 3: broken JSON at line 4, column 8 (in element 3 of the array)" in message

    def test_json_array_that_breaks_off(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.json", '[{"a": 1},\n{"a": "x'))
        assert "at line 2" in message
        assert "element 2" in message

    def test_missing_comma(self, tmp_path: Path) -> None:
        assert "at line 2, column 1" in fault(write(tmp_path / "a.json", '[{"a": 1}\n{"a": 1}]'))

    def test_json_lines_in_a_json_file(self, tmp_path: Path) -> None:
        assert "Name a file with one object per line .jsonl" in fault(write(tmp_path / "a.json", json_lines(ROWS)))

    def test_json_array_in_a_json_lines_file(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.jsonl", "[{}]"))
        assert "row 1: the row is a list, not an object" in message
        assert "must be named .json" in message

    @pytest.mark.parametrize("text", ['{"a": [], "b": []}', '{"a": 1}'])
    def test_object_whose_rows_cannot_be_told(self, tmp_path: Path, text: str) -> None:
        assert "rows cannot be told" in fault(write(tmp_path / "a.json", text))

    def test_json_scalar(self, tmp_path: Path) -> None:
        assert "the file is a single int" in fault(write(tmp_path / "a.json", "3"))

    def test_broken_line(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 1\n'))
        assert "a.jsonl, row 3: broken JSON" in message

    @pytest.mark.parametrize(("name", "text"), [("a.json", '[{"a": 1}, "x"]'), ("a.jsonl", '{"a": 1}\n"x"')])
    def test_row_that_is_no_object(self, tmp_path: Path, name: str, text: str) -> None:
        assert "row 2: the row is a str, not an object" in fault(write(tmp_path / name, text))

    def test_nesting_without_end(self, tmp_path: Path) -> None:
        assert "nested too deeply" in fault(write(tmp_path / "a.json", "[" * 200_000))
        assert "row 1" in fault(write(tmp_path / "a.jsonl", "[" * 200_000))

    def test_not_utf8(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n'))
        assert "not UTF-8: byte 0xe9 at offset 19, line 2" in message
        assert "UTF-8" in message.split("line 2")[1]

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.doc", "x"))
        assert "kind of file is not known" in message
        assert ".jsonl" in message

    @pytest.mark.parametrize(
        "content", [b"plain text", gzip.compress(b'{"a": 1}\n' * 99)[:-12]], ids=["text", "cut off"]
    )
    def test_damaged_gzip(self, tmp_path: Path, content: bytes) -> None:
        assert "gzip data is damaged" in fault(write(tmp_path / "a.jsonl.gz", content))

    def test_damaged_parquet(self, tmp_path: Path) -> None:
        assert "not a readable Parquet file" in fault(write(tmp_path / "a.parquet", b"PAR1 and then nothing PAR1"))

    def test_ragged_table(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "a.csv", 'p,q\n"1\n1",2\n1,2,3\n'))
        assert "row 4: the row has 3 fields, the header has 2" in message

    def test_open_quotation(self, tmp_path: Path) -> None:
        assert "row 3: the row cannot be parsed" in fault(write(tmp_path / "a.csv", 'p,q\n1,2\n1,"2\n3,4\n'))

    @pytest.mark.parametrize(
        ("name", "text", "row"),
        [
            ("a.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}\n', "row 2"),
            ("a.json", '[{"a": 1},\n {"a": 1}, {"a": 1, "a": 1}]', "row 3"),
        ],
    )
    def test_a_key_that_stands_twice(self, tmp_path: Path, name: str, text: str, row: str) -> None:
        message = fault(write(tmp_path / name, text))
        assert f"{name}, {row}: " in message
        assert "stands twice in one object" in message

    @pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
    def test_a_number_without_end(self, tmp_path: Path, name: str) -> None:
        text = '{"a": ' + "1" * 5000 + "}"
        assert "row 1: broken JSON: Exceeds the limit" in fault(
            write(tmp_path / name, f"[{text}]" * (name == "a.json") or text)
        )

    def test_columns_of_one_name_in_parquet(self, tmp_path: Path) -> None:
        parquet.write_table(pyarrow.table([["x"], ["y"]], names=["a", "a"]), tmp_path / "a.parquet")
        assert "two columns have one name" in fault(str(tmp_path / "a.parquet"))

    @pytest.mark.parametrize("name", ["a.pkl", "a.pt", "a.bin", "A.CKPT", "a.npy"])
    def test_a_pickle_is_refused_by_its_name_alone(self, tmp_path: Path, name: str) -> None:
        assert "can hold a pickle, which runs code when it is read" in fault(write(tmp_path / name, pickle.dumps(ROWS)))

    def test_a_pickle_by_another_name_is_no_text(self, tmp_path: Path) -> None:
        assert "not UTF-8" in fault(write(tmp_path / "a.jsonl", pickle.dumps(ROWS)))

    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.jsonl")
        assert "no regular file" in fault(str(tmp_path / "a.jsonl"))

    @pytest.mark.parametrize("path", ["x" * 5000 + ".json", "~nobody-of-this-name/a.json"])
    def test_a_name_that_no_file_can_have(self, path: str) -> None:
        assert "no file can have this name" in fault(path)

    def test_what_would_steer_a_terminal_is_spelt_out(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json.dumps({"\x1b[31m\u202e\ud800": 1}))
        with pytest.raises(DataError) as caught:
            parse_instructions(read_rows(path))
        assert str(caught.value).isprintable()
        assert r"\x1b[31m\u202e\ud800" in str(caught.value)

    def test_column_named_twice(self, tmp_path: Path) -> None:
        assert "names a column twice" in fault(write(tmp_path / "a.csv", "p,p\n1,2\n"))


class TestMemory:
    def test_a_pass_holds_a_few_rows_and_not_the_file(self, tmp_path: Path) -> None:
        """Also where the text is compressed a hundredfold, and whatever comes of it."""
        line = json.dumps({"prompt": "x" * 500, "completion": "y" * 500}) + "\n"
        path = write(tmp_path / "a.jsonl.gz", gzip.compress(line.encode() * 20_000, 1))
        rows = parse_file(open_rows(path), recognise_instructions).rows
        assert len(rows) == 20_000
        assert peak(lambda: sum(1 for _ in rows)) < 2 * 2**20

    @pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz", "a.json.gz"])
    def test_a_bomb_is_refused_before_it_has_unfolded(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(files, "LONGEST_ROW", 2**20)
        monkeypatch.setattr(files, "LARGEST_JSON", 2**20)
        path = write(tmp_path / name, gzip.compress(b'"' + b"x" * 100 * 2**20, 1))
        assert os.path.getsize(path) < 2**20
        message: list[str] = []
        assert peak(lambda: message.append(fault(path))) < 16 * 2**20
        assert ("larger than 1 MiB" if ".json." in name else "the row is longer than 1 MiB") in message[0]

    def test_a_quotation_mark_that_is_never_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "LONGEST_ROW", 2**16)
        text = 'p,q\n1,2\n3,"4\n' + "5,6\n" * 2**16
        assert "row 3: the row is longer than" in fault(write(tmp_path / "a.csv", text))

    def test_a_file_that_changes_between_passes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.jsonl", json_lines(ROWS))
        rows = parse_file(open_rows(path), recognise_instructions).rows
        write(tmp_path / "a.jsonl", json_lines(ROWS[:1]))
        with pytest.raises(DataError, match="had 2 usable rows a moment ago and has 1 now"):
            list(rows)


def peak(work: Callable[[], object]) -> int:
    """Bytes that Python held at most while it worked."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
