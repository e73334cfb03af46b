"""Which checkpoint a run goes on from, and what is said of damaged ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hbat_lightning.checkpoint_io import AtomicCheckpointIO
from hbat_lightning.cli import main
from hbat_lightning.errors import UserError
from hbat_lightning.run_folder import clear, find_checkpoint, leave_mark, refuse_links, require_free

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 4, 8 and 12, and a link to the last; another callback has kept one too."""
    for number, name in enumerate(("step=4", "step=8", "step=12", "best")):
        path = tmp_path / "checkpoints" / f"{name}.ckpt"
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.arange(100)}}, path)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step=12.ckpt")
    return tmp_path


def spoil(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:300] + b"?" + content[301:])


def test_last_is_the_newest_good_one_and_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest = run / "checkpoints" / "step=12.ckpt"
    assert find_checkpoint(run, "last") == newest
    assert capsys.readouterr().err == ""
    spoil(newest)
    before = run / "checkpoints" / "step=8.ckpt"
    assert find_checkpoint(run, "last") == before
    said = f"hbat: warning: {newest}: damaged, its bytes are not those that were written; going back to {before}\n"
    assert capsys.readouterr().err == said


def test_damaged_ones_only_are_no_fresh_start(run: Path, tmp_path: Path) -> None:
    for path in (run / "checkpoints").glob("[sb]*.ckpt"):
        path.write_bytes(b"PK" + bytes(40))
    with pytest.raises(UserError, match=r"no good checkpoint in .*step=12\.ckpt: not a whole.*--overwrite true"):
        find_checkpoint(run, "last")
    with pytest.raises(UserError, match="unfinished run"):
        require_free(run)
    assert find_checkpoint(tmp_path / "empty", "last") is None


def test_a_damaged_one_that_was_asked_for_is_refused_with_the_name_of_the_newest_good_one(run: Path) -> None:
    folder = run / "checkpoints"
    spoil(folder / "step=4.ckpt")
    with pytest.raises(UserError, match=r"step=4\.ckpt: damaged, .*; the newest good one is .*step=12\.ckpt$"):
        find_checkpoint(run, str(folder / "step=4.ckpt"))
    copy = run / "copy.ckpt"
    copy.write_bytes((folder / "step=12.ckpt").read_bytes()[:-100])
    (run / "copy2.ckpt").write_bytes((folder / "step=12.ckpt").read_bytes())
    with pytest.raises(UserError, match=r"copy\.ckpt: not a whole .*cut off.*newest good one is .*copy2\.ckpt$"):
        find_checkpoint(run, str(copy))


def test_a_torn_mark_is_none(tmp_path: Path) -> None:
    leave_mark(tmp_path, True, {"steps": 3})
    with pytest.raises(UserError, match="finished run"):
        require_free(tmp_path)
    (tmp_path / "run.json").write_text('{"status": "fini')
    require_free(tmp_path)


def test_a_run_s_files_go_and_others_stay(tmp_path: Path) -> None:
    of_run = ["metrics.csv", "run.json", "nonfinite.jsonl", "rank1.nonfinite.jsonl", "rank12.nonfinite.jsonl"]
    others = ["notes.txt", "mine.jsonl", "rank1.notes.jsonl"]
    for name in of_run + others:
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints").mkdir()
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


LINKS = [
    *("metrics.csv", ".metrics.csv.partial", "run.json", ".lock", "config.yaml", "rank3.nonfinite.jsonl", "adapter"),
    *(
        "checkpoints",
        "checkpoints/step=4.ckpt",
        "checkpoints/.step=4.ckpt.partial",
        "adapter/README.md",
        "predictions.jsonl",
    ),
]


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_leads_out_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command that writes; what it leads to is as it was."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    (run / name).parent.mkdir(parents=True)
    outside.write_text("mine")
    (run / name).symlink_to(outside)
    for command in ("fit", "test"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--config", str(CONFIGS / "sft.yaml"), "--trainer.default_root_dir", str(run)])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hbat: ")]
        assert line.startswith(f"hbat: error: {run / name} is a link that leads out of the run folder, to {outside}")
    assert outside.read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [outside, run]


def test_other_links_are_in_order(run: Path, tmp_path: Path) -> None:
    """To a file of the run, of a name that is none of a run's, and of the whole folder."""
    (run / "data").symlink_to("/")
    (run / "metrics.csv").symlink_to(run / "checkpoints" / "best.ckpt")
    refuse_links(run)
    (run / "again").symlink_to(run)
    refuse_links(run / "again")
    refuse_links(tmp_path / "not there")
