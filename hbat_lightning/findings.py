"""What a data audit finds, as plain records: the audit fills them, the terminal view and the JSON report read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FaultKind:
    """Rows with the same fault.

    Attributes:
        kind: What is wrong, with an N for every number.
        count: How many rows.
        fatal: Whether it ends the run under the configured policies; else the rows are left out.
        first: The first few, each as the line that training would end with.
    """

    kind: str
    count: int
    fatal: bool
    first: list[str]


@dataclass(frozen=True)
class FileFindings:
    """A file, folder or hub id. Every row is one of usable, invalid and dropped.

    Attributes:
        path: Where the rows come from.
        formats: Rows by the format they were read as.
        found: All rows.
        usable: Rows that would train or be evaluated.
        invalid: Rows with a fault.
        dropped: Rows that the truncation policy leaves out.
        faults: The faults by kind, the most frequent first.
    """

    path: str
    formats: dict[str, int]
    found: int
    usable: int
    invalid: int
    dropped: int
    faults: list[FaultKind]


@dataclass(frozen=True)
class PartFindings:
    """The training or the held-out rows of an objective, those with a fault in the file left aside.

    Attributes:
        path: The file they come from.
        rows: Rows with a readable format; usable + invalid + dropped.
        usable: Rows that would train or be evaluated.
        invalid: Rows that the template cannot write, or that do not fit into ``max_length`` under the policy.
        dropped: Rows that the truncation policy leaves out.
        over_length: Rows of more than ``max_length`` tokens, whatever the policy; under ``error`` each ends the run.
        truncated_prompt: Usable rows that lose the beginning of their prompt.
        truncated_completion: Usable rows that lose the end of an answer, and its stop token.
        lengths: Percentiles of token counts before truncation (nearest rank): of the prompt; of the completion with its
            stop token, in pairs both, and each side; of the whole, in pairs the longer side, which ``max_length`` limits.
        answers: Last answers of usable rows; a pair has two.
        ending_in_stop: Share of these whose last label is the stop token; ``None`` where there are none.
        unsupervised: Usable rows with an answer of which no token is learnt.
        unknown: Usable rows of whose tokens more than a tenth are the tokenizer's unknown one.
        boundary_merges: Rows whose prompt and answer, tokenised as one text, would give other ids at their boundary.
        bos: Sequences by how many bos tokens they hold.
    """

    path: str
    rows: int
    usable: int
    invalid: int
    dropped: int
    over_length: int
    truncated_prompt: int
    truncated_completion: int
    lengths: dict[str, dict[str, int]]
    answers: int
    ending_in_stop: float | None
    unsupervised: int
    unknown: int
    boundary_merges: int
    bos: dict[str, int]


@dataclass(frozen=True)
class Duplicates:
    """Rows that stand in the data more than once, compared in canonical form.

    Attributes:
        inside_train: Training rows that repeat an earlier one, prompt and answers.
        prompt_inside_train: Training rows that repeat only the prompt of an earlier one.
        across: Held-out rows that also stand in training, prompt and answers.
        prompt_across: Held-out rows of which only the prompt stands in training.
        first: The first few of ``inside_train`` and ``across``.
    """

    inside_train: int
    prompt_inside_train: int
    across: int
    prompt_across: int
    first: list[str]


@dataclass(frozen=True)
class Example:
    """An encoded row, to be shown.

    Attributes:
        title: Which row it is.
        ids: Its token ids.
        supervised: Which of them are learnt.
    """

    title: str
    ids: list[int]
    supervised: list[bool]


@dataclass(frozen=True)
class SourceFindings:
    """What was found in the data of one objective.

    Attributes:
        objective: Its name.
        template: Name of the template.
        template_from: Who chose it.
        stop_token: The token that ends an answer, and its id.
        files: The files.
        parts: ``training`` and ``held_out`` rows.
        duplicates: Rows that stand there more than once.
        rounds: Shards that the schedule cuts the training rows into.
        examples: Rows to show.
    """

    objective: str
    template: str
    template_from: str
    stop_token: dict[str, Any]
    files: list[FileFindings]
    parts: dict[str, PartFindings]
    duplicates: Duplicates
    rounds: int
    examples: list[Example]


@dataclass(frozen=True)
class Findings:
    """The whole audit.

    Attributes:
        tokenizer: Its name and its special tokens.
        settings: The settings of the data module that decide about rows.
        sources: Findings per objective.
        warnings: What deserves attention, in words.
    """

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    sources: list[SourceFindings]
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The findings as plain dictionaries and lists."""
        return asdict(self)


def warnings(source: SourceFindings, tokenizer: dict[str, Any]) -> list[str]:
    """What in the findings of an objective deserves attention, in words.

    Args:
        source: The findings.
        tokenizer: Facts of the tokenizer, as in :class:`Findings`.
    """
    train, held_out, twice = source.parts["training"], source.parts["held_out"], source.duplicates
    parts = [train, held_out]
    fatal = [kind for file in source.files for kind in file.faults if kind.fatal]
    left_out = [kind for file in source.files for kind in file.faults if not kind.fatal]
    dropped, cut = sum(part.dropped for part in parts), sum(part.truncated_completion for part in parts)
    unsupervised = sum(part.unsupervised for part in parts)
    stops = [part.ending_in_stop for part in parts if part.ending_in_stop is not None]
    said = [
        (_count(fatal), "would end the run"),
        (_count(left_out), "are left out, being invalid"),
        (dropped, "are left out, being longer than max_length"),
        (cut, "lose the end of an answer and its stop token, so that no stop is learnt there"),
        (unsupervised, "have no token to learn"),
        (sum(part.unknown for part in parts), "are for more than a tenth words that the tokenizer does not know"),
        (twice.across, "are held out but stand in training too, so that held-out figures will flatter"),
        (twice.inside_train, "repeat an earlier row of training"),
    ]
    lines = [f"rows that {what}: {count:,}" for count, what in said if count]
    if not cut and any(share < 1 for share in stops):
        lines.append("not every answer ends in a stop token")
    bos = tokenizer["bos"]
    if bos["token"] and bos != tokenizer["eos"] and any(part.bos.get("none") for part in parts):
        lines.append(f"the tokenizer has a bos token, {bos['token']}, that neither it nor the template writes")
    if train.usable < source.rounds:
        lines.append(f"{train.usable:,} usable training rows are fewer than the schedule's {source.rounds} rounds")
    if not held_out.usable:
        lines.append("no held-out rows: there will be no val figures")
    return [f"{source.objective}: {line}" for line in lines]


def _count(kinds: list[FaultKind]) -> int:
    return sum(kind.count for kind in kinds)
