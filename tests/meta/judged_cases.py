"""Count what the judge was tried on, and say so at the end.

A hook of ``tests/conftest.py``: the process that prints the summary of parallel workers loads
no other.
"""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of judged cases that tests recorded as a property."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    judged = sum(
        value
        for report in reports
        for name, value in report.user_properties
        if name == "judged_cases"
    )
    if judged:
        terminalreporter.write_line(f"judged cases of correct layers: {judged}")
