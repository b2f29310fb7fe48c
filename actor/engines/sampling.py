"""Sampling parameters, and which of them may be used for training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

from protocol.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one generation, with SGLang's names. `temperature` 0 is greedy.

    SGLang's log-probs are temperature-scaled but not renormalised for truncation. So truncation (top_p, top_k, min_p,
    greedy) is refused unless `allow_truncation` is set, for tokens that are not trained on. `seed` (SGLang's
    `sampling_seed`) makes a generation repeatable if the engine supports it.

    Raises: ConfigError.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    allow_truncation: bool = False

    def __post_init__(self) -> None:
        _check("temperature", "finite and >= 0", self.temperature, 0 <= self.temperature < math.inf)
        _check("top_p", "in (0, 1]", self.top_p, 0 < self.top_p <= 1)
        _check("top_k", "-1 (all) or >= 1", self.top_k, self.top_k == -1 or self.top_k >= 1)
        _check("min_p", "in [0, 1]", self.min_p, 0 <= self.min_p <= 1)
        _check("max_new_tokens", ">= 1", self.max_new_tokens, self.max_new_tokens >= 1)
        _check("stop_token_ids", ">= 0", self.stop_token_ids, all(token >= 0 for token in self.stop_token_ids))
        if self.truncates and not self.allow_truncation:
            raise ConfigError(
                "sampling for training must not truncate: temperature > 0, top_p 1, top_k -1, min_p 0; got "
                f"temperature {self.temperature}, top_p {self.top_p}, top_k {self.top_k}, min_p {self.min_p}; "
                "set allow_truncation for evaluation"
            )

    @property
    def truncates(self) -> bool:
        """Whether some tokens of the vocabulary cannot be sampled."""
        return self.temperature == 0 or self.top_p < 1 or self.top_k != -1 or self.min_p > 0

    def derived_seed(self, name: str | int) -> int | None:
        """Derives a seed in [0, 2^31) from `seed` and `name` (a trajectory, a generation). None if `seed` is None."""
        if self.seed is None:
            return None
        return int.from_bytes(blake2b(f"{self.seed}:{name}".encode(), digest_size=4).digest(), "big") >> 1

    def to_wire(self) -> dict[str, float | int | list[int]]:
        """Returns the `sampling_params` of /generate. `sampling_seed` is present only if a seed is set."""
        wire: dict[str, float | int | list[int]] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "max_new_tokens": self.max_new_tokens,
            "stop_token_ids": list(self.stop_token_ids),
        }
        if self.seed is not None:
            wire["sampling_seed"] = self.seed
        return wire


def _check(name: str, bound: str, value: object, is_valid: bool) -> None:
    if not is_valid:
        raise ConfigError(f"sampling.{name} must be {bound}, got {value}")
