"""The policy: scores against the full logits, whatever the padding; references; modes; generation; export."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import GenerationSettings, LoraSettings, Policy
from hbat_lightning.errors import UserError
from hbat_lightning.functional import log_probs, sequence_log_probs
from hbat_lightning.generation import LogProbRecorder
from tests.support import same_bits

CPU = torch.device("cpu")


def built(policy: Policy, *references: Any, noise: float = 0.05) -> Policy:
    """A policy whose adapter says something: as PEFT makes it, it says nothing."""
    torch.manual_seed(0)  # the adapter's weights
    policy.build(CPU)
    policy.add_snapshots(references)
    shake(policy, noise)
    return policy


@torch.no_grad()
def shake(policy: Policy, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.trained_parameters().values():
        parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def gradients(policy: Policy, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Row sums, and the gradient of their mean."""
    sums = policy.score(inputs).row_sums()
    trained = policy.trained_parameters()
    return sums.detach(), dict(zip(trained, torch.autograd.grad(sums.mean(), list(trained.values())), strict=True))


def padded(inputs: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """More columns on either side, of a token that is not the pad token."""
    fill = {"input_ids": 9, "attention_mask": 0, "labels": -100}
    return {name: torch.nn.functional.pad(inputs[name], (left, right), value=value) for name, value in fill.items()}


def to_the_right_edge(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row's padding moved from its right to its left side."""
    lengths = inputs["attention_mask"].sum(-1).tolist()
    shift = [inputs["attention_mask"].shape[1] - length for length in lengths]
    return {
        name: torch.stack([torch.roll(row, by) for row, by in zip(inputs[name], shift, strict=True)])
        for name in ("input_ids", "attention_mask", "labels")
    }


# ---- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"lora": None}, {"gradient_checkpointing": True}], ids=["lora", "full", "gc"])
def test_score_is_that_of_the_full_logits(settings: Any, make_policy: Any, batches: Any) -> None:
    policy, (batch, _) = built(make_policy(**settings)), batches
    policy.eval()
    logits = policy.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    scores = policy.score(batch, with_correct=True)
    assert torch.allclose(scores.row_sums(), sequence_log_probs(logits, batch["labels"]), rtol=1e-5)
    supervised = batch["labels"][:, 1:] != -100
    assert scores.log_probs.numel() == int(supervised.sum())
    assert torch.equal(torch.bincount(scores.row, minlength=5), supervised.sum(-1))
    best = logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
    assert torch.equal(scores.correct, best[supervised])
    assert 0 < int(scores.correct.sum()) < scores.correct.numel() or "lora" not in settings


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": None}, {"lora": LoraSettings(r=4, target_modules=["q_proj", "lm_head"])}],
    ids=["lora", "full", "adapter on the output layer"],
)
def test_chunks_leave_scores_and_gradients_unchanged(
    settings: Any, make_policy: Any, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, (batch, _) = built(make_policy(double=True, **settings)), batches
    policy.eval()
    logits = policy.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    truth = sequence_log_probs(logits, batch["labels"])
    trained = policy.trained_parameters()
    slopes = torch.autograd.grad(truth.mean(), list(trained.values()))
    monkeypatch.setattr(log_probs, "CPU_CHUNK_ELEMENTS", 3 * logits.shape[-1])  # the batch has more than three tokens
    sums, gradient = gradients(policy, batch)
    assert torch.allclose(sums, truth, rtol=1e-12)
    for name, slope in zip(trained, slopes, strict=True):
        assert torch.allclose(gradient[name], slope, rtol=1e-9, atol=1e-12), name
    assert torch.equal(policy.score(batch, with_correct=True).log_probs, policy.score(batch).log_probs)


@pytest.mark.parametrize("which", [0, 1], ids=["instruction", "preference"])
def test_padding_and_order_leave_scores_and_gradients_unchanged(which: int, make_policy: Any, batches: Any) -> None:
    policy, batch = built(make_policy(double=True)), batches[which]
    order = torch.randperm(len(batch["labels"]), generator=torch.Generator().manual_seed(2))
    shuffled = {name: batch[name][order] for name in ("input_ids", "attention_mask", "labels")}
    sums, gradient = gradients(policy, batch)
    cases = {
        "more on the right": (padded(batch, 0, 7), None),
        "some on the left": (padded(batch, 5, 0), None),
        "both": (padded(batch, 2, 3), None),
        "left": (to_the_right_edge(batch), None),
        "shuffled": (shuffled, order),
    }
    assert (batch["attention_mask"] == 0).any()
    for name, (inputs, by) in cases.items():
        other, other_gradient = gradients(policy, inputs)
        assert torch.allclose(other, sums if by is None else sums[by], rtol=1e-12), name
        for key, value in gradient.items():
            assert torch.allclose(other_gradient[key], value, rtol=1e-9, atol=1e-13), (name, key)


def test_gradient_checkpointing_recomputes_layers_and_changes_nothing(make_policy: Any, batches: Any) -> None:
    results = []
    for on in (False, True):
        for dropout in (True, False):  # phases of both kinds
            policy = built(make_policy(gradient_checkpointing=on))
            policy.set_training(dropout)
            policy.score(batches[0])  # the first call also runs a token through, to learn what becomes of logits
            calls = []
            layer = policy.model.get_base_model().model.layers[1].self_attn
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            results.append(gradients(policy, batches[0]))
            assert len(calls) == 1 + on
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0])
        for name, value in gradient.items():
            assert torch.allclose(value, results[0][1][name], rtol=1e-5, atol=1e-8), name


@pytest.mark.parametrize("dropout", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_gradients_stay_right_after_an_evaluation_pass(
    quantization: Any, dropout: bool, make_policy: Any, batches: Any
) -> None:
    """bitsandbytes repacks 4-bit weights on some CPUs for a kernel that has no backward pass."""
    policy = built(make_policy(quantization=quantization))
    policy.set_training(dropout)
    before = gradients(policy, batches[0])[1]
    policy.eval()
    with torch.no_grad():
        policy.score(batches[0])
    policy.set_training(dropout)
    after = gradients(policy, batches[0])[1]
    assert same_bits(before, after)
    policy.set_training(not dropout)
    for name, value in gradients(policy, batches[0])[1].items():
        assert torch.nn.functional.cosine_similarity(value.flatten(), before[name].flatten(), 0) > 0.99, name


def test_nf4_gradients_are_those_of_the_dequantised_weights(make_policy: Any, batches: Any) -> None:
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    policy = built(make_policy(quantization="nf4", dtype="float32"))
    plain = built(make_policy())
    quantised = dict(policy.model.named_modules())
    replaced = 0
    for name, module in plain.model.named_modules():
        if isinstance(quantised[name], bnb.nn.Linear4bit):
            weight = quantised[name].weight
            module.weight.data = dequantize_4bit(weight.data, weight.quant_state).float()
            replaced += 1
    assert replaced == 14
    for parameter, values in zip(
        plain.trained_parameters().values(), policy.trained_parameters().values(), strict=True
    ):
        parameter.data = values.data.clone()
    sums, gradient = gradients(policy, batches[0])
    truth, other = gradients(plain, batches[0])
    assert torch.allclose(sums, truth, rtol=1e-4)
    for name, value in gradient.items():
        assert torch.allclose(value, other[name], rtol=1e-2, atol=1e-3 * float(other[name].abs().max())), name


# ---- references, by a private field of PEFT --------------------------------------------------------------------------------


def peft_says(policy: Policy, inputs: dict[str, Tensor], adapter: str | None) -> Tensor:
    """The same through PEFT's public interface."""
    model: Any = policy.model
    with torch.no_grad():
        if adapter is None:
            with model.disable_adapter():
                logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        else:
            flags = {name: p.requires_grad for name, p in model.named_parameters()}
            model.set_adapter(adapter)
            logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            model.set_adapter("default")
            for name, p in model.named_parameters():
                p.requires_grad_(flags[name])
    return sequence_log_probs(logits, inputs["labels"])


def test_references_are_the_adapters_they_name(make_policy: Any, batches: Any, fit: Any, tmp_path: Any) -> None:
    batch = batches[1]
    given = built(make_policy())
    given.export(tmp_path)
    policy = make_policy(adapter_path=str(tmp_path))
    policy.build(CPU)
    policy.add_snapshots(["phase_start", "initial", "base"])
    initial = policy.score(batch).row_sums().detach()
    shake(policy, 0.1)
    policy.take_snapshot()
    start = policy.score(batch).row_sums().detach()
    shake(policy, 0.1)
    policy.eval()
    got = {name: policy.score_reference(batch, name).row_sums() for name in ("phase_start", "initial", "base")}
    assert torch.allclose(got["phase_start"], start, rtol=1e-5)
    assert torch.allclose(got["initial"], initial, rtol=1e-5)
    assert torch.allclose(got["phase_start"], peft_says(policy, batch, "phase_start"), rtol=1e-5)
    assert torch.allclose(got["initial"], peft_says(policy, batch, "initial"), rtol=1e-5)
    assert torch.allclose(got["base"], peft_says(policy, batch, None), rtol=1e-5)
    values = [policy.score(batch).row_sums().detach(), *got.values()]
    assert all(not torch.allclose(one, other, rtol=1e-3) for n, one in enumerate(values) for other in values[:n])


def test_reference_pass_leaves_the_policy_as_it_was(make_policy: Any, batches: Any) -> None:
    policy = built(make_policy(), "phase_start")
    frozen = next(iter(policy.trained_parameters().values()))
    frozen.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in policy.named_parameters()}
    layers = [layer for layer in policy.modules() if isinstance(layer, BaseTunerLayer)]
    assert len(layers) == 14
    before = policy.score(batches[0]).row_sums()
    scores = policy.score_reference(batches[0], "phase_start")
    assert not scores.log_probs.requires_grad
    assert not torch.allclose(scores.row_sums(), before.detach(), rtol=1e-3)
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == flags
    assert all(layer.active_adapters == ["default"] for layer in layers)  # PEFT's own reading of the private field
    assert torch.equal(policy.score(batches[0]).row_sums(), before)


def test_an_exception_in_a_reference_pass_restores_the_policy(
    make_policy: Any, batches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = built(make_policy(), "phase_start")
    before = policy.score(batches[0]).row_sums()
    head = policy.model.get_output_embeddings()
    seen: list[Any] = []

    def fail(*args: Any) -> None:
        seen.append([layer.active_adapters for layer in policy.modules() if isinstance(layer, BaseTunerLayer)])
        raise MemoryError

    handle = head.register_forward_hook(fail)
    for reference, active in (("phase_start", ["phase_start"]), ("base", [])):
        with pytest.raises(MemoryError):
            policy.score_reference(batches[0], reference)
        assert seen.pop() == [active] * 14
    handle.remove()
    assert torch.equal(policy.score(batches[0]).row_sums(), before)


def test_peft_still_keeps_the_active_adapter_in_the_field_that_is_set(make_policy: Any) -> None:
    """What `Policy._adapters` leans on. If this fails, a release of PEFT has moved it: see peft's pin in pyproject.toml."""
    policy = built(make_policy(), "phase_start")
    for layer in policy.modules():
        if isinstance(layer, BaseTunerLayer):
            assert layer._active_adapter == layer.active_adapters == ["default"]
            assert not layer.disable_adapters


def test_snapshots_are_taken_when_asked_and_hold_what_trains_elsewhere_frozen(make_policy: Any) -> None:
    policy = make_policy()
    policy.build(CPU)
    first = next(iter(policy.trained_parameters().values()))
    first.requires_grad_(False)
    with torch.no_grad():
        first.fill_(0.25)  # frozen by the user, but part of the model all the same
    policy.add_snapshots(["phase_start", "phase_start", "base"])
    assert policy.snapshot("base") is None
    assert policy.snapshot("initial") is None  # the bare base serves as it
    trained = policy.trained_parameters()
    snapshot = policy.snapshot("phase_start")
    assert snapshot.keys() == trained.keys()
    assert not first.requires_grad
    twins = [p for name, p in policy.named_parameters() if ".phase_start." in name]
    assert len(twins) == 28
    assert not any(p.requires_grad for p in twins)
    assert bool((twins[0] == 0.25).all())
    shake(policy, 0.1)
    assert not torch.equal(snapshot[next(iter(trained))], trained[next(iter(trained))])
    policy.take_snapshot()
    policy.take_snapshot("unknown")  # not asked for: nothing to do
    assert same_bits(snapshot, {name: p.detach() for name, p in trained.items()})


@pytest.mark.parametrize("lora", [LoraSettings(r=4), None])
def test_what_trains_is_found_without_a_walk_in_every_step(lora: Any, make_policy: Any, monkeypatch: Any) -> None:
    """And what is frozen meanwhile, or comes as a further adapter, is seen."""
    policy = built(make_policy(lora=lora))
    before = policy.trained_parameters()
    assert before == {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    monkeypatch.setattr(policy.model, "named_parameters", None)
    assert policy.trained_parameters() == before
    name, parameter = next(iter(before.items()))
    parameter.requires_grad_(False)
    assert policy.trained_parameters().keys() == before.keys() - {name}
    monkeypatch.undo()
    if lora is not None:
        assert policy.adapter_parameters("value") == {}
        policy.add_adapter("value", LoraSettings(r=2))
        assert {p.shape[0] for n, p in policy.adapter_parameters("value").items() if ".lora_A." in n} == {2}


# ---- generation and export ---------------------------------------------------------------------------------------------


def test_generation_is_greedy_decoding_by_hand_and_keeps_modes(make_policy: Any, batches: Any) -> None:
    policy = built(make_policy(gradient_checkpointing=True), noise=0.1)
    policy.set_training(dropout=True)
    tokenizer = policy.tokenizer
    prompts = [row[:length] for row, length in zip(batches[0]["input_ids"], (9, 14, 11, 5, 8), strict=True)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=tokenizer.pad_token_id) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    modes = [module.training for module in policy.modules()]
    free = policy.generate(
        ids, mask, GenerationSettings(max_new_tokens=6), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    assert [module.training for module in policy.modules()] == modes
    policy.eval()
    stop = free[2][3]  # a token that some row writes: now it ends a completion
    stopped = policy.generate(ids, mask, GenerationSettings(max_new_tokens=6), stop, tokenizer.pad_token_id)
    for prompt, out, cut in zip(prompts, free, stopped, strict=True):
        text = prompt.tolist()
        for token in out:
            with torch.no_grad():
                best = int(policy.model(torch.tensor([text])).logits[0, -1].argmax())
            assert token == best
            text.append(token)
        assert len(out) == 6 or out[-1] == tokenizer.eos_token_id
        assert cut == (out[: out.index(stop) + 1] if stop in out else out)


def test_sampling_draws_from_the_global_generator(make_policy: Any, batches: Any) -> None:
    policy = built(make_policy())
    settings = GenerationSettings(max_new_tokens=8, temperature=1.5)
    ids = batches[0]["input_ids"][:, :6]

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return policy.generate(ids, torch.ones_like(ids), settings, 2, 0)

    assert sample(1) == sample(1) != sample(2)


def test_a_recorder_knows_the_log_probabilities_of_what_is_sampled(make_policy: Any, batches: Any) -> None:
    """Each token's from the plain model over the unpadded text: tempered, whatever top-k leaves, the stop token's too."""
    policy = built(make_policy(), noise=0.1).eval()
    lengths, width = (9, 14, 11, 5, 8), 14
    prompts = [row[:length] for row, length in zip(batches[0]["input_ids"], lengths, strict=True)]
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(p) for p in prompts]).long()
    settings = GenerationSettings(max_new_tokens=8, temperature=0.7, top_k=3)
    torch.manual_seed(3)
    free = policy.generate(ids, mask, settings, -1, 0)
    stop = free[1][4]
    for ending in (-1, stop):
        recorder = LogProbRecorder(0.7)
        torch.manual_seed(3)
        completions = policy.generate(ids, mask, settings, ending, 0, recorder)
        if ending == -1:
            assert completions == free  # listening changes nothing
        else:
            assert len(completions[1]) <= 5
        for prompt, completion, found in zip(prompts, completions, recorder.log_probs, strict=True):
            whole = torch.tensor([prompt.tolist() + completion])
            with torch.no_grad():
                logits = policy.model(whole).logits[0, len(prompt) - 1 : -1] / 0.7
            expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
            assert torch.allclose(found, expected, atol=1e-5)
            assert found.shape == (len(completion),)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_an_exported_adapter_gives_the_same_logits_in_plain_peft(
    targets: Any, make_policy: Any, batches: Any, base_folder: str, tmp_path: Any
) -> None:
    policy = built(make_policy(lora=LoraSettings(r=4, alpha=8, target_modules=targets)), "phase_start", "initial")
    policy.export(tmp_path)
    policy.eval()
    ids = batches[0]["input_ids"]
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, policy.model(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == policy.tokenizer.get_vocab()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []  # no snapshot beside it
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) in (2, 14)
    assert names == sorted(names), "every process writes the same file"


def test_an_exported_full_model_gives_the_same_logits_in_plain_transformers(
    make_policy: Any, batches: Any, tmp_path: Any
) -> None:
    policy = built(make_policy(lora=None), "phase_start", noise=0.01)
    policy.export(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    policy.eval()
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, policy.model(ids).logits)
    again = Policy(str(tmp_path), lora=None)
    again.build(CPU)
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template
    assert same_bits(
        {name: p.detach() for name, p in again.trained_parameters().items()},
        {name: p.detach() for name, p in policy.trained_parameters().items()},
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraSettings(r=8, alpha=8), r"has r 4, alpha 8; policy.init_args.lora says r 8, alpha 8"),
        (LoraSettings(r=4, alpha=16), r"has r 4, alpha 8; policy.init_args.lora says r 4, alpha 16"),
        (LoraSettings(r=4, alpha=8, target_modules=["q_proj"]), "does not fit this base or these target_modules"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(lora: Any, message: str, make_policy: Any, tmp_path: Any) -> None:
    built(make_policy()).export(tmp_path)
    with pytest.raises(UserError, match=message):
        make_policy(lora=lora, adapter_path=str(tmp_path)).build(CPU)


def test_a_folder_without_an_adapter_is_refused(make_policy: Any, tmp_path: Any) -> None:
    with pytest.raises(UserError, match="not a PEFT folder"):
        make_policy(adapter_path=str(tmp_path)).build(CPU)


def test_contradictory_settings_are_refused(make_policy: Any) -> None:
    for quantization in ("nf4", "int8"):
        with pytest.raises(UserError, match=f"{quantization} weights cannot be trained: give policy.init_args.lora"):
            make_policy(lora=None, quantization=quantization)
    with pytest.raises(UserError, match="adapter_path needs policy"):
        make_policy(lora=None, adapter_path="somewhere")
    with pytest.raises(UserError, match=r"lora.target_modules: .*no_such_layer"):
        make_policy(lora=LoraSettings(target_modules=["no_such_layer"])).build(CPU)
    with pytest.raises(RuntimeError, match="no weights yet"):
        make_policy().trained_parameters()


def test_a_description_counts_what_trains(make_policy: Any) -> None:
    policy = make_policy(quantization="nf4")
    policy.build(CPU)
    costs = policy.add_snapshots(["phase_start"])
    assert policy.add_snapshots(["phase_start"]) == []  # told once
    shapes = [(128, 128)] * 4 + [(128, 256)] * 3
    trained = 2 * sum(4 * (one + other) for one, other in shapes)  # two layers, rank 4
    base = sum(p.numel() for p in AutoModelForCausalLM.from_config(policy.model.config).parameters())
    told = policy.describe()
    assert told.pop(2).startswith("policy: kept in full precision: ")
    assert told + costs == [
        f"policy: embedded://tiny-llama, LoRA r 4, {trained:,} of {base + trained:,} parameters train",
        "policy: 14 linear layers are nf4",
        f"snapshot: phase_start is a frozen adapter, {4 * trained / 2**20:,.1f} MiB",
    ]


def test_trained_tensors_are_fp32_whatever_the_base_is(make_policy: Any) -> None:
    for settings in ({"dtype": "bfloat16"}, {"quantization": "nf4"}, {"quantization": "int8"}, {"lora": None}):
        policy = make_policy(**settings)
        policy.build(CPU)
        policy.add_snapshots(["phase_start"])
        tensors = [*policy.trained_parameters().values(), *policy.snapshot("phase_start").values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
