"""Keys in environment variables stay there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger

from hbat_lightning.cli import main
from hbat_lightning.privacy import _print_exception, keyless_streams, without_keys, without_secret_settings

KEYS = {
    "HF_TOKEN": "hf_Abc123Abc123Abc123",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnop",
}
GIVEN = "given-as-an-argument"


class ServiceLogger(CSVLogger):
    """A logger of a service: it wants a key."""

    def __init__(self, save_dir: str, api_key: str, workspace: str) -> None:
        super().__init__(save_dir, name="service", version="")
        self.api_key = api_key


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)


def found_in(text: bytes) -> list[str]:
    return [name for name, value in {**KEYS, "argument": GIVEN}.items() if value.encode() in text]


@pytest.mark.usefixtures("keys")
def test_no_key_reaches_a_file_or_a_stream(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Keys stand where they could be written from: in a folder's name, in a logger's arguments, in an address."""
    places = tmp_path / KEYS["HF_TOKEN"]
    places.mkdir()
    rows = [{"prompt": f"post {number}", "completion": "david"} for number in range(16)]
    (places / "rows.json").write_text(json.dumps(rows))
    run, out = tmp_path / "run", tmp_path / "out"
    logger = {
        "class_path": "tests.test_privacy.ServiceLogger",
        "init_args": {"save_dir": str(run), "api_key": GIVEN, "workspace": f"of {KEYS['WANDB_API_KEY']}"},
    }
    settings = tmp_path / "service.yaml"
    settings.write_text(yaml.safe_dump({"trainer": {"logger": [logger]}}))
    options = [
        "--config",
        str(Path(__file__).parents[1] / "configs" / "sft.yaml"),
        "--data.init_args.instruction.path",
        str(places / "rows.json"),
    ]
    options += ["--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu"]
    more = [
        "--config",
        str(settings),
        "--data.init_args.instruction.val_fraction",
        "0.25",
        "--model.init_args.epochs",
        "1",
    ]
    main(["fit", *options, *more])
    main(["inspect", *options])
    main(["export", "--config", str(run / "config.yaml"), "--trainer.logger", "true", "--output", str(out)])
    main(["validate", *options, "--ckpt_path", "last"])
    address = f"https://me:{KEYS['OPENAI_API_KEY']}@host/{KEYS['AWS_SECRET_ACCESS_KEY']}"
    with pytest.raises(SystemExit) as left:
        main(["fit", *options, "--model.init_args.policy.init_args.model_name_or_path", address, "--overwrite", "true"])
    assert left.value.code == 2
    told = capfd.readouterr()
    assert "hbat: error:" in told.err
    assert "(removed)" in told.err
    assert "(removed)" in told.out, "the folder is named, and was cleaned"
    assert found_in(told.out.encode()) == found_in(told.err.encode()) == []
    files = [path for folder in (run, out) for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {
        "config.yaml",
        "metrics.csv",
        "switches.jsonl",
        "inspect.json",
        "hbat.json",
        "README.md",
        "last.ckpt",
    }
    assert {path.name: found_in(path.read_bytes()) for path in files if found_in(path.read_bytes())} == {}
    text = (run / "config.yaml").read_text()
    assert text.startswith("# What looked like a secret is not here")
    (saved,) = yaml.safe_load(text)["trainer"]["logger"]
    assert saved["init_args"] == {"save_dir": str(run), "api_key": None, "workspace": "of (removed)"}


@pytest.mark.usefixtures("keys")
def test_what_is_printed_and_what_ends_a_process_have_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    hook = sys.excepthook
    try:
        with keyless_streams():
            print("key", KEYS["HF_TOKEN"], file=sys.stderr)
            print(f"a {KEYS['OPENAI_API_KEY']} b")
            assert sys.excepthook is _print_exception
            assert sys.stdout.isatty() is False
        try:
            raise RuntimeError(f"401 for {KEYS['WANDB_API_KEY']}")
        except RuntimeError as error:
            sys.excepthook(RuntimeError, error, error.__traceback__)
    finally:
        sys.excepthook = hook
    told = capsys.readouterr()
    assert told.out == "a (removed) b\n"
    assert told.err.startswith("key (removed)\nTraceback (most recent call last):")
    assert told.err.endswith("RuntimeError: 401 for (removed)\n")


def test_names_of_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GITHUB_PAT", "MY_PASSWORD", "DB_PASSPHRASE", "AWS_ACCESS_KEY_ID", "CREDENTIALS", "token"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert without_keys(f"<value-of-{name}>") == "<(removed)>", name
    for name in ("PATH_OF", "TOKENIZER", "KEYBOARD", "MAX_NEW_TOKENS", "MONKEY"):
        monkeypatch.setenv(name, f"value-of-{name}")
        assert without_keys(f"<value-of-{name}>") == f"<value-of-{name}>", name


def test_settings_that_are_no_secrets_stay() -> None:
    settings: dict[str, Any] = {"max_new_tokens": 4, "api_key": None, "list": [{"token": "x", "r": 2}], "key": "y"}
    assert without_secret_settings(settings) == {
        "max_new_tokens": 4,
        "api_key": None,
        "list": [{"token": "(removed)", "r": 2}],
        "key": "(removed)",
    }
