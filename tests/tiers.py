"""What the tiers of the suite promise, checked while the tests run (see CONTRIBUTING.md for the tiers).

A test without the marks `integration` and `slow` starts no process and trains nothing; a file takes less than a minute
of a processor for its tests without the mark `slow`. (Time on the wall would fail it where other work runs beside.)
"""

import multiprocessing.process
import os
import subprocess
from collections import defaultdict
from collections.abc import Iterable

import pytest

from tests.bounds import FUZZ
from warpcore.core import WarpCore

MAX_SECONDS_PER_FILE = 60 * FUZZ
"""Processor time of a file's tests without the mark `slow`, with fixtures and the processes that they wait for."""
PROCESSOR_SECONDS = "processor_seconds"
STARTS_A_PROCESS = (
    (subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start"), (os, "fork"), (os, "posix_spawn"),
)  # fmt: skip
TRAINS = ((WarpCore, "run"), (WarpCore, "setup"))


def represented_by(*representatives: str, of: Iterable[str]) -> list:
    """Parameters of a test: the representatives, and others that run only in `make test-slow`."""
    return [name if name in representatives else pytest.param(name, marks=pytest.mark.slow) for name in sorted(of)]


class Tiers:
    """A plugin of pytest."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.counted = _processor_seconds()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        if any(item.get_closest_marker(mark) for mark in ("integration", "slow")):
            return (yield)
        with pytest.MonkeyPatch.context() as patch:
            for names, does in ((STARTS_A_PROCESS, "starts a process"), (TRAINS, "trains")):
                for owner, name in names:
                    patch.setattr(owner, name, _refuse(item.nodeid, does))
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        now = _processor_seconds()
        report.user_properties.append((PROCESSOR_SECONDS, now - self.counted))
        self.counted = now
        return report

    def pytest_runtest_logreport(self, report):
        if "slow" not in report.keywords:
            seconds = [value for name, value in report.user_properties if name == PROCESSOR_SECONDS]
            self.seconds[report.nodeid.partition("::")[0]] += seconds[-1]

    def pytest_sessionfinish(self, session):
        if self._too_slow() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        for file, seconds in self._too_slow().items():
            remedy = "make its tests faster, or mark those that another test represents `slow`"
            terminalreporter.write_line(
                f"FAILED {file} took {seconds:.0f} s of a processor, more than {MAX_SECONDS_PER_FILE} s: {remedy}",
                red=True,
            )

    def _too_slow(self) -> dict[str, float]:
        return {file: seconds for file, seconds in self.seconds.items() if seconds > MAX_SECONDS_PER_FILE}


def _processor_seconds() -> float:
    """Of this process and of those it has waited for, so far."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _refuse(test: str, does: str):
    def refused(*args, **kwargs):
        pytest.fail(f"{test} {does}: mark it with @pytest.mark.integration")

    return refused
