"""`pytest --check-slow`: are the tests without the mark `slow` as quick as `make quick` needs them?

Of use on a machine that does nothing else; a test run itself never judges by a clock. A fixture
that tests share is no time of the test that happens to make it, and has a limit of its own.
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
    """Name what is above its limit, with its seconds."""
    for report in reports:
        if report.when != "call" or "slow" in report.keywords:
            continue
        shared = [value for name, value in report.user_properties if name == SHARED]
        if report.duration > TEST_SECONDS:
            yield f"{report.duration:.2f} s {report.nodeid}"
        for name, took in shared:
            if took > SHARED_FIXTURE_SECONDS:
                yield f"{took:.2f} s fixture {name}, made for {report.nodeid}"
