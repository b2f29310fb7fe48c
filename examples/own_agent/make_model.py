"""Makes model/, which is part of the repository so that the example runs at once.

rm -r examples/own_agent/model && python examples/own_agent/make_model.py
"""

from __future__ import annotations

from pathlib import Path

from own_agent import CITIES, PEOPLE

from learner.model.tiny import make_tiny_model

if __name__ == "__main__":
    make_tiny_model(Path(__file__).parent / "model", words=("?", "where", "answer", "unknown", *PEOPLE, *CITIES))
