"""The data audit: figures against truths counted by hand, on small files and on real ones."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaTokenizer, PreTrainedTokenizerFast

from hbat_lightning import DataSource, HybridDataModule
from hbat_lightning.cli import main
from hbat_lightning.findings import Example, Findings
from hbat_lightning.inspection import audit, percentiles
from hbat_lightning.inspection_view import printable, show_tokens, token_texts, wants_colour

CONFIGS = Path(__file__).parents[1] / "configs"
WORDS = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(40))]
SFT, PAIRS = "instruction", "preference"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token per word, no bos of its own accord: with the plain template, lengths are word counts."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentence(count: int, start: int = 0) -> str:
    return " ".join(f"w{(start + n) % 40}" for n in range(count))


def row(prompt: int, answer: int, start: int = 0) -> Row:
    return {"prompt": sentence(prompt, start), "completion": sentence(answer, start + 1)}


@pytest.fixture
def examine(tmp_path: Path, words: PreTrainedTokenizerFast) -> Callable[..., Findings]:
    """Audit rows that are given as lists."""

    def run(
        name: str, train: list[Row], held_out: list[Row] | None = None, shards: int = 1, **settings: Any
    ) -> Findings:
        paths = []
        for place, rows in enumerate((train, held_out)):
            if rows is not None:
                paths.append(tmp_path / f"{place}.jsonl")
                paths[-1].write_text("".join(json.dumps(one) + "\n" for one in rows))
        source = DataSource(str(paths[0]), val_path=str(paths[1]) if held_out is not None else None, val_fraction=0)
        settings = {"template": "plain", "max_length": 20, "invalid_rows": "error"} | settings
        data = HybridDataModule(**{name: source}, **settings)
        return audit(data, [name], words, seed=0, shards=shards, examples=2)

    return run


Examine = Callable[..., Findings]


# ---- small files, counted by hand ---------------------------------------------------------------------------------


def test_lengths(examine: Examine) -> None:
    """The stop token counts with the completion."""
    (source,) = examine(SFT, [row(n, 2 * n) for n in range(1, 6)]).sources
    lengths = source.parts["training"].lengths
    assert lengths["prompt"] == {"p0": 1, "p50": 3, "p90": 5, "p95": 5, "p99": 5, "p100": 5}
    assert lengths["completion"] == {"p0": 3, "p50": 7, "p90": 11, "p95": 11, "p99": 11, "p100": 11}
    assert lengths["whole"] == {"p0": 4, "p50": 10, "p90": 16, "p95": 16, "p99": 16, "p100": 16}


def test_percentiles_are_lengths_that_occur() -> None:
    ten = list(range(10, 110, 10))
    assert percentiles(ten) == {"p0": 10, "p50": 50, "p90": 90, "p95": 100, "p99": 100, "p100": 100}
    assert percentiles([7]) == dict.fromkeys(("p0", "p50", "p90", "p95", "p99", "p100"), 7)


def test_lengths_of_pairs(examine: Examine) -> None:
    """The whole is the longer side."""
    pairs = [{"prompt": sentence(3), "chosen": sentence(2), "rejected": sentence(6)}]
    (source,) = examine(PAIRS, pairs).sources
    part = source.parts["training"]
    shown = {name: (values["p0"], values["p100"]) for name, values in part.lengths.items()}
    assert shown == {"prompt": (3, 3), "completion": (3, 7), "whole": (10, 10), "chosen": (3, 3), "rejected": (7, 7)}
    assert (part.answers, part.ending_in_stop) == (2, 1.0)


# Rows of 5, 10, 20, 25 and 33 tokens with their stop; the last two are too long, the very last by its answer alone.
LONG = [row(2, 2), row(4, 5), row(10, 9), row(10, 14), row(2, 30)]


@pytest.mark.parametrize(
    ("truncation", "usable", "invalid", "dropped", "cut_prompt", "cut_answer", "stops"),
    [
        ("error", 3, 2, 0, 0, 0, 1.0),
        ("drop", 3, 0, 2, 0, 0, 1.0),
        ("prompt_left", 4, 1, 0, 1, 0, 1.0),
        ("completion_right", 5, 0, 0, 0, 2, 0.6),
    ],
)
def test_truncation(
    truncation: str,
    usable: int,
    invalid: int,
    dropped: int,
    cut_prompt: int,
    cut_answer: int,
    stops: float,
    examine: Examine,
) -> None:
    (source,) = examine(SFT, LONG, truncation=truncation).sources
    (file,), part = source.files, source.parts["training"]
    assert part.over_length == 2, "these would end the run under the policy error, whatever is configured"
    assert (file.found, file.usable, file.invalid, file.dropped) == (5, usable, invalid, dropped)
    assert (part.truncated_prompt, part.truncated_completion, part.ending_in_stop) == (cut_prompt, cut_answer, stops)
    assert [kind.fatal for kind in file.faults] == ([True] if invalid else [])


def test_faults_by_kind(examine: Examine) -> None:
    rows: list[Row] = [
        row(2, 2),
        {"prompt": "w1", "completion": ""},
        {"prompt": "w1", "completion": " "},
        {"prompt": None, "completion": "w2"},
        {"completion": "w2"},
        row(30, 2),
        row(40, 2),
        {"prompt": "w1", "completion": "</s>"},
        *({"prompt": "w1", "completion": ""} for _ in range(3)),
    ]
    findings = examine(SFT, rows)
    (file,) = findings.sources[0].files
    assert (file.found, file.usable, file.invalid, file.dropped) == (11, 1, 10, 0)
    assert file.formats == {"prompt_completion": 11}
    kinds = {kind.kind: kind for kind in file.faults}
    counts = {kind.split(":")[0]: found.count for kind, found in kinds.items()}
    assert counts == {
        "'completion' is empty": 5,
        "the row is longer than max_length": 2,
        "'prompt' is null": 1,
        "the column 'prompt' is missing": 1,
        "the answer holds nothing but a stop token": 1,
    }
    assert file.faults[0].count == 5, "the most frequent first"
    empty = kinds["'completion' is empty"]
    assert [line.split(":")[0].rpartition("row ")[2] for line in empty.first] == ["2", "3", "9"]
    assert all(kind.fatal for kind in file.faults)
    assert any("would end the run: 10" in line for line in findings.warnings)


def test_faults_that_are_dropped(examine: Examine) -> None:
    """Under `invalid_rows: drop` only what the truncation policy refuses ends the run."""
    findings = examine(SFT, [row(2, 2), row(30, 2), {"prompt": "w1", "completion": ""}], invalid_rows="drop")
    fatal = {kind.kind.split(":")[0]: kind.fatal for kind in findings.sources[0].files[0].faults}
    assert fatal == {"the row is longer than max_length": True, "'completion' is empty": False}


def test_nothing_but_faults_is_a_finding(examine: Examine) -> None:
    findings = examine(SFT, [{"prompt": "w1", "completion": ""}])
    assert findings.sources[0].files[0].invalid == 1
    assert findings.sources[0].parts["training"].lengths == {}


def test_a_cut_answer_loses_its_stop(examine: Examine) -> None:
    """A prompt that leaves room for one token: the answer keeps that, without a stop, and has something to learn."""
    (source,) = examine(SFT, [row(19, 4), row(3, 4)], truncation="completion_right").sources
    assert source.parts["training"].unsupervised == 0
    assert source.parts["training"].ending_in_stop == 0.5


def test_words_that_the_tokenizer_does_not_know(examine: Examine) -> None:
    """One in ten is no finding, two are; in pairs of either side; held-out rows too."""
    some, more = row(8, 1), row(8, 1)
    some["prompt"] = some["prompt"].replace("w3", "never")
    more["prompt"] = some["prompt"].replace("w4", "seen")
    findings = examine(SFT, [row(8, 1), some, more], [more])
    assert [findings.sources[0].parts[part].unknown for part in ("training", "held_out")] == [1, 1]
    assert any(
        "are for more than a tenth words that the tokenizer does not know: 2" in line for line in findings.warnings
    )
    pair = {"prompt": sentence(3), "chosen": sentence(3), "rejected": "never seen w1"}
    assert examine(PAIRS, [pair]).sources[0].parts["training"].unknown == 1
    assert not any("does not know" in line for line in examine(SFT, [row(8, 1), some]).warnings)


def test_duplicates(examine: Examine) -> None:
    train = [row(3, 2, n) for n in range(6)]
    train += [train[0], train[0], train[1] | {"completion": "w9"}]
    held_out = [train[2], train[3] | {"completion": "w9"}, row(3, 2, 20), train[0]]
    findings = examine(SFT, train, held_out)
    twice = findings.sources[0].duplicates
    assert (twice.inside_train, twice.prompt_inside_train) == (2, 1)
    assert (twice.across, twice.prompt_across) == (2, 1)
    assert twice.first[0] == "training row 7 repeats row 1"
    assert "held-out row 1 is training row 3" in twice.first
    assert any("held out but stand in training" in line for line in findings.warnings)


def test_duplicates_are_found_across_formats(examine: Examine) -> None:
    train = [{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}]
    assert examine(SFT, train, [{"prompt": "w1", "completion": "w2"}]).sources[0].duplicates.across == 1


def test_duplicate_pairs(examine: Examine) -> None:
    """The same answers the other way round are another pair, to the same prompt."""
    pair = {"prompt": "w1", "chosen": "w2", "rejected": "w3"}
    twice = examine(PAIRS, [pair], [pair, {"prompt": "w1", "chosen": "w3", "rejected": "w2"}]).sources[0].duplicates
    assert (twice.across, twice.prompt_across) == (1, 1)


def test_two_files_are_counted_apart(examine: Examine) -> None:
    (source,) = examine(
        SFT, [row(2, 2), row(3, 3)], [row(4, 4), {"prompt": "w1", "completion": ""}, row(30, 1)]
    ).sources
    assert [(file.found, file.usable, file.invalid) for file in source.files] == [(2, 2, 0), (3, 1, 2)]
    held_out = source.parts["held_out"]
    assert (held_out.rows, held_out.usable, held_out.invalid) == (2, 1, 1)


def test_what_is_drawn_is_what_training_draws(tmp_path: Path, words: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(1 + n % 5, 1 + n % 3) for n in range(40)]))
    data = HybridDataModule(instruction=DataSource(str(path), val_fraction=0.25), template="plain")
    findings = audit(data, [SFT], words, seed=3)
    data.load(SFT, words, seed=3)
    parts = findings.sources[0].parts
    assert (parts["training"].usable, parts["held_out"].usable) == (30, 10)
    longest = {len(encoded.input_ids) for encoded in data.train_sets[SFT].rows}
    assert (min(longest), max(longest)) == tuple(parts["training"].lengths["whole"][at] for at in ("p0", "p100"))


def test_facts(examine: Examine) -> None:
    findings = examine(SFT, [row(2, 2)], shards=3)
    facts, (source,) = findings.tokenizer, findings.sources
    assert facts["eos"] == {"token": "</s>", "id": 2}
    assert facts["pad"] == {"token": None, "id": None}
    assert (facts["padding_id"], facts["pad_is_eos"]) == (2, True)
    assert (source.template, source.stop_token) == ("plain", {"token": "</s>", "id": 2})
    assert "data.init_args.template" in source.template_from
    assert source.parts["training"].bos == {"none": 1}
    said = "\n".join(findings.warnings)
    assert "bos token, <s>" in said
    assert "1 usable training rows are fewer than the schedule's 3 rounds" in said
    assert "no held-out rows" in said


# ---- tokens and labels --------------------------------------------------------------------------------------------


def test_marks(words: PreTrainedTokenizerFast) -> None:
    example = Example("", [3, 4, 2, 5, 6, 2], [False, False, False, True, True, True])
    assert show_tokens(example, words, 2, colour=False) == "w0 w1 </s>[ w2][ w3][[ </s>]]"
    coloured = show_tokens(example, words, 2, colour=True)
    assert "\x1b[32m w2\x1b[0m" in coloured
    assert coloured.startswith("\x1b[2mw0\x1b[0m")
    assert coloured.endswith("\x1b[1;7;33m </s>\x1b[0m")


def test_long_stretches_are_shortened(words: PreTrainedTokenizerFast) -> None:
    shown = show_tokens(Example("", [3] * 500, [False] * 500), words, 2, colour=False)
    assert "… 404 more tokens …" in shown
    assert shown.count("w0") == 96


def test_colour_only_where_it_can_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


def test_text_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[31mb\r\nc\x07") == "a\ufffd[31mb\ufffd↵\nc\ufffd"


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Path:
    """A folder with the Llama-2 tokenizer and no weights."""
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copyfile(real_data / "llama2_tokenizer.model", folder / "tokenizer.model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(vocab_size=32000, **sizes).save_pretrained(folder)
    return folder


def test_tokens_spell_the_text(llama2: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(llama2)
    text = "Answer: 東京\n\n  naïve 🦙 x"
    texts = token_texts(tokenizer.encode(text, add_special_tokens=False), tokenizer)
    assert "".join(texts).strip() == text
    assert "\ufffd" not in "".join(texts)
    assert "🦙" in texts, "a character of several tokens stands at the last of them"


# ---- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, Any]]:
    """Run the command; the report in words, and as JSON."""
    monkeypatch.setattr("hbat_lightning.policy.load_model", lambda *_: pytest.fail("weights were loaded"))

    def run(*arguments: str, config: Path = CONFIGS / "hbat_dpo.yaml", folder: bool = True) -> tuple[str, Any]:
        place = ["--trainer.default_root_dir", str(tmp_path / "run")] if folder else []
        main(["inspect", "--config", str(config), *place, *arguments])
        report = tmp_path / "run" / "inspect.json"
        return capsys.readouterr().out, json.loads(report.read_text()) if report.exists() else None

    return run


Inspect = Callable[..., tuple[str, Any]]


def limits(rows: int) -> list[str]:
    return [option for name in (SFT, PAIRS) for option in (f"--data.init_args.{name}.limit", str(rows))]


def test_the_embedded_default(inspect: Inspect) -> None:
    said, report = inspect(*limits(60), "--examples", "1")
    assert "nothing stands out" in said
    assert said.count("\n-- ") == 3, "one instruction row, and both sides of a pair"
    assert "[[ <eos>]]" in said
    assert "\x1b" not in said
    assert [source["objective"] for source in report["sources"]] == [SFT, PAIRS]
    assert report["tokenizer"]["name"] == "embedded://tiny-llama"
    for source in report["sources"]:
        assert source["template_from"] == "the tokenizer's chat template"
        for file in source["files"]:
            assert file["found"] == file["usable"] + file["invalid"] + file["dropped"] == 60
        assert source["parts"]["training"]["bos"] == {"one": 57 * (2 if source["objective"] == PAIRS else 1)}
        assert source["parts"]["training"]["ending_in_stop"] == 1.0


@pytest.mark.parametrize(("name", "objective"), [("sft", SFT), ("dpo", PAIRS)])
def test_one_objective(name: str, objective: str, inspect: Inspect) -> None:
    options = [f"--data.init_args.{objective}.limit", "20", "--examples", "0"]
    said, report = inspect(*options, config=CONFIGS / f"{name}.yaml")
    assert [source["objective"] for source in report["sources"]] == [objective]
    assert "tokens and labels" not in said


def test_a_saved_configuration_will_do(tmp_path: Path, inspect: Inspect, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds the options of ``fit``, and names a run folder that may hold a finished run."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(CONFIGS / "hbat_dpo.yaml"), *limits(20), "--print_config"])
    saved = yaml.safe_load(capsys.readouterr().out)
    assert {"ckpt_path", "overwrite"} <= set(saved)
    saved["trainer"]["default_root_dir"] = str(tmp_path / "run")
    saved |= {"ckpt_path": "last", "overwrite": True}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(saved))
    _, report = inspect(config=tmp_path / "run" / "config.yaml", folder=False)
    assert report["sources"][0]["files"][0]["found"] == 20
    assert (tmp_path / "run" / "run.json").exists(), "an audit replaces nothing"


def test_bad_rows_are_reported_and_no_failure(tmp_path: Path, inspect: Inspect) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = [json.dumps({"prompt": f"who {n}", "completion": "" if n % 2 else "anna"}) for n in range(10)]
    bad.write_text("\n".join(lines))
    report = tmp_path / "elsewhere" / "audit.json"
    options = ["--data.init_args.instruction.path", str(bad), *limits(20), "--report", str(report)]
    said, default = inspect(*options)
    assert "10 rows found (10 as prompt_completion) = 5 usable + 5 invalid + 0 dropped" in said
    assert "bad.jsonl, row 2: 'completion' is empty" in said
    assert default is None
    assert json.loads(report.read_text())["sources"][0]["files"][0]["invalid"] == 5


def test_a_whole_file_that_cannot_be_read_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--trainer.default_root_dir", str(tmp_path / "run")]
    for option, value in (("instruction.path", str(tmp_path / "no.json")), ("batchsize", "3")):
        with pytest.raises(SystemExit) as stopped:
            main(["inspect", "--config", str(CONFIGS / "hbat_dpo.yaml"), f"--data.init_args.{option}", value, *place])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("hbat: error: ")
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hbat_lightning", "inspect", "--config", str(CONFIGS / "sft.yaml")]
    options = ["--trainer.default_root_dir", str(tmp_path), "--data.init_args.instruction.limit", "20"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "20 rows found" in done.stdout
    assert "Traceback" not in done.stderr
    assert (tmp_path / "inspect.json").exists()


# ---- real data ----------------------------------------------------------------------------------------------------


def test_real_data_with_the_llama_tokenizer(llama2: Path, real_data: Path, inspect: Inspect) -> None:
    """Alpaca and Anthropic's pairs, whole."""
    said, report = inspect(
        *["--model.init_args.policy.init_args.model_name_or_path", str(llama2), "--data.init_args.max_length", "512"],
        *["--data.init_args.instruction.path", str(real_data / "alpaca_en_demo.json")],
        *["--data.init_args.preference.path", str(real_data / "hh_rlhf_harmless_base_test.jsonl.gz")],
        *["--data.init_args.truncation", "drop", "--examples", "1"],
    )
    alpaca, pairs = report["sources"]
    (file,) = alpaca["files"]
    assert (file["found"], file["formats"], file["invalid"]) == (999, {"alpaca": 999}, 0)
    assert file["usable"] + file["dropped"] == 999
    assert file["dropped"] == sum(part["over_length"] for part in alpaca["parts"].values()) == 53
    assert (alpaca["template"], alpaca["template_from"]) == ("alpaca", "the default, as the tokenizer has none")
    assert alpaca["parts"]["training"]["rows"] + alpaca["parts"]["held_out"]["rows"] == 999
    # Whether two equal rows meet in training or across depends on the draw; how many rows are repeats does not.
    rows = json.loads((real_data / "alpaca_en_demo.json").read_text())
    different = {(row["instruction"], row.get("input", ""), row["output"]) for row in rows}
    assert alpaca["duplicates"]["inside_train"] + alpaca["duplicates"]["across"] == 999 - len(different)

    (file,) = pairs["files"]
    assert (file["found"], file["formats"], file["invalid"]) == (2312, {"transcripts": 2312}, 9)
    assert file["usable"] + file["dropped"] == 2303
    assert sum(kind["count"] for kind in file["faults"]) == 9
    for source in (alpaca, pairs):
        for part in source["parts"].values():
            assert part["ending_in_stop"] == 1.0
            assert part["unsupervised"] == 0
    assert report["tokenizer"]["pad_is_eos"] is True
    assert "rows are filled up with eos" in said


def test_real_pairs_in_sharegpt_style(real_data: Path, llama2: Path) -> None:
    tokenizer = LlamaTokenizer.from_pretrained(llama2)
    data = HybridDataModule(preference=DataSource(str(real_data / "dpo_en_demo.json")), max_length=4096)
    findings = audit(data, [PAIRS], tokenizer, seed=0)
    (file,) = findings.sources[0].files
    assert (file.found, file.usable, file.formats) == (300, 299, {"sharegpt_preference": 300})
    (too_long,) = file.faults
    assert "row 225" in too_long.first[0]
    train, held_out = findings.sources[0].parts["training"], findings.sources[0].parts["held_out"]
    assert (train.rows, held_out.rows) == (285, 15)
    assert train.over_length + held_out.over_length == 1
    assert max(part.lengths["whole"]["p100"] for part in (train, held_out)) == 4338 + 487
