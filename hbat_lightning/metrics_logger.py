"""``metrics.csv`` that goes on where a resumed run goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from hbat_lightning.files import append_text, replace_text, sync_file, whole_lines

Row = dict[str, Any]


class _ContinuingWriter(ExperimentWriter):
    """Goes on with a file that is already there, where Lightning's own writer deletes it.

    Lightning asks for a writer before anything of a run has been checked. So nothing is touched until the first row. The
    file is whole at any moment, but for a last line that may be torn: new columns do not empty it for a while.
    """

    def __init__(self, log_dir: str, filename: str) -> None:
        # Not the base class's own: it makes the folder.
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self.log_dir, self.metrics_file_path = log_dir, str(Path(log_dir) / filename)
        self._fs = get_filesystem(log_dir)

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.metrics_file_path)

    def save(self) -> None:
        """Append the rows; the columns of a file that is there are kept."""
        if not self.metrics:
            return
        rows, self.metrics = self.metrics, []  # rows that cannot be written are not tried again behind a torn line
        if not self.metrics_keys:
            self.metrics_keys = read_rows(self.path)[0]
        columns = sorted(set(self.metrics_keys).union(*rows))
        if columns == self.metrics_keys and self.path.exists():
            append_text(self.path, _lines(columns, rows))
            return
        write_rows(self.path, columns, [*read_rows(self.path)[1], *rows])
        self.metrics_keys = columns


class MetricsLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run folder, row by row, so that a killed run loses none.

    Args:
        save_dir: The run folder.
        filename: Name of the file in it.
        leave_out: Columns that are not written.
    """

    def __init__(
        self,
        save_dir: str,
        filename: str = ExperimentWriter.NAME_METRICS_FILE,
        leave_out: Sequence[str] = (),
    ) -> None:
        super().__init__(save_dir, name=None, version="", flush_logs_every_n_steps=1)
        self._filename, self._leave_out = filename, leave_out
        self._ahead: tuple[int, frozenset[str]] | None = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _ContinuingWriter(self.save_dir, self._filename)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def log_ahead(self, metrics: dict[str, float], step: int) -> None:
        """Write a row that Lightning will log next, and pass over it then.

        A checkpoint is saved before Lightning logs the step that it ends with. Without this, a process that is killed in
        between would leave a checkpoint that goes on behind a row which was never written.
        """
        self._ahead = None
        self.log_metrics(metrics, step)
        self._ahead = (step, frozenset(metrics))

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a row."""
        metrics = {name: value for name, value in metrics.items() if name not in self._leave_out}
        ahead, self._ahead = self._ahead, None
        if ahead is None or (step, frozenset(metrics)) != ahead:
            super().log_metrics(metrics, step)

    @rank_zero_only
    def sync(self) -> None:
        """See to it that all rows are on the disk: a checkpoint that is there goes on behind them."""
        path = Path(self.save_dir) / self._filename
        if path.exists():
            sync_file(path)

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop rows of this optimizer step and later ones: a resumed run will write them again."""
        path = Path(self.save_dir) / self._filename
        if not path.exists():
            return
        self.save()
        columns, rows = read_rows(path)
        if columns:
            write_rows(path, columns, [row for row in rows if int(row["step"]) < step])
        else:
            path.unlink()


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a file, up to a line that was torn as it was written; neither where there is no file."""
    lines = list(csv.reader(whole_lines(path))) if path.exists() else []
    columns = lines[0] if lines else []
    rows: list[Row] = []
    for line in lines[1:]:
        row = dict(zip(columns, line, strict=False))
        if len(line) != len(columns) or not row["step"].isdecimal():
            break
        rows.append(row)
    return columns, rows


def write_rows(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a file anew, whole or not at all."""
    replace_text(path, _lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))


def _lines(columns: Sequence[str], rows: Sequence[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue()
