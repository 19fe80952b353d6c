"""Run a bundle without torch: stages one after another, each only for the images that are still undecided."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from erde import bundle
from erde.bundle.profile import PROFILE, Profile
from erde.bundle.shipped import bundle_folder, sample_images
from erde.common.errors import UserError, in_one_line
from erde.common.splits import ImageSource
from erde.policy import rule as policy
from erde.policy.cost import Cost, first_stage
from erde.runtime.display import MOST_ROWS
from erde.runtime.engines import check_engine, open_stages
from erde.runtime.inputs import ImageLike, read_images
from erde.runtime.monitor import Monitor
from erde.runtime.prediction import Prediction
from erde.runtime.stages import CPU, Providers

# More than any machine has; ONNX Runtime would start them all the same, and wait for them.
MAX_THREADS = 1024


class Session:
    """A bundle, verified and ready to answer; several threads may share one.

    Args:
        path: the bundle's folder; or ``digits-demo``, which comes with erde, or ``hf://OWNER/NAME[@REVISION]`` on the
            Hugging Face hub (the extra ``hub``), downloaded once.
        threads: of the engine; None leaves the choice to it.
        providers: ONNX Runtime's execution providers; the CPU by default, for which alone int8 stages are certified:
            with any other their answers are ``capped``.
        spinning: whether idle threads of ONNX Runtime wait actively; False leaves the cores to others.
        engine: ``onnxruntime``, or ``openvino`` (the extra of that name). Int8 stages round otherwise in
            OpenVINO than where they were certified, so that their answers are ``capped``.

    Raises:
        UserError: whatever is wrong with the bundle, in one line, before any graph is loaded.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        providers: Providers | None = None,
        spinning: bool = True,
        engine: str = "onnxruntime",
    ) -> None:
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(
                f"threads is {threads}, expected 1 to {MAX_THREADS}, or None for the engine's choice"
            )
        self._engine = check_engine(engine)
        folder = self.folder = bundle_folder(path)
        self.manifest = bundle.read(folder)
        self.rule = self.manifest.rule()
        self._threads = threads
        self._stages = open_stages(
            engine,
            [folder / stage.file for stage in self.manifest.stages],
            threads,
            providers,
            spinning,
            self.manifest.takes_image(),
        )
        # Certificates are of ONNX Runtime's logits on the CPU. Another library has them in float up to the last bits;
        # int8 values it rounds otherwise.
        named = {name if isinstance(name, str) else name[0] for name in providers or [CPU]}
        on_cpu = engine == "onnxruntime" and named == {CPU}
        self._certified = on_cpu or self.manifest.precision == "fp32"
        self._networks = self.manifest.networks()
        self._macs = np.asarray([stage.macs for stage in self.manifest.stages], dtype=np.int64)
        # MACs where every early exit is disabled: of a chain the last network runs alone.
        nowhere = [None] * (len(self._macs) - 1)
        self._alone_macs = self.manifest.cost().macs_at(nowhere).astype(np.int64)
        self._temperatures = np.asarray(self.manifest.temperatures)
        self._profile = self._profile_at_hand()
        self._check_reference_sample(folder)

    @property
    def classes(self) -> list[str]:
        """Class names, by label."""
        return self.manifest.classes

    def samples(self) -> list[Path]:
        """Image files to try the bundle with, in the folder ``samples`` beside its stages; most bundles have none."""
        return sample_images(self.folder)

    def all_logits(self, images: ImageSource) -> NDArray[np.float32]:
        """Raw logits (E, N, K) of every exit for uint8 images (N, H, W, C); for calibration, not for speed."""
        if tuple(images.shape[1:]) != self.manifest.input_shape:
            expected = ", ".join(map(str, self.manifest.input_shape))
            raise UserError(f"expected images of shape (N, {expected}), got {tuple(images.shape)}")
        # Their type shows in what is taken from them only: they need not be an array.
        self._check_images(images[:1])
        return self._stages.all_logits(images)

    def cost(self, timed: bool | None = None) -> Cost:
        """MACs per exit, and milliseconds where the bundle's folder has a profile of the machine.

        A profile that does not fit is an error where milliseconds are asked for (``timed=True``) and as good as none
        else; with ``timed=False`` none is read.
        """
        milliseconds = None
        if timed is not False and (self.folder / PROFILE).is_file():
            try:
                milliseconds = self._profile_on_disk().exit_milliseconds()
            except UserError:
                if timed:
                    raise
        return self.manifest.cost(milliseconds)

    def profile(
        self,
        *,
        images: NDArray[np.uint8] | None = None,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32),
        rounds: int = 30,
    ) -> Profile:
        """Time every stage on this machine, and write ``profile.json`` into the bundle's folder.

        Batch sizes and stages take turns within each round, so that a busy moment hits all alike; the median
        of ``rounds`` counts. ``images``: uint8 (N, H, W, C), drawn from with replacement; the bundle's own
        reference sample without them.

        With its profile a session knows when taking the images that are done out of a batch costs more than
        carrying them along to the next exit; without one they are always taken out.
        """
        if not batch_sizes or min(batch_sizes) != 1 or rounds < 1:
            raise UserError(
                f"batch sizes {', '.join(map(str, batch_sizes))} and {rounds} rounds: expected 1 among the sizes, "
                "no smaller one, and a round or more"
            )
        if images is None:
            images = self.manifest.reference_sample.decode(self.manifest.input_shape)
        images = self._check_images(images)
        generator = np.random.default_rng(0)
        times: dict[int, list[list[float]]] = {size: [] for size in batch_sizes}
        gathering: list[list[float]] = []
        for turn in range(rounds + 2):
            for size in batch_sizes:
                seconds, per_row = self._time_stages(images[generator.integers(0, len(images), size)])
                if turn >= 2:  # the first calls allocate
                    times[size].append(seconds)
                    gathering += [per_row] if size == max(batch_sizes) else []
        profile = Profile(
            stages=bundle.stages_hash(self.manifest),
            machine=f"{platform.system()} {platform.machine()}, {self._stages.version}",
            engine=self._engine,
            threads=self._threads,
            rounds=rounds,
            milliseconds={size: (1e3 * np.median(rows, axis=0)).tolist() for size, rows in times.items()},
            gather_milliseconds=(1e3 * np.median(gathering, axis=0)).tolist(),
        )
        profile.write(self.folder / PROFILE)
        self._profile = self._profile_at_hand()
        return profile

    def _profile_on_disk(self) -> Profile:
        """The profile in the bundle's folder; :class:`UserError` without one."""
        stages, exits = bundle.stages_hash(self.manifest), len(self._stages)
        return Profile.read(self.folder / PROFILE, stages, exits)

    def _read_profile(self) -> Profile:
        """The same, if it is of this session's threads and engine."""
        profile = self._profile_on_disk()
        if profile.threads != self._threads:
            raise UserError(
                f"{self.folder / PROFILE} was measured with threads={profile.threads}, this session has "
                f"threads={self._threads}: open it with the same number, or measure again with "
                "`erde bundle profile --threads`"
            )
        if profile.engine != self._engine:
            raise UserError(
                f"{self.folder / PROFILE} was measured with the engine {profile.engine}, this session has {self._engine}: "
                f"measure again with `erde bundle profile --engine {self._engine}`"
            )
        return profile

    def _profile_at_hand(self) -> Profile | None:
        """The profile if there is one for this session's threads and engine."""
        stages, exits = bundle.stages_hash(self.manifest), len(self._stages)
        profile = Profile.at_hand(self.folder / PROFILE, stages, exits)
        fits = profile is not None and (profile.threads, profile.engine) == (self._threads, self._engine)
        return profile if fits else None

    def _time_stages(self, images: NDArray[np.uint8]) -> tuple[list[float], list[float]]:
        """Seconds of each stage with its decision, for a batch that stays whole, and of taking an image over to the
        next stage."""
        features: NDArray[Any] | None = None
        so_far: list[NDArray[Any]] = []
        seconds, per_row = [], []
        every = np.arange(len(images))
        for index, takes_image in enumerate(self._stages.takes_image):
            x = images if takes_image else features
            assert x is not None
            final = index == len(self._stages) - 1
            if index:
                started = time.perf_counter()
                self._stages.gather(index, x, every)
                per_row.append((time.perf_counter() - started) / len(images))
            started = time.perf_counter()
            features, logits = self._stages.run_bound(index, x)
            so_far = [*so_far, logits]
            self.rule.decide_on(so_far, self.rule.answer(so_far, final), final)
            seconds.append(time.perf_counter() - started)
        return seconds, per_row

    def predict(
        self,
        images: ImageLike | Sequence[ImageLike],
        *,
        operating_point: str | None = None,
        thresholds: policy.Thresholds | None = None,
        max_exit: int | None = None,
        max_macs: float | None = None,
        deadline_ms: float | None = None,
    ) -> Prediction:
        """Answer N images, N = 0 included; a stage runs only for images still undecided.

        With several limits the tightest counts. See :class:`Prediction` for what ``capped`` says of them.

        Args:
            images: uint8 (N, H, W, C) as the bundle takes them: the quick way. Or a path, the bytes of an image file,
                an image of Pillow's, a uint8 array (H, W), (H, W, C) or (N, H, W, C) of another size, or a list of
                these: decoded, turned upright, resized and cropped as ``erde predict`` does.
            operating_point: by name; the bundle's default without it.
            thresholds: E-1 numbers or None, instead of an operating point; not certified.
            max_exit: the last exit that may run; it answers whatever is left. Not certified.
            max_macs: the same as a limit on MACs per image.
            deadline_ms: the same in milliseconds for the whole batch, as if no image left early, by the
                ``profile.json`` in the bundle's folder: the times of the least profiled batch size that holds
                N images, or those of the largest one, scaled up. A plan, not a guard: no stage is interrupted.

        Raises:
            UserError: images of a wrong type, or that cannot be read; an unknown operating point, an impossible
                limit, a deadline without a profile.
        """
        files: list[str] | None = None
        if self._is_batch(images):
            batch = np.ascontiguousarray(images)
        else:
            batch, files = read_images(images, self.manifest.input_shape)
        chosen, last = self.plan(
            len(batch),
            operating_point=operating_point,
            thresholds=thresholds,
            max_exit=max_exit,
            max_macs=max_macs,
            deadline_ms=deadline_ms,
        )
        name = self.manifest.point(operating_point).name if thresholds is None else None
        limited = name is None or last < len(self._stages) - 1
        answer = self._answer(batch, chosen, last, limited or not self._certified, name)
        if files is None:
            return answer
        return dataclasses.replace(answer, files=files, thumbnails=batch[:MOST_ROWS].copy())

    def plan(
        self,
        count: int,
        *,
        operating_point: str | None = None,
        thresholds: policy.Thresholds | None = None,
        max_exit: int | None = None,
        max_macs: float | None = None,
        deadline_ms: float | None = None,
    ) -> tuple[policy.Thresholds, int]:
        """What :meth:`predict` would do with ``count`` images: the thresholds, and the last exit that may run.

        It raises what ``predict`` raises of its settings, before there is an image.
        """
        chosen, final = self._thresholds(operating_point, thresholds), len(self._stages) - 1
        if max_exit is None and max_macs is None and deadline_ms is None:
            return chosen, final
        if max_exit is not None and not 0 <= max_exit <= final:
            raise UserError(f"max_exit is {max_exit}, this bundle has exits 0 to {final}")
        within = np.arange(final + 1) <= (final if max_exit is None else max_exit)
        # To the final exit of a chain its last network may run alone; to those before it all stages run.
        start = first_stage(self._networks, chosen)
        if max_macs is not None:
            if not math.isfinite(max_macs):
                raise UserError(f"max_macs is {max_macs}, expected a finite number of MACs per image")
            macs = np.append(self._macs[:-1], (self._alone_macs if start else self._macs)[-1])
            within &= macs <= max_macs
            if not (macs <= max_macs).any():
                raise UserError(f"max_macs is {max_macs:,.0f}, the first exit already takes {macs[0]:,}")
        if deadline_ms is not None:
            within &= self._in_time(deadline_ms, count, start)
        if not within.any():
            raise UserError("no exit is within all of these limits: raise one of them, or leave it out")
        return chosen, int(np.flatnonzero(within)[-1])

    def monitor(self, *, false_alarm: float = 0.01) -> Monitor:
        """A drift watch for this session's answers; ``false_alarm`` bounds its whole life."""
        return Monitor(self.manifest, false_alarm=false_alarm)

    def predict_stream(
        self,
        images: Iterable[NDArray[np.uint8]],
        *,
        batch_size: int = 32,
        operating_point: str | None = None,
        thresholds: policy.Thresholds | None = None,
        max_exit: int | None = None,
        max_macs: float | None = None,
        deadline_ms: float | None = None,
    ) -> Iterator[Prediction]:
        """Answer any number of single uint8 images (H, W, C), in order: a Prediction for every ``batch_size``.

        The last one has what is left over. ``images`` may be endless: no image is taken before its batch is
        asked for, and one batch is held at a time. The other arguments, for each batch, and the errors are
        those of :meth:`predict`; all but those about images, and a deadline for a smaller last batch, come at
        once, before any image is taken.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, expected 1 or more")
        self.plan(
            batch_size,
            operating_point=operating_point,
            thresholds=thresholds,
            max_exit=max_exit,
            max_macs=max_macs,
            deadline_ms=deadline_ms,
        )
        return (
            self.predict(
                batch,
                operating_point=operating_point,
                thresholds=thresholds,
                max_exit=max_exit,
                max_macs=max_macs,
                deadline_ms=deadline_ms,
            )
            for batch in self._batches(images, batch_size)
        )

    def _batches(self, images: Iterable[NDArray[np.uint8]], size: int) -> Iterator[NDArray[np.uint8]]:
        """Batches (up to ``size``, H, W, C) of single images. All lie in one memory: use each before the next."""
        shape = self.manifest.input_shape
        batch = np.empty((size, *shape), dtype=np.uint8)
        filled = 0
        for number, image in enumerate(images):
            image = np.asarray(image)
            if image.shape != shape or image.dtype != np.uint8:
                raise UserError(
                    f"image {number} of the stream (from 0): expected uint8 of shape "
                    f"({', '.join(map(str, shape))}), got {image.dtype} of shape {image.shape}"
                )
            batch[filled] = image
            filled += 1
            if filled == size:
                yield batch
                filled = 0
        if filled:
            yield batch[:filled]

    def _answer(
        self,
        images: NDArray[np.uint8],
        thresholds: policy.Thresholds,
        last: int,
        capped: bool,
        operating_point: str | None,
    ) -> Prediction:
        """Stages 0 to ``last`` on checked images; at ``last`` all that are left have to answer."""
        # What left together: rows of ``images``, their exit, logits and scores.
        parts: list[tuple[NDArray[np.intp], int, NDArray[Any], NDArray[np.float64]]] = []
        carried: list[tuple[NDArray[np.intp], int]] = []  # rows that a stage computed although they were done
        present = np.arange(len(images))  # rows in the batch
        undecided: NDArray[np.bool_] | None = None  # which of them are; None for all
        first_scores = np.zeros(0)
        x: NDArray[Any] = images
        so_far: list[NDArray[Any]] = []  # their logits at every exit they passed, where the rule looks back
        final = len(self._stages) - 1
        start = first_stage(self._networks, thresholds) if last == final else 0
        first_scored = last if start else 0
        clock = [time.perf_counter()] * (start + 1)  # stages before the first one take no time
        for index in range(start, last + 1):
            features, stage_logits = self._stages.run_bound(index, x)
            so_far = [*so_far, stage_logits] if self.rule.looks_back else [stage_logits]
            left = len(present)
            if undecided is not None:
                carried.append((present[~undecided], index))
                left = int(np.count_nonzero(undecided))
            threshold = thresholds[index] if index < last else None
            # Nobody asks for the score of a disabled exit.
            if index in (first_scored, last) or threshold is not None:
                answer = self.rule.answer(so_far, index == final)
                scores = self.rule.decide_on(so_far, answer, index == final)
                if index == first_scored:
                    first_scores = scores
                if index == last:
                    done = undecided
                else:
                    done = policy.leaves(scores, threshold)
                    done = done if undecided is None else done & undecided
                leaving = left if done is None else int(np.count_nonzero(done))
                if done is None or leaving == len(present):
                    parts.append((present, index, answer, scores))
                elif leaving:
                    parts.append((present[done], index, answer[done], scores[done]))
                    undecided = ~done if undecided is None else undecided & ~done
                left -= leaving
            if left and index < last:
                keep: NDArray[np.intp] | None = None  # rows that go on; None for all
                takes_image = self._stages.takes_image[index + 1]
                if undecided is not None and (takes_image or self._pays_to_gather(index, len(present), left)):
                    keep = np.flatnonzero(undecided)
                    so_far = [logits[keep] for logits in so_far]
                    present, undecided = present[keep], None
                if takes_image:
                    x = (
                        images
                        if len(present) == len(images)
                        else self._stages.gather(index + 1, images, present)
                    )
                else:
                    assert features is not None
                    x = features if keep is None else self._stages.gather(index + 1, features, keep)
            clock.append(time.perf_counter())
            if not left:
                break
        return self._prediction(
            parts, carried, len(images), start, first_scores, capped, operating_point, clock
        )

    def _prediction(
        self,
        parts: list[tuple[NDArray[np.intp], int, NDArray[Any], NDArray[np.float64]]],
        carried: list[tuple[NDArray[np.intp], int]],
        count: int,
        start: int,
        first_scores: NDArray[np.float64],
        capped: bool,
        operating_point: str | None,
        clock: list[float],
    ) -> Prediction:
        if len(parts) == 1:  # all left together, as a single image does
            _, exit, answer, scores = parts[0]
            exits, logits = np.full(count, exit, dtype=np.int64), answer.astype(np.float64)
        else:
            exits = np.zeros(count, dtype=np.int64)
            logits, scores = np.zeros((count, len(self.manifest.classes))), np.zeros(count)
            for rows, exit, answer, of_rows in parts:
                exits[rows], logits[rows], scores[rows] = exit, answer, of_rows
        reached = exits
        if carried:
            reached = exits.copy()
            for rows, index in carried:
                reached[rows] = index
        if not np.isfinite(logits).all():
            raise UserError(
                f"the stages of bundle {self.folder} give logits that are not finite for these images: export it again"
            )
        return Prediction(
            labels=logits.argmax(axis=-1),
            logits=logits,
            exits=exits,
            scores=scores,
            macs=(self._alone_macs if start else self._macs)[reached],
            capped=capped,
            milliseconds=tuple(1e3 * (after - before) for before, after in itertools.pairwise(clock)),
            first_scores=first_scores,
            operating_point=operating_point,
            temperatures=self._temperatures,
            classes=self.manifest.classes,
        )

    def _pays_to_gather(self, index: int, present: int, left: int) -> bool:
        """True if the next stage is quicker on the ``left`` undecided images of ``present`` behind exit ``index``."""
        if self._profile is None:
            return True
        saved = self._profile.stage_milliseconds(index + 1, present)
        saved -= self._profile.stage_milliseconds(index + 1, left)
        return saved > left * self._profile.gather_milliseconds[index]

    def _is_batch(self, images: object) -> TypeGuard[NDArray[np.uint8]]:
        """True for uint8 (N, H, W, C) as the stages take it."""
        return (
            isinstance(images, np.ndarray)
            and images.ndim == 4
            and images.shape[1:] == self.manifest.input_shape
            and images.dtype == np.uint8
        )

    def _check_images(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        images = np.asarray(images)
        expected = self.manifest.input_shape
        if not self._is_batch(images):
            raise UserError(
                f"expected uint8 images of shape (N, {', '.join(map(str, expected))}), got {images.dtype} of shape "
                f"{images.shape}: decode and resize them first (erde predict does both)"
            )
        return np.ascontiguousarray(images)

    def _in_time(self, deadline_ms: float, count: int, start: int) -> NDArray[np.bool_]:
        """Whether ``count`` images reach each exit in time, by the profile; the final one from stage ``start``."""
        profile = self._profile or self._read_profile()
        count = max(1, count)
        size = min(
            (size for size in profile.milliseconds if size >= count), default=max(profile.milliseconds)
        )
        times = np.cumsum(profile.milliseconds[size]) * max(1.0, count / size)
        times[-1] -= times[start - 1] if start else 0
        if not (times <= deadline_ms).any():
            raise UserError(
                f"deadline_ms is {deadline_ms:g}, by {self.folder / PROFILE} the first exit takes {times[0]:.3g} ms "
                f"for a batch of {count}: allow more time, or give fewer images at once"
            )
        in_time: NDArray[np.bool_] = times <= deadline_ms
        return in_time

    def _thresholds(self, name: str | None, thresholds: policy.Thresholds | None) -> policy.Thresholds:
        if thresholds is None:
            return self.manifest.point(name).thresholds
        if name is not None:
            raise UserError("give an operating point or thresholds, not both")
        if len(thresholds) != len(self._stages) - 1:
            raise UserError(
                f"{len(thresholds)} thresholds for {len(self._stages)} exits: expected {len(self._stages) - 1}, "
                "None to disable an exit"
            )
        return thresholds

    def _check_reference_sample(self, folder: Path) -> None:
        sample = self.manifest.reference_sample
        try:
            images = sample.decode(self.manifest.input_shape)
            logits = self._stages.all_logits(images)
        except Exception as error:  # a stage that does not take what the last one gives, and the like
            raise UserError(f"bundle {folder}: its stages do not run: {in_one_line(str(error))}") from error
        expected = np.asarray(sample.logits)
        if logits.shape != expected.shape or not np.abs(logits - expected).max() <= sample.tolerance:
            if self._engine != "onnxruntime":
                raise UserError(
                    f"bundle {folder} ({self.manifest.precision}): in {self._stages.version} its stages do not give the "
                    "logits of its reference sample, which are ONNX Runtime's: use the engine onnxruntime"
                )
            raise UserError(
                f"bundle {folder}: its stages do not give the logits of its reference sample on this machine: "
                "export it again here, or report this with `erde bundle info`"
            )


def load(
    bundle: str | Path,
    *,
    threads: int | None = None,
    providers: Providers | None = None,
    spinning: bool = True,
    engine: str = "onnxruntime",
) -> Session:
    """Open a bundle: a folder, ``digits-demo``, which comes with erde, or ``hf://OWNER/NAME[@REVISION]`` on the hub.

    The other arguments and the errors are those of :class:`Session`.
    """
    return Session(bundle, threads=threads, providers=providers, spinning=spinning, engine=engine)
