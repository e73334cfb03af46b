"""``metrics.csv`` that goes on where a resumed run goes on."""

from __future__ import annotations

import csv
from pathlib import Path

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _ContinuingWriter(ExperimentWriter):
    """Keeps a file that is already there, where Lightning's own writer deletes it."""

    def _check_log_dir_exists(self) -> None:
        if Path(self.metrics_file_path).exists():
            with open(self.metrics_file_path, newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class MetricsLogger(CSVLogger):
    """Writes ``metrics.csv`` straight into the run folder, row by row, so that a killed run loses none.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir, name=None, version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if self._experiment is None:
            Path(self.save_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _ContinuingWriter(log_dir=self.save_dir)
        return self._experiment  # type: ignore[return-value]

    @rank_zero_only
    def forget_from(self, step: int) -> None:
        """Drop rows of this optimizer step and later ones: a resumed run will write them again."""
        path = Path(self.save_dir) / ExperimentWriter.NAME_METRICS_FILE
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
