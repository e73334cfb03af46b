"""Places in a run at which it can be stopped. Only tests and the soak set these traps; the package knows nothing of them."""

from __future__ import annotations

import enum
import errno
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


class Fault(enum.Enum):
    """What else ends a run than a signal."""

    EXCEPTION = "an exception"
    FULL_DISK = "a full disk"

    def happen(self) -> NoReturn:
        """End the run."""
        if self is Fault.FULL_DISK:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("nobody expects this")


@dataclass(frozen=True)
class Stop:
    """A signal to a run, or a fault in it.

    Attributes:
        signal: Which.
        place: Where in the run it comes; ``time`` where the clock decides.
        count: How often the place is reached until then; of the clock, milliseconds.
    """

    signal: signal.Signals | Fault
    place: str
    count: int

    def __str__(self) -> str:
        when = f"after {self.count} ms" if self.place == "time" else f"{self.place}, {self.count}."
        return f"{self.signal.name} {when}"


class Traps:
    """Counts how often a run comes to each place, and stops it at one.

    Args:
        stop: Where; ``None`` only counts.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self.stop = stop
        self.counts: Counter[str] = Counter()

    def reach(self, place: str) -> None:
        """The run is at a place."""
        self.counts[place] += 1
        stop = self.stop
        if stop is not None and place == stop.place and self.counts[place] == stop.count:
            if isinstance(stop.signal, Fault):
                stop.signal.happen()
            os.kill(os.getpid(), stop.signal)

    def around(self, owner: Any, name: str, place: str) -> None:
        """Set traps before and behind a function."""
        original: Callable[..., Any] = getattr(owner, name)

        def trapped(*args: Any, **kwargs: Any) -> Any:
            self.reach(f"before {place}")
            result = original(*args, **kwargs)
            self.reach(f"after {place}")
            return result

        setattr(owner, name, staticmethod(trapped) if isinstance(vars(owner).get(name), staticmethod) else trapped)

    def install(self) -> None:
        """Set all traps, in this process."""
        from lightning.pytorch.trainer import call

        from hbat_lightning import alignment, checkpoint_io, cli, files, metrics_logger
        from hbat_lightning.callbacks import checkpoint, switch_report
        from hbat_lightning.policy import Policy

        hooks: Any = call._call_callback_hooks

        def hook(trainer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
            self.reach(_place_of(trainer, name, args))
            return hooks(trainer, name, *args, **kwargs)

        call._call_callback_hooks = hook  # type: ignore[assignment]
        self.around(alignment, "roll_out", "rollouts")
        self.around(alignment.OptimizerStateKeeper, "switch", "a switch of the optimizer's state")
        self.around(alignment.AlignmentModule, "_log_window", "the window's figures")
        self.around(metrics_logger, "append_text", "a row of metrics.csv")
        self.around(metrics_logger, "replace_text", "metrics.csv anew")
        self.around(switch_report, "append_text", "a row of switches.jsonl")
        self.around(switch_report, "replace_text", "switches.jsonl anew")
        self.around(checkpoint_io._DigestingWriter, "write", "bytes of a checkpoint")
        self.around(checkpoint_io, "_seal", "a checkpoint's checksum")
        self.around(checkpoint.WindowCheckpoint, "_link_checkpoint", "the link to a checkpoint")
        self.around(checkpoint.WindowCheckpoint, "_tidy", "old checkpoints go")
        self.around(files.os, "replace", "a file takes its place")
        self.around(files, "sync_folder", "the folder is synced")
        self.around(Policy, "export", "the export")
        self.around(cli, "leave_mark", "run.json")
        # What only runs that go on come to.
        self.around(cli, "find_checkpoint", "the search for a checkpoint")
        self.around(checkpoint_io.AtomicCheckpointIO, "load_checkpoint", "a checkpoint is read")
        self.around(alignment.AlignmentModule, "on_load_checkpoint", "what a checkpoint says is taken over")
        self.around(metrics_logger.MetricsLogger, "forget_from", "later rows of metrics.csv go")


def _place_of(trainer: Any, hook: str, args: tuple[Any, ...]) -> str:
    if hook == "on_train_batch_end" and not args[1].last:
        return "on_train_batch_end, inside a window"
    if hook == "on_train_batch_end":
        phase = trainer.lightning_module.plan.ended_at(trainer.global_step)
        return "on_train_batch_end, of a window" if phase is None else "on_train_batch_end, of a phase"
    return f"{hook}, sanity check" if trainer.sanity_checking else hook
