"""Sources of images: scikit-learn's digits, a folder or the Hugging Face hub, in memory or streamed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erde.common.errors import UserError, in_one_line, nearest
from erde.common.images import UnreadableError
from erde.common.progress import say
from erde.common.splits import ImageSource, Labels
from erde.data.encoded import Index, StreamedImages, arrow_column, decode, pixels
from erde.data.image_folders import check_card, open_image_folder
from erde.recipe.schema import DataConfig


@dataclass(frozen=True)
class Shipped:
    """The place of a shipped data set on the Hugging Face hub, and its columns."""

    hub_id: str
    configuration: str | None
    image_column: str
    label_column: str


SHIPPED: dict[str, Shipped | None] = {
    "digits": None,  # comes with scikit-learn
    "cifar10": Shipped("uoft-cs/cifar10", None, "img", "label"),
    "cifar100": Shipped("uoft-cs/cifar100", None, "img", "fine_label"),
    "svhn": Shipped("ufldl-stanford/svhn", "cropped_digits", "image", "label"),
}


@dataclass(frozen=True)
class Columns:
    """The images and labels of one table."""

    images: ImageSource
    labels: Labels
    groups: Index | None = None  # (N,), a number per group of images that belong together

    def take(self, rows: Index) -> Columns:
        """The rows at ``rows``, in that order."""
        groups = None if self.groups is None else self.groups[rows]
        return Columns(part_of(self.images, rows), self.labels[rows], groups)


def part_of(images: ImageSource, rows: Index) -> ImageSource:
    """Some rows of images, without decoding streamed ones."""
    return images.part(rows) if isinstance(images, StreamedImages) else images[rows]


def load_digits() -> tuple[Columns, None, list[str]]:
    """scikit-learn's digits, no test split of their own, and the class names."""
    from sklearn import datasets

    digits = datasets.load_digits()
    # 8x8 images with values 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    return Columns(images, digits.target.astype(np.int64)), None, [str(name) for name in digits.target_names]


def load_columns(config: DataConfig) -> tuple[Columns, Columns | None, list[str]]:
    """The train pool, the test split if the set has one, and the class names."""
    tables, shipped = _open_tables(config.name)
    train = tables["train"] if "train" in tables else tables[sorted(tables)[0]]
    test_name = next((name for name in ("test", "validation", "val") if name in tables), None)
    features = train.features
    image_column = config.image_column or _guess_column(
        "image", shipped.image_column if shipped else None, ("image", "img"), features, config.name
    )
    label_column = config.label_column or _guess_column(
        "label",
        shipped.label_column if shipped else None,
        ("label", "labels", "fine_label", "class", "target"),
        features,
        config.name,
    )
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in features:
            raise UserError(f"data.{key}: no column '{column}' in '{config.name}'{nearest(column, features)}")
    classes = getattr(features[label_column], "names", None)
    if classes is None:
        classes = [str(label) for label in range(_highest_label(train, label_column) + 1)]
    # Copies are looked for among streamed images, or among resident ones: both splits are streamed, or neither.
    has_test = test_name is not None and tables[test_name] is not train
    largest = max(len(train), len(tables[test_name]) if has_test else 0)
    where = f"data set '{config.name}', split 'train'"
    pool = _columns(config, train, image_column, label_column, where, None, len(classes), largest)
    test = None
    if has_test:
        shape = (int(pool.images.shape[1]), int(pool.images.shape[2]), int(pool.images.shape[3]))
        where = f"data set '{config.name}', split '{test_name}'"
        test = _columns(
            config, tables[test_name], image_column, label_column, where, shape, len(classes), largest
        )
    return pool, test, list(classes)


def _open_tables(name: str) -> tuple[Any, Shipped | None]:
    """The tables of a data set: from ``ERDE_DATA``, a folder, or the hub."""
    import datasets

    datasets.disable_progress_bars()
    shipped = SHIPPED.get(name)
    root = os.environ.get("ERDE_DATA")
    if root and not Path(root).is_dir():
        raise UserError(f"ERDE_DATA is {root}, which is not a folder: correct or unset it")
    folder = _folder(name)
    try:
        if folder.is_dir():
            _check_parquet(folder)
            check_card(folder)
            plain = open_image_folder(folder)
            if plain is not None:
                return plain, shipped
            # A copy of the hub's repository can hold several configurations.
            configuration = shipped.configuration if shipped else None
            if configuration not in datasets.get_dataset_config_names(str(folder)):
                configuration = None
            return datasets.load_dataset(str(folder), configuration), shipped
        if name.startswith((".", "/", "~")):
            raise UserError(
                f"no data at {name}: expected a folder with Parquet files, or with a folder per class"
            )
        if shipped is None and "/" not in name:
            raise UserError(
                f"unknown data set '{name}'{nearest(name, SHIPPED)}; a folder or a hub id also works"
            )
        if shipped:
            return datasets.load_dataset(shipped.hub_id, shipped.configuration), shipped
        return datasets.load_dataset(name), shipped
    except UserError:
        raise
    except Exception as error:  # the datasets library raises many types of its own
        # Of a table that cannot be made, the reason stands in the error below.
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        if folder.is_dir():
            raise UserError(f"the data in {folder} cannot be read: {reason}") from error
        raise UserError(
            f"data set '{name}' is not in ERDE_DATA and cannot be fetched from the hub ({type(error).__name__}): "
            "check the name and the network, or set ERDE_DATA to a folder that holds it"
        ) from error


def _folder(name: str) -> Path:
    """The data set's folder, which need not exist: below ``ERDE_DATA`` if it is there, else the folder of that name."""
    root = os.environ.get("ERDE_DATA")
    local = Path(root) / name if root else None
    return local if local is not None and local.is_dir() else Path(name)


def _check_inside(table: Any, column: str, where: str, folder: Path) -> None:
    """Raise if a table or a metadata file names an image outside of the data set's folder."""
    import pyarrow.compute as pc

    images = arrow_column(table, column)
    paths = pc.struct_field(images, "path")
    inside = [os.path.join(place, "") for place in (os.path.abspath(folder), os.path.realpath(folder))]
    plain = pc.and_(pc.starts_with(paths, inside[0]), pc.invert(pc.match_substring(paths, "..")))
    is_file = pc.and_(pc.is_null(pc.struct_field(images, "bytes")), pc.is_valid(paths))
    suspect = pc.and_(is_file, pc.invert(pc.fill_null(plain, False)))
    for row in np.flatnonzero(suspect.to_numpy()).tolist():
        path = paths[row].as_py()
        if not os.path.abspath(path).startswith(tuple(inside)):
            raise UserError(
                f"{where}, row {row} takes its image from '{in_one_line(path)}', which is not in {folder}: copy it there, "
                "or put the images themselves into the table"
            )


def _check_parquet(folder: Path) -> None:
    import pyarrow.parquet

    for path in sorted(folder.rglob("*.parquet")):
        try:
            pyarrow.parquet.read_metadata(path)
        except Exception as error:
            raise UserError(f"{path} is not a readable Parquet file: copy or download it again") from error


def _guess_column(kind: str, shipped: str | None, names: Sequence[str], features: Any, data: str) -> str:
    known = [name for name in ([shipped] if shipped else []) + list(names) if name in features]
    if kind == "image" and not known:
        known = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if not known:
        raise UserError(
            f"data set '{data}' has no column that looks like the {kind} (it has: {', '.join(features)}): "
            f"name it in data.{kind}_column"
        )
    return known[0]


def _columns(
    config: DataConfig,
    table: Any,
    image_column: str,
    label_column: str,
    where: str,
    shape: tuple[int, int, int] | None,
    classes: int,
    largest: int,
) -> Columns:
    import datasets

    if len(table) == 0:
        raise UserError(f"{where} is empty")
    labels = _labels(table, label_column, where, classes)
    # A set's own test split is split further with `held_out: test` only: else its groups do not matter.
    is_split = shape is None or config.held_out == "test"
    groups = _groups(table, config.group, where) if config.group is not None and is_split else None
    table = table.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    folder = _folder(config.name)
    if folder.is_dir():
        _check_inside(table, image_column, where, folder)
    if shape is None:
        first = _first_image(table, image_column, where, config)
        size = config.image_size
        shape = (size or first.height, size or first.width, config.channels)
    same_size = config.image_size is None
    size_gib = largest * int(np.prod(shape)) / 2**30
    # Random parts are cut from the files as they are, not from images that were brought to size.
    needed = size_gib > config.memory_limit_gib or config.augmentation.resized_crop is not None
    if config.streaming == "always" or (config.streaming == "auto" and needed):
        rows = np.arange(len(table))
        if config.skip_unreadable:
            # An extra pass over the set: bad files must be known before it is split.
            bad = _for_each(table, image_column, where, lambda _, value, place: decode(value, place).close())
            rows = np.delete(rows, _skipped(bad, len(table), where))
        images: ImageSource = StreamedImages(table, image_column, where, rows, shape, same_size)
        return Columns(images, labels[rows], None if groups is None else groups[rows])
    decoded = np.empty((len(table), *shape), dtype=np.uint8)

    def take(row: int, value: Any, place: str) -> None:
        decoded[row] = pixels(value, place, shape, same_size)

    bad = _for_each(table, image_column, where, take)
    if not bad:
        return Columns(decoded, labels, groups)
    if not config.skip_unreadable:
        raise UnreadableError(f"{_listed(bad)}; data.skip_unreadable=true leaves such images out")
    rows = np.delete(np.arange(len(table)), _skipped(bad, len(table), where))
    return Columns(decoded, labels, groups).take(rows)


def _first_image(table: Any, column: str, where: str, config: DataConfig) -> Any:
    """The first readable image, which sets the size. Errors of the others are reported when they are decoded."""
    bad: dict[int, str] = {}
    for row in range(len(table)):
        try:
            first = decode(table[row][column], f"{where}, row {row}")
        except UnreadableError as error:
            bad[row] = str(error)
            continue
        if config.channels == 3 and first.mode in ("1", "L", "I;16"):
            say(f"{where}: the first image is gray; data.channels=1 computes less, if all are")
        return first
    raise UnreadableError(f"{where} has no image that can be read: {_listed(bad)}")


def _for_each(table: Any, column: str, where: str, use: Callable[[int, Any, str], object]) -> dict[int, str]:
    """Call ``use`` with row, encoded image and place of each image; returns the errors of unreadable ones by row."""
    bad: dict[int, str] = {}

    def chunk(start: int) -> None:
        for row, value in enumerate(table[start : start + 512][column], start):
            try:
                use(row, value, f"{where}, row {row}")
            except UnreadableError as error:
                bad[row] = str(error)

    # Pillow decodes without the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(chunk, range(0, len(table), 512)))
    return dict(sorted(bad.items()))


def _skipped(bad: dict[int, str], images: int, where: str) -> list[int]:
    """The rows to leave out, which are reported."""
    if len(bad) == images:
        raise UnreadableError(f"{where} has no image that can be read: {_listed(bad)}")
    if bad:
        say(f"skipped {len(bad):,} of {images:,} images: {_listed(bad)}")
    return list(bad)


def _listed(bad: dict[int, str]) -> str:
    reasons, most = list(bad.values()), 10
    if len(reasons) == 1:
        return reasons[0]
    more = f"; and {len(reasons) - most:,} more" if len(reasons) > most else ""
    return f"{len(reasons):,} images cannot be read: {'; '.join(reasons[:most])}{more}"


def _groups(table: Any, column: str, where: str) -> Index:
    """A number per value of ``column``, int64 (N,)."""
    import pyarrow.compute as pc

    if column not in table.column_names:
        raise UserError(f"data.group: no column '{column}' in {where}{nearest(column, table.column_names)}")
    values = arrow_column(table, column)
    if values.null_count:
        raise UserError(
            f"data.group: {values.null_count:,} rows of '{column}' in {where} are empty: fill them"
        )
    try:
        encoded = pc.dictionary_encode(values.combine_chunks())
    except NotImplementedError as error:  # of ArrowNotImplementedError: lists, images
        raise UserError(
            f"data.group: '{column}' in {where} holds {values.type}, text or numbers are expected"
        ) from error
    numbers: Index = encoded.indices.to_numpy().astype(np.int64)
    return numbers


def _highest_label(table: Any, column: str) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = arrow_column(table, column)
    return max(pc.max(numbers).as_py() or 0, 0) if pa.types.is_integer(numbers.type) else 0


def _labels(table: Any, column: str, where: str, classes: int) -> Labels:
    """The labels as numbers, int64 (N,), through Arrow: a million Python objects would be slow and large."""
    import pyarrow as pa

    values = arrow_column(table, column)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int64())
    wrong = 0
    if pa.types.is_integer(values.type):
        labels: Labels = values.fill_null(-1).to_numpy().astype(np.int64)
        outside = np.flatnonzero((labels < 0) | (labels >= classes))
        if not len(outside):
            return labels
        wrong = int(outside[0])
    raise UserError(
        f"{where}, row {wrong}: the label is {values[wrong].as_py()!r}, expected a number, 0 to {classes - 1}"
    )
