"""What a Lightning checkpoint holds, and which it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import DPOModule, LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation, PolicyExport, WindowCheckpoint
from hbat_lightning.errors import UserError
from hbat_lightning.schedules import Interval
from tests.support import Run, same_bits

SMALL = Interval(1, 2, 2)  # stopped after three of its four steps


def save(module: Any, fit: Any, folder: Path, *callbacks: Any) -> tuple[Run, Path]:
    run = fit(module, WindowCheckpoint(1, str(folder)), *callbacks, enable_checkpointing=True, max_steps=3)
    return run, folder / "last.ckpt"


@pytest.fixture
def saved(make_hybrid: Any, fit: Any, tmp_path: Path) -> Path:
    """A checkpoint of a LoRA run of rank 4, three steps in."""
    return save(make_hybrid(schedule=SMALL), fit, tmp_path)[1]


@pytest.mark.parametrize(
    ("settings", "reference", "snapshots"),
    [
        ({}, "phase_start", ["phase_start"]),
        ({}, "base", []),
        ({"quantization": "nf4"}, "phase_start", ["phase_start"]),
        ({"lora": None}, "phase_start", ["phase_start"]),
        ({"lora": None}, "initial", ["initial"]),
    ],
    ids=["lora", "lora base", "nf4", "full", "full initial"],
)
def test_it_holds_what_trains_and_its_snapshots_and_nothing_else(
    settings: Any, reference: Any, snapshots: list[str], make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    preference = DPOModule(beta=0.5, reference=reference)
    module = make_hybrid(make_policy(**settings), preference=preference, schedule=SMALL)
    run, path = save(module, fit, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["state_dict"]
    trained = run.weights
    expected = {f"policy.model.{name}" for name in trained}
    for snapshot in snapshots:
        if "lora" in settings:
            expected |= {f"policy.frozen_copies.{snapshot}.{name}" for name in trained}
        else:
            expected |= {f"policy.model.{name.replace('.default.', f'.{snapshot}.')}" for name in trained}
    assert set(state) == expected
    size = sum(value.numel() * value.element_size() for value in trained.values())
    stored = sum(value.numel() * value.element_size() for value in state.values())
    assert stored == size * (1 + len(snapshots))
    assert not any("base_layer" in name or "embed" in name for name in state) or "lora" in settings
    for name, value in trained.items():
        assert torch.equal(state[f"policy.model.{name}"], value)
    moments = 2 * size
    assert path.stat().st_size < stored + moments + 200_000  # nothing large hides elsewhere in the file


def test_it_loads_with_weights_only_with_every_callback(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    module = make_hybrid(schedule=SMALL, optimizer_state="per_objective")
    run, path = save(module, fit, tmp_path, ElasticWeightConsolidation(), PolicyExport())
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hbat"]["phase"] == (1, "preference")
    assert checkpoint["hbat"]["policy"] == run.module.policy.identity()
    assert checkpoint["hbat"]["idle_optimizer_states"].keys() == {"instruction"}
    assert checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"] == 9


def changed_base(folder: Path, base_folder: str) -> str:
    """The embedded model with its last number changed."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "on_resume", "message"),
    [
        ({"lora": LoraSettings(r=8, alpha=8)}, "lora r: was 4, is 8", r"another policy .*lora r 4 there, 8 here"),
        (
            {"lora": LoraSettings(r=4, alpha=16)},
            "lora alpha: was 8, is 16",
            r"another policy .*lora alpha 8 there, 16 here",
        ),
        ({"lora": None}, "lora r: was 4, is nothing", r"another policy .*lora r 4 there, None here"),
        (
            {"quantization": "nf4"},
            "quantization: was none, is nf4",
            r"another policy .*quantization 'none' there, 'nf4' here",
        ),
        (
            {"lora": LoraSettings(r=4, alpha=8, target_modules=["q_proj"])},
            r"tensors do not match .*0 missing, (48|24) too many",
            r"tensors do not match .*0 missing, (48|24) too many",
        ),
        (
            {"name": "changed"},
            r"base: was embedded://tiny-llama \(\w+\), is .*other \(\w+\)",
            r"another policy \(base embedded://tiny-llama, here .*base fingerprint",
        ),
    ],
    ids=["rank", "alpha", "full", "quantization", "targets", "base"],
)
@pytest.mark.parametrize("entry", ["fit", "validate", "test"])
def test_it_is_refused_where_it_does_not_fit(
    settings: Any,
    on_resume: str,
    message: str,
    entry: str,
    saved: Path,
    make_policy: Any,
    make_hybrid: Any,
    make_data: Any,
    make_trainer: Any,
    base_folder: str,
    tmp_path: Path,
) -> None:
    if "name" in settings:
        settings = {"name": changed_base(tmp_path / "other", base_folder)}
    module = make_hybrid(make_policy(**settings), schedule=SMALL)
    with pytest.raises(UserError, match=on_resume if entry == "fit" else message):
        getattr(make_trainer(), entry)(module, datamodule=make_data(), ckpt_path=saved)


def test_a_base_in_another_folder_is_the_same_base(
    saved: Path, make_policy: Any, make_hybrid: Any, fit: Any, base_folder: str
) -> None:
    module = make_hybrid(make_policy(base_folder), schedule=SMALL)
    assert fit(module, ckpt_path=saved).trainer.global_step == 4


def test_a_run_with_other_snapshots_is_refused(saved: Path, make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(preference=DPOModule(reference="base"), schedule=SMALL)
    with pytest.raises(UserError, match=r"0 missing, 28 too many, for example .*phase_start"):
        fit(module, ckpt_path=saved)


def test_evaluation_needs_no_snapshots(
    saved: Path, make_hybrid: Any, make_data: Any, make_trainer: Any, fit: Any
) -> None:
    module = make_hybrid(schedule=SMALL)
    make_trainer().validate(module, make_data(), ckpt_path=saved, verbose=False)
    state = torch.load(saved, weights_only=True)["state_dict"]
    trained = {name: p.detach() for name, p in module.policy.trained_parameters().items()}
    assert same_bits(trained, {name: state[f"policy.model.{name}"] for name in trained})
    assert module.policy.snapshot() is None


def test_a_checkpoint_of_something_else_is_refused(
    make_hybrid: Any, make_data: Any, fit: Any, make_trainer: Any, tmp_path: Path
) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    checkpoint = ModelCheckpoint(tmp_path, filename="boring")
    make_trainer(
        callbacks=[checkpoint], max_steps=1, enable_checkpointing=True, accumulate_grad_batches=1, limit_val_batches=0
    ).fit(BoringModel())
    (file,) = tmp_path.glob("boring*.ckpt")
    with pytest.raises(UserError, match="does not say what its run was made of, as those of hbat fit do"):
        fit(make_hybrid(), ckpt_path=file)
    with pytest.raises(UserError, match="not written by hbat_lightning"):
        make_trainer().validate(make_hybrid(), make_data(), ckpt_path=file, verbose=False)


def test_other_data_or_windows_are_refused_where_a_position_would_mean_other_rows(
    saved: Path, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    with pytest.raises(UserError, match=r"of another run, batch_size × devices: was 2, is 1"):
        fit(make_hybrid(schedule=SMALL), data=make_data(batch_size=1), ckpt_path=saved)
    with pytest.raises(UserError, match=r"of another run, accumulate_grad_batches: was 3, is 2"):
        fit(make_hybrid(schedule=SMALL), accumulate_grad_batches=2, ckpt_path=saved)
    with pytest.raises(UserError, match=r"instruction data: was \S+, 24 rows \(\w+\), is \S+, 20 rows \(\w+\)"):
        fit(make_hybrid(schedule=SMALL), data=make_data(instruction=20), ckpt_path=saved)
    with pytest.raises(UserError, match=r"of another run, seed: was 1234, is 5\."):
        fit(make_hybrid(schedule=SMALL, seed=5), ckpt_path=saved)
