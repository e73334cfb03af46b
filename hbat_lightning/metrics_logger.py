"""``metrics.csv`` that goes on where a resumed run goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _ContinuingWriter(ExperimentWriter):
    """Goes on with a file that is already there, where Lightning's own writer deletes it.

    Lightning asks for a writer before anything of a run has been checked. So nothing is touched until the first row.
    """

    def __init__(self, log_dir: str, filename: str) -> None:
        # Not the base class's own: it makes the folder.
        self.metrics: list[dict[str, float]] = []
        self.metrics_keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self.log_dir, self.metrics_file_path = log_dir, str(Path(log_dir) / filename)
        self._fs = get_filesystem(log_dir)

    def save(self) -> None:
        """Append the rows; the columns of a file that is there are kept."""
        if self.metrics and not self.metrics_keys:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            if Path(self.metrics_file_path).exists():
                with open(self.metrics_file_path, newline="") as file:
                    self.metrics_keys = next(csv.reader(file), [])
        super().save()


class MetricsLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run folder, row by row, so that a killed run loses none.

    Args:
        save_dir: The run folder.
        filename: Name of the file in it.
    """

    def __init__(self, save_dir: str, filename: str = ExperimentWriter.NAME_METRICS_FILE) -> None:
        super().__init__(save_dir, name=None, version="", flush_logs_every_n_steps=1)
        self._filename = filename

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            self._experiment = _ContinuingWriter(self.save_dir, self._filename)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop rows of this optimizer step and later ones: a resumed run will write them again."""
        path = Path(self.save_dir) / self._filename
        if not path.exists():
            return
        self.save()
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or []), [row for row in reader if int(row["step"]) < step]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
