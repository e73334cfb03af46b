"""Where rewards come from: trained reward models as they were trained, classifiers as transformers has them, and rules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hbat_lightning import (
    ClassifierPolicy,
    ClassifierRewardModule,
    DataSource,
    GenerationSettings,
    HybridDataModule,
    LoraSettings,
    PPOModule,
    RewardModule,
)
from hbat_lightning.callbacks import PolicyExport, WindowCheckpoint
from hbat_lightning.cli import main, make_cli
from hbat_lightning.data import embedded
from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.errors import UserError
from hbat_lightning.rewards import HEAD_FILE, AdapterReward, ClassifierReward, FunctionReward

CPU = torch.device("cpu")
SMALL = LoraSettings(r=4, alpha=8)


def pairs() -> HybridDataModule:
    return HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.25), batch_size=4)


def rollouts(tokenizer: Any, texts: int = 4) -> list[Rollout]:
    """Prompts and answers of very different lengths, with bos and a stop token."""
    rows = embedded.rows(embedded.PREFERENCE)[:texts]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    stop = [tokenizer.eos_token_id]
    return [
        Rollout([tokenizer.bos_token_id, *encode(row["prompt"])], encode(row["chosen"])[: 2 + 3 * number] + stop)
        for number, row in enumerate(rows)
    ]


@pytest.fixture
def trained(make_policy: Any, fit: Any, tmp_path: Path) -> Any:
    """A finished reward model, and its adapter folder."""
    run = fit(RewardModule(policy=make_policy(), lr=2e-2, epochs=3), PolicyExport(), data=pairs())
    return run.module, str(tmp_path / "adapter")


def own_rewards(module: RewardModule, rows: list[Rollout], left: bool = False) -> torch.Tensor:
    """What the trained module says of the same ids, padded on either side."""
    lists = [row.prompt + row.completion for row in rows]
    longest = max(map(len, lists))
    ids, mask = torch.full((len(rows), longest), 7), torch.zeros(len(rows), longest, dtype=torch.long)  # 7 is a word
    for number, row in enumerate(lists):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    with torch.no_grad():
        return module.rewards(module.policy, {"input_ids": ids, "attention_mask": mask})


# ---- trained on the policy's base ---------------------------------------------------------------------------------------


def test_an_exported_reward_model_gives_the_numbers_of_the_trained_one(trained: Any, make_policy: Any) -> None:
    """On another policy of the same base, whose own adapter is another one."""
    module, folder = trained
    module.policy.eval()
    policy = make_policy(lora=LoraSettings(r=2, alpha=4))
    policy.build(CPU)
    reward, rows = AdapterReward(folder, SMALL), rollouts(policy.tokenizer)
    before = {name: value.clone() for name, value in policy.trained_parameters().items()}
    reward.build(policy, CPU)
    reward.build(policy, CPU)  # idempotent
    policy.eval()
    scores = reward.score(policy, rows, CPU)
    assert scores.shape == (4,)
    assert float(scores.std()) > 0.05
    for left in (False, True):
        assert torch.allclose(scores, own_rewards(module, rows, left), atol=1e-5)
    assert torch.allclose(reward.score(policy, rows[:1], CPU), scores[:1], atol=1e-5)
    assert not scores.requires_grad
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not policy.adapter_parameters("reward")
    assert policy.trained_parameters().keys() == before.keys()
    assert policy.checkpoint_names() == {f"model.{name}" for name in before}


def test_in_another_process(trained: Any, tmp_path: Path) -> None:
    module, folder = trained
    module.policy.eval()
    rows = rollouts(module.policy.tokenizer)
    (tmp_path / "rows.json").write_text(json.dumps([[row.prompt, row.completion] for row in rows]))
    code = f"""if True:
        import json, torch
        from hbat_lightning import LoraSettings, Policy
        from hbat_lightning.data.rollouts import Rollout
        from hbat_lightning.rewards import AdapterReward
        policy, cpu = Policy("embedded://tiny-llama"), torch.device("cpu")
        policy.build(cpu)
        reward = AdapterReward({folder!r}, LoraSettings(r=4, alpha=8))
        reward.build(policy, cpu)
        policy.eval()
        rows = [Rollout(*row) for row in json.load(open({str(tmp_path / "rows.json")!r}))]
        print(json.dumps(reward.score(policy, rows, cpu).tolist()))"""
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(told.splitlines()[-1]) == pytest.approx(own_rewards(module, rows).tolist(), abs=1e-5)


def test_what_the_folder_holds(trained: Any) -> None:
    module, folder = trained
    head = load_file(Path(folder, HEAD_FILE))
    assert torch.equal(head["weight"], module.head.weight)
    record = json.loads(Path(folder, "hbat.json").read_text())
    assert HEAD_FILE in record["files"]
    card = Path(folder, "README.md").read_text()
    assert "AdapterReward" in card
    assert "reward model (Bradley-Terry)" in card


def test_folders_that_do_not_fit(
    trained: Any, adapter: str, make_policy: Any, base_folder: str, tmp_path: Path
) -> None:
    _, folder = trained
    policy = make_policy()
    policy.build(CPU)
    with pytest.raises(UserError, match="r 4, alpha 8"):
        AdapterReward(folder).build(policy, CPU)
    other = shutil.copytree(base_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    for settings in ({"name": str(other)}, {"quantization": "nf4"}):
        strange = make_policy(**settings)
        strange.build(CPU)
        with pytest.raises(
            UserError, match=r"was trained on embedded://tiny-llama .*train the reward model on the policy's"
        ):
            AdapterReward(folder, SMALL).build(strange, CPU)
    Path(folder, HEAD_FILE).unlink()
    with pytest.raises(UserError, match=f"holds no {HEAD_FILE}: give the adapter/ folder of a run of RewardModule"):
        AdapterReward(folder, SMALL).build(policy, CPU)


# ---- classifiers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(base_folder: str, tmp_path: Path) -> Path:
    """Random weights behind the embedded tokenizer, without a pad token in the model's own settings."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=None, initializer_range=0.3, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    tokenizer.save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


@pytest.mark.parametrize("pad", ["its own", "eos"])
def test_a_classifier_says_what_it_says_in_transformers(pad: str, classifier: Path, make_policy: Any) -> None:
    if pad == "eos":
        tokenizer = AutoTokenizer.from_pretrained(classifier)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(classifier)
    policy, reward = make_policy(), ClassifierReward(str(classifier))
    reward.build(policy, CPU)
    model, tokenizer = (
        kind.from_pretrained(classifier) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    rows = rollouts(policy.tokenizer)
    texts = [
        policy.tokenizer.decode(row.prompt, skip_special_tokens=True)
        + " "
        + policy.tokenizer.decode(row.completion, skip_special_tokens=True)
        for row in rows
    ]
    with torch.no_grad():
        truth = [model.eval()(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    scores = reward.score(policy, rows, CPU)
    assert scores.tolist() == pytest.approx(truth, abs=1e-5)
    assert float(scores.std()) > 0.01
    assert not scores.requires_grad


@pytest.mark.parametrize("lora", [SMALL, None], ids=["lora", "full"])
def test_a_trained_classifier_reads_the_policys_tokens(
    lora: Any, make_policy: Any, base_folder: str, fit: Any, tmp_path: Path
) -> None:
    module = ClassifierRewardModule(policy=ClassifierPolicy(base_folder, lora=lora), lr=2e-3)
    fit(module, PolicyExport(), data=pairs())
    policy, reward = (
        make_policy(),
        ClassifierReward(str(tmp_path / ("adapter" if lora else "model")), policy_tokens=True),
    )
    reward.build(policy, CPU)
    module.policy.eval()
    rows = rollouts(policy.tokenizer)
    assert torch.allclose(reward.score(policy, rows, CPU), own_rewards(module, rows), atol=1e-5)
    assert torch.allclose(own_rewards(module, rows, left=True), own_rewards(module, rows), atol=1e-5)


def test_classifiers_that_are_none(classifier: Path, base_folder: str, make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy()
    policy.build(CPU)
    two = shutil.copytree(classifier, tmp_path / "two")
    config = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(
        json.dumps(config | {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}})
    )
    language = shutil.copytree(base_folder, tmp_path / "language")
    config = json.loads((language / "config.json").read_text())
    (language / "config.json").write_text(json.dumps(config | {"id2label": {"0": "a"}, "label2id": {"a": 0}}))
    cases = {str(two): "no sequence classifier could be loaded|has 2 outputs", str(language): "has no output layer"}
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            ClassifierReward(path).build(policy, CPU)
    policy.export(tmp_path / "adapter")
    with pytest.raises(UserError, match="is no adapter of a classifier: AdapterReward takes"):
        ClassifierReward(str(tmp_path / "adapter")).build(policy, CPU)
    with pytest.raises(UserError, match="no such folder"):
        ClassifierReward(str(tmp_path / "nowhere" / "at" / "all")).build(policy, CPU)


# ---- in a run of PPO ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adapter", "classifier"])
def test_a_run_leaves_it_as_it_is_and_out_of_its_checkpoints(
    kind: str, request: pytest.FixtureRequest, make_policy: Any, fit: Any, tmp_path: Path
) -> None:
    if kind == "adapter":
        reward: Any = AdapterReward(request.getfixturevalue("trained")[1], SMALL)
    else:
        reward = ClassifierReward(str(request.getfixturevalue("classifier")))
    module = PPOModule(reward, policy=make_policy(), lr=1e-2, generation=GenerationSettings(max_new_tokens=4))
    module.sampling = GenerationSettings(max_new_tokens=6, temperature=1.0)
    checkpoint = WindowCheckpoint(1, str(tmp_path / "checkpoints"))
    run = fit(module, checkpoint, data=pairs(), enable_checkpointing=True, max_steps=2)
    assert len(run.log.column("train/preference/reward")) == 2
    rows = rollouts(module.policy.tokenizer)
    module.policy.eval()
    with torch.no_grad():
        after = reward.score(module.policy, rows, CPU)
    policy = make_policy()
    policy.build(CPU)
    fresh = AdapterReward(reward.path, SMALL) if kind == "adapter" else ClassifierReward(reward.spec.name)
    fresh.build(policy, CPU)
    policy.eval()
    assert torch.allclose(fresh.score(policy, rows, CPU), after, atol=1e-5)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    others = {name for name in state if ".lora_" not in name}
    assert others == {"value.head.weight", "value.head.bias"}
    assert not any(".reward." in name for name in state if name.startswith("policy."))


# ---- rules --------------------------------------------------------------------------------------------------------------


def politeness(prompt: str, completion: str) -> float:
    """1 for an answer that thanks, less a little for every word."""
    return ("thanks" in completion.split()) - 0.01 * len(completion.split())


def nothing(prompt: str, completion: str) -> Any:
    return None


def test_a_function_sees_texts_without_special_tokens(make_policy: Any) -> None:
    policy, seen = make_policy(), []

    def count(prompt: str, completion: str) -> int:
        seen.append((prompt, completion))
        return len(completion.split())

    rows = rollouts(policy.tokenizer)
    assert FunctionReward(count).score(policy, rows, CPU).tolist() == [2.0, 5.0, 8.0, 11.0]
    data = embedded.rows(embedded.PREFERENCE)
    assert seen == [(data[n]["prompt"], " ".join(data[n]["chosen"].split()[: 2 + 3 * n])) for n in range(4)]


@pytest.mark.parametrize("value", [None, "1.0", float("nan"), float("-inf"), torch.tensor(1.0)])
def test_a_function_must_give_a_finite_number(value: Any, make_policy: Any) -> None:
    policy = make_policy()
    with pytest.raises(UserError, match=r"reward function <lambda> gave .* for the completion 'please note'"):
        FunctionReward(lambda prompt, completion: value).score(policy, rollouts(policy.tokenizer), CPU)


def ppo(function: str) -> list[str]:
    """Options of a run of PPO with a rule."""
    return [
        *("--model", "hbat_lightning.objectives.ppo.PPOModule", "--model.policy", "Policy"),
        *("--model.policy.model_name_or_path", embedded.TINY_LLAMA),
        *("--model.reward", "hbat_lightning.rewards.FunctionReward", "--model.reward.function", function),
        *("--data", "HybridDataModule", "--data.preference.path", embedded.PREFERENCE, "--data.preference.limit", "8"),
        *("--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    ]


def test_a_function_by_its_import_path() -> None:
    assert make_cli(ppo("tests.test_rewards.politeness"), run=False).model.reward.function is politeness


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("tests.test_rewards.no_such", "'no_such' is no class or function that fits here; give its full path"),
        ("politeness", "'politeness' is no class or function that fits here; give its full path"),
        (
            "no_such.module.rule",
            "'no_such.module.rule' cannot be imported, there is no module no_such: install it, or put ",
        ),
        ("tests.test_rewards.SMALL", "'tests.test_rewards.SMALL' is neither a function nor a class"),
    ],
)
def test_functions_that_cannot_be_imported(function: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *ppo(function)])
    assert stopped.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"hbat: error: model.init_args.reward.init_args.function: {said}")


def test_what_a_function_gives_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *ppo("tests.test_rewards.nothing"), "--trainer.default_root_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "reward function nothing gave None for the completion" in capsys.readouterr().err.strip().splitlines()[-1]
