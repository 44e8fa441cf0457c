"""Test the peers and rft on the thirteen questions: `python -m benchmarks.peers --save`.

The peers need the packages that `python -m benchmarks.environments` installs. rft runs through the
same probes. Its own, stricter tests of the same questions (`test_t1_*` to `test_t13_*`) are counted
separately. The last line is one JSON object.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from benchmarks import environments, machine
from benchmarks.peers.experiments import TESTS
from rft import cli
from rft.storage import files

RESULTS = environments.ROOT / "benchmarks" / "results" / "peers.json"
TABLE = environments.ROOT / "benchmarks" / "results" / "peers.md"  # docs/peers.md shows it
PAGE = environments.ROOT / "docs" / "results" / "peers.md"
# peer -> its program and environment
PEERS = {
    "rft": ("on_rft", None),
    "webdataset": ("on_webdataset", None),
    "open_clip": ("on_open_clip", "open_clip"),
    "timm": ("on_timm", "open_clip"),
    "mosaicml-streaming": ("on_streaming", "mosaicml-streaming"),
    "litdata": ("on_litdata", "litdata"),
}
PATIENCE = 1800.0  # seconds per peer for all questions
Answers = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Test all peers, each in the environment that it needs."""

    peers: tuple[str, ...] = tuple(PEERS)
    """Peers to test."""
    tests: tuple[str, ...] = TESTS
    """Questions of T1 to T13."""
    at_once: int = 2
    """Peers that are tested in parallel."""
    save: bool = False
    """Also write peers.json and peers.md in benchmarks/results, and docs/results/peers.md. Saved
    answers of peers and tests that this call leaves out stay, each with its commit."""


def ask(peer: str, tests: tuple[str, ...], work: Path) -> tuple[dict[str, str], Answers]:
    """Return a peer's versions and answers; a missing answer is `not run`, with the reason."""
    module, environment = PEERS[peer]
    absent = environment and environments.absence(environment)
    if absent:
        return {}, {test: {"result": "not run", "seen": absent} for test in tests}
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", "--work", str(work / peer)]
    log = work / f"{peer}.log"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--tests", *tests],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environments.variables(environment), "OMP_NUM_THREADS": "1"},
            cwd=environments.ROOT,
            text=True,
        )
        try:
            said = process.communicate(timeout=PATIENCE)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0]
    documents = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    versions = documents[0]["versions"] if documents else {}
    last = (log.read_text().strip().splitlines() or ["it ended without a word"])[-1]
    answers = {test: {"result": "not run", "seen": last} for test in tests}
    for document in documents[1:]:
        answers[document["test"]] = {"result": document["result"], "seen": document["seen"]}
    return versions, answers


def own_tests(tests: tuple[str, ...], work: Path) -> dict[str, dict[str, int]]:
    """Count the outcomes of rft's own tests of the same questions, by question."""
    report = work / "rft.xml"
    names = " or ".join(f"test_{test.lower()}_" for test in tests)
    command = [sys.executable, "-m", "pytest", "-q", "tests", "-k", names]
    with (work / "rft.log").open("w") as log:
        subprocess.run(
            [*command, f"--junitxml={report}"],
            cwd=environments.ROOT,
            stdout=log,
            stderr=log,
            check=False,
        )
    outcomes: dict[str, Counter[str]] = {test: Counter() for test in tests}
    for case in Xml.parse(report).iter("testcase"):
        number = re.match(r"test_(t\d+)_", case.get("name", ""))
        if number is not None and number[1].upper() in outcomes:
            children = {child.tag for child in case} & {"failure", "error", "skipped"}
            outcomes[number[1].upper()][next(iter(children), "passed")] += 1
    return {test: dict(found) for test, found in outcomes.items()}


def with_earlier(document: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Add the earlier answers of peers and tests that this call leaves out."""
    answers = {
        peer: {**earlier["answers"].get(peer, {}), **document["answers"].get(peer, {})}
        for peer in earlier["answers"] | document["answers"]
    }
    return {
        **document,
        "packages": earlier["packages"] | document["packages"],
        "answers": answers,
        "own_tests": earlier["own_tests"] | document["own_tests"],
    }


def answered(document: dict[str, Any]) -> tuple[dict[str, Answers], list[str]]:
    """Sort the answers in the order of PEERS, and list the tests that all peers have answered."""
    # a file that was read has its keys sorted
    answers: dict[str, Answers] = {
        n: document["answers"][n] for n in PEERS if n in document["answers"]
    }
    return answers, [test for test in TESTS if all(test in found for found in answers.values())]


def table(document: dict[str, Any]) -> str:
    """Write every peer's result for every question, as Markdown."""
    answers, tests = answered(document)
    lines = [
        f"| | {' | '.join(answers)} |",
        f"|---|{'---|' * len(answers)}",
        *(
            f"| {test} | {' | '.join(found[test]['result'] for found in answers.values())} |"
            for test in tests
        ),
    ]
    return "\n".join([*lines, "", provenance(document)]) + "\n"


def page(document: dict[str, Any]) -> str:
    """Write the page of observations, one for every answer."""
    answers, tests = answered(document)
    lines = [
        "# Thirteen questions: observations",
        "",
        "`make peers` writes this page. The questions and the table of results are in "
        "[peers.md](../peers.md#thirteen-questions). An exception is one that reaches the training "
        "loop; some libraries log theirs instead.",
        "",
        made(document),
    ]
    for peer, found in answers.items():
        versions = document["packages"][peer]
        named = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        lines += ["", f"**{peer}** ({named})", ""]
        lines += [
            f"- {test} {found[test]['result']}: {escaped(found[test]['seen'])}"
            + older(found[test], document)
            for test in tests
        ]
    return "\n".join(lines) + "\n"


def made(document: dict[str, Any]) -> str:
    """Name commit, day and machine of the answers."""
    return (
        f"The same program asked all libraries: {machine.made(document)}, except where an "
        "observation names another commit."
    )


def provenance(document: dict[str, Any]) -> str:
    """Name the origin of the answers, and count rft's own tests."""
    own = document["own_tests"]
    passed = ", ".join(f"{test} {own[test].get('passed', 0)}" for test in TESTS if test in own)
    others = sum(number for found in own.values() for name, number in found.items())
    others -= sum(found.get("passed", 0) for found in own.values())
    return (
        f"{made(document)} rft's own tests of the same questions are counted separately. Passed, "
        f"by question: {passed}. Failed or skipped: {others}."
    )


def older(answer: dict[str, Any], document: dict[str, Any]) -> str:
    """Name the commit of an answer from an earlier call; empty for the last call."""
    commit = answer["commit"]
    return "" if commit == document["commit"] else f" (commit {commit})"


def escaped(text: str) -> str:
    """Escape text, so that Markdown shows it unchanged."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


def main() -> None:
    """Test, print, save."""
    arguments = cli.parse(Arguments, prog="benchmarks.peers")
    for peer in arguments.peers:
        if peer not in PEERS:
            raise cli.unknown("peer", peer, list(PEERS))
    for test in arguments.tests:
        if test not in TESTS:
            raise cli.unknown("test", test, list(TESTS))
    # before the questions: the tree may change meanwhile
    about = machine.describe(machine.DATA_PLANE)
    work = Path(tempfile.mkdtemp(prefix="peers-"))
    try:
        with ThreadPoolExecutor(arguments.at_once) as pool:
            asked = {
                peer: pool.submit(ask, peer, arguments.tests, work) for peer in arguments.peers
            }
            found = {peer: future.result() for peer, future in asked.items()}
        own = own_tests(arguments.tests, work) if "rft" in arguments.peers else {}
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for answer in (answer for _, answers in found.values() for answer in answers.values()):
        answer["commit"] = about["commit"]
    document = {
        "benchmark": "peers",
        **about,
        "packages": {peer: packages for peer, (packages, _) in found.items()},
        "answers": {peer: answers for peer, (_, answers) in found.items()},
        "own_tests": own,
    }
    if arguments.save and RESULTS.exists():
        document = with_earlier(document, files.read_json(str(RESULTS)))
    print(table(document))
    print(page(document))
    if arguments.save:
        files.write_json(str(RESULTS), document)
        files.write_bytes(str(TABLE), table(document).encode())
        files.write_bytes(str(PAGE), page(document).encode())
    print(json.dumps(document))
