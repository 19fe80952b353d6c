"""Run folders that are started, continued or read: their lock, and whether a recipe is the one that a run began with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from erde.common.errors import UserError
from erde.common.files import (
    Lock,
    check_folder,
    is_leftover,
    make_folder,
    sweep_leftovers,
    write_json,
    write_text,
)
from erde.data.sources import SHIPPED
from erde.recipe.load import load_saved_config
from erde.recipe.schema import FREE_TO_CHANGE, Config
from erde.recipe.validation import first_difference, validate
from erde.runs import training
from erde.runs.folder import CONFIG, SPLITS, Run
from erde.training import parallel

LOCK = ".lock"


def open_run(config: Config, folder: Path, resume: bool) -> Run:
    """Start a run in a new folder, or continue the one that is there.

    Nothing is written before the data is loaded and every network and loss of the recipe is built once.

    Raises:
        UserError: bad input; a folder that holds another run, or a run and no ``resume``; another writer.
    """
    parallel.start(config.device)
    config = with_whole_paths(config)
    runs: list[Run] = []
    parallel.first_only(lambda: runs.append((_continue if resume else _start)(config, folder)))
    if runs:
        return runs[0]
    # The other processes read the recipe as the first one wrote it.
    saved = folder / CONFIG
    return Run(load_saved_config(saved) if resume and saved.is_file() else config, folder)


def existing_run(folder: Path, *, read_only: bool = False) -> Run:
    """The run in ``folder``, by its own saved recipe; reading alone needs no lock."""
    saved = folder / CONFIG
    if not saved.is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml (erde run writes one)")
    config = load_saved_config(saved)
    _check_cache_folder(config, saved)
    if read_only:
        return Run(config, folder)
    parallel.start(config.device)
    locks: list[Lock] = []
    parallel.first_only(lambda: locks.append(_lock(folder)))
    parallel.first_only(lambda: sweep_leftovers(folder))
    return Run(config, folder, locks[0] if locks else None)


def _continue(config: Config, folder: Path) -> Run:
    saved = folder / CONFIG
    if not saved.is_file():
        raise UserError(f"nothing to resume in {folder}: it has no config.yaml; start without --resume")
    with _locked(folder) as lock:
        sweep_leftovers(folder)
        run = Run(_resumed(config, saved), folder, lock)
        training.check(run)
        _begin(run, "resume")
    return run


def _start(config: Config, folder: Path) -> Run:
    _check_empty(folder)
    checked = Run(config, folder)
    training.check(checked)
    make_folder(folder)
    with _locked(folder) as lock:
        # Another process may have been quicker.
        _check_empty(folder)
        sweep_leftovers(folder)
        run = Run(config, folder, lock)
        run.data = checked.data
        _begin(run, "start")
    return run


def _begin(run: Run, event: str) -> None:
    write_text(run.folder / CONFIG, run.config.to_yaml())
    if not (run.folder / SPLITS).exists():
        write_json(run.folder / SPLITS, run.data.fingerprints())
    run.log.write(event, recipe=run.config.name, seed=run.config.seed)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Lock]:
    """The lock of a run that is being opened. It is released if that fails, and else stays with the run."""
    lock = _lock(folder)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _lock(folder: Path) -> Lock:
    return Lock(folder / LOCK, f"the run {folder}")


def with_whole_paths(config: Config) -> Config:
    """The recipe with its local data, weights and cache by their whole paths, so that it works from every folder."""

    def whole(path: Any) -> Any:
        return str(Path(path).resolve()) if isinstance(path, str) and Path(path).exists() else path

    def changed(section: Any, **values: Any) -> Any:
        # Only keys that change: a resumed run tells keys that the user set from defaults.
        return section.model_copy(
            update={key: value for key, value in values.items() if value != getattr(section, key)}
        )

    data, root = config.data, os.environ.get("ERDE_DATA")
    if data.name not in SHIPPED and not (root and (Path(root) / data.name).is_dir()):
        data = changed(data, name=whole(data.name))
    cache = config.teacher.cache
    # The cache need not be there yet.
    cache = str(Path(cache).resolve()) if isinstance(cache, str) else cache
    teacher = changed(config.teacher, weights=whole(config.teacher.weights), cache=cache)
    student = changed(config.student, weights=whole(config.student.weights))
    arms = {
        name: changed(
            arm,
            student={key: whole(value) if key == "weights" else value for key, value in arm.student.items()},
        )
        for name, arm in config.arms.items()
    }
    sections = {"data": data, "teacher": teacher, "student": student, "arms": arms}
    return config.changed(
        **{name: section for name, section in sections.items() if section != getattr(config, name)}
    )


def _check_cache_folder(config: Config, saved: Path) -> None:
    """A run that someone else made writes into no new folder of its choice."""
    cache = config.teacher.cache
    if isinstance(cache, str) and not Path(cache).is_dir():
        raise UserError(
            f"teacher.cache in {saved} is {cache}, which is not a folder: make it, if that is where the teacher's answers "
            "shall go, or set teacher.cache: false there"
        )


def _check_empty(folder: Path) -> None:
    # A start that was killed leaves its lock's file, and perhaps half of config.yaml.
    if folder.is_dir() and any(path.name != LOCK and not is_leftover(path) for path in folder.iterdir()):
        advice = "continue it with --resume, or" if (folder / CONFIG).is_file() else "it holds other files:"
        raise UserError(f"{folder} is not empty: {advice} choose another folder with --out")
    check_folder(folder)


def _resumed(config: Config, saved: Path) -> Config:
    """The recipe to go on with: that of ``saved``, but for the keys that may change; else :class:`UserError`.

    A key that ``config`` leaves to its default stays as the run began with it, so that a later version of erde, with
    other defaults and more keys, goes on with older runs.
    """
    began = with_whole_paths(load_saved_config(saved)).model_dump(mode="json")
    now = _fill_from(config, began)
    for group, key in FREE_TO_CHANGE:
        began[group][key] = now[group][key]
    difference = first_difference(began, now)
    if difference is not None:
        key, before, after = difference
        raise UserError(
            f"{saved.parent} belongs to another recipe: there {key} is {before!r}, now it is {after!r}; give the same "
            f"recipe and overrides, or another folder; `erde run {saved} --out {saved.parent} --resume` goes on as it began"
        )
    return validate(Config, now)


def _fill_from(model: BaseModel, began: dict[str, Any]) -> dict[str, Any]:
    """The tree of ``model``; keys that nobody set have their value in ``began``, where it has them."""
    tree = model.model_dump(mode="json")
    for name in type(model).model_fields:
        value, before = getattr(model, name), began.get(name)
        if name not in model.model_fields_set:
            tree[name] = began.get(name, tree[name])
        elif isinstance(value, BaseModel) and isinstance(before, dict):
            tree[name] = _fill_from(value, before)
        elif isinstance(value, dict) and isinstance(before, dict):
            for key, inner in value.items():
                if isinstance(inner, BaseModel) and isinstance(before.get(key), dict):
                    tree[name][key] = _fill_from(inner, before[key])
    return tree
