"""Where the rows of an objective come from: files, folders, and data sets of the hub."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

from hbat_lightning.data.readers import WHOLE, HubSelection
from hbat_lightning.errors import UserError


class Place(NamedTuple):
    """Where rows are: what :func:`~hbat_lightning.data.readers.open_rows` takes."""

    path: str
    split: str | None
    limit: int | None
    selection: HubSelection


@dataclass(frozen=True)
class DataSource:
    """Where the rows of one objective come from.

    Attributes:
        path: A file (.json, .jsonl, .csv, .tsv, .parquet, text ones also .gz), a folder or a hub id.
        format: Name of the row format; recognised from the columns when not given.
        template: Name of the prompt template for these rows; that of the data module when not given.
        split: Split of a hub data set, or of a folder with several; ``train`` when not given.
        subset: Subset (configuration) of the hub data set ``path``.
        revision: Branch, tag or commit of it.
        data_files: Pattern of files in it, or one per split, where the data set does not say itself which files are rows,
            as in the hub's Parquet conversions, ``revision: refs/convert/parquet``.
        val_path: Held-out rows, in the same format.
        val_split: Split to hold out, of ``val_path`` or else of ``path`` itself; of hub data also a slice,
            ``validation[:500]``.
        val_fraction: Share of the rows to hold out when there is no ``val_path``; 0 holds out none.
        test_path: Rows for ``test`` and ``predict``; the held-out rows when not given.
        test_split: Split for them, likewise.
        limit: Use only the first so many rows of ``path``.
    """

    path: str
    format: str | None = None
    template: str | None = None
    split: str | None = None
    subset: str | None = None
    revision: str | None = None
    data_files: str | dict[str, str] | None = None
    val_path: str | None = None
    val_fraction: float = 0.05
    val_split: str | None = None
    test_path: str | None = None
    test_split: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Take ``null`` on the command line for what it says: jsonargparse 4.53 hands a nested one on as ``"None"``."""
        for name in (field.name for field in fields(self)):
            if getattr(self, name) == "None":
                object.__setattr__(self, name, None)
        for place, split in ((self.val_path, self.val_split), (self.test_path, self.test_split)):
            if place == self.path and (split or "train") == (self.split or "train"):
                raise UserError(
                    f"{place}: held-out rows would be the training rows: give another val_split or test_split"
                )

    @property
    def training(self) -> Place:
        """Where the training rows are."""
        return self._place(None, self.split, self.limit)

    @property
    def held_out(self) -> Place | None:
        """Where the held-out rows are; ``None`` where a share of the training rows is held out."""
        return self._place(self.val_path, self.val_split) if self.val_path or self.val_split else None

    @property
    def testing(self) -> Place | None:
        """Where the rows for ``test`` and ``predict`` are; ``None`` where the held-out rows serve."""
        return self._place(self.test_path, self.test_split) if self.test_path or self.test_split else None

    def _place(self, other: str | None, split: str | None, limit: int | None = None) -> Place:
        """A split of ``path``, or of another path, which has no part in what was chosen within ``path``."""
        own = other is None or other == self.path
        selection = HubSelection(self.subset, self.revision, self.data_files) if own else WHOLE
        return Place(other or self.path, split, limit, selection)
