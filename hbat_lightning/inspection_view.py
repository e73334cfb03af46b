"""A data audit as people read it: a report in words and figures, and rows as tokens with their labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from hbat_lightning.findings import Example, FileFindings, Findings, PartFindings, SourceFindings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# ANSI codes: what is learnt, what is only read, and the token that ends an answer.
_LEARNT, _READ, _STOP, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1;7;33m", "\x1b[0m"
_LONGEST = 96  # tokens of one label in a row that are shown whole
_CONTEXT = 8  # tokens before a token that its text may depend on


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour: only on a terminal, and not where the user has switched it off (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


# ---- the report ---------------------------------------------------------------------------------------------------


def render(findings: Findings) -> str:
    """The report without the examples."""
    blocks = [_tokenizer(findings), *(_source(source, findings) for source in findings.sources)]
    heading = "attention" if findings.warnings else "nothing stands out"
    blocks.append([heading, *(f"  ! {line}" for line in findings.warnings)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _tokenizer(findings: Findings) -> list[str]:
    facts, settings = findings.tokenizer, findings.settings
    special = [
        f"{name} {facts[name]['token']} ({facts[name]['id']})" if facts[name]["token"] else f"no {name}"
        for name in ("bos", "eos", "pad")
    ]
    padding = ", rows are filled up with eos and masked by length" if facts["pad_is_eos"] else ""
    return [
        f"tokenizer  {facts['name']} ({facts['kind']}, {facts['size']:,} tokens): {', '.join(special)}{padding}",
        "settings   " + ", ".join(f"{name} {value}" for name, value in settings.items()),
    ]


def _source(source: SourceFindings, findings: Findings) -> list[str]:
    stop = source.stop_token
    lines = [
        f"== {source.objective} ==",
        f"template   {source.template}: {source.template_from}; answers end in {stop['token']} ({stop['id']})",
    ]
    for file in source.files:
        lines += _file(file)
    for name, part in source.parts.items():
        lines += _part(name.replace("_", "-"), part, findings)
    rows = source.parts["training"].usable
    if source.rounds > 1:
        lines.append(f"rounds     {source.rounds}, of about {rows // source.rounds:,} training rows each")
    twice = source.duplicates
    lines.append(
        f"duplicates {twice.inside_train:,} in training (and {twice.prompt_inside_train:,} of the prompt alone), "
        f"{twice.across:,} between held-out and training (and {twice.prompt_across:,} of the prompt alone)"
    )
    return lines + [f"             {line}" for line in twice.first]


def _file(file: FileFindings) -> list[str]:
    formats = ", ".join(f"{count:,} as {name}" for name, count in file.formats.items())
    lines = [
        f"file       {file.path}",
        f"           {file.found:,} rows found ({formats}) = {file.usable:,} usable + {file.invalid:,} invalid "
        f"+ {file.dropped:,} dropped",
    ]
    for kind in file.faults:
        fate = "ends the run" if kind.fatal else "left out"
        lines.append(f"  invalid  {kind.count:,} × {kind.kind} [{fate}]")
        lines += [f"             {printable(line)}" for line in kind.first]
    return lines


def _part(name: str, part: PartFindings, findings: Findings) -> list[str]:
    settings = findings.settings
    lines = [
        f"{name}: {part.usable:,} usable rows of {part.rows:,} ({part.invalid:,} invalid, {part.dropped:,} dropped)"
    ]
    if not part.rows:
        return lines
    cut = part.truncated_prompt + part.truncated_completion
    share = "–" if part.ending_in_stop is None else f"{part.ending_in_stop:.2%}"
    bos = ", ".join(f"{count:,} with {many}" for many, count in part.bos.items())
    return [
        *lines,
        *_lengths(part),
        f"  over max_length {settings['max_length']:,}: {part.over_length:,} rows; truncation {settings['truncation']} "
        f"drops {part.dropped:,} and cuts {cut:,}; truncation error would end the run at {part.over_length:,}",
        f"  last label is the stop token: {share} of {part.answers:,} answers; rows without a token to learn: "
        f"{part.unsupervised:,}; with unknown words: {part.unknown:,}",
        f"  boundary merges of prompt and answer: {part.boundary_merges:,}; sequences by bos tokens: {bos or 'none'}",
    ]


def _lengths(part: PartFindings) -> Iterator[str]:
    heading = list(next(iter(part.lengths.values()), {}))
    if heading:
        yield "  tokens      " + "".join(f"{name:>8}" for name in heading)
    for name, values in part.lengths.items():
        yield f"  {name:<12}" + "".join(f"{value:>8,}" for value in values.values())


# ---- tokens -------------------------------------------------------------------------------------------------------


def show_tokens(example: Example, tokenizer: PreTrainedTokenizerBase, stop_token_id: int, colour: bool) -> str:
    """A row as its tokens, with what becomes of each.

    Args:
        example: The row.
        tokenizer: What its ids belong to.
        stop_token_id: The token that ends answers.
        colour: With ANSI colours; else what is learnt stands in brackets, and a learnt stop token in double ones.
    """
    paint = _coloured if colour else _bracketed
    labelled = zip(token_texts(example.ids, tokenizer), example.ids, example.supervised, strict=True)
    written = []
    for learnt, run in groupby(labelled, key=lambda item: item[2]):
        tokens = list(run)
        hidden = len(tokens) - _LONGEST
        for place, (text, number, _) in enumerate(tokens):
            if hidden > 0 and _LONGEST // 2 <= place < _LONGEST // 2 + hidden:
                if place == _LONGEST // 2:
                    written.append(f" … {hidden:,} more tokens … ")
                continue
            written.append(paint(text, learnt, learnt and number == stop_token_id))
    return "".join(written)


def legend(colour: bool) -> str:
    """What the marks mean."""
    marks: Callable[[str, bool, bool], str] = _coloured if colour else _bracketed
    return f"{marks('read', False, False)}  {marks('learnt', True, False)}  {marks('stop token', True, True)}"


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token where it stands: what the decoded row grows by with it.

    Tokens that are part of a character have none, the last of them has the character.
    """
    texts, start = [], 0
    for place in range(len(ids)):
        start = max(start, place - _CONTEXT)
        before, upto = _decode(ids[start:place], tokenizer), _decode(ids[start : place + 1], tokenizer)
        grown = upto[len(before) :] if upto.startswith(before) else upto[len(before.rstrip("\ufffd")) :]
        texts.append("" if grown.endswith("\ufffd") and place + 1 < len(ids) else grown)
    return texts


def printable(text: str) -> str:
    """Text without characters that would drive the terminal; line ends are shown and kept."""
    kept = "".join(char if char.isprintable() or char == "\n" else "\ufffd" for char in text)
    return kept.replace("\n", "↵\n")


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _coloured(text: str, learnt: bool, stops: bool) -> str:
    return f"{_STOP if stops else _LEARNT if learnt else _READ}{printable(text)}{_PLAIN}"


def _bracketed(text: str, learnt: bool, stops: bool) -> str:
    return f"[[{printable(text)}]]" if stops else f"[{printable(text)}]" if learnt else printable(text)
