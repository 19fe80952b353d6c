from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from erde.common.errors import UserError
from erde.runtime.session import Session
from tests.helpers import fuzz_bundles
from tests.helpers.fuzz_bundles import Result, Watch, describe, examine, hunt, table, use
from tests.helpers.hand_made_bundle import convolution_bundle
from tests.helpers.mutations import KINDS


def run(first: int, count: int, folder: Path) -> list[Result]:
    results = list(hunt(first, count, folder))
    print(table(results))
    bad = [describe(one) for one in results if not one.good]
    assert not bad, "\n".join(bad)
    assert [one.seed for one in results] == list(range(first, first + count))
    return results


def test_mutated_bundles(tmp_path: Path) -> None:
    results = run(0, 500, tmp_path)
    # The hunt is worth its name: all kinds, most of them sealed again, and neither outcome a rarity.
    assert {one.kind for one in results} == set(KINDS)
    assert sum(one.resealed for one in results) >= 250
    found = Counter((one.resealed, one.outcome) for one in results)
    assert found[True, "answered"] > 50
    assert found[True, "refused"] > 150
    assert found[False, "refused"] > 30
    # Whitespace, the profile, files that nobody names: not all that differs is wrong.
    assert found[False, "answered"] > 10


@pytest.mark.slow
def test_many_mutated_bundles(tmp_path: Path) -> None:
    run(100_000, 5000, tmp_path)


# ---------------------------------------------------------------- the hunter sees what it looks for


@pytest.fixture
def prey(tmp_path: Path) -> Path:
    return convolution_bundle(tmp_path / "scratch" / "bundle")


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    (tmp_path / "scratch").mkdir()
    return Watch(tmp_path / "scratch")


IMAGES = np.random.default_rng(9).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)


def outcome(monkeypatch: pytest.MonkeyPatch, watch: Watch, prey: Path, what: Callable[..., object]) -> str:
    monkeypatch.setattr(fuzz_bundles, "use", what)
    found: tuple[str, str] = examine(prey, IMAGES, None, watch)
    return found[0]


def test_a_whole_bundle_answers(watch: Watch, prey: Path) -> None:
    expected = use(Session(prey, threads=1), IMAGES)
    assert examine(prey, IMAGES, expected, watch) == ("answered", "")
    assert examine(prey, IMAGES, expected[::-1], watch)[0] == "WRONG ANSWER"


def test_exceptions_are_seen(monkeypatch: pytest.MonkeyPatch, watch: Watch, prey: Path) -> None:
    for error, expected in (
        (UserError("wrong"), "refused"),
        (UserError("two\nlines"), "NOT ONE LINE"),
        (UserError("\x1b[31m"), "NOT ONE LINE"),
        (UserError("x" * 10_000), "LONG ERROR"),
        (UserError("std::bad_alloc"), "refused for memory"),
        (IndexError("x"), "RAISED"),
        (SystemExit(2), "RAISED"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        assert outcome(monkeypatch, watch, prey, fail) == expected


def test_files_are_watched(monkeypatch: pytest.MonkeyPatch, watch: Watch, prey: Path) -> None:
    outside = prey.parent / "outside"
    outside.touch()

    def behind_python(*_: object) -> list[object]:
        watch.allowed = None  # as a library would, without Python's hook
        (prey / "newer").touch()
        return []

    deeds: list[Callable[..., object]] = [
        lambda *_: (prey / "new").touch(),
        lambda *_: outside.read_bytes(),
        lambda *_: outside.open("a").close(),
        lambda *_: outside.rename(outside.with_name("moved")),
        lambda *_: (prey / ".." / "more").mkdir(),
        lambda *_: os.system("true"),
    ]
    for deed in deeds:
        assert outcome(monkeypatch, watch, prey, deed) == "TOUCHED FILES"
    assert outcome(monkeypatch, watch, prey, behind_python) == "WROTE FILES"
    assert outcome(monkeypatch, watch, prey, lambda *_: (prey / "README.md").read_bytes()) == "answered"


SABOTAGE = """
import os, sys, time
from tests.helpers import fuzz_bundles, mutations

mutate, examine, seeds = mutations.mutate, fuzz_bundles.examine, []

def remember(*arguments):
    seeds.append(arguments[-1])
    return mutate(*arguments)

def sabotage(*arguments):
    if seeds[-1] == 2:
        os.abort()
    if seeds[-1] == 4:
        time.sleep(100)
    if seeds[-1] == 6:
        bytearray(2**32)
    return examine(*arguments)

mutations.mutate, fuzz_bundles.examine = remember, sabotage
sys.exit(fuzz_bundles.main())
"""


def test_a_process_that_dies_hangs_or_grows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fuzz_bundles, "SECONDS", 4.0)
    monkeypatch.setattr(fuzz_bundles, "MODULE", "sabotage")
    (tmp_path / "scratch").mkdir()
    found = {one.seed: one for one in hunt(0, 8, tmp_path / "scratch")}
    assert [found[seed].outcome for seed in (2, 4, 6)] == ["CRASHED", "HUNG", "CRASHED"]
    assert "Aborted" in found[2].detail
    assert "MemoryError" in found[6].detail
    assert all(found[seed].good for seed in (0, 1, 3, 5, 7))


def test_a_session_leaves_nothing_at_home(tmp_path: Path) -> None:
    # ONNX Runtime is one of those that would: its telemetry keeps a data base below the cache folder.
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    folder = convolution_bundle(tmp_path / "bundle")
    before = fuzz_bundles.snapshot(tmp_path)
    kept = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(home))
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import sys, numpy\n"
        "from erde.runtime import Session\n"
        "session = Session(sys.argv[1], threads=1)\n"
        "session.predict(numpy.zeros((2, 8, 8, 3), numpy.uint8))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, cwd=elsewhere, check=True)
    assert fuzz_bundles.snapshot(tmp_path) == before
