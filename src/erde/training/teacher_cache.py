"""A teacher's answers on disk.

The cache holds the logits (and, if a loss needs them, each stage's output) of every view of every train image, so
that arms, epochs, resumed runs and other runs with the same teacher and images compute them once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erde.common import progress
from erde.common.errors import UserError
from erde.common.files import check_folder, make_folder, write_json
from erde.data.batches import Batch, TrainBatches
from erde.data.views import Views
from erde.recipe.schema import AugmentationConfig
from erde.training import parallel
from erde.training.teacher import Answer, Teacher

MANIFEST = "manifest.json"
# Seconds between records of progress; a killed fill computes again what came after the last record.
SAVE_SECONDS = 5.0
# Space to leave free beside the cache, for checkpoints and exports.
SPARE_BYTES = 256 * 2**20


class CachedTeacher:
    """A teacher whose answers to all views of all images are on disk; filled once, in order."""

    def __init__(
        self, teacher: Teacher, batches: TrainBatches, root: Path, images: int, identity: dict[str, Any]
    ) -> None:
        self._batches, self._images, self._device = batches, images, teacher.device
        views = batches.views
        if views is None:
            raise UserError(
                "teacher.cache needs views that can be numbered, and cutout and resized_crop have places without number: "
                "set data.augmentation.cutout=0 and resized_crop=null, or teacher.cache=false"
            )
        self._views = views.count
        example = teacher.ask(next(batches.view(0, np.arange(batches.batch_size)[None])))
        # One file an array: (views, images, ...) of float32.
        shapes: dict[str, tuple[int, ...]] = {"logits": (len(example.logits), example.logits.shape[-1])}
        shapes |= {
            f"features_{index}": tuple(value.shape[1:]) for index, value in enumerate(example.features)
        }
        identity = {
            **identity,
            "teacher": network_hash(teacher.network),
            "precision": "bf16" if teacher.autocast else "fp32",
            "computed": [teacher.device.type, teacher.compiled],
            "images": images,
            "views": [views.padding, views.flip, views.count],
            "arrays": {name: list(shape) for name, shape in shapes.items()},
        }
        text = json.dumps(identity, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._identity = identity
        parallel.first_only(lambda: self._fill(teacher, root, shapes))
        self._arrays = {
            name: torch.from_numpy(self._open(name, shape, "c")) for name, shape in shapes.items()
        }

    def __call__(self, batch: Batch) -> Answer:
        """The answer to a training batch."""
        assert batch.views is not None
        rows = batch.views * self._images + batch.indices
        logits, *features = [
            array.flatten(0, 1)[rows].to(self._device, non_blocking=True) for array in self._arrays.values()
        ]
        return Answer(logits.transpose(0, 1), features)

    # ------------------------------------------------------------ filling

    def _fill(self, teacher: Teacher, root: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        done = self._check_manifest()
        total = self._views * self._images
        if done < total:
            self._reserve(root, shapes)
            progress.say(
                f"teacher cache: {self._views} views of {self._images:,} images, {self._size(shapes):,} bytes, in {self.folder}"
            )
            files = {name: self._open(name, shape, "r+") for name, shape in shapes.items()}
            self._compute(teacher, files, done, total)

    def _compute(
        self, teacher: Teacher, files: dict[str, NDArray[np.float32]], done: int, total: int
    ) -> None:
        # The last batch is full too: its kernels are those of the others.
        size, saved = self._batches.batch_size, time.monotonic()
        with progress.task("teacher cache", total, done) as task:
            while done < total:
                view, start = divmod(done, self._images)
                firsts = np.arange(start, self._images, size)
                chunks = (firsts[:, None] + np.arange(size)) % self._images
                for first, images in zip(firsts.tolist(), self._batches.view(view, chunks), strict=True):
                    count = min(size, self._images - first)
                    answer = teacher.ask(images)
                    values = [answer.logits.transpose(0, 1), *answer.features]
                    for file, value in zip(files.values(), values, strict=True):
                        file[view, first : first + count] = value[:count].float().cpu().numpy()
                    done += count
                    if done == total or time.monotonic() - saved > SAVE_SECONDS:
                        self._save(files, done)
                        saved = time.monotonic()
                    if task.due():
                        task.update(done)

    def _save(self, files: dict[str, NDArray[np.float32]], done: int) -> None:
        # First the numbers, then the claim that they are there.
        for file in files.values():
            file.flush()  # type: ignore[attr-defined]  # a memory map
        write_json(self.folder / MANIFEST, {**self._identity, "done": done})

    def _check_manifest(self) -> int:
        """The number of answers that an earlier process recorded; 0 without a manifest."""
        path = self.folder / MANIFEST
        if not path.exists():
            return 0
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            done = manifest.pop("done")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not the manifest of a teacher cache: remove {self.folder}") from error
        if manifest != self._identity:
            raise UserError(
                f"{self.folder} is the cache of another teacher, or of other images: set teacher.cache to another "
                "folder, or remove it"
            )
        complete = all(
            (self.folder / f"{name}.f32").is_file()
            and (self.folder / f"{name}.f32").stat().st_size == self._bytes(tuple(shape))
            for name, shape in self._identity["arrays"].items()
        )
        if not complete or not isinstance(done, int):
            raise UserError(f"the teacher cache {self.folder} is damaged: remove it, it is computed again")
        return done

    def _reserve(self, root: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        """Reserve the disk space: a full disk would kill a process that writes to a memory map."""
        try:
            make_folder(self.folder)
            reserved = sum(file.stat().st_blocks * 512 for file in self.folder.glob("*.f32"))
            missing, free = self._size(shapes) - reserved, shutil.disk_usage(self.folder).free - SPARE_BYTES
            if missing > free:
                raise _too_large(self._size(shapes), root, free)
            for name, shape in shapes.items():
                with (self.folder / f"{name}.f32").open("ab") as file:
                    file.truncate(self._bytes(shape))
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, self._bytes(shape))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
                raise UserError(
                    f"the teacher cache cannot be written to {root}: {error.strerror}; set teacher.cache to a folder "
                    "that you may write to"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"the teacher cache takes {_gigabytes(self._size(shapes))}, and the disk of {root} is full: set "
                    "teacher.cache to a larger disk, or lower data.augmentation.views"
                ) from error
            raise

    # ------------------------------------------------------------ sizes and files

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return 4 * self._views * self._images * math.prod(shape)

    def _size(self, shapes: dict[str, tuple[int, ...]]) -> int:
        return sum(self._bytes(shape) for shape in shapes.values())

    def _open(self, name: str, shape: tuple[int, ...], mode: Any) -> NDArray[np.float32]:
        path = self.folder / f"{name}.f32"
        return np.memmap(path, dtype="<f4", mode=mode, shape=(self._views, self._images, *shape))


def check_cache(root: Path, augmentation: AugmentationConfig, images: int, logits: int) -> None:
    """Raise, before the teacher is trained, if ``root`` cannot be written to or lacks the space.

    ``logits`` is the number of logits per image: exits times classes.
    """
    views = Views.of(augmentation)
    assert views is not None
    check_folder(root)
    parent = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(
            f"the teacher cache cannot be written to {root}: {parent} is read-only; set teacher.cache to a folder that "
            "you may write to"
        )
    size = 4 * views.count * images * logits
    free = shutil.disk_usage(parent).free - SPARE_BYTES
    if size > free + sum(file.stat().st_size for file in root.glob("*/*.f32")):
        raise _too_large(size, root, free)


def _too_large(size: int, root: Path, free: int) -> UserError:
    return UserError(
        f"the teacher cache takes {_gigabytes(size)} in {root}, where {_gigabytes(max(free, 0))} can be used: set "
        "teacher.cache to a larger disk, lower data.augmentation.views, or set teacher.cache=false"
    )


def network_hash(network: nn.Module) -> str:
    """SHA-256 over the structure, as printed, attributes, code, and all tensors, by name."""
    digest = hashlib.sha256(repr(network).encode())
    every_module_has = vars(nn.Module())
    for name, module in network.named_modules():
        own = {key: _text(value) for key, value in vars(module).items() if key not in every_module_has}
        code = getattr(module, "code", None)
        if not isinstance(code, str):
            # Two classes with equal weights may compute different things.
            with contextlib.suppress(OSError, TypeError):
                code = inspect.getsource(type(module))
        digest.update(repr((name, sorted(own.items()), code)).encode())
    # Buffers that are not saved may compute all the same.
    for name, tensor in (dict(network.named_buffers()) | network.state_dict()).items():
        digest.update(name.encode() + _text(tensor).encode())
    return digest.hexdigest()


def _text(value: Any) -> str:
    """An attribute by its value; an object that has none in writing by its type."""
    if isinstance(value, Tensor):
        # As bytes: numpy has no bfloat16.
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}{hashlib.sha256(content).hexdigest()}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return repr(sorted((_text(key), _text(item)) for key, item in value.items()))
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_text, value)))
    if isinstance(value, list | tuple):
        return repr([_text(item) for item in value])
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
