"""Flat trained tokens made from seeds, for the loss, the corrections and their slow reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from learner.algorithms.token_data import TokenData
from tests.learner.reference import Token
from tests.learner.tiny import context as tiny_context


@dataclass(frozen=True)
class Flat:
    """N tokens of a few trajectories with a few contexts; the log-probs, float64 [N], are close to each other."""

    tokens: list[Token]
    logprobs: np.ndarray
    proximal: np.ndarray
    reference: np.ndarray
    weight: np.ndarray

    def select(self, at: list[int]) -> Flat:
        columns = {name: getattr(self, name)[at] for name in ("logprobs", "proximal", "reference", "weight")}
        return replace(self, tokens=[self.tokens[n] for n in at], **columns)

    def column(self, name: str) -> Tensor:
        """Returns a column of all tokens, float64 [N]."""
        by_token = {"behavior": "behavior", "advantages": "advantage"}
        if name in by_token:
            return torch.tensor([getattr(token, by_token[name]) for token in self.tokens], dtype=torch.float64)
        return torch.from_numpy(getattr(self, name).copy())

    def index(self, name: str) -> Tensor:
        """Returns an integer field of all tokens, int64 [N]."""
        return torch.tensor([getattr(token, name) for token in self.tokens], dtype=torch.int64)

    def loss_tokens(self, *, importance: Tensor | None = None) -> TokenData:
        """Uses a token's version as its age, and its context's number as its context index."""
        return TokenData(
            logprobs=self.column("logprobs").requires_grad_(),
            entropy=self.column("weight") + 1.0,
            proximal=self.column("proximal"),
            behavior=self.column("behavior"),
            importance=torch.ones(len(self.tokens), dtype=torch.float64) if importance is None else importance,
            advantages=self.column("advantages"),
            weight=self.column("weight"),
            context=self.index("context"),
            age=self.index("version"),
            trajectory=self.index("trajectory"),
            context_index=self.index("context"),
            reference=self.column("reference"),
        )


def flat_tokens(seed: int) -> Flat:
    rng = np.random.default_rng(seed)
    source = tiny_context(rng, length=8)
    owners = np.repeat(np.arange(3), rng.integers(1, 4, size=3))
    contexts = np.repeat(np.arange(len(owners)), rng.integers(0, 5, size=len(owners)))
    num = len(contexts)
    proximal = -rng.exponential(1.0, size=num)
    behavior = proximal + rng.normal(scale=0.3, size=num)
    advantage = rng.choice([-1.5, 0.0, 1.0], size=3)
    versions = rng.integers(0, 20, size=num)
    return Flat(
        tokens=[
            Token(int(owners[k]), int(k), n, float(advantage[owners[k]]), float(behavior[n]), int(versions[n]), source)
            for n, k in enumerate(contexts)
        ],
        logprobs=proximal + rng.normal(scale=0.3, size=num),
        proximal=proximal,
        reference=proximal + rng.normal(scale=0.3, size=num),
        weight=rng.uniform(0.1, 1.0, size=num),
    )
