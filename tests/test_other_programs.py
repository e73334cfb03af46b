"""Commands of the README that other programs start: torchrun, SLURM's srun, lm-eval; each as it stands there, but smaller."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from tests.documents import README, fences

pytestmark = pytest.mark.timeout(900)  # processes that import torch, on machines that may be busy
ROOT = Path(__file__).parents[1]
SMALL = shlex.split(
    "--data.instruction.limit 24 --data.instruction.val_fraction 0.25 --data.preference.limit 24 "
    "--data.preference.val_fraction 0.25 --trainer.max_steps 2 --trainer.accelerator cpu --trainer.enable_progress_bar false"
)
# What SLURM would do: as many processes as tasks, each told its place.
SRUN = """\
#!{python}
import os, subprocess, sys
own = [one for one in sys.argv[1:] if not one.startswith("--kill-on-bad-exit")]
slurm = dict(SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1", SLURM_NNODES="2",
             SLURM_NODELIST="127.0.0.1", MASTER_PORT="{port}")
tasks = [
    subprocess.Popen(own, env=os.environ | slurm | dict(SLURM_PROCID=str(n), SLURM_LOCALID="0", SLURM_NODEID=str(n)))
    for n in range(2)
]
sys.exit(max([task.wait() for task in tasks]))
"""


def lines(beginning: str) -> list[str]:
    """Commands of the README that begin so, on one line each and without comments."""
    text = "\n".join(fences("", README)).replace("\\\n", " ")
    return [" ".join(shlex.split(line, comments=True)) for line in text.splitlines() if line.startswith(beginning)]


def environment() -> dict[str, str]:
    """With this interpreter's programs, and a core for each process."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": programs, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return int(own.getsockname()[1])


def run(commands: Sequence[list[str]], **more: str) -> list[str]:
    """Start all at once; what they print."""
    programs = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment() | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    texts = [program.communicate(timeout=600)[0] for program in programs]
    for program, text in zip(programs, texts, strict=True):
        assert program.returncode == 0, text[-4000:]
    return texts


def require_two_processes_trained(folder: Path) -> None:
    assert json.loads((folder / "run.json").read_text())["steps"] == 2
    settings = (folder / "config.yaml").read_text()
    assert re.search(r"strategy: ddp", settings)


def test_torchrun_on_one_node(tmp_path: Path) -> None:
    (command,) = (line for line in lines("torchrun") if "--nnodes" not in line)
    smaller = shlex.split(command.replace("--nproc-per-node 4", "--nproc-per-node 2").replace("devices 4", "devices 2"))
    (text,) = run([[*smaller, *SMALL, "--trainer.default_root_dir", str(tmp_path)]])
    assert "MEMBER: 2/2" in text
    require_two_processes_trained(tmp_path)


def test_torchrun_on_two_nodes(tmp_path: Path) -> None:
    (command,) = (line for line in lines("torchrun") if "--nnodes" in line)
    smaller = command.replace("--nproc-per-node 4", "--nproc-per-node 1").replace("devices 4", "devices 1")
    node = shlex.split(smaller.replace("HOST:29500", f"127.0.0.1:{free_port()}"))
    texts = run([[*node, *SMALL, "--trainer.default_root_dir", str(tmp_path)] for _ in range(2)])
    assert any("MEMBER: 2/2" in text for text in texts)
    require_two_processes_trained(tmp_path)


def test_the_job_for_slurm(tmp_path: Path) -> None:
    (script,) = (text for text in fences("", README) if "#SBATCH" in text)
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN.format(python=sys.executable, port=free_port()))
    srun.chmod(0o755)
    smaller = script.replace("devices 4", "devices 1").replace("runs/mine", str(tmp_path / "run"))
    for steps in (2, 3):  # put back into the queue, it goes on
        path = f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}"
        limit = ["--trainer.max_steps", str(steps)]
        (tmp_path / "job.sh").write_text(f"{smaller.rstrip()} {shlex.join([*SMALL, *limit])}\n")
        (text,) = run([["bash", str(tmp_path / "job.sh")]], PATH=path)
        assert "MEMBER: 2/2" in text
        assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == steps


def test_lm_eval_gets_the_answers_that_predict_gets(tmp_path: Path) -> None:
    """A task of held-out prompts: the exported model, under lm-eval's own chat template and stopping, says the same."""
    pytest.importorskip("lm_eval", reason='lm-eval is not installed: pip install "hbat-lightning[oracles]"')
    (command,) = lines("lm_eval")
    rows = embedded.rows(embedded.INSTRUCTION_VALIDATION)[:12]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_task(tmp_path / "tasks", tmp_path / "rows.jsonl")
    limits = shlex.split(
        "--data.instruction.limit 200 --data.preference.limit 40 --model.instruction.lr 5e-3 --model.schedule.rounds 1 "
        "--trainer.accelerator cpu --trainer.enable_progress_bar false --model.generation.max_new_tokens 24"
    )
    run_folder, model = tmp_path / "run", tmp_path / "out" / "model"
    place = [
        "--trainer.default_root_dir",
        str(run_folder),
        "--data.instruction.test_path",
        str(tmp_path / "rows.jsonl"),
    ]
    main(["fit", "--config", str(ROOT / "configs" / "hbat_dpo.yaml"), *limits, *place])
    main(["predict", "--config", str(run_folder / "config.yaml"), "--ckpt_path", "last"])
    main(
        [
            "export",
            "--config",
            str(run_folder / "config.yaml"),
            "--output",
            str(model),
            "--form",
            "merged",
            "--base",
            "original",
        ]
    )
    given = shlex.split(command.replace("out/model", str(model)).replace("TASKS", "held_out"))
    more = [
        "--include_path",
        str(tmp_path / "tasks"),
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(tmp_path / "eval"),
    ]
    run([[*given, *more]], HF_HOME=str(tmp_path / "cache"))
    (samples,) = (tmp_path / "eval").rglob("samples_held_out_*.jsonl")
    theirs = {sample["doc"]["prompt"]: sample["resps"][0][0].strip() for sample in read(samples)}
    ours = [row["completion"].strip() for row in read(run_folder / "predictions.jsonl")]
    assert [theirs[row["prompt"]] for row in rows] == ours
    assert len(set(ours)) > 3  # it has learnt to look at the prompt


def write_task(folder: Path, rows: Path) -> None:
    folder.mkdir()
    (folder / "held_out.yaml").write_text(
        "task: held_out\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        "doc_to_text: '{{prompt}}'\n"
        "doc_to_target: '{{completion}}'\n"
        "generation_kwargs: {until: ['<eos>'], max_gen_toks: 24, do_sample: false}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
