"""Real servers on loopback, with real faults, for the tests of remote data.

If a server is not installed, or the user may not start it, the tests that need it are skipped with
the reason.
"""

import uuid
from collections.abc import Iterator

import fsspec
import pytest

from tests.servers.s3 import ObjectStore, object_store, use_environment


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """Run an S3 server; it starts once for all tests."""
    with object_store(tmp_path_factory.mktemp("s3")) as running:
        yield running


@pytest.fixture
def bucket(store: ObjectStore) -> Iterator[str]:
    """Return the URL of a new bucket; this process's environment has its user's credentials."""
    with pytest.MonkeyPatch.context() as environment:
        use_environment(environment, store.environment())
        name = f"test-{uuid.uuid4().hex[:12]}"
        fsspec.filesystem("s3").mkdir(name)
        yield f"s3://{name}"
