"""Shared pieces: the embedded model and small slices of its task, and modules and trainers made from them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in these tests may reach for a hub
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from lightning.pytorch import Callback, Trainer, seed_everything

from hbat_lightning import (
    DataSource,
    DPOModule,
    HybridAlignmentModule,
    HybridDataModule,
    LoraSettings,
    Policy,
    SFTModule,
)
from hbat_lightning.data import embedded
from hbat_lightning.schedules import Rounds
from tests.support import DoublePolicy, MemoryLogger, Run, shake

# A shell begins a job in the background with Ctrl-C ignored, and Python then leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# The same cases in every run of the suite; `pytest tests/data -k fuzz --hypothesis-profile thorough` draws new ones.
settings.register_profile("suite", max_examples=40, derandomize=True, database=None, deadline=None)
settings.register_profile("thorough", max_examples=500, derandomize=False, database=None, deadline=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    # With several threads, sums may be split in another way from run to run, and bits differ.
    torch.set_num_threads(1)
    seed_everything(1234, verbose=False)


@pytest.fixture(scope="session", autouse=True)
def reached_by_children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the processes that tests start write which other machines they have reached for."""
    file = tmp_path_factory.mktemp("network") / "reached.txt"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HBAT_TESTS_REACHED", str(file))
        patch.setenv("PYTHONPATH", str(Path(__file__).with_name("no_network")), prepend=os.pathsep)
        yield file


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch, reached_by_children: Path) -> Iterator[list[str]]:
    """Every test fails that reaches for another machine, or asks for one by name, also where a library hides the error."""
    tried: list[str] = []

    def guard(name: str, where: Callable[..., Any]) -> Callable[..., Any]:
        real = getattr(socket if name == "getaddrinfo" else socket.socket, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            host = where(*args)
            if host is None or str(host) in ("localhost", "127.0.0.1", "::1", ""):
                return real(*args, **kwargs)
            tried.append(f"{name} {host}")
            raise OSError(f"no network in the tests: {name} {host}")

        return call

    def peer(one: socket.socket, address: Any) -> Any:
        return None if one.family == getattr(socket, "AF_UNIX", None) else address[0]

    monkeypatch.setattr(socket.socket, "connect", guard("connect", peer))
    monkeypatch.setattr(socket.socket, "connect_ex", guard("connect_ex", peer))
    monkeypatch.setattr(socket.socket, "sendto", guard("sendto", lambda one, data, *more: peer(one, more[-1])))
    monkeypatch.setattr(socket, "getaddrinfo", guard("getaddrinfo", lambda host, *_: host))
    yield tried
    tried += reached_by_children.read_text().splitlines()
    reached_by_children.write_text("")
    assert tried == [], "the network was asked"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real data beside the repository; skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("real data are not beside this checkout (../shared/data)")
    return SHARED_DATA


@pytest.fixture
def make_policy() -> Callable[..., Policy]:
    """A policy on the embedded model; LoRA of rank 4 unless told otherwise."""

    def make(name: str = embedded.TINY_LLAMA, double: bool = False, **settings: Any) -> Policy:
        settings.setdefault("lora", LoraSettings(r=4, alpha=8))
        return (DoublePolicy if double else Policy)(name, **settings)

    return make


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded model in a folder, for plain transformers and peft."""
    with embedded.materialise(embedded.TINY_LLAMA) as folder:
        yield folder


@pytest.fixture
def adapter(make_policy: Callable[..., Policy], tmp_path: Path) -> str:
    """A folder with an adapter that says something."""
    policy = make_policy()
    policy.build(torch.device("cpu"))
    shake(policy.trained_parameters())
    policy.export(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def make_data() -> Callable[..., HybridDataModule]:
    """A data module on a few rows of the embedded task."""

    def make(instruction: int = 24, preference: int = 12, **settings: Any) -> HybridDataModule:
        settings.setdefault("batch_size", 2)
        return HybridDataModule(
            instruction=DataSource(embedded.INSTRUCTION, limit=instruction, val_fraction=0.25),
            preference=DataSource(embedded.PREFERENCE, limit=preference, val_fraction=0.25),
            **settings,
        )

    return make


@pytest.fixture
def make_hybrid(make_policy: Callable[..., Policy]) -> Callable[..., HybridAlignmentModule]:
    """A hybrid of SFT and DPO in two rounds of 1 + 1 epochs."""

    def make(policy: Policy | None = None, **settings: Any) -> HybridAlignmentModule:
        settings.setdefault("schedule", Rounds(2, 1, 1))
        settings.setdefault("instruction", SFTModule(lr=5e-3))
        settings.setdefault("preference", DPOModule(beta=0.5, lr=2e-3))
        return HybridAlignmentModule(policy or make_policy(), **settings)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet CPU trainer that writes below the test's folder."""

    def make(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "default_root_dir": tmp_path,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "reload_dataloaders_every_n_epochs": 1,
            "gradient_clip_val": 1.0,
            "accumulate_grad_batches": 3,
        }
        return Trainer(**(defaults | settings))

    return make


@pytest.fixture
def fit(make_data: Callable[..., HybridDataModule], make_trainer: Callable[..., Trainer]) -> Callable[..., Run]:
    """Train a module, and hand back what came of it."""

    def run(
        module: Any, *callbacks: Callback, data: HybridDataModule | None = None, ckpt_path: Any = None, **settings: Any
    ) -> Run:
        log = MemoryLogger()
        trainer = make_trainer(callbacks=list(callbacks), logger=log, **settings)
        data = data or make_data()
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return Run(module, data, trainer, log)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte that really gets full; skips where none can be mounted."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no small disk can be mounted here: that needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def batches() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Five instruction rows and three pairs of the embedded task, collated as in training."""
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=5, val_fraction=0.0),
        DataSource(embedded.PREFERENCE, limit=3, val_fraction=0.0),
    )
    tokenizer = Policy(embedded.TINY_LLAMA).tokenizer
    for name in ("instruction", "preference"):
        data.load(name, tokenizer, seed=0)
    return data.train_sets["instruction"].collate(range(5)), data.train_sets["preference"].collate(range(3))
