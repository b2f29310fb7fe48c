"""An evaluation: its folder, its plan, its report. The launcher writes the plan; the evaluator writes the rest.

RUN/evaluations/NAME/   plan.json       what to measure (EvaluationPlan)
                        config.json     the run's config with the addresses of this evaluation
                        identity.json   what the samples depend on; another identity is refused
                        samples.jsonl   one line per finished trajectory, appended
                        report.json     means over the lines of samples.jsonl (EvaluationReport)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, FiniteFloat, ValidationError

from protocol.atomic_write import atomic_write
from protocol.config_base import NonNegative, Positive, Section
from protocol.errors import DataError
from protocol.framing import describe

S = TypeVar("S", bound=Section)


class EvaluationPlan(Section):
    """What to measure, and how. Only `split`, `samples`, `temperature`, `seed` and `policy` affect the samples.

    policy          names what is evaluated; "" if it is known only by the weight versions that engines state
    limit           number of questions; None: all of the split, 512 if the task has no last question
    version         wait until every engine serves this version of the run
    wait_s          longest wait for the engines to respond at the start, and for `version`
    lost_after_s    after a failed sample: the evaluation ends if no engine responds for so long
    transcripts     also write the text of each context and the memories
    mixed_versions  accept samples of several weight versions
    """

    engines: Annotated[tuple[str, ...], Field(min_length=1)]
    policy: str = ""
    split: Literal["train", "eval"] = "eval"
    limit: Positive | None = None
    samples: Positive = 1
    temperature: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    seed: NonNegative = 0
    concurrency: Positive = 128
    version: NonNegative | None = None
    wait_s: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    lost_after_s: Annotated[FiniteFloat, Field(ge=0)] = 10.0
    transcripts: bool = False
    mixed_versions: bool = False


class Estimate(Section):
    """A mean over questions of the mean over a question's samples that did not fail.

    stderr         standard error of the mean: standard deviation over questions / sqrt(num_questions); None for one
    num_questions  with at least one sample that did not fail
    """

    mean: FiniteFloat
    stderr: FiniteFloat | None
    num_questions: Positive


class EvaluationReport(Section):
    """The report of an evaluation. FAILED samples are in no mean; they are counted by reason.

    complete   whether every sample was taken (failed ones included)
    versions   weight version, as the engine states it → number of trajectories with tokens of it
    statuses   status → number of samples
    failures   reason → number of FAILED samples
    reward     None if no sample is valid
    parts      the reward's parts (em, f1 …), by name
    best_of    k → the expected largest reward of k samples of a question; pass@k if rewards are 0 or 1
    stats      means of the trajectories' counts (num_turns, num_generated_tokens …), by name
    """

    complete: bool
    policy: str
    versions: dict[str, int]
    split: str
    temperature: float
    seed: int
    num_questions: int
    samples_per_question: int
    num_done: int
    num_failed: int
    statuses: dict[str, int]
    failures: dict[str, int]
    reward: Estimate | None
    parts: dict[str, Estimate]
    best_of: dict[int, Estimate]
    stats: dict[str, Estimate]

    @property
    def num_samples(self) -> int:
        """The number of samples of the complete evaluation."""
        return self.num_questions * self.samples_per_question


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """The paths in an evaluation's folder."""

    root: Path

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    @property
    def identity(self) -> Path:
        return self.root / "identity.json"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    @property
    def model(self) -> Path:
        """The evaluated policy, until the evaluation is complete."""
        return self.root / "model"

    @property
    def engine_token(self) -> Path:
        """The bearer token of the evaluation's own engine."""
        return self.root / "engine-token"

    def write_plan(self, plan: EvaluationPlan) -> None:
        atomic_write(self.plan, plan.model_dump_json(indent=2) + "\n")

    def read_plan(self) -> EvaluationPlan:
        """Raises: DataError."""
        return _read(self.plan, EvaluationPlan)

    def write_report(self, report: EvaluationReport) -> None:
        atomic_write(self.report, report.model_dump_json(indent=2) + "\n")

    def read_report(self) -> EvaluationReport:
        """Raises: DataError."""
        return _read(self.report, EvaluationReport)


def _read(path: Path, kind: type[S]) -> S:
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}") from error
