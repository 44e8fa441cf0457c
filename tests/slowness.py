"""`pytest --check-slow`: check that tests without the mark `slow` are fast enough for `make quick`.

Useful on an idle machine; a normal test run never depends on a clock. Shared fixtures do not count
for the test that happens to create them, and have their own limit.
"""

import time
from collections.abc import Generator, Iterator

import pytest

TEST_SECONDS = 0.3
SHARED_FIXTURE_SECONDS = 2.0
SHARED = "shared fixture"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--check-slow",
        action="store_true",
        help="fail if a test without the mark `slow` takes too long (with -m 'not slow')",
    )


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    started = time.perf_counter()
    try:
        return (yield)
    finally:
        if fixturedef.scope != "function":
            took = time.perf_counter() - started
            request._pyfuncitem.user_properties.append((SHARED, [fixturedef.argname, took]))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--check-slow"):
        for line in too_slow(terminalreporter.stats.get("passed", [])):
            terminalreporter.write_line(f"slow without the mark: {line}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    checked = session.config.getoption("--check-slow") and reporter is not None
    if checked and session.exitstatus == 0 and any(too_slow(reporter.stats.get("passed", []))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def too_slow(reports: list[pytest.TestReport]) -> Iterator[str]:
    """Name tests above the limit, with their seconds."""
    for report in reports:
        if report.when != "call" or "slow" in report.keywords:
            continue
        shared = [value for name, value in report.user_properties if name == SHARED]
        if report.duration > TEST_SECONDS:
            yield f"{report.duration:.2f} s {report.nodeid}"
        for name, took in shared:
            if took > SHARED_FIXTURE_SECONDS:
                yield f"{took:.2f} s fixture {name}, made for {report.nodeid}"
