"""One server for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from erde.runtime import Session
from tests.helpers.hand_made_bundle import pixel_bundle
from tests.helpers.served import Served, certified_bundle, serving


@pytest.fixture(scope="session")
def bundle_a(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certified_bundle(tmp_path_factory.mktemp("served") / "a")


@pytest.fixture(scope="session")
def session_a(bundle_a: Path) -> Session:
    session = Session(bundle_a, threads=1)
    session.profile(rounds=2)  # for deadlines
    return session


@pytest.fixture(scope="session")
def two_bundles(
    bundle_a: Path, session_a: Session, tmp_path_factory: pytest.TempPathFactory
) -> list[Path | str]:
    """Models ``a``, which knows its times, and ``gray``."""
    return [bundle_a, f"gray={pixel_bundle(tmp_path_factory.mktemp('served') / 'other')}"]


@pytest.fixture(scope="session")
def server(two_bundles: list[Path | str]) -> Iterator[Served]:
    """At most 8 images and 1 MiB a request."""
    with serving(two_bundles, "--max-batch", "8", "--max-body", "1") as served:
        yield served


@pytest.fixture(scope="session")
def server_of_processes(two_bundles: list[Path | str]) -> Iterator[Served]:
    """The same, where processes answer."""
    with serving(two_bundles, "--max-batch", "8", "--max-body", "1", "--processes") as served:
        yield served
