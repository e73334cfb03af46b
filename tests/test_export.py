"""``hbat export``, against plain transformers, plain peft, bitsandbytes' own forward pass and sums made by hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hbat_lightning import merging
from hbat_lightning.cli import main
from hbat_lightning.data import embedded

CONFIGS = Path(__file__).parents[1] / "configs"
POLICY = "--model.init_args.policy.init_args"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
R, ALPHA = 4, 8


def trained(folder: Path, *more: str) -> Path:
    """A finished run of one round that has learned enough to tell it from its base."""
    layers = [option for name in ("hbat_dpo", "demo") for option in ("--config", str(CONFIGS / f"{name}.yaml"))]
    sizes = ["--data.instruction.limit", "96", "--data.preference.limit", "24", "--data.init_args.batch_size", "8"]
    shared = ["--model.schedule.rounds", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    lora = [f"{POLICY}.lora.r", str(R), f"{POLICY}.lora.alpha", str(ALPHA)]
    held_out = [
        f"--data.{name}.{key}"
        for name in ("instruction", "preference")
        for key in ("val_path=null", "val_fraction=0.1")
    ]
    main(["fit", *layers, *sizes, *shared, *lora, *held_out, "--trainer.default_root_dir", str(folder), *more])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on a base in full precision."""
    return trained(tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture(scope="module")
def nf4_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """QLoRA that computes in bf16, as it does by default."""
    return trained(tmp_path_factory.mktemp("nf4") / "run", f"{POLICY}.quantization", "nf4")


def export(run: Path, output: Path, *options: str) -> Path:
    main(["export", "--config", str(run / "config.yaml"), "--output", str(output), *options])
    return output


def refused(run: Path, output: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        export(run, output, *options)
    assert left.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("hbat: error: ")
    return said


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def deltas(run: Path) -> dict[str, torch.Tensor]:
    """``alpha / r · B A`` of every adapted weight, by its name in the plain model."""
    factors = load_file(run / "adapter" / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")]
    found = {
        f"{name.removeprefix('base_model.model.')}.weight": ALPHA
        / R
        * factors[f"{name}.lora_B.weight"]
        @ factors[f"{name}.lora_A.weight"]
        for name in names
    }
    assert len(found) == 2 * len(PROJECTIONS)
    assert all(delta.abs().max() > 1e-3 for delta in found.values()), "the run has learned nothing"
    return found


def prompts(run: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """What ``hbat predict`` says, on a copy of the run."""
    folder = Path(shutil.copytree(run, tmp_path / "predicting", symlinks=True))
    main(
        [
            "predict",
            "--config",
            str(run / "config.yaml"),
            "--trainer.default_root_dir",
            str(folder),
            "--ckpt_path",
            "last",
        ]
    )
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def same_text(folder: Path, predictions: list[dict[str, Any]]) -> None:
    """Plain transformers, with no argument but the length, says what the run's own ``predict`` said."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert len({row["completion"] for row in predictions}) > 3
    for row in predictions:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=24)[0, ids.shape[1] :]
        assert len(out) == row["tokens"]
        assert tokenizer.decode(out, skip_special_tokens=True).strip() == row["completion"]


# ---- merged weights ---------------------------------------------------------------------------------------------------


def test_merged_weights_are_the_sum_and_say_the_same(run: Path, base_folder: str, tmp_path: Path) -> None:
    merged = weights(folder := export(run, tmp_path / "out", "--form", "merged"))
    base, added = weights(Path(base_folder)), deltas(run)
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        expected = base[name] + added[name] if name in added else base[name]
        assert torch.allclose(value, expected, rtol=0, atol=1e-6), name
    same_text(folder, prompts(run, tmp_path))


def test_the_original_base_takes_the_adapter_of_a_quantised_run(
    nf4_run: Path, base_folder: str, tmp_path: Path
) -> None:
    merged = weights(folder := export(nf4_run, tmp_path / "out", "--form", "merged", "--base", "original"))
    base, added = weights(Path(base_folder)), deltas(nf4_run)
    for name, value in merged.items():
        assert value.dtype == torch.float32, "the files' own type"
        assert torch.allclose(value, base[name] + added.get(name, 0), rtol=0, atol=1e-6), name
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def forward_weight(weight: torch.Tensor) -> torch.Tensor:
    """What a 4-bit layer of this weight multiplies by: its own forward pass over the unit vectors."""
    import bitsandbytes as bnb

    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.bfloat16(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")(torch.eye(columns, dtype=torch.bfloat16)).T


def test_the_dequantised_base_is_what_the_quantised_layers_multiplied_by(
    nf4_run: Path, base_folder: str, tmp_path: Path
) -> None:
    merged = weights(folder := export(nf4_run, tmp_path / "out", "--form", "merged", "--base", "dequantized"))
    base, added = weights(Path(base_folder)), deltas(nf4_run)
    for name, value in merged.items():
        plain = forward_weight(base[name]).float() + added[name] if name in added else base[name]
        assert torch.equal(value, plain.bfloat16()), name
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not any("quant" in key for key in config)


def test_a_dequantised_merge_in_fp32_says_the_same(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", f"{POLICY}.quantization", "nf4", f"{POLICY}.dtype", "float32")
    same_text(export(run, tmp_path / "out", "--form", "merged", "--base", "dequantized"), prompts(run, tmp_path))


def test_quantised_layers_without_an_adapter_are_dequantised_too(
    make_policy: Any, base_folder: str, tmp_path: Path
) -> None:
    from hbat_lightning import LoraSettings

    policy = make_policy(quantization="nf4", lora=LoraSettings(r=R, alpha=ALPHA, target_modules=["q_proj"]))
    policy.build(torch.device("cpu"))
    merging.dequantise(policy)
    merging.merge(policy).save_pretrained(tmp_path)
    base = weights(Path(base_folder))
    for name, value in weights(tmp_path).items():
        quantised = any(part in name for part in PROJECTIONS)
        assert torch.equal(value, forward_weight(base[name]) if quantised else base[name].bfloat16()), name


def test_int8_layers_are_dequantised_by_their_scales(make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy(quantization="int8", dtype="float32")
    policy.build(torch.device("cpu"))
    layer = policy.model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    expected = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    policy.eval()
    policy.model(input_ids=torch.tensor([[1, 5, 9]]))  # the first pass moves the scales elsewhere
    merging.dequantise(policy)
    merging.merge(policy).save_pretrained(tmp_path)
    found = weights(tmp_path)["model.layers.0.mlp.up_proj.weight"]
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


def test_the_printed_difference(
    nf4_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], base_folder: str
) -> None:
    folder = export(
        nf4_run, tmp_path / "out", "--form", "merged", "--base", "original", "--dtype", "bfloat16", "--prompts", "3"
    )
    said = capsys.readouterr().out
    predictions = prompts(nf4_run, tmp_path)[:3]
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    for layer in base.modules():
        layer.support_avx512bf16_for_cpu = False  # another kernel, for evaluation only; no run uses it
    policy = PeftModel.from_pretrained(base, nf4_run / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.bfloat16
    tokenizer, differences = AutoTokenizer.from_pretrained(folder), []
    with torch.no_grad():
        for row in predictions:
            ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
            differences.append((policy(ids).logits.float() - merged(ids).logits.float()).abs().flatten())
    every = torch.cat(differences)
    found = re.search(r"largest (\S+), mean (\S+), over (\d+) positions of 3 held-out prompts", said)
    assert found, said
    assert float(found[1]) == pytest.approx(float(every.max()), rel=0.02)
    assert float(found[2]) == pytest.approx(float(every.mean()), rel=0.02)
    assert int(found[3]) == every.numel() // merged.config.vocab_size
    assert float(every.max()) > 0.01, "a comparison of a model with itself"
    assert "merged into the original base, as in its files; bfloat16" in said
    assert said.index("largest") < said.index("written:")


def test_the_quantised_model_is_given_up_before_the_original_is_loaded(
    nf4_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    logits, transplant = merging.prompt_logits, merging.transplant

    def watched_logits(model: Any, *args: Any) -> Any:
        policies.append(weakref.ref(model))
        return logits(model, *args)

    def watched_transplant(*args: Any) -> None:
        alive.append(policies[0]() is not None)
        transplant(*args)

    monkeypatch.setattr(merging, "prompt_logits", watched_logits)
    monkeypatch.setattr(merging, "transplant", watched_transplant)
    export(nf4_run, tmp_path / "out", "--form", "merged", "--base", "original")
    assert alive == [False]


def tiny(folder: Path, kind: str, **settings: Any) -> str:
    from transformers import AutoConfig

    with embedded.materialise(embedded.TINY_LLAMA) as source:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=103, **settings)).save_pretrained(folder)
    return str(folder)


def with_random_adapter(policy: Any) -> Any:
    policy.build(torch.device("cpu"))
    with torch.no_grad():
        for parameter in policy.trained_parameters().values():
            parameter.normal_(std=0.2)
    return policy.eval()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], ["q_proj"]], ids="+".join)
def test_tied_embeddings(targets: list[str], make_policy: Any, tmp_path: Path) -> None:
    from hbat_lightning import LoraSettings

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = tiny(tmp_path / "base", "llama", tie_word_embeddings=True, **sizes)
    policy = with_random_adapter(make_policy(base, lora=LoraSettings(r=2, alpha=4, target_modules=targets)))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        merging.merge(policy).save_pretrained(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-4)
    assert model.config.tie_word_embeddings is (targets == ["q_proj"])


def test_layers_that_are_stored_the_other_way_round(make_policy: Any, tmp_path: Path) -> None:
    base = tiny(tmp_path / "base", "gpt2", n_embd=64, n_layer=1, n_head=2)
    policy = with_random_adapter(make_policy(base))
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        expected = policy.model(input_ids=ids).logits
        merging.merge(policy).save_pretrained(tmp_path / "out")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    quantised = with_random_adapter(make_policy(base, quantization="nf4"))
    with pytest.raises(merging.UserError, match="give --base original"):
        merging.dequantise(quantised)


def test_a_sum_that_overflows_its_type(make_policy: Any) -> None:
    policy = with_random_adapter(make_policy())
    policy.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = 1e6
    with pytest.raises(merging.UserError, match=r"layers\.1\.mlp\.up_proj.*float16; give --dtype bfloat16"):
        merging.merge(policy, torch.float16)


def test_a_full_fine_tune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--config", str(CONFIGS / "policy/full.yaml"), "--trainer.max_steps", "3", "--trainer.callbacks", "[]"]
    run = trained(tmp_path / "run", *options)
    state = torch.load(next((run / "checkpoints").glob("step=*.ckpt")), weights_only=True)["state_dict"]
    capsys.readouterr()
    written = weights(export(run, tmp_path / "out", "--form", "merged"))
    assert "nothing to merge; float32" in capsys.readouterr().out
    assert {f"policy.model.{name}" for name in written} <= set(state)
    assert all(torch.equal(value, state[f"policy.model.{name}"]) for name, value in written.items())
    assert "no adapter" in refused(run, tmp_path / "other", capsys=capsys)
    shutil.rmtree(run / "checkpoints")
    again = weights(export(run, tmp_path / "again", "--form", "merged", "--dtype", "bfloat16"))
    assert all(torch.equal(again[name], value.bfloat16()) for name, value in written.items())
    assert json.loads((tmp_path / "again" / "hbat.json").read_text())["policy"]["base"] == embedded.TINY_LLAMA


# ---- the adapter ------------------------------------------------------------------------------------------------------


def test_the_adapter_of_a_run_in_progress(tmp_path: Path, base_folder: str) -> None:
    run = trained(tmp_path / "run", "--trainer.max_steps", "5")
    shutil.rmtree(run / "adapter")
    folder = export(run, tmp_path / "out")
    checkpoint = torch.load(run / "checkpoints" / "step=5.ckpt", weights_only=True)
    saved = {name: value for name, value in checkpoint["state_dict"].items() if ".default." in name}
    written = load_file(folder / "adapter_model.safetensors")
    assert len(written) == len(saved)
    for name, value in written.items():
        inner = name.replace(".weight", ".default.weight")
        assert torch.equal(value, saved[f"policy.model.{inner}"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    assert model.peft_config["default"].r == R
    card = (folder / "README.md").read_text()
    assert "Optimizer steps: 5" in card
    assert "More Information Needed" not in card


def test_what_a_run_has_finished_with_serves_where_no_checkpoint_is_left(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    shutil.rmtree(folder / "checkpoints")
    moved = ["--trainer.default_root_dir", str(folder)]
    written = load_file(export(run, tmp_path / "out", *moved) / "adapter_model.safetensors")
    expected = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in expected.items())
    assert f"exporting {folder / 'adapter'}" in capsys.readouterr().out
    assert "no whole checkpoint" in refused(run, tmp_path / "o", *moved, "--ckpt_path", "last", capsys=capsys)
    other = refused(run, tmp_path / "o", *moved, f"{POLICY}.quantization", "nf4", capsys=capsys)
    assert "base fingerprint" in other
    (folder / "adapter" / "hbat.json").unlink()
    assert "run fit first" in refused(run, tmp_path / "o", *moved, capsys=capsys)


def test_a_checkpoint_that_training_went_on_from_is_not_taken_for_the_result(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = yaml.safe_load((run / "config.yaml").read_text())
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"ckpt_path": str(tmp_path / "long gone.ckpt")}))
    main(["export", "--config", str(config), "--output", str(tmp_path / "out")])
    assert f"exporting {run / 'checkpoints' / 'step='}" in capsys.readouterr().out


# ---- the card ---------------------------------------------------------------------------------------------------------


def test_weights_are_for_whoever_may_read_the_rest(run: Path, tmp_path: Path) -> None:
    """The run's own adapter, an exported one and a merged model: safetensors alone would write them for their owner."""
    folders = [run / "adapter"]
    folders += [export(run, tmp_path / form, "--form", form) for form in ("adapter", "merged")]
    for folder in folders:
        modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir() if path.is_file()}
        assert any(name.endswith(".safetensors") for name in modes)
        assert len(set(modes.values())) == 1, modes


def test_the_card_of_a_finished_run(run: Path) -> None:
    card = ModelCard.load(run / "adapter" / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None, "an embedded model is none of the hub's"
    state = torch.load(next((run / "checkpoints").glob("step=*.ckpt")), weights_only=True)
    order = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["fingerprint"]
    for name in ("instruction", "preference"):
        rows, digest = re.fullmatch(r"(\d+) \((\w+)\)", order[f"{name} rows"]).groups()  # type: ignore[union-attr]
        assert re.search(rf"\| {name} \| `embedded://conflict/{name}` .*\| chat \| {rows} \(`{digest}`\) \|", card.text)
    last = json.loads((run / "switches.jsonl").read_text().splitlines()[-1])
    assert f"After optimizer step {last['step']}:" in card.text
    for name, value in last["after"].items():
        assert f"| `{name}` | {value:.4f} |" in card.text
    shown = re.search(r"```yaml\n(.*)```", card.text, re.DOTALL)
    assert shown
    assert yaml.safe_load(shown[1]) == yaml.safe_load((run / "config.yaml").read_text())
    assert state["hbat"]["policy"]["base_fingerprint"] in card.text
    for said in (
        "Seed: 42",
        "Rounds: 1",
        "DPO: beta 1, reference phase_start",
        "Modified EWC: strength 0.1",
        "peft 0.",
    ):
        assert said in card.text
    assert "base_model: embedded" not in card.content


def test_figures_of_later_steps_are_not_those_of_an_earlier_checkpoint(run: Path, tmp_path: Path) -> None:
    from hbat_lightning.model_card import MODEL, Training, write_card

    first, *_, last = map(json.loads, (run / "switches.jsonl").read_text().splitlines())
    origin = json.loads((run / "adapter" / "hbat.json").read_text())
    assert first["step"] < last["step"]
    write_card(tmp_path, MODEL, Training(origin, last["step"] - 1, run))
    assert f"After optimizer step {first['step']}:" in (tmp_path / "README.md").read_text()
    (copy := tmp_path / "run").mkdir()
    shutil.copy(run / "metrics.csv", copy)
    write_card(tmp_path, MODEL, Training(origin, last["step"], copy))
    text = (tmp_path / "README.md").read_text()
    assert f"| `val/preference/loss` | {last['after']['val/preference/loss']:.4f} |" in text
    write_card(tmp_path, MODEL, Training(origin, 1, copy))
    assert "None were kept" in (tmp_path / "README.md").read_text()


def test_no_secret_enters_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    from hbat_lightning.model_card import ADAPTER, Training, write_card

    monkeypatch.setenv("SOME_SERVICE_TOKEN", "s3cr3t-of-the-service")
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.CometLogger",
        "init_args": {"api_key": "comet-key", "experiment_key": None, "workspace": "s3cr3t-of-the-service"},
    }
    settings["data"]["init_args"]["instruction"]["path"] = "https://me:pass-word@host/rows.json"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    origin = json.loads((run / "adapter" / "hbat.json").read_text())
    origin["policy"]["base"] = "/home/somebody/models/base"
    origin["data"]["instruction"]["source"] |= {"path": "https://me:pass-word@host/rows.json"}
    (out := tmp_path / "out").mkdir()
    write_card(out, ADAPTER, Training(origin, 3, tmp_path))
    for name in ("README.md", "hbat.json"):
        text = (out / name).read_text()
        assert not [word for word in ("s3cr3t", "comet-key", "pass-word", "somebody") if word in text]
    assert "max_new_tokens: 24" in (out / "README.md").read_text()
    assert "experiment_key: null" in (out / "README.md").read_text()


def test_hub_ids_stand_where_the_hub_reads_them(tmp_path: Path, run: Path) -> None:
    from hbat_lightning.model_card import MODEL, Training, write_card

    origin = json.loads((run / "adapter" / "hbat.json").read_text())
    origin["policy"]["base"] = "owner/model"
    origin["data"]["preference"] |= {"on_hub": True, "source": {"path": "owner/pairs"}}
    write_card(tmp_path, MODEL, Training(origin, 3, tmp_path))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.datasets, data.library_name) == ("owner/model", ["owner/pairs"], "transformers")


# ---- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--form", "merged", "--ckpt_path", "none.ckpt"], "none.ckpt: no such checkpoint"),
        (["--form", "merged", "--prompts", "-1"], "--prompts is -1"),
        (["--base", "original"], "--base is for merged weights"),
        (["--dtype", "bfloat16"], "--dtype is for merged weights"),
        (["--form", "pickled"], "form is 'pickled'; it should be one of adapter, merged"),
        (["--trainer.default_root_dir", "nowhere"], "nowhere holds no whole checkpoint and no adapter/"),
        ([f"{POLICY}.lora.r", "2"], "lora r 4 there, 2 here"),
        (["--form", "merged", "--data.instruction.path", "gone.json"], "--prompts 0 writes without comparing"),
    ],
)
def test_what_is_refused(
    options: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(run, tmp_path / "out", *options, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_must_be_chosen_by_name(
    nf4_run: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --base original" in refused(nf4_run, tmp_path / "out", "--form", "merged", capsys=capsys)
    export(run, tmp_path / "out", "--form", "merged", "--base", "dequantized", "--prompts", "0")
    said = capsys.readouterr().out
    assert "original and dequantized are the same weights" in said
    assert "largest" not in said


def test_a_folder_that_holds_something_is_left_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--config", str(run / "config.yaml")])
    assert "give --output" in capsys.readouterr().err
    (out := tmp_path / "out").mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty" in refused(run, out, "--overwrite", "true", capsys=capsys)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    export(run, out)
    (out / "notes.txt").write_text("mine")
    assert "--overwrite true" in refused(run, out, "--form", "merged", capsys=capsys)
    export(run, out, "--form", "merged", "--overwrite", "true", "--prompts", "0")
    names = {path.name for path in out.iterdir()}
    assert {"notes.txt", "model.safetensors"} < names
    assert not [name for name in names if name.startswith("adapter")]
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(run, tmp_path / "file", capsys=capsys)
    assert "cannot be written" in refused(run, tmp_path / "file" / "out", capsys=capsys)


def test_a_damaged_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "global_step": 1}, foreign)
    assert "not written by hbat_lightning" in refused(run, tmp_path / "o", "--ckpt_path", str(foreign), capsys=capsys)
    torch.save({"state_dict": Path("x")}, foreign)
    assert "not a checkpoint of a run" in refused(run, tmp_path / "o", "--ckpt_path", str(foreign), capsys=capsys)


# ---- no network, and no file elsewhere --------------------------------------------------------------------------------

WATCHED = """
    import os, sys

    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            print("REACHED", event, args[-1])
            raise OSError("no network in this test")
        if event == "open" and isinstance(args[0], (str, bytes)):
            mode, flags = args[1], args[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                print("WRITTEN", os.path.abspath(os.fsdecode(args[0])))

    sys.addaudithook(watch)
    from hbat_lightning.cli import main

    main(sys.argv[1:])
"""


def test_it_reaches_no_host_and_writes_only_into_its_folder(nf4_run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in nf4_run.rglob("*")}
    for name in ("home", "cwd", "tmp"):
        (tmp_path / name).mkdir()
    keep = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = ["export", "--config", str(nf4_run / "config.yaml"), "--form", "merged", "--base", "original"]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WATCHED), *command, "--output", str(tmp_path / "out")],
        cwd=tmp_path / "cwd",
        env=keep | places,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "REACHED" not in done.stdout
    fonts = tmp_path / "home" / ".cache" / "matplotlib"  # its list of fonts, made once per user by whatever imports it
    allowed = (str(tmp_path / "out"), str(tmp_path / "tmp"), str(fonts), os.devnull, "/proc/", "/dev/")
    written = re.findall(r"^WRITTEN (.*)$", done.stdout, re.MULTILINE)
    assert any(path.startswith(allowed[0]) for path in written)
    assert [path for path in written if not path.startswith(allowed)] == []
    left = [path for name in ("home", "cwd", "tmp") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert [path for path in left if not path.is_relative_to(fonts)] == []
    assert {path: path.stat().st_mtime_ns for path in nf4_run.rglob("*")} == before
