"""The data module: files to encoded rows, held-out parts, and the training stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

from lightning.pytorch import LightningDataModule

from hbat_lightning.data.encoded_rows import EncodedRows, with_hint
from hbat_lightning.data.kinds import INSTRUCTIONS, PAIRS, RowKind
from hbat_lightning.data.provenance import Change, RowPlaces, contents_digest, digest, tokenizer_identity
from hbat_lightning.data.readers import is_on_hub, open_rows
from hbat_lightning.data.rows import ParsedFile, PartOfRows, Rows, parse_file
from hbat_lightning.data.sets import EvaluationLoader, Prompt, PromptLoader, pad_id
from hbat_lightning.data.source import DataSource, Place
from hbat_lightning.data.templates import Template, TextTemplate, resolve_template
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError, LengthError, UserError
from hbat_lightning.ranks import Ranks
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE
from hbat_lightning.stream import WindowStream, permutation
from hbat_lightning.training_data import TrainingSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hbat_lightning.alignment import AlignmentModule
    from hbat_lightning.objective import Objective

Truncation = Literal["error", "drop", "prompt_left", "completion_right"]


class HybridDataModule(LightningDataModule):
    """Instruction and preference data for one run.

    Everything is read, checked and encoded in ``setup``, before any weight is loaded.

    Args:
        instruction: Rows to imitate; may be left out where only the preference objective trains.
        preference: Pairs; may be left out where only the instruction objective trains.
        template: ``chat``, ``alpaca``, ``tldr``, ``plain``, or a :class:`~hbat_lightning.data.templates.TextTemplate`;
            by default the tokenizer's chat template if it has one, else ``alpaca``.
        max_length: Longest row in tokens, prompt and completion together.
        truncation: What happens to longer ones: ``error``, ``drop``, ``prompt_left`` or ``completion_right``.
        supervise: Which answers of a conversation are trained, ``all`` or ``last``.
        invalid_rows: What happens to rows that cannot be used: ``error``, or ``drop`` with a count.
        batch_size: Examples (pairs) in a micro-batch, on each device.
        val_batch_size: The same in evaluation; ``batch_size`` when not given.
        accept_changes: What may differ from the run that a checkpoint is of when training goes on from it; see
            :data:`~hbat_lightning.data.provenance.Change`.
    """

    def __init__(
        self,
        instruction: DataSource | None = None,
        preference: DataSource | None = None,
        template: str | TextTemplate | None = None,
        max_length: int = 1024,
        truncation: Truncation = "error",
        supervise: Literal["all", "last"] = "all",
        invalid_rows: Literal["error", "drop"] = "error",
        batch_size: int = 4,
        val_batch_size: int | None = None,
        accept_changes: Sequence[Change] = (),
    ) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 2:
            raise UserError(
                f"data: batch_size must be at least 1 and max_length at least 2, got {batch_size}, {max_length}"
            )
        self.sources = {INSTRUCTION: instruction, PREFERENCE: preference}
        self.template, self.max_length, self.truncation = template, max_length, truncation
        self.supervise, self.invalid_rows = supervise, invalid_rows
        self.batch_size, self.val_batch_size = batch_size, val_batch_size or batch_size
        self.accept_changes = tuple(accept_changes)
        self.kinds: dict[str, RowKind] = {INSTRUCTION: INSTRUCTIONS, PREFERENCE: PAIRS}
        self.train_sets: dict[str, TrainingSet] = {}
        self.val_sets: dict[str, TrainingSet] = {}
        self.notes: list[str] = []
        self.places: dict[str, RowPlaces] = {}
        self._contents: dict[str, dict[str, Any]] = {}
        self._templates: dict[str, Template] = {}
        self._tokenizer: dict[str, str] = {}
        self._stream: WindowStream | None = None
        self._prompts: list[Prompt] | None = None

    # ---- Lightning's hooks ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read and encode what the stage needs; every process reads everything."""
        with self.ranks.together():
            self._set_up(stage)

    def _set_up(self, stage: str) -> None:
        module = cast("AlignmentModule", cast(Any, self.trainer).lightning_module)
        module.require_policy()
        self.expect(module.objectives)
        tokenizer = module.policy.tokenizer
        if stage in ("fit", "validate"):
            for name in module.objectives:
                self.load(name, tokenizer, module.run_seed)
        if stage == "fit":
            accumulate = cast(Any, self.trainer).accumulate_grad_batches
            self._stream = WindowStream(
                module.schedule, self.train_sets, self.batch_size, accumulate, module.run_seed, self.ranks
            )
        if stage in ("test", "predict"):
            self._prompts = self.load_prompts(tokenizer, module.run_seed, compared=stage == "test")

    @property
    def ranks(self) -> Ranks:
        """The processes that share the data."""
        return Ranks.of(cast(Any, self.trainer))

    @property
    def stream(self) -> WindowStream:
        """The training stream; there is one after ``setup("fit")``."""
        if self._stream is None:
            raise RuntimeError("the stream exists after setup('fit')")
        return self._stream

    def train_dataloader(self) -> WindowStream:
        """The stream, at the round of the current epoch: Lightning asks for its length before it announces the epoch."""
        self.stream.set_epoch(cast(Any, self.trainer).current_epoch)
        return self.stream

    def val_dataloader(self) -> list[EvaluationLoader]:
        """One loader per objective with held-out rows: this process's share of them."""
        return [
            EvaluationLoader(data, name, self.val_batch_size, self.kinds[name].together, self.ranks)
            for name, data in self.val_sets.items()
            if len(data)
        ]

    def test_dataloader(self) -> PromptLoader:
        """Held-out prompts."""
        tokenizer = cast("AlignmentModule", cast(Any, self.trainer).lightning_module).policy.tokenizer
        return PromptLoader(cast(list[Prompt], self._prompts), self.val_batch_size, pad_id(tokenizer), self.ranks)

    def predict_dataloader(self) -> PromptLoader:
        """Held-out prompts."""
        return self.test_dataloader()

    # ---- files to sets --------------------------------------------------------------------------------------------

    def expect(self, objectives: Mapping[str, Objective]) -> None:
        """Learn which kind of rows each objective trains on.

        Raises:
            UserError: When micro-batches are too small for them.
        """
        for name, objective in objectives.items():
            if objective.rows.together and min(self.batch_size, self.val_batch_size) < 2:
                raise UserError(
                    f"data.init_args.batch_size and val_batch_size must be at least 2: the {objective.rows.name} rows of a "
                    "micro-batch are compared with each other; halve trainer.accumulate_grad_batches in exchange"
                )
            if objective.rows is not self.kinds[name]:
                self.kinds[name] = objective.rows
                self.train_sets.pop(name, None)

    def source(self, name: str) -> DataSource:
        """The source of an objective's rows.

        Raises:
            UserError: When none was given.
        """
        source = self.sources[name]
        if source is None:
            raise UserError(f"the {name} objective has no data: give --data.init_args.{name}.path")
        return source

    def encoder(self, name: str, tokenizer: PreTrainedTokenizerBase, count_merges: bool = False) -> Encoder:
        """What turns the rows of an objective into ids and masks."""
        template = resolve_template(self.source(name).template or self.template, tokenizer)
        return Encoder(tokenizer, template, self.max_length, self.truncation, self.supervise, count_merges)

    def load(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        """Read, check and encode the training and held-out rows of an objective. Idempotent."""
        if name in self.train_sets:
            return
        encoder = self.encoder(name, tokenizer)
        train, held_out = self.split(name, seed)
        for rows, sets, what in ((train, self.train_sets, "training"), (held_out, self.val_sets, "held-out")):
            kind = self.kinds[name]
            encoded = EncodedRows(rows, kind, encoder, name, self.is_fatal)
            collect = kind.collect if sets is self.train_sets else kind.held_out or kind.collect
            sets[name] = collect(encoded, self.source(name).path, pad_id(tokenizer))
            self._drop(name, encoded.faults)
            self.notes.append(f"{name}: {encoded.count:,} {what} rows of {len(rows):,}")
            if sets is self.train_sets:
                self.places[name] = encoded.places
        if not len(self.train_sets[name]):
            raise DataError("no usable row is left", self.source(name).path, remedy="Run hbat inspect to see why")
        counts = ", ".join(f"{count:,} {what}" for what, count in sorted(encoder.counts.items()))
        self._templates[name] = encoder.template
        self._tokenizer = self._tokenizer or tokenizer_identity(tokenizer)
        self.notes.append(f"{name}: template {encoder.template.name}, truncation {self.truncation}: {counts}")

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What was read, in plain types: per objective its source and template, and number and digest of the rows.

        The contents are all rows of the source before any template; training and held-out rows are encoded ones.
        """
        return {
            name: {
                "source": {key: value for key, value in asdict(self.source(name)).items() if value is not None},
                "on_hub": is_on_hub(self.source(name).path),
                "contents": self._contents[name],
                "template": self._templates[name].name,
                "template_digest": digest(self._templates[name].wording),
                "tokenizer": self._tokenizer,
                "training": {"rows": len(rows), "digest": rows.digest},
                "held_out": {"rows": len(self.val_sets[name]), "digest": self.val_sets[name].digest},
            }
            for name, rows in self.train_sets.items()
        }

    def split(self, name: str, seed: int) -> tuple[Rows, Rows]:
        """The rows of an objective, in canonical form: (training, held-out)."""
        source = self.source(name)
        rows = self.read(name, source.training)
        self._contents[name] = {"rows": len(rows), "digest": contents_digest(rows)}
        return (rows, self.read(name, source.held_out)) if source.held_out else self.hold_out(name, rows, seed)

    def hold_out(self, name: str, rows: Rows, seed: int) -> tuple[Rows, Rows]:
        """Draw a share of the rows with the run's seed: (training, held-out)."""
        fraction = self.source(name).val_fraction
        count = min(len(rows) - 1, max(1, round(len(rows) * fraction))) if fraction > 0 and len(rows) else 0
        held_out = frozenset(permutation(len(rows), seed, name, "held-out")[:count])
        return PartOfRows(rows, held_out, inside=False), PartOfRows(rows, held_out, inside=True)

    def parse(self, name: str, place: Place) -> ParsedFile:
        """Find the usable rows of a file, and collect the faults of the others.

        Raises:
            UserError: The file as a whole cannot be used.
        """
        return parse_file(open_rows(*place), lambda first: self.kinds[name].recognise(first, self.source(name).format))

    def read(self, name: str, place: Place) -> Rows:
        """Rows of a file in canonical form; faults end the run, or are dropped and counted."""
        file = self.parse(name, place)
        self._drop(name, file.faults)
        if not len(file.rows):
            raise DataError("no usable row", place.path, remedy="Run hbat inspect to see why")
        self.notes.append(f"{name}: {place.path} read as {file.format}")
        return file.rows

    def is_fatal(self, fault: DataError) -> bool:
        """Whether a fault in a single row ends the run."""
        return self.invalid_rows == "error" or isinstance(fault, LengthError)

    def _drop(self, name: str, faults: list[DataError]) -> None:
        """Note rows that cannot be used; raise instead where they end the run."""
        for fault in faults[:1]:
            if self.is_fatal(fault):
                raise with_hint(faults)
            self.notes.append(f"{name}: {len(faults):,} invalid rows of {fault.source} dropped, the first: {fault}")

    @property
    def prompt_source(self) -> str:
        """Whose rows ``test`` and ``predict`` complete: instructions, or where these have no prompts the pairs'."""
        return next(
            (name for name in self.sources if self.sources[name] is not None and self.kinds[name].prompted), PREFERENCE
        )

    def load_prompts(self, tokenizer: PreTrainedTokenizerBase, seed: int, compared: bool) -> list[Prompt]:
        """Prompts with the data's answers, for ``test`` and ``predict``.

        Args:
            tokenizer: The tokenizer of the model.
            seed: Seed of the run, which decides what is held out.
            compared: Whether completions will be compared with the answers.

        Raises:
            UserError: There are no prompts, or no answers to compare with.
        """
        name = self.prompt_source
        source, encoder = self.source(name), self.encoder(name, tokenizer)
        rows: Rows = self.read(name, source.testing) if source.testing else self.split(name, seed)[1]
        if not len(rows):
            raise UserError(f"no held-out prompts: give --data.init_args.{name}.test_path, val_path or val_fraction")
        prompts = []
        for row in rows:
            if compared and not row.answers:
                message = "the row has no answer that a completion could be compared with"
                raise DataError(
                    message, row.source, row.number, f"Complete it with hbat predict, or give {name}.test_path"
                )
            prompts.append(_prompt(encoder, row))
        return prompts

    def held_out_prompts(self, name: str, tokenizer: PreTrainedTokenizerBase, seed: int, count: int) -> list[Prompt]:
        """The first prompts of an objective's held-out rows; none where its rows have no prompts.

        Args:
            name: Name of the objective.
            tokenizer: The tokenizer of the model.
            seed: Seed of the run, which decides what is held out.
            count: How many at most.
        """
        if not self.kinds[name].prompted:
            return []
        encoder = self.encoder(name, tokenizer)
        return [_prompt(encoder, row) for row in islice(self.split(name, seed)[1], count)]


def _prompt(encoder: Encoder, row: Any) -> Prompt:
    text = "".join(segment.text for segment in encoder.template.segments(row.prompt))
    text = text.removeprefix(str(encoder.tokenizer.bos_token or ""))
    return Prompt(encoder.encode_prompt_of(row), text, row.answers[0] if row.answers else "")
