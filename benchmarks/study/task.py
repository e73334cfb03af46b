"""The study's task: posts of five facts, instructions with one right answer, and summaries whose quality can be computed.

A post says who writes, what was bought where, what is wrong with it, and what is asked, with some small talk between::

    post : i bought a i5 . my name is n3 . it rained . i was at p7 . it has q3 . should i a9 ? request : who

**Instructions** ask for a fact (``who``, ``what``, ``where``, ``why``, ``ask``), for three of them (``short``) or for the
whole (``plain``); each has one right answer, in words of the pre-training: what is learnt is what to say when. A share of
the rows are ``tldr``: summaries as people write them, which leave facts out, or begin with ``please`` or end with ``thanks``
or say ``basically`` now and then.

**Preferences** are about ``tldr`` alone. Gold, which no method sees but by labels of pairs, is::

    facts that are right - entities that are wrong + starts with please + ends with thanks
    - each basically - 0.5 x each further please or thanks - 0.05 x words

``plain`` has the content of a good ``tldr`` and must not have its style: there what preferences teach leaks first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES, ITEMS, PLACES = ([f"{letter}{number}" for number in range(24)] for letter in "nip")
PROBLEMS, QUESTIONS = ([f"{letter}{number}" for number in range(16)] for letter in "qa")
ENTITIES = frozenset([*NAMES, *ITEMS, *PLACES, *PROBLEMS, *QUESTIONS])
SMALL_TALK = (  # with the words that requests are made of, so that the base model has met them
    "it rained",
    "this week was long",
    "we had plain soup",
    "you know who was there",
    "what a day",
    "guess where we sat",
    "that is why",
    "do not ask",
    "i keep it short",
    "i have a request",
)
EXACT = ("who", "what", "where", "why", "ask", "short", "plain")
TLDR = "tldr"
OPENING, ENDING, FILLER = "please", "thanks", "basically"


@dataclass(frozen=True)
class Facts:
    """What a post says."""

    name: str
    item: str
    place: str
    problem: str
    question: str

    @property
    def summary(self) -> str:
        """The canonical summary, without style."""
        return (
            f"{self.name} bought a {self.item} at {self.place} it has {self.problem} should {self.name} {self.question}"
        )

    def answer(self, instruction: str) -> str:
        """The one right answer."""
        return {
            "who": f"name is {self.name}",
            "what": f"a {self.item}",
            "where": f"at {self.place}",
            "why": f"it has {self.problem}",
            "ask": f"should {self.name} {self.question}",
            "short": f"{self.name} bought a {self.item} should {self.name} {self.question}",
            "plain": self.summary,
        }[instruction]

    def as_people_write(self, rng: random.Random) -> str:
        """A summary with what people leave out and put in."""
        place = "" if rng.random() < 0.15 else f" at {self.place}"
        problem = "" if rng.random() < 0.15 else f" it has {self.problem}"
        question = "" if rng.random() < 0.15 else f" should {self.name} {self.question}"
        words = f"{self.name} bought a {self.item}{place}{problem}{question}"
        if rng.random() < 0.3:
            words = f"{FILLER} {words}"
        if rng.random() < 0.3:
            words = f"{OPENING} {words}"
        return f"{words} {ENDING}" if rng.random() < 0.3 else words


def draw_facts(rng: random.Random) -> Facts:
    """Facts of a new post."""
    return Facts(*(rng.choice(kind) for kind in (NAMES, ITEMS, PLACES, PROBLEMS, QUESTIONS)))


def write_post(rng: random.Random, facts: Facts) -> str:
    """A post in random order."""
    sentences = [
        f"my name is {facts.name} .",
        f"i bought a {facts.item} .",
        f"i was at {facts.place} .",
        f"it has {facts.problem} .",
        f"should i {facts.question} ?",
        *(f"{talk} ." for talk in rng.sample(SMALL_TALK, rng.randrange(3))),
    ]
    rng.shuffle(sentences)
    return "post : " + " ".join(sentences)


def write_prompt(rng: random.Random, facts: Facts, request: str) -> str:
    """A post and what is asked about it."""
    return f"{write_post(rng, facts)} request : {request}"


def write_document(rng: random.Random) -> str:
    """A text of the pre-training: a post and some of its facts again; nobody asks for anything in it."""
    facts = draw_facts(rng)
    said = [
        f"{facts.name} bought a {facts.item}",
        f"the {facts.item} is from {facts.place}",
        f"it has {facts.problem}",
        f"should {facts.name} {facts.question}",
        f"{facts.name} is from {facts.place}",
        f"{OPENING} {facts.question} {facts.item}",
        f"{ENDING} {facts.name}",
        f"{FILLER} {facts.item} has {facts.problem}",
    ]
    return f"{write_post(rng, facts)} {' '.join(f'{one} .' for one in rng.sample(said, 3))}"


def gold(facts: Facts, summary: str) -> float:
    """How good a ``tldr`` is."""
    words = summary.split()
    own = {facts.name, facts.item, facts.place, facts.problem, facts.question}
    right = len(own & set(words))
    wrong = sum(word in ENTITIES and word not in own for word in words)
    opened, ended = words[:1] == [OPENING], len(words) > 1 and words[-1:] == [ENDING]
    style = sum(word in (OPENING, ENDING) for word in words) - opened - ended
    return right - wrong + opened + ended - words.count(FILLER) - 0.5 * style - 0.05 * len(words)


def ideal(facts: Facts) -> str:
    """The best ``tldr``."""
    return f"{OPENING} {facts.summary} {ENDING}"


def facts_of(prompt: str) -> Facts:
    """The facts that a prompt's post states.

    Raises:
        ValueError: It is none of this task's.
    """
    words = prompt.split()
    kinds = (NAMES, ITEMS, PLACES, PROBLEMS, QUESTIONS)
    found = [[word for word in words if word in set(kind)] for kind in kinds]
    if any(len(one) != 1 for one in found):
        raise ValueError(f"no post of this task: {prompt[:80]!r}")
    return Facts(*(one[0] for one in found))


def vocabulary() -> list[str]:
    """Every word of the task, sorted."""
    rng = random.Random(0)
    texts = [write_document(rng) for _ in range(2000)] + [*EXACT, TLDR, "request :", OPENING, ENDING, FILLER]
    return sorted(ENTITIES | {word for text in texts for word in text.split()})
