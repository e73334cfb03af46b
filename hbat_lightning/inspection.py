"""The data audit: what training would read, how long it is, what it would learn from it, and what is wrong with it.

Nothing is decided here. Files are read, held out, templated, tokenised and truncated by the same calls that training
makes; this module only counts. No weights are involved.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hbat_lightning.data.encoded import Encoded
from hbat_lightning.data.encoded_rows import with_bar
from hbat_lightning.data.fields import Row
from hbat_lightning.data.kinds import RowKind
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.rows import ParsedFile, Rows
from hbat_lightning.data.sets import pad_id
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError
from hbat_lightning.findings import (
    Duplicates,
    Example,
    FaultKind,
    FileFindings,
    Findings,
    PartFindings,
    SourceFindings,
    warnings,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (0, 50, 90, 95, 99, 100)
SHOWN = 3  # of every kind of fault or duplicate


def audit(
    data: HybridDataModule,
    objectives: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    shards: int = 1,
    examples: int = 0,
) -> Findings:
    """Read and encode the data of some objectives, and report what is there.

    Args:
        data: The data module of the run.
        objectives: Names of the objectives that train.
        tokenizer: The tokenizer of the model.
        seed: Seed of the run, which decides what is held out.
        shards: How many shards the schedule cuts the training rows into.
        examples: How many usable training rows to keep for showing, per objective.

    Raises:
        UserError: A file as a whole cannot be used. Faults in single rows are findings.
    """
    sources = [_source(data, name, tokenizer, seed, shards, examples) for name in objectives]
    settings = {name: getattr(data, name) for name in ("max_length", "truncation", "supervise", "invalid_rows")}
    facts = _tokenizer_facts(tokenizer)
    return Findings(facts, settings, sources, [line for source in sources for line in warnings(source, facts)])


# ---- one objective ------------------------------------------------------------------------------------------------


def _source(
    data: HybridDataModule, name: str, tokenizer: PreTrainedTokenizerBase, seed: int, shards: int, examples: int
) -> SourceFindings:
    source = data.source(name)
    files = [data.parse(name, source.training)]
    if source.held_out:
        files.append(data.parse(name, source.held_out))
        train, held_out = files[0].rows, files[1].rows
    else:
        train, held_out = data.hold_out(name, files[0].rows, seed)
    audits = {
        part: _Part(data.encoder(name, tokenizer, count_merges=True), data.kinds[name], keep)
        for part, keep in (("training", examples), ("held_out", 0))
    }
    for (part, audited), rows in zip(audits.items(), (train, held_out), strict=True):
        audited.read(rows, f"{name}, {part.replace('_', '-')} rows")
    # A part belongs to its own file, or both belong to the one there is.
    owners = [[audits["training"]], [audits["held_out"]]] if source.held_out else [list(audits.values())]
    encoder = audits["training"].encoder
    return SourceFindings(
        objective=name,
        template=encoder.template.name,
        template_from=_template_origin(source.template, data.template, tokenizer),
        stop_token={"token": _token(tokenizer, encoder.stop_token_id), "id": encoder.stop_token_id},
        files=[_file(data, file, parts) for file, parts in zip(files, owners, strict=True)],
        parts={part: audited.findings(files[-1 if part == "held_out" else 0].path) for part, audited in audits.items()},
        duplicates=find_duplicates(train, held_out),
        rounds=shards,
        examples=audits["training"].examples,
    )


class _Part:
    """Counts over some rows.

    Args:
        encoder: Encodes them; used for nothing else, since it counts too.
        kind: Which kind of rows they are.
        keep: Usable rows to keep as examples.
    """

    def __init__(self, encoder: Encoder, kind: RowKind, keep: int) -> None:
        self.encoder, self.kind, self.keep = encoder, kind, keep
        self.faults: list[DataError] = []
        self.examples: list[Example] = []
        self.rows = self.usable = self.over_length = self.unsupervised = self.unknown = self.answers = self.stopped = 0
        self.lengths: dict[str, array[int]] = {}
        self.bos: Counter[str] = Counter()

    def read(self, rows: Rows, what: str) -> None:
        for row in with_bar(rows, what):
            self.rows += 1
            try:
                self._row(row)
            except DataError as fault:
                self.faults.append(fault.with_traceback(None))

    def _row(self, row: Row) -> None:
        draft = self.kind.draft(self.encoder, row)
        prompt, answers = draft.lengths
        self._measure(prompt, answers)
        self.over_length += prompt + max(answers) > self.encoder.max_length
        encoded = self.kind.fit(self.encoder, row, draft)
        if encoded is None:
            return
        self.usable += 1
        self.unknown += any(self._share_unknown(side) > 0.1 for side in encoded)
        for side in encoded:
            self._opening(side)
        if self.kind.answered:
            for side in encoded:
                self._answer(side)
            # The first token is never predicted, so it does not count as learnt.
            self.unsupervised += not all(side.supervised[1:].any() for side in encoded)
        if self.usable <= self.keep:
            names = (", chosen", ", rejected") if len(draft.answers) == 2 else ("", *(", continued",) * len(encoded))
            self.examples += [
                Example(f"{row.source}, row {row.number}{name}", side.input_ids.tolist(), side.supervised.tolist())
                for name, side in zip(names, encoded, strict=False)
            ]

    def _measure(self, prompt: int, answers: list[int]) -> None:
        measured = {"prompt": [prompt], "completion": answers, "whole": [prompt + max(answers)]}
        if len(answers) == 2:
            measured |= {"chosen": answers[:1], "rejected": answers[1:]}
        for name, lengths in measured.items():
            self.lengths.setdefault(name, array("i")).extend(lengths)

    def _answer(self, side: Encoded) -> None:
        self.answers += 1
        self.stopped += bool(side.supervised[-1]) and int(side.input_ids[-1]) == self.encoder.stop_token_id

    def _share_unknown(self, side: Encoded) -> float:
        tokenizer = self.encoder.tokenizer
        unknown = tokenizer.unk_token_id
        if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id):
            return 0.0  # a tokenizer of bytes knows everything, and may have another token in that place
        return int((side.input_ids == unknown).sum()) / max(len(side.input_ids), 1)

    def _opening(self, side: Encoded) -> None:
        bos = self.encoder.tokenizer.bos_token_id
        count = 0 if bos is None else int((side.input_ids == bos).sum())
        self.bos[("none", "one", "more")[min(count, 2)]] += 1

    def findings(self, path: str) -> PartFindings:
        counts = self.encoder.counts
        return PartFindings(
            path=path,
            rows=self.rows,
            usable=self.usable,
            invalid=len(self.faults),
            dropped=counts["dropped"],
            over_length=self.over_length,
            truncated_prompt=counts["truncated_prompt"],
            truncated_completion=counts["truncated_completion"],
            lengths={name: percentiles(lengths) for name, lengths in self.lengths.items()},
            answers=self.answers,
            ending_in_stop=self.stopped / self.answers if self.answers else None,
            unsupervised=self.unsupervised,
            unknown=self.unknown,
            boundary_merges=counts["boundary_merges"],
            bos=dict(self.bos),
        )


def _file(data: HybridDataModule, file: ParsedFile, parts: Sequence[_Part]) -> FileFindings:
    faults = [*file.faults, *(fault for part in parts for fault in part.faults)]
    usable = sum(part.usable for part in parts)
    found = len(file.rows) + len(file.faults)
    return FileFindings(
        path=file.path,
        formats={file.format: found},
        found=found,
        usable=usable,
        invalid=len(faults),
        dropped=sum(part.encoder.counts["dropped"] for part in parts),
        faults=_by_kind(data, faults),
    )


def _by_kind(data: HybridDataModule, faults: Iterable[DataError]) -> list[FaultKind]:
    kinds: dict[tuple[str, bool], list[DataError]] = {}
    for fault in sorted(faults, key=lambda fault: fault.row or 0):
        kinds.setdefault((re.sub(r"\d+", "N", fault.message), data.is_fatal(fault)), []).append(fault)
    found = [
        FaultKind(kind, len(same), fatal, [str(fault) for fault in same[:SHOWN]])
        for (kind, fatal), same in kinds.items()
    ]
    return sorted(found, key=lambda kind: -kind.count)


# ---- figures ------------------------------------------------------------------------------------------------------


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Percentiles by nearest rank: each is a length that some row has."""
    ranked = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    return {f"p{percent}": int(length) for percent, length in zip(PERCENTILES, ranked, strict=True)}


def find_duplicates(train: Rows, held_out: Rows) -> Duplicates:
    """Compare canonical rows: blanks and spelling count, the format that a row came in does not."""
    whole: dict[bytes, int] = {}
    prompts: set[bytes] = set()
    counts: Counter[str] = Counter()
    first: list[str] = []
    for row in train:
        prompt, same = _digests(row)
        if same in whole:
            counts["inside_train"] += 1
            first.append(f"training row {row.number} repeats row {whole[same]}")
        elif prompt in prompts:
            counts["prompt_inside_train"] += 1
        whole.setdefault(same, row.number)
        prompts.add(prompt)
    inside = first[:SHOWN]
    first = []
    for row in held_out:
        prompt, same = _digests(row)
        if same in whole:
            counts["across"] += 1
            first.append(f"held-out row {row.number} is training row {whole[same]}")
        elif prompt in prompts:
            counts["prompt_across"] += 1
    return Duplicates(
        inside_train=counts["inside_train"],
        prompt_inside_train=counts["prompt_inside_train"],
        across=counts["across"],
        prompt_across=counts["prompt_across"],
        first=inside + first[:SHOWN],
    )


def _digests(row: Row) -> tuple[bytes, bytes]:
    """What stands for a prompt, and for it with its answers, in place of their texts."""
    prompt = repr([(turn.role, turn.content, turn.context) for turn in row.prompt])
    return tuple(
        hashlib.blake2b(text.encode(), digest_size=16).digest() for text in (prompt, prompt + repr(row.answers))
    )  # type: ignore[return-value]


# ---- facts --------------------------------------------------------------------------------------------------------


def _template_origin(own: str | None, common: object, tokenizer: PreTrainedTokenizerBase) -> str:
    if own is not None:
        return "given for this data (template of the source)"
    if common is not None:
        return "given for all data (data.init_args.template)"
    return "the tokenizer's chat template" if tokenizer.chat_template else "the default, as the tokenizer has none"


def _token(tokenizer: PreTrainedTokenizerBase, number: int | None) -> str | None:
    return None if number is None else str(tokenizer.convert_ids_to_tokens(number))


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    special: Mapping[str, int | None]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        "name": str(tokenizer.name_or_path),
        "kind": type(tokenizer).__name__,
        "size": len(tokenizer),
        **{name: {"token": _token(tokenizer, number), "id": number} for name, number in special.items()},
        "padding_id": pad_id(tokenizer),  # what fills rows up where there is no pad token
        "pad_is_eos": pad_id(tokenizer) == special["eos"],
    }
