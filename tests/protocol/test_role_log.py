"""Log lines of a role: names and texts of peers cannot write to the terminal or imitate a line."""

from __future__ import annotations

import logging

from protocol.role_startup import RoleLogFormatter

FORMATTER = RoleLogFormatter("12:00 learner %(levelname)s %(message)s")


def formatted(message: str, *arguments: object) -> str:
    return FORMATTER.format(logging.LogRecord("x", logging.WARNING, "x.py", 1, message, arguments, None))


def test_names_of_peers_are_escaped() -> None:
    hostile = "a\x1b[2J\x07\r\x9b31m"
    line = formatted("actor %s was restarted", hostile)
    assert line == "12:00 learner WARNING actor a\\x1b[2J\\x07\\x0d\\x9b31m was restarted"
    assert line.isprintable()


def test_a_name_with_a_line_end_does_not_begin_a_log_line() -> None:
    lines = formatted("actor %s was restarted", "a\n12:00 learner INFO trained step 7").split("\n")
    assert lines[0] == "12:00 learner WARNING actor a"
    assert all(line.startswith("    ") for line in lines[1:])


def test_other_text_is_unchanged() -> None:
    assert formatted("staleness\tmax %d, Łódź", 2) == "12:00 learner WARNING staleness\tmax 2, Łódź"
