"""Which rows of a source are training, held-out and test rows."""

from __future__ import annotations

from hbat_lightning import DataSource
from hbat_lightning.data.readers import WHOLE, HubSelection


def test_splits_of_a_hub_data_set_share_its_subset_revision_and_files() -> None:
    files = {"train": "a/*.parquet", "validation": "b/*.parquet"}
    source = DataSource(
        "owner/name", subset="main", revision="v1", data_files=files, val_split="validation[:9]", limit=5
    )
    chosen = HubSelection("main", "v1", files)
    assert source.training == ("owner/name", None, 5, chosen)
    assert source.held_out == ("owner/name", "validation[:9]", None, chosen)
    assert source.testing is None


def test_another_path_has_no_part_in_what_is_chosen_within_the_first() -> None:
    source = DataSource(
        "owner/name", revision="v1", val_path="held_out.json", test_path="owner/other", test_split="test"
    )
    assert source.held_out == ("held_out.json", None, None, WHOLE)
    assert source.testing == ("owner/other", "test", None, WHOLE)


def test_null_as_the_command_line_hands_it_on() -> None:
    source = DataSource("a.json", split="None", revision="None", data_files="None", val_split="None")
    assert source.training == ("a.json", None, None, WHOLE)
    assert source.held_out is None
