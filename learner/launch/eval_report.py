"""The printed report of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from learner.launch.command_line import relative
from protocol.evaluation import Estimate, EvaluationFolder, EvaluationReport
from protocol.failure_counts import failure_line


def report_text(report: EvaluationReport, folder: EvaluationFolder) -> str:
    """One line per number; a mean has its standard error over questions."""
    rows = list(_rows(report, folder))
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


def _rows(report: EvaluationReport, folder: EvaluationFolder) -> Iterator[tuple[str, str]]:
    how = "greedy" if report.temperature == 0 else f"temperature {report.temperature:g}, seed {report.seed}"
    yield "policy", report.policy or "(see versions)"
    yield "versions", ", ".join(f"{version} ({count} trajectories)" for version, count in report.versions.items())
    yield (
        "samples",
        f"{report.num_questions} questions of {report.split} x {report.samples_per_question}, {how}; "
        + ", ".join(f"{count} {status}" for status, count in report.statuses.items()),
    )
    if report.num_failed:
        yield "not in the means", failure_line(report.failures)
    yield "reward", "none: no sample is valid" if report.reward is None else _text(report.reward)
    for name, estimate in report.parts.items():
        yield f"  {name}", _text(estimate)
    for k, estimate in report.best_of.items():
        yield f"best of {k} (pass@{k})", _text(estimate)
    for name, estimate in report.stats.items():
        yield f"  {name}", f"{estimate.mean:.4g}"
    yield "written", f"{relative(folder.samples)}, {relative(folder.report)}"


def _text(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f}" + (f" ± {estimate.stderr:.4f}" if estimate.stderr is not None else "")
