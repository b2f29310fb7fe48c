"""Settings of the property tests: the same examples in every run, and no time limits.

Hypothesis fails a test by default if one example takes longer than 200 ms, or if drawing examples is slow.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

deterministic = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100
)
