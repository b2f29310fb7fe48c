"""Scripted episodes: a script replaces the engines, so texts, tokens and masks are the workflow's own.

    Script.write(context) ─► ScriptedGenerator, in place of an engine pool ─► Session, Workflow ─► contexts

The script's tokens have loss mask true, as sampled tokens do: supervised fine-tuning trains on them
(learner/warmstart/sft.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import save_file

from actor.chat.tokenizer import Tokenizer
from actor.engines.completion import Completion, Finish, Span
from actor.engines.sampling import SamplingParams
from protocol.atomic_write import atomic_path
from protocol.errors import ConfigError, DataError
from protocol.types import Context

_VERSION = "script"


class Script(Protocol):
    """Writes the policy's pieces of one episode."""

    def write(self, context: str) -> str:
        """The policy's next piece, its end token included. `context` is the text of the open context."""
        ...


class ScriptedGenerator:
    """Implements `Generator` with a script. Its tokens have log-prob 0 and no version, so RL must not train on them."""

    def __init__(self, *, script: Script, tokenizer: Tokenizer) -> None:
        self._script = script
        self._tokenizer = tokenizer

    async def generate(
        self, input_ids: Sequence[int], sampling: SamplingParams, *, min_version: int, prefer: str = "", rid: str = ""
    ) -> Completion:
        """Returns the script's next piece, cut off at `max_new_tokens` as an engine would.

        Raises: ConfigError if the piece does not end in a stop token.
        """
        ids = self._tokenizer.encode(self._script.write(self._tokenizer.decode(input_ids)))
        if not ids or ids[-1] not in sampling.stop_token_ids:
            raise ConfigError(
                f"a scripted piece must end in one of the stop tokens {sampling.stop_token_ids}, got {ids[-3:]}"
            )
        finish = Finish("stop", ids[-1])
        if len(ids) > sampling.max_new_tokens:
            ids, finish = ids[: sampling.max_new_tokens], Finish("length")
        return Completion(
            token_ids=np.asarray(ids, dtype=np.int32),
            logprobs=np.zeros(len(ids), dtype=np.float32),
            finish_reason=finish,
            spans=(Span(0, len(ids), _VERSION),),
            prompt_tokens=len(input_ids),
            cached_tokens=0,
        )


def save_demonstrations(path: Path, contexts: Sequence[Context], *, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contexts as the arrays that learner/warmstart/sft.py reads.

    safetensors: token_ids int32 [N], loss_mask bool [N], offsets int64 [C + 1] with context c at
    [offsets[c], offsets[c + 1]).

    Raises: DataError if there is no context.
    """
    if not contexts:
        raise DataError(f"no demonstration to write to {path}: every scripted episode was rejected")
    lengths = [len(context) for context in contexts]
    columns = {
        "token_ids": np.concatenate([context.token_ids for context in contexts]).astype(np.int32),
        "loss_mask": np.concatenate([context.loss_mask for context in contexts]).astype(np.bool_),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }
    with atomic_path(path) as temporary:
        save_file(columns, temporary, metadata=dict(metadata or {}))
