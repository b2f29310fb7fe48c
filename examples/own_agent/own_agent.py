"""A complete agent: it looks up a person in an address book, stores the city as its memory, and answers from it.

Each question has its own address book, so a policy cannot answer without the look-up and the memory.
"""

from __future__ import annotations

import random

from pydantic import Field

from palimpsest import Episode, Observation, Options, Question, Reward, Score, Session, Task, Tool, Workflow

PEOPLE = ("anna", "bela", "carl", "dora", "emil", "fay", "gus", "hanna")
CITIES = ("oslo", "rome", "lima", "cairo", "kyoto", "porto", "quito", "accra")


class AddressTask(Task):
    """Asks where a person lives. The metadata is a random address book."""

    def question(self, cursor: int) -> Question:
        rng = random.Random(f"{self.seed}/{self.split}/{cursor}")
        book: dict[str, str] = dict(zip(PEOPLE, rng.sample(CITIES, len(CITIES)), strict=True))
        person = rng.choice(PEOPLE)
        return Question(id=f"{self.split}-{cursor}", text=person, answers=(book[person],), metadata=book)


class AddressBook(Tool):
    """Looks up one person."""

    schema = {"name": "lookup", "description": "Where a person lives.", "parameters": {"type": "object"}}

    async def call(self, arguments, context) -> Observation:
        city = context.question.metadata.get(arguments["person"])
        return Observation(text=city) if city else Observation(error="unknown")


class AddressAgent(Workflow):
    """Two contexts: `where ? PERSON` asks for the person to look up, `answer ? MEMORY` for the city."""

    class Options(Options):
        lookups: int = Field(default=1, ge=1, description="Look-ups before the answer; the last one is remembered.")

    tool_names = ("address_book",)

    async def run(self, question: Question, session: Session) -> Episode:
        memory = "unknown"
        for _ in range(self.options.lookups):
            session.open_context(f"where ? {question.text}")
            person = (await session.generate(1)).text
            session.close_context()
            found = await session.call(self.tools["address_book"], {"person": person})
            memory = found.text or found.error
        session.open_context(f"answer ? {memory}")
        city = (await session.generate(1)).text
        return Episode(answer=city, memories=(memory,), stats={"num_unknown": float(memory == "unknown")})


class AddressReward(Reward):
    """1 for the right city; `lookup_bonus` if only the memory was right."""

    class Options(Options):
        lookup_bonus: float = Field(default=0.3, description="Reward of a right memory with a wrong answer.")

    async def score(self, question: Question, episode: Episode, trajectory) -> Score:
        right, remembered = (text in question.answers for text in (episode.answer, episode.memories[-1]))
        reward = 1.0 if right else self.options.lookup_bonus * remembered
        return Score(reward, {"right": float(right), "remembered": float(remembered)})
