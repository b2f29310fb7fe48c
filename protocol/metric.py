"""The declaration of a metric: its name, how its values are reduced, its unit, and how to read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_PLACEHOLDER = re.compile(r"\{\w+\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """`name` is the TensorBoard tag and the key in metrics.jsonl.

    A name with a placeholder, such as `reward/{part}`, declares a family: the placeholder matches any text.
    `reduction`: how the values of tokens, trajectories or processes become the one value of a step.
    `absent_if`: when a step has no value; empty if every step has one.
    `chart`: the chart of TensorBoard's CUSTOM SCALARS tab that shows it (learner/metrics/layout.py); empty: none.
    """

    name: str
    reduction: str
    unit: str
    explanation: str
    healthy: str = ""
    absent_if: str = ""
    chart: str = ""
    kind: Literal["scalar", "histogram", "text"] = "scalar"

    @property
    def section(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    @property
    def is_family(self) -> bool:
        return _PLACEHOLDER.search(self.name) is not None

    def member(self, value: object) -> str:
        """The tag of the family's member `value`."""
        return _PLACEHOLDER.sub(str(value), self.name)

    def matches(self, tag: str) -> bool:
        """Whether this declaration covers `tag`."""
        return re.fullmatch(self.pattern(), tag, re.DOTALL) is not None

    def pattern(self, prefix: str = "") -> str:
        """A regular expression that matches `prefix` and then a tag of this declaration."""
        return re.escape(prefix) + ".+".join(map(re.escape, _PLACEHOLDER.split(self.name)))
