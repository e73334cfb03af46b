"""No network, no telemetry, no foreign code, and no file outside the run folder."""

from __future__ import annotations

import ast
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import Policy
from hbat_lightning.base_model import BaseSpec, load_classifier, load_model, load_tokenizer
from hbat_lightning.checkpoint_io import AtomicCheckpointIO
from hbat_lightning.classifier import load_trained_classifier
from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError

# Runs in a fresh interpreter. Audit hooks cannot be taken back, and see what libraries catch and hide: every attempt
# to reach a host or to resolve a name, and every file opened for writing, whoever makes it.
WATCHED_RUN = """
    import json, os, socket, sys

    reached, written = [], []

    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            reached.append([event, repr(args[-1] if event == "socket.connect" else args[0])])
            raise OSError("no network in this test")
        if event == "open" and isinstance(args[0], (str, bytes)):
            mode, flags = args[1], args[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                written.append(os.path.abspath(os.fsdecode(args[0])))

    sys.addaudithook(watch)
    import torch

    torch.set_num_threads(1)
    from lightning.pytorch import Trainer
    from hbat_lightning import (
        DataSource, DPOModule, GenerationSettings, HybridAlignmentModule, HybridDataModule, LoraSettings, Policy, SFTModule
    )
    from hbat_lightning.callbacks import *
    from hbat_lightning.data import embedded
    from hbat_lightning.metrics_logger import MetricsLogger
    from hbat_lightning.schedules import Rounds

    folder = sys.argv[1]
    module = HybridAlignmentModule(
        Policy(embedded.TINY_LLAMA, quantization="nf4", lora=LoraSettings(r=4)),
        SFTModule(), DPOModule(), Rounds(1, 1, 1), generation=GenerationSettings(max_new_tokens=4), seed=0,
    )
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=8, val_fraction=0.25),
        DataSource(embedded.PREFERENCE, limit=8, val_fraction=0.25),
    )
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", logger=MetricsLogger(folder), num_sanity_val_steps=-1,
        callbacks=[ElasticWeightConsolidation(), WindowCheckpoint(), SwitchReport(), PolicyExport(), PredictionWriter()],
        enable_model_summary=False, reload_dataloaders_every_n_epochs=1, log_every_n_steps=1,
    )
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    trainer.predict(module, data)
    print("REPORT" + json.dumps({"reached": reached, "written": written}))
"""


def test_a_whole_run_reaches_no_host_and_writes_only_into_its_folder(tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("home", "cwd", "tmp")} | {"run": tmp_path / "r ü n %s {0} $HOME"}
    for place in places.values():
        place.mkdir()
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment = keep | {
        "HOME": str(places["home"]),
        "TMPDIR": str(places["tmp"]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # neither HF_HUB_OFFLINE nor any switch against telemetry: a user has not set them either
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED_RUN), str(places["run"])],
        cwd=places["cwd"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.rpartition("REPORT")[2])
    assert report["reached"] == []
    fonts = places["home"] / ".cache" / "matplotlib"  # its list of fonts, made once per user by whatever draws first
    allowed = (str(places["run"]), str(places["tmp"]), str(fonts), os.devnull, "/proc/", "/dev/")
    assert [path for path in report["written"] if not path.startswith(allowed)] == []
    left = [path for name in ("home", "cwd", "tmp") for path in places[name].rglob("*") if path.is_file()]
    assert [path for path in left if not path.is_relative_to(fonts)] == []
    names = {path.name for path in places["run"].iterdir()}
    expected = {"metrics.csv", "switches.jsonl", "switches.png", "checkpoints", "adapter", "predictions.jsonl"}
    expected |= {"held_out.json"}
    assert names == expected


@pytest.mark.parametrize("asked", [False, True])
def test_trust_remote_code_reaches_transformers_as_asked_and_is_off_by_default(
    asked: bool, make_policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        original = kind.from_pretrained

        def load(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(kwargs["trust_remote_code"])
            return original(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", load)
    policy = make_policy(**({"trust_remote_code": True} if asked else {}))
    policy.build(torch.device("cpu"))
    assert policy.tokenizer.eos_token == "<eos>"
    assert seen == [asked, asked]


def test_code_beside_a_model_is_not_run(tmp_path: Path, base_folder: str) -> None:
    mark = tmp_path / "it ran"
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    config = json.loads(Path(base_folder, "config.json").read_text())
    config |= {
        "model_type": "foreign",
        "auto_map": {"AutoConfig": "foreign.Config", "AutoModelForCausalLM": "foreign.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\n")
    with pytest.raises(UserError, match="the model could not be loaded"):
        load_model(BaseSpec(str(folder)), torch.device("cpu"))
    with pytest.raises(UserError):
        Policy(str(folder)).build(torch.device("cpu"))
    assert not mark.exists()


class Evil:
    """What runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("evil", [True, False], ids=["one that runs code", "tensors alone"])
def test_weights_in_a_pickle_are_refused_unread(evil: bool, tmp_path: Path, base_folder: str) -> None:
    mark, folder = tmp_path / "it ran", tmp_path / "model"
    shutil.copytree(base_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"model.norm.weight": Evil(mark) if evil else torch.ones(64)}, folder / "pytorch_model.bin")
    tokenizer = load_tokenizer(BaseSpec(base_folder))
    for load in (
        lambda: load_model(BaseSpec(str(folder)), torch.device("cpu")),
        lambda: load_classifier(BaseSpec(str(folder)), tokenizer, new_output=True),
    ):
        with pytest.raises(UserError, match=r"holds its weights as a pickle \(pytorch_model.bin\).*convert this one"):
            load()
    assert not mark.exists()


def test_a_damaged_safetensors_file_is_one_line(tmp_path: Path, base_folder: str) -> None:
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{torn")
    with pytest.raises(UserError, match="model: the model could not be loaded"):
        load_model(BaseSpec(str(tmp_path / "model")), torch.device("cpu"))


def test_an_adapter_in_a_pickle_is_refused_unread(tmp_path: Path, adapter: str, make_policy: Any) -> None:
    mark = tmp_path / "it ran"
    Path(adapter, "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Evil(mark)}, Path(adapter, "adapter_model.bin"))
    policy = make_policy(adapter_path=adapter)
    for load in (
        lambda: policy.build(torch.device("cpu")),
        lambda: load_trained_classifier(BaseSpec(adapter), policy.tokenizer),
    ):
        with pytest.raises(UserError, match=r"weights as a pickle \(adapter_model.bin\).*convert it"):
            load()
    assert not mark.exists()


@pytest.mark.parametrize("asked", [None, False])
def test_a_checkpoint_with_a_pickled_object_is_refused(asked: bool | None, tmp_path: Path) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "step=1.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(1)}, "hbat": Evil(mark)}, path)
    with pytest.raises(UserError, match=r"step=1.ckpt holds more than tensors and plain types.*refused: give a"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=asked)
    assert not mark.exists()


def test_the_command_refuses_a_pickled_checkpoint_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, path = tmp_path / "it ran", tmp_path / "step=1.ckpt"
    torch.save({"hbat": Evil(mark)}, path)
    config = Path(__file__).parents[1] / "configs" / "sft.yaml"
    arguments = [
        "--config",
        str(config),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
        "--weights_only",
        "false",
    ]
    arguments += ["--data.instruction.limit", "40", "--trainer.accelerator", "cpu", "--ckpt_path", str(path)]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith(f"hbat: error: {path} holds more than tensors and plain types")
    assert "Traceback" not in error
    assert not mark.exists()


def test_nothing_in_the_package_unpickles_or_unpacks() -> None:
    """In its own code; what libraries are called for is in the tests above."""
    root = Path(__file__).parents[1]
    calls = [
        (path.name, node)
        for folder in ("hbat_lightning", "callbacks", "benchmarks")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    seen = 0
    for name, call in calls:
        called = ast.unparse(call.func)
        assert called.rpartition(".")[2] not in ("Unpickler", "extractall", "unpack_archive"), name
        assert called not in ("pickle.load", "pickle.loads", "np.load", "yaml.load", "eval", "exec"), name
        if called == "torch.load":
            seen += 1
            assert "weights_only=True" in ast.unparse(call), name
    assert seen


def test_the_suite_itself_cannot_reach_a_host(reached: list[str]) -> None:
    with pytest.raises(OSError, match="no network in the tests"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="no network in the tests"):
        socket.getaddrinfo("huggingface.co", 443)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one, pytest.raises(OSError, match="no network"):
        one.sendto(b"x", ("192.0.2.1", 53))
    assert len(reached) == 3
    reached.clear()
    with socket.socket() as server:  # this machine itself may be reached
        server.bind(("127.0.0.1", 0))
        server.listen()
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_processes_that_tests_start_cannot_either(reached_by_children: Path) -> None:
    """And what they tried is seen where they say nothing of it."""
    code = """
import contextlib, socket
for call in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
):
    with contextlib.suppress(OSError):
        call()
        raise SystemExit("reached")
with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    socket.create_connection(server.getsockname(), timeout=5).close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    tried = [line.split()[-1] for line in reached_by_children.read_text().splitlines()]
    assert set(tried) == {"192.0.2.1", "huggingface.co"}
    assert len(tried) >= 3
    reached_by_children.write_text("")


def test_an_embedded_model_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    load_tokenizer(BaseSpec(embedded.TINY_LLAMA))
    model = load_model(BaseSpec(embedded.TINY_LLAMA), torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []
    assert model.name_or_path == embedded.TINY_LLAMA  # nothing looks for the temporary folder later
