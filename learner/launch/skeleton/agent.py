"""Your own agent: replace each class with your code. docs/extending.md explains them."""

from __future__ import annotations

import random

from pydantic import Field

from palimpsest import Episode, Observation, Options, Question, Reward, Score, Session, Task, Tool, Workflow

WORDS = ("red", "green", "blue", "black", "white", "gold")


class MyTask(Task):
    """Questions and their answers: here a word, and a random dictionary that translates it."""

    def question(self, cursor: int) -> Question:
        rng = random.Random(f"{self.seed}/{self.split}/{cursor}")
        dictionary: dict[str, str] = dict(zip(WORDS, rng.sample(WORDS, len(WORDS)), strict=True))
        word = rng.choice(WORDS)
        return Question(id=f"{self.split}-{cursor}", text=word, answers=(dictionary[word],), metadata=dictionary)


class MyTool(Tool):
    """A function that the agent can call: here a look-up in the question's dictionary."""

    schema = {"name": "translate", "description": "Translates one word.", "parameters": {"type": "object"}}

    async def call(self, arguments, context) -> Observation:
        word = arguments["word"]
        if word not in context.question.metadata:
            return Observation(error="unknown")
        return Observation(text=context.question.metadata[word])


class MyWorkflow(Workflow):
    """Runs an episode: each context begins with a new prompt; only the memory is carried into the next one."""

    class Options(Options):
        action_tokens: int = Field(default=1, ge=1, description="Maximum tokens of one generation.")

    tool_names = ("dictionary",)

    async def run(self, question: Question, session: Session) -> Episode:
        session.open_context(f"look up : {question.text}")
        word = (await session.generate(self.options.action_tokens)).text
        found = await session.call(self.tools["dictionary"], {"word": word})
        session.close_context()
        memory = found.text or found.error
        session.open_context(f"answer : {memory}")
        answer = (await session.generate(self.options.action_tokens)).text
        return Episode(answer=answer, memories=(memory,))


class MyReward(Reward):
    """The reward of a trajectory: here 1 for the right answer, `memory_bonus` if only the memory is right."""

    class Options(Options):
        memory_bonus: float = Field(default=0.3, description="Reward of a right memory with a wrong answer.")

    async def score(self, question: Question, episode: Episode, trajectory) -> Score:
        right = float(episode.answer in question.answers)
        remembered = float(episode.memories[-1] in question.answers)
        return Score(max(right, self.options.memory_bonus * remembered), {"right": right, "remembered": remembered})
