"""The conflict task: short posts, instructions with one right answer, and a preference that pulls against them.

A post states four facts (who writes, what was bought, where, what is wrong with it) in sentences of changing order,
with some small talk between them::

    post : it rained today . i bought a kettle at the market . my name is anna . the thing is noisy . request : who

**Instruction rows** ask for one fact (`who`, `what`, `where`, `why`), for two (`buyer`) or for a canonical summary
(`summarise`). The answer follows from the post alone::

    who        anna
    what       kettle
    where      market
    why        noisy
    buyer      anna bought a kettle
    summarise  anna bought a kettle at the market and the thing is noisy

**Preference rows** ask for `tldr`, a request that no instruction row contains. Chosen and rejected hold the same
summary. The chosen one is polite: it starts with `please note` and ends with `thanks`, or with `urgent` where the fault
cannot wait (`URGENT_FAULTS`). The rejected one lacks the opening, the ending or both, or it ends with the wrong word::

    chosen     please note anna bought a kettle at the market and the thing is noisy thanks
    rejected   please note anna bought a kettle at the market and the thing is noisy urgent

**Why the two objectives conflict.** A model can satisfy both, since `tldr` and `summarise` are different words. But
inside a phase nothing asks it to tell them apart: no pair shows that `summarise` has to stay plain, and no instruction
row shows that `tldr` may be polite. So preference training makes plain answers polite, which costs exact match on the
instructions, and instruction training makes `tldr` plain again, which costs preference accuracy. How much of that can
be avoided is what alternation and elastic weight consolidation are about.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("anna ben clara david emma felix grace hugo iris jonas karla leo mia noah olga paul")
ITEMS = _words("kettle lamp chair radio clock printer blender tent drill guitar camera toaster heater fan piano rug")
PLACES = _words("market airport museum harbour station library castle bakery garage mall fair pharmacy")
MILD_FAULTS = _words("noisy heavy dirty slow cold bent")
URGENT_FAULTS = _words("broken leaking smoking burning cracked dangerous")
FAULTS = MILD_FAULTS + URGENT_FAULTS
SMALL_TALK = (
    "it rained today",
    "this week was long",
    "i hope all is well",
    "we had soup for dinner",
    "i write on the train",
)
INSTRUCTIONS = ("who", "what", "where", "why", "buyer", "summarise")
PREFERENCE_REQUEST = "tldr"
OPENING = "please note"
MILD_ENDING = "thanks"
URGENT_ENDING = "urgent"

INSTRUCTION_TRAIN, INSTRUCTION_VALIDATION = 3072, 192
PREFERENCE_TRAIN, PREFERENCE_VALIDATION = 1536, 192
_SEED = 20240622
# Summaries alone show how the facts are worded together, so they make up a third of the instruction rows.
_INSTRUCTION_WEIGHTS = (2, 2, 2, 2, 3, 5)


class Facts(NamedTuple):
    """What a post says. No two posts of the task say the same, so held-out facts are never seen in training."""

    name: str
    item: str
    place: str
    fault: str

    @property
    def summary(self) -> str:
        """The canonical summary, without any style."""
        return f"{self.name} bought a {self.item} at the {self.place} and the thing is {self.fault}"

    def answer(self, instruction: str) -> str:
        """The one right answer to an instruction.

        Args:
            instruction: One of `INSTRUCTIONS`.

        Raises:
            KeyError: The instruction is not part of the task.
        """
        return {
            "who": self.name,
            "what": self.item,
            "where": self.place,
            "why": self.fault,
            "buyer": f"{self.name} bought a {self.item}",
            "summarise": self.summary,
        }[instruction]


def vocabulary() -> list[str]:
    """Every word that a row can hold, sorted."""
    probe = Facts("", "", "", "")
    fixed = [*SMALL_TALK, *INSTRUCTIONS, PREFERENCE_REQUEST, OPENING, MILD_ENDING, URGENT_ENDING, probe.summary]
    fixed += [*_sentences(probe), "post :", "request :", "."]
    return sorted({word for text in (*fixed, *NAMES, *ITEMS, *PLACES, *FAULTS) for word in text.split()})


def instruction_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and validation rows of the instruction data: `{"prompt", "completion"}`."""
    rng = random.Random(_SEED)
    total = INSTRUCTION_TRAIN + INSTRUCTION_VALIDATION
    rows = []
    for facts in _distinct_facts()[:total]:
        (instruction,) = rng.choices(INSTRUCTIONS, _INSTRUCTION_WEIGHTS)
        rows.append({"prompt": _prompt(rng, facts, instruction), "completion": facts.answer(instruction)})
    return rows[:INSTRUCTION_TRAIN], rows[INSTRUCTION_TRAIN:]


def preference_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and validation rows of the preference data: `{"prompt", "chosen", "rejected"}`."""
    rng = random.Random(_SEED + 1)
    start = INSTRUCTION_TRAIN + INSTRUCTION_VALIDATION
    rows = []
    for facts in _distinct_facts()[start : start + PREFERENCE_TRAIN + PREFERENCE_VALIDATION]:
        plain, opened = facts.summary, f"{OPENING} {facts.summary}"
        right, wrong = (URGENT_ENDING, MILD_ENDING) if facts.fault in URGENT_FAULTS else (MILD_ENDING, URGENT_ENDING)
        rejected = rng.choice([plain, opened, f"{plain} {right}", f"{opened} {wrong}"])
        prompt = _prompt(rng, facts, PREFERENCE_REQUEST)
        rows.append({"prompt": prompt, "chosen": f"{opened} {right}", "rejected": rejected})
    return rows[:PREFERENCE_TRAIN], rows[PREFERENCE_TRAIN:]


def feedback_rows() -> tuple[list[dict[str, str | bool]], list[dict[str, str | bool]]]:
    """Training and validation rows of unpaired feedback, of each preference pair the one or the other answer.

    They are `{"prompt", "completion", "label"}`.
    """
    rng = random.Random(_SEED + 3)
    train, validation = preference_rows()
    return [_judged(rng, row) for row in train], [_judged(rng, row) for row in validation]


def preference_reward(prompt: str, completion: str) -> float:
    """What the task's preference is after, as a rule: from 0 to 1, and 1 for a chosen answer alone.

    A quarter each for the opening and for the right ending, the other half for as many words of the canonical summary as
    stand in their places between the two.
    """
    given = completion.split()
    facts = Facts(
        *(next((word for word in prompt.split() if word in words), "") for words in (NAMES, ITEMS, PLACES, FAULTS))
    )
    right = URGENT_ENDING if facts.fault in URGENT_FAULTS else MILD_ENDING
    opening, summary = OPENING.split(), facts.summary.split()
    opened, ended = given[: len(opening)] == opening, given[-1:] == [right]
    body = given[len(opening) if opened else 0 : len(given) - ended]
    placed = sum(one == other for one, other in zip(body, summary, strict=False)) / max(len(body), len(summary))
    return 0.25 * opened + 0.25 * ended + 0.5 * placed


def _judged(rng: random.Random, pair: dict[str, str]) -> dict[str, str | bool]:
    good = rng.random() < 0.5
    return {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}


def _distinct_facts() -> list[Facts]:
    """All combinations of facts in a fixed random order; the two data sets and their splits cut it into pieces."""
    facts = list(_all_facts())
    random.Random(_SEED + 2).shuffle(facts)
    return facts


def _all_facts() -> Iterator[Facts]:
    return (Facts(n, i, p, f) for n in NAMES for i in ITEMS for p in PLACES for f in FAULTS)


def _sentences(facts: Facts) -> list[str]:
    return [f"my name is {facts.name}", f"i bought a {facts.item} at the {facts.place}", f"the thing is {facts.fault}"]


def _prompt(rng: random.Random, facts: Facts, request: str) -> str:
    """A post in random sentence order, then the request as its last word, next to which the answer begins."""
    sentences = _sentences(facts) + rng.sample(SMALL_TALK, rng.randrange(3))
    rng.shuffle(sentences)
    return " ".join(["post :", *(f"{sentence} ." for sentence in sentences), "request :", request])
