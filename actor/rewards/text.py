"""Comparison of answers, with the same normalisation for rewards and evaluation.

Normalisation and scores are SQuAD's (Rajpurkar et al., 2016, v1.1 script); the rule for yes, no and noanswer is
HotpotQA's (Yang et al., 2018).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_MUST_MATCH = frozenset({"yes", "no", "noanswer"})


def normalise(text: str) -> str:
    """Lowercases, removes ASCII punctuation, removes a/an/the, and collapses whitespace, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Iterable[str]) -> float:
    """1.0 if the normalised prediction is one of the normalised answers, else 0.0."""
    normalised = normalise(prediction)
    return float(any(normalised == normalise(answer) for answer in answers))


def f1(prediction: str, answers: Iterable[str]) -> float:
    """The largest token F1 over the answers. F1 is 0.0 if only one of the two texts is yes (or no, or noanswer)."""
    return max((_token_f1(normalise(prediction), normalise(answer)) for answer in answers), default=0.0)


def _token_f1(prediction: str, answer: str) -> float:
    if prediction != answer and _MUST_MATCH & {prediction, answer}:
        return 0.0
    predicted, wanted = prediction.split(), answer.split()
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * shared / (len(predicted) + len(wanted)) if shared else 0.0
