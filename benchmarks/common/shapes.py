"""Groups of contexts with random tokens in the shapes of memory workflows, for benchmarks/learner.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """token_ids int32 [L]; trained int64 [n]: the trained positions; advantage: its trajectory's advantage."""

    token_ids: NDArray[np.int32]
    trained: NDArray[np.int64]
    advantage: float


@dataclass(slots=True)
class Writer:
    """Makes contexts of random tokens; lengths are divided by `divisor`."""

    rng: np.random.Generator
    vocab_size: int
    divisor: int = 1

    def text(self, low: int, high: int | None = None) -> NDArray[np.int32]:
        length = max(2, int(self.rng.integers(low, (high or low) + 1)) // self.divisor)
        return self.rng.integers(0, self.vocab_size, size=length, dtype=np.int32)

    def context(self, *parts: tuple[NDArray[np.int32], bool], advantage: float) -> Context:
        """Makes a context of consecutive parts (text, True if it is trained)."""
        mask = np.concatenate([np.full(len(text), trained) for text, trained in parts])
        return Context(np.concatenate([text for text, _ in parts]), np.flatnonzero(mask), advantage)


Group = Callable[[Writer, NDArray[np.int32]], list[Context]]


def memsearcher(writer: Writer, system: NDArray[np.int32]) -> list[Context]:
    """8 trajectories of 1-5 contexts: system, question, memory; action, observation, new memory."""
    question, contexts = writer.text(20), []
    for _ in range(8):
        advantage, memory = float(writer.rng.normal()), writer.text(1)[:0]
        for _ in range(int(writer.rng.integers(1, 6))):
            prompt, action, observation = np.concatenate([system, question, memory]), writer.text(80), writer.text(700)
            contexts.append(
                writer.context(
                    (prompt, False), (action, True), (observation, False), (writer.text(150), True), advantage=advantage
                )
            )
            memory = writer.text(0, 300)
    return contexts


def answerer(writer: Writer, system: NDArray[np.int32]) -> list[Context]:
    """8 responses of 60 to one prompt of 2,500."""
    prompt = np.concatenate([system, writer.text(2050)])
    return [
        writer.context((prompt, False), (writer.text(60), True), advantage=float(writer.rng.normal())) for _ in range(8)
    ]


def manager(writer: Writer, system: NDArray[np.int32]) -> list[Context]:
    """4 turns of 8 responses of 100; prompts of 600, of which 300 are the same in all turns."""
    first, contexts = writer.text(300), []
    for _ in range(4):
        prompt = np.concatenate([first, writer.text(300)])
        contexts += [
            writer.context((prompt, False), (writer.text(100), True), advantage=float(writer.rng.normal()))
            for _ in range(8)
        ]
    return contexts


def react(writer: Writer, system: NDArray[np.int32]) -> list[Context]:
    """8 trajectories of one growing context: 4-5 turns of an action and an observation of 700-850."""
    prompt, contexts = np.concatenate([system, writer.text(20)]), []
    for _ in range(8):
        parts = [(prompt, False)]
        for _ in range(int(writer.rng.integers(4, 6))):
            parts += [(writer.text(80), True), (writer.text(700, 850), False)]
        parts += [(writer.text(60), True)]
        contexts.append(writer.context(*parts, advantage=float(writer.rng.normal())))
    return contexts


def react_steps(writer: Writer, system: NDArray[np.int32]) -> list[Context]:
    """4 trajectories of 8 turns, each a context with the whole history; only its last action is trained."""
    prompt, contexts = np.concatenate([system, writer.text(20)]), []
    for _ in range(4):
        advantage, history = float(writer.rng.normal()), prompt
        for _ in range(8):
            action = writer.text(80)
            contexts.append(writer.context((history, False), (action, True), advantage=advantage))
            history = np.concatenate([history, action, writer.text(250, 350)])
    return contexts


SHAPES: dict[str, Group] = {
    "memsearcher": memsearcher,
    "answerer": answerer,
    "manager": manager,
    "react": react,
    "react_steps": react_steps,
}
