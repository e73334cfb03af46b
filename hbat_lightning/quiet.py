"""Silences messages of other libraries that no user of this one can act on; each with its reason."""

from __future__ import annotations

import logging
import warnings

_LOGGED = {
    # Advertisements of hosted services.
    "lightning.pytorch.utilities.rank_zero": ("💡 Tip:",),
    # On CPUs with AVX512-BF16 bitsandbytes looks for an optional package that would fetch a kernel from a hub.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Said once per process, without the layers' names; the export prints the type that it writes.
    "transformers.integrations.bitsandbytes": ("The modules are dequantized in",),
    # One line per quantised layer and pass; int8 layers compute in float16 whatever comes in.
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
}
_WARNED = (
    r"It is recommended to use .*sync_dist=True",  # figures are summed over processes before they are logged
    ".*gradient_checkpointing.* is deprecated",  # PEFT 0.21 and transformers 5 use old names of their own methods
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 inside itself, with torch 2.13
    "Couldn't infer the batch indices",  # our loaders yield whole batches; nobody asks for indices
    ".*does not have many workers",  # rows are encoded beforehand; collating them needs no worker
    r".*Found .* module\(s\) in eval mode at the start of training",  # each phase sets the mode before its first step
)


def quieten_imports() -> None:
    """Add the filter for what bitsandbytes says when it is imported, and no other: the process may not be ours."""
    name = "bitsandbytes.backends.cpu.ops"
    logging.getLogger(name).addFilter(_Without(_LOGGED[name]))


def install() -> None:
    """Add all filters, for the command line."""
    for name, beginnings in _LOGGED.items():
        logging.getLogger(name).addFilter(_Without(beginnings))
    for message in _WARNED:
        warnings.filterwarnings("ignore", message=message)


class _Without(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)
