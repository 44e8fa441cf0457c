"""The program of a peer: answers the requested questions with one JSON line each."""

import importlib.metadata
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import experiments
from benchmarks.peers.experiments import Peer, Verdict
from rft import cli


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Test one peer."""

    work: Path
    """Empty folder."""
    tests: tuple[str, ...] = experiments.TESTS
    """Questions of T1 to T13."""


def main(peer: Peer, packages: tuple[str, ...]) -> None:
    """Answer; libraries' output goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arguments = cli.parse(Arguments)
    arguments.work.mkdir(parents=True, exist_ok=True)
    versions = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for test in arguments.tests:
        if test not in experiments.TESTS:
            raise cli.unknown("test", test, list(experiments.TESTS))
        began = time.monotonic()
        try:
            verdict = experiments.run(peer, test, arguments.work)
        except (AssertionError, OSError) as error:  # a fault of the experiment, not of the peer
            verdict = Verdict("not run", experiments.short(f"{type(error).__name__}: {error}"))
        document = {"test": test, **vars(verdict), "seconds": round(time.monotonic() - began, 1)}
        print(json.dumps(document), file=answers, flush=True)
