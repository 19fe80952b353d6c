"""The bundles that a server answers with: opened, warmed, looked after, and exchanged without a pause."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from erde.bundle.sealing import seal_of
from erde.bundle.shipped import bundle_folder
from erde.common.errors import UserError, in_one_line, listed
from erde.policy.points import OperatingPoint
from erde.runtime.monitor import Monitor
from erde.runtime.session import Session
from erde.serving.errors import Reason, RequestError, bad
from erde.serving.log import Log

# As in a URL and a label of the metrics.
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")
# Each bounds the risk: an image that is lost is one that is answered otherwise.
_BOUNDS_RISK = ("risk", "disagreement")
# A bundle that was refused is tried again, if nothing changed: memory may have been short.
RETRY_SECONDS = 10.0
Stamp = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class Loaded:
    """A bundle in memory: its session, the start of its seal as the version, and a drift watch if it is calibrated."""

    session: Session
    version: str
    monitor: Monitor | None

    @classmethod
    def open(cls, path: Path, threads: int | None) -> Loaded:
        """Verify and warm the bundle at ``path``; :class:`UserError` if anything is wrong with it."""
        # Several requests are answered at once: a thread that waits actively would take a core from another one.
        session = Session(path, threads=threads, spinning=False)
        sample = session.manifest.reference_sample.decode(session.manifest.input_shape)
        session.predict(sample)
        session.predict(sample, thresholds=[None] * (len(session.manifest.stages) - 1))
        try:
            monitor = session.monitor()
        except UserError:  # nothing to watch against
            monitor = None
        return cls(session, seal_of(session.manifest)[:12], monitor)


class Model:
    """A bundle under a name. ``loaded`` is exchanged as a whole: a request takes it once and keeps it."""

    def __init__(self, name: str, path: Path, threads: int | None, log: Log | None = None) -> None:
        self.name, self.path, self._threads = name, path, threads
        self.log = log or Log()
        self._alarmed: Monitor | None = None  # whose drift was logged
        self._stamp = _stamp(path)
        self._refused: Stamp = ()
        self._said = ""  # why it was refused
        self._retry = 0.0  # when the refused one is tried again
        self.loaded = Loaded.open(path, threads)
        # Where load control will set a cheaper point; None for the bundle's own default.
        self.default_point: str | None = None

    def check_version(self, version: str) -> None:
        """:class:`RequestError` unless ``version`` is the one that is loaded, or empty."""
        if version not in ("", self.loaded.version):
            raise RequestError(
                Reason.UNKNOWN,
                f"model '{self.name}' has no version '{version}': it has {self.loaded.version}, or name none",
            )

    def point_for(self, loaded: Loaded, name: str | None, max_risk: float | None) -> OperatingPoint:
        """The operating point of a request; the only place where it is decided.

        ``name`` and ``max_risk`` are what the request asks for. With ``max_risk`` it is the certified point that saves
        most MACs among those whose certificate bounds the risk by that share of images or less.

        Raises:
            RequestError: both are given, or no certificate is that strict.
            UserError: the bundle has no such point.
        """
        manifest = loaded.session.manifest
        if max_risk is None:
            return manifest.point(name or self.current_default(loaded))
        if name is not None:
            raise bad("give an operating_point or a max_risk, not both")
        promises = [
            (point, point.certificate.max_risk)
            for point in manifest.operating_points
            if point.certificate is not None and point.certificate.guarantee in _BOUNDS_RISK
        ]
        kept = [point for point, risk in promises if risk <= max_risk]
        if not kept:
            known = listed([f"{point.name} ({risk:g})" for point, risk in promises])
            raise bad(
                f"max_risk is {max_risk:g}, and no operating point of '{self.name}' is certified for so little; "
                f"certified: {known or 'none'}"
            )
        return max(kept, key=lambda point: point.macs_saved or 0.0)

    def current_default(self, loaded: Loaded) -> str:
        """The operating point of requests that name none."""
        names = [point.name for point in loaded.session.manifest.operating_points]
        # An exchanged bundle need not have the point.
        moved = self.default_point if self.default_point in names else None
        return moved or loaded.session.manifest.default_operating_point

    def refresh(self) -> bool:
        """Open the bundle again if its folder has changed; True if it is another one now.

        What cannot be loaded is tried again now and then, and logged once for each reason: a bundle that is copied file
        by file changes many times before it is complete. The same bundle, of which a file beside the seal has changed,
        keeps its drift watch.
        """
        stamp = _stamp(self.path)
        if stamp == self._stamp:  # rolled back: the next refusal is a new story
            self._said = ""
        # While a folder is being renamed there is none.
        if stamp in (self._stamp, ()) or (stamp == self._refused and time.monotonic() < self._retry):
            return False
        try:
            loaded = Loaded.open(self.path, self._threads)
        except Exception as error:  # files may vanish while they are read
            reason = in_one_line(str(error))
            if reason != self._said:
                self.log.event(
                    "bundle_refused",
                    self.name,
                    f"the changed bundle is not taken, {self.loaded.version} stays: {reason}",
                )
            self._refused, self._said, self._retry = stamp, reason, time.monotonic() + RETRY_SECONDS
            return False
        self._stamp, self._said = stamp, ""
        old = self.loaded
        if loaded.version == old.version:
            self.loaded = replace(loaded, monitor=old.monitor)
            self.log.event(
                "bundle_reopened", self.name, f"bundle {old.version} opened again: its folder changed"
            )
            return False
        self.log.event("bundle_exchanged", self.name, f"bundle {loaded.version} in place of {old.version}")
        self.loaded = loaded
        return True

    def look_for_drift(self) -> None:
        """Log an alarm of the drift watch, once for a bundle."""
        monitor = self.loaded.monitor
        if monitor is not None and monitor is not self._alarmed:
            report = monitor.report()
            if report.drifted:
                self._alarmed = monitor
                self.log.event("drift", self.name, report.message)

    def properties(self, loaded: Loaded) -> dict[str, Any]:
        """What a client may want to know beside shapes and types."""
        manifest = loaded.session.manifest
        return {
            "classes": manifest.classes,
            "default_operating_point": self.current_default(loaded),
            "operating_points": [
                {
                    "name": point.name,
                    "certificate": None
                    if point.certificate is None
                    else point.certificate.sentence(manifest.precision),
                    "macs_saved": point.macs_saved,
                }
                for point in manifest.operating_points
            ],
            "macs": [stage.macs for stage in manifest.stages],
            "precision": manifest.precision,
        }


def _stamp(path: Path) -> Stamp:
    """Names, inodes, sizes and times of a bundle's files; () where there is no folder."""
    try:
        with os.scandir(path) as entries:
            states = [(entry.name, entry.stat()) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted((name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in states))


def open_models(bundles: Sequence[str], threads: int | None, log: Log) -> dict[str, Model]:
    """The models for ``BUNDLE``, if there is such a path, or ``NAME=BUNDLE``; without a name it is the folder's.

    Raises:
        UserError: a name that cannot stand in a URL or comes twice, or a bundle that cannot be used.
    """
    paths: dict[str, Path] = {}
    for text in bundles:
        name, equals, rest = text.partition("=")
        # A path may have an equals sign as well: one that is there is meant.
        if equals and _NAME.fullmatch(name) and not Path(text).exists():
            path = bundle_folder(rest)
        else:
            path = bundle_folder(text)
            name = path.resolve().name
        if not _NAME.fullmatch(name):
            raise UserError(
                f"'{name}' cannot name a model: give NAME={text} with letters, digits, '.', '_' and '-'"
            )
        if name in paths:
            raise UserError(
                f"two models are called '{name}' ({paths[name]} and {path}): give one as NAME={path}"
            )
        paths[name] = path
    return {name: Model(name, path, threads, log) for name, path in paths.items()}
