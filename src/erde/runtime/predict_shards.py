"""``erde predict`` on Parquet: shards through a bundle by worker processes of this machine or by Ray.

Each shard's answers appear in one step as a file of the same name. ``--resume`` skips the shards that have theirs, so
that no row is answered twice in the output, and none is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from erde.bundle.sealing import seal_of
from erde.common import progress
from erde.common.errors import UserError, in_one_line, nearest
from erde.common.files import (
    Lock,
    check_folder,
    is_leftover,
    make_folder,
    replacing_file,
    sweep_leftovers,
    write_json,
)
from erde.common.tasks import import_ray, in_processes, in_ray
from erde.runtime.batch import ANSWERS, Predictor

SUFFIX = ".parquet"
# In the output's folder: what its answers were made with.
SETTINGS = "settings.json"
# The key of a shard's tally in the metadata of its answers.
TALLY = b"erde"


@dataclass
class Tally:
    """Counts of one shard or several: rows, those without an answer, answers per exit, MACs."""

    rows: int
    failed: int
    exits: list[int]
    macs: int

    def add(self, other: Tally) -> None:
        """Count another shard's rows too."""
        self.rows += other.rows
        self.failed += other.failed
        self.exits = [here + there for here, there in zip(self.exits, other.exits, strict=True)]
        self.macs += other.macs


@dataclass(frozen=True)
class Shard:
    """One file to answer, and where its answers go."""

    source: Path
    target: Path
    rows: int


def predict_shards(
    bundle: Path,
    shards: Sequence[Path],
    out: Path,
    *,
    column: str = "image",
    keep: Sequence[str] = (),
    operating_point: str | None = None,
    max_exit: int | None = None,
    max_macs: float | None = None,
    batch_size: int = 64,
    threads: int = 1,
    engine: str = "onnxruntime",
    workers: int = 1,
    ray: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Answer every row of Parquet files, each in a file of the same name below the folder ``out``.

    An image that cannot be answered is a row with a reason. A shard is one task; ``workers`` of them run at a time, in
    processes of their own, or in ``ray``'s. ``resume`` goes on where an earlier call was stopped.

    Returns a summary: images answered, images failed, exit rates, mean MACs, shards.

    Raises:
        UserError: no pyarrow or Ray, no shards, a shard without the column, an output that was begun with other
            settings or from other shards, and what :class:`Predictor` raises.
    """
    _import_parquet()
    place = out.resolve()
    if not place.name:
        raise UserError(f"--out is {out}: expected a folder of its own for the answers")
    predictor = Predictor(
        bundle.absolute(), column=column, operating_point=operating_point, max_exit=max_exit, max_macs=max_macs,
        batch_size=batch_size, threads=threads, engine=engine, keep=keep,
    )  # fmt: skip
    manifest = predictor.session.manifest
    seal = seal_of(manifest)
    settings = {
        "seal": seal, "operating_point": manifest.point(operating_point).name, "max_exit": max_exit,
        "max_macs": max_macs, "engine": engine, "column": column, "keep": list(keep),
    }  # fmt: skip
    tasks = [
        Shard(source, target, _rows_of(source, column, keep)) for source, target in _find_shards(shards, out)
    ]
    if ray:
        import_ray()
    tally = Tally(0, 0, [0] * len(manifest.stages), 0)
    check_folder(out)
    make_folder(place.parent)
    with Lock(place.with_name(f"{place.name}.lock"), str(out)):
        _begin(out, settings, resume)
        waiting = []
        for shard in tasks:
            answered = _answers_of(shard)
            if answered is None:
                waiting.append(shard)
            else:
                tally.add(answered)
        work = partial(_answer_shard, predictor, seal)
        if ray:
            finished = in_ray(work, waiting, workers, cpus=threads)
        elif workers > 1:
            finished = in_processes(work, waiting, workers, remedy="fewer workers or a smaller batch size")
        else:
            finished = (work(shard) for shard in waiting)
        with (
            progress.task("predict", sum(shard.rows for shard in tasks), tally.rows) as task,
            closing(finished) as parts,
        ):
            for part in parts:
                tally.add(part)
                if task.due():
                    task.update(tally.rows)
    answers = tally.rows - tally.failed
    return {
        "images": answers,
        "failed": tally.failed,
        "exit_rates": [exits / max(1, answers) for exits in tally.exits],
        "mean_macs": tally.macs / max(1, answers),
        "shards": len(tasks),
        "out": str(out),
    }


# ---------------------------------------------------------------- before the work


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("Parquet shards need pyarrow: pip install 'erde[batch]'") from error
    return pyarrow.parquet


def _find_shards(paths: Sequence[Path], out: Path) -> list[tuple[Path, Path]]:
    """Files as given and those below folders, sorted, each with the place of its answers.

    Folders may be named as shards are, and hold shards. What lies below ``out``, itself below a folder, is answers.
    """
    answers = out.resolve()
    pairs: list[tuple[Path, Path]] = []
    for path in paths:
        if path.is_dir():
            own = path.resolve() in answers.parents
            inside = sorted(
                file
                for file in path.rglob(f"*{SUFFIX}")
                if not file.is_dir() and not (own and file.parent.resolve().is_relative_to(answers))
            )
            if not inside:
                raise UserError(f"no shard below the folder {path}: expected files ending in {SUFFIX}")
            pairs += [(file.absolute(), out.absolute() / file.relative_to(path)) for file in inside]
        elif path.is_file():
            pairs.append((path.absolute(), (out.absolute() / path.name).with_suffix(SUFFIX)))
        else:
            raise UserError(f"no shard at {path}: expected a Parquet file or a folder of them")
    sources: dict[Path, Path] = {}
    for source, target in pairs:
        other = sources.setdefault(target, source)
        if other is not source:
            raise UserError(
                f"{other} and {source} would both be answered in {target}: give each once, or the folder above them"
            )
        if target.resolve() == source.resolve():
            raise UserError(f"--out is {out}, where {source} itself is: choose another folder")
    return pairs


def _rows_of(path: Path, column: str, keep: Sequence[str]) -> int:
    """The number of rows, if the file is Parquet and has the columns."""
    parquet = _import_parquet()
    try:
        with parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except Exception as error:
        raise UserError(f"{path} is not a readable Parquet file: copy or write it again") from error
    for name, option in [(column, "--image-column"), *((name, "--keep") for name in keep)]:
        if schema.names.count(name) != 1:
            raise UserError(
                f"{path} has no column '{name}'{nearest(name, schema.names)}: name it with {option}"
            )
    kind = schema.field(column).type
    text = ("string", "large_string", "binary", "large_binary", "string_view", "binary_view")
    struct = str(kind).startswith("struct<") and {"bytes", "path"} & {
        kind[i].name for i in range(kind.num_fields)
    }
    if str(kind) not in text and not struct:
        raise UserError(
            f"column '{column}' of {path} holds {in_one_line(str(kind))}, expected encoded images (binary), paths (string) "
            "or a struct of bytes and path: name it with --image-column"
        )
    return int(rows)


def _begin(out: Path, settings: dict[str, Any], resume: bool) -> None:
    """Make the folder, or check that what it holds was begun alike."""
    if not out.is_dir() or all(map(is_leftover, out.iterdir())):
        make_folder(out)
        sweep_leftovers(out)
        write_json(out / SETTINGS, settings)
        return
    try:
        before = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--out is {out}, which has other files: choose a new or an empty folder") from error
    if not resume:
        raise UserError(
            f"{out} has answers of an earlier command: continue it with --resume, or choose another folder"
        )
    if before != settings:
        other = [
            key for key, value in settings.items() if not isinstance(before, dict) or before.get(key) != value
        ]
        names = ", ".join("bundle" if key == "seal" else key for key in other)
        raise UserError(
            f"{out} was begun with another {names or 'erde'}: give what was given then, or choose another folder"
        )
    sweep_leftovers(out)


def _answers_of(shard: Shard) -> Tally | None:
    """What an earlier call counted, where the shard has its answers."""
    if not shard.target.exists():
        return None
    try:
        metadata = _import_parquet().read_metadata(shard.target)
        tally = Tally(**json.loads(metadata.metadata[TALLY]))
    except Exception as error:
        raise UserError(
            f"{shard.target} has no answers of erde: remove it, then repeat the command"
        ) from error
    if not metadata.num_rows == tally.rows == shard.rows:
        raise UserError(
            f"{shard.target} has answers to {metadata.num_rows:,} rows, {shard.source} has {shard.rows:,}: it has changed; "
            "remove the answers, then repeat the command"
        )
    return tally


# ---------------------------------------------------------------- one shard


def _answer_shard(predictor: Predictor, seal: str, shard: Shard) -> Tally:
    """Answer a shard, a row group in memory at a time; its file appears when it is whole."""
    import pyarrow as pa

    parquet = _import_parquet()
    manifest = predictor.session.manifest
    if seal_of(manifest) != seal:
        raise UserError(
            f"the bundle {predictor.bundle} of a worker is not the one that the command began with: copy it there, then "
            "repeat the command with --resume"
        )
    tally = Tally(0, 0, [0] * len(manifest.stages), 0)
    make_folder(shard.target.parent)
    with parquet.ParquetFile(shard.source) as file, replacing_file(shard.target) as beside:
        kept = [file.schema_arrow.field(name) for name in predictor.keep]
        answers = [
            pa.field(name, pa.string() if kind is str else pa.from_numpy_dtype(kind))
            for name, kind in ANSWERS.items()
        ]
        schema = pa.schema([*kept, *answers])
        names = [predictor.column, *predictor.keep]
        with parquet.ParquetWriter(beside, schema) as writer:
            for group in range(file.num_row_groups):
                parts = [
                    _answer_batch(predictor, batch, schema, tally)
                    for batch in file.iter_batches(1024, row_groups=[group], columns=names)
                ]
                writer.write_table(pa.Table.from_batches(parts, schema))
            writer.add_key_value_metadata({TALLY.decode(): json.dumps(asdict(tally))})
    return tally


def _answer_batch(predictor: Predictor, batch: Any, schema: Any, tally: Tally) -> Any:
    import numpy as np
    import pyarrow as pa

    # What is kept stays in Arrow, with its type: the predictor sees its names only. The images may be among it; as
    # objects they are not copied.
    kept = [batch.column(name) for name in predictor.keep]
    images = np.array(_cells(batch.column(predictor.column)), dtype=object)
    answers = predictor({**dict.fromkeys(predictor.keep, ()), predictor.column: images})
    good = answers["error"] == ""
    tally.rows += len(good)
    tally.failed += int(np.count_nonzero(~good))
    exits = np.bincount(answers["exit"][good], minlength=len(tally.exits))
    tally.exits = [int(count) + before for count, before in zip(exits, tally.exits, strict=True)]
    tally.macs += int(answers["macs"].sum())
    return pa.record_batch([*kept, *(pa.array(answers[name]) for name in ANSWERS)], schema=schema)


def _cells(column: Any) -> list[Any]:
    """The values of a column; text that is not UTF-8, which Parquet lets pass, as Python has it of file names."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_cell(value) for value in column]


def _cell(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        if hasattr(value, "as_buffer"):
            return value.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
        return {name: _cell(field) for name, field in value.items()}
