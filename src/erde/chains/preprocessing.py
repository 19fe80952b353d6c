"""From pixels to the numbers that a network takes: sizes, normalisation, order of axes and channels; and files that say so."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from erde.common.errors import UserError, nearest

Layout = Literal["NCHW", "NHWC"]
Channels = Literal["RGB", "BGR"]
# Not said: the size that the graph tells, and no resizing beyond it.
UNSET = (0, 0)
MAX_SIDE = 8192
# Pillow's numbers in Hugging Face's ``resample``.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
# Files of this name are looked at beside a network, in this order.
FILES = ("preprocessor_config.json", "config.json")


@dataclass(frozen=True)
class Preprocessing:
    """An image becomes ``(pixel * scale - mean) / std`` per channel, after resizing and a centre crop.

    Attributes:
        size: H, W that the network takes; ``UNSET`` where its graph tells them.
        mean, std: per channel, in the network's order of channels; one number stands for all. Empty: not known.
        scale: factor of the pixels 0 to 255.
        layout: order of the network's axes; None where its graph tells it.
        channels: order of the network's channels.
        resize: H, W that an image is brought to, the shorter side first, then the centre; of it the network takes the
            middle, ``size``. By default ``size``.
        warnings: lines about what is not as a file asks for.

    Raises:
        UserError: numbers that cannot be.
    """

    size: tuple[int, int] = UNSET
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 1 / 255
    layout: Layout | None = None
    channels: Channels = "RGB"
    resize: tuple[int, int] = UNSET
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.resize == UNSET:
            object.__setattr__(self, "resize", self.size)
        for name in ("size", "resize"):
            sides = getattr(self, name)
            if sides != UNSET and not all(1 <= side <= MAX_SIDE for side in sides):
                raise UserError(
                    f"{name} is {_sides(sides)}, expected height x width of 1 to {MAX_SIDE} pixels"
                )
        if any(crop > side for crop, side in zip(self.size, self.resize, strict=True)):
            raise UserError(
                f"resize is {_sides(self.resize)}, which is smaller than the {_sides(self.size)} that are cropped from it: "
                "give a resize of at least the size"
            )
        if len(self.mean) != len(self.std):
            raise UserError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}, expected one per channel in both"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.scale)):
            raise UserError(f"mean {self.mean}, std {self.std} and scale {self.scale} must be finite numbers")
        if not all(value > 0 for value in (*self.std, self.scale)):
            raise UserError(f"std is {self.std} and scale {self.scale}, expected numbers above 0")
        if self.layout not in (None, "NCHW", "NHWC"):
            raise UserError(f"layout is '{self.layout}', expected NCHW or NHWC")
        if self.channels not in ("RGB", "BGR"):
            raise UserError(f"channels is '{self.channels}', expected RGB or BGR")

    def summary(self) -> dict[str, Any]:
        """All but the warnings, as JSON has it."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "warnings"}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def preprocessing_beside(path: Path) -> Preprocessing | None:
    """What a file beside the network ``path`` says, or one folder up from a folder ``onnx``; None without one."""
    folders = [path.parent, *([path.parent.parent] if path.absolute().parent.name == "onnx" else [])]
    for name in FILES:
        for folder in folders:
            values = _json_object(folder / name) if (folder / name).is_file() else {}
            # A config.json is usually about the network alone.
            if _is_hugging_face(values) or _is_timm(values):
                return read_preprocessing(folder / name)
    return None


def read_preprocessing(path: Path) -> Preprocessing:
    """Read Hugging Face's ``preprocessor_config.json``, timm's ``config.json``, or the fields of :class:`Preprocessing`.

    Raises:
        UserError: not such a file, or what it asks for cannot be done.
    """
    values = _json_object(path)
    try:
        if _is_hugging_face(values):
            return _hugging_face(values, path)
        if _is_timm(values):
            return timm_preprocessing(values, path)
        return _own(values, path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"{path} has a value of an unexpected kind ({error}): give mean, std and size yourself"
        ) from error


def _json_object(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object, expected keys such as mean, std and size")
    return values


def _is_hugging_face(values: Mapping[str, Any]) -> bool:
    return bool(
        {"image_mean", "do_normalize", "image_processor_type", "feature_extractor_type"} & set(values)
    )


def _is_timm(values: Mapping[str, Any]) -> bool:
    return "input_size" in _timm_values(values)


def _timm_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    # Older files have the keys at the top.
    inner = values.get("pretrained_cfg")
    return inner if isinstance(inner, dict) else values


def _own(values: Mapping[str, Any], path: Path) -> Preprocessing:
    known = {item.name for item in fields(Preprocessing)} - {"warnings"}
    for key in values:
        if key not in known:
            raise UserError(f"unknown key '{key}'{nearest(key, known)}")
    if not values:
        raise UserError(f"no keys, expected some of {', '.join(sorted(known))}")
    pairs = {key: _pair(values[key], key) for key in ("size", "resize") if key in values}
    rows = {key: _numbers(values[key]) for key in ("mean", "std") if key in values}
    return Preprocessing(**{**values, **pairs, **rows})


def _hugging_face(values: Mapping[str, Any], path: Path) -> Preprocessing:
    """As transformers' image processors for classification read it (ViT, ConvNext, CLIP, MobileNet, EfficientNet ...)."""
    warnings: list[str] = []
    if not _flag(values, "do_resize", True):
        warnings.append(f"{path} asks for no resizing (do_resize is false); erde resizes images all the same")
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    scale = float(values.get("rescale_factor") or 1 / 255) if _flag(values, "do_rescale", True) else 1.0
    if _flag(values, "do_normalize", True):
        if not values.get("image_mean") or not values.get("image_std"):
            raise UserError("no image_mean and image_std: give mean and std yourself")
        mean, std = _numbers(values["image_mean"]), _numbers(values["image_std"])
    else:
        mean, std = (0.0,), (1.0,)  # for any number of channels
    if values.get("rescale_offset"):  # EfficientNet: pixels * scale - 1
        mean = tuple(value + 1 for value in mean)
    # EfficientNet divides by std a second time, unless told not to.
    if _flag(values, "include_top", "EfficientNet" in kind) and _flag(values, "do_normalize", True):
        std = tuple(value**2 for value in std)

    channels: Channels = "BGR" if values.get("do_flip_channel_order") else "RGB"
    size, shortest = values.get("size"), None
    if size is None:  # the graph may tell it
        return Preprocessing(mean=mean, std=std, scale=scale, channels=channels, warnings=tuple(warnings))
    crop = values.get("crop_size")
    is_cropped = _flag(values, "do_center_crop", crop is not None)
    # Of ConvNext by default, of LeViT always.
    own_percentage = 224 / 256 if "ConvNext" in kind or "Levit" in kind else None
    percentage = values.get("crop_pct") or own_percentage
    if isinstance(size, dict) and size.get("shortest_edge"):
        shortest = int(size["shortest_edge"])
    elif isinstance(size, int) and (is_cropped or percentage):
        shortest = size
    # ConvNext crops below 384 pixels only.
    is_convnext = "ConvNext" in kind
    if shortest is None:
        resize = _pair(size, "size")
    elif percentage and not (is_convnext and shortest >= 384):
        resize = (int(shortest / percentage),) * 2
    else:
        resize = (shortest, shortest)
    if shortest is None or (is_convnext and shortest >= 384):
        warnings.append(_stretched(path, resize))
    if is_cropped and crop is not None:
        network = _pair(crop, "crop_size")
    else:
        network = resize if shortest is None else (shortest, shortest)
    warnings += _filter_warning(path, _FILTERS.get(values.get("resample", 2), str(values.get("resample"))))
    return Preprocessing(network, mean, std, scale, None, channels, resize, tuple(warnings))


def timm_preprocessing(values: Mapping[str, Any], path: str | Path) -> Preprocessing:
    """As timm's ``resolve_data_config`` and its transform for evaluation read it."""
    values = _timm_values(values)
    if "mean" not in values or "std" not in values:
        raise UserError("no mean and std: give them yourself")
    height, width = (int(side) for side in values["input_size"][1:])
    share = float(values.get("crop_pct") or 0.875)
    resize = (math.floor(height / share), math.floor(width / share))
    warnings = []
    if values.get("crop_mode") == "squash":
        warnings.append(_stretched(path, resize))
    warnings += _filter_warning(path, str(values.get("interpolation") or "bilinear"))
    mean, std = _numbers(values["mean"]), _numbers(values["std"])
    return Preprocessing((height, width), mean, std, resize=resize, warnings=tuple(warnings))


def _stretched(path: str | Path, size: tuple[int, int]) -> str:
    return (
        f"{path} asks for images stretched to {_sides(size)}; erde keeps their shape and crops the centre "
        "(the same for square images)"
    )


def _filter_warning(path: str | Path, name: str) -> list[str]:
    return [] if name == "bilinear" else [f"{path} asks for {name} resizing; erde resizes bilinearly"]


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    # Newer files write null where the class decides.
    return default if values.get(key) is None else bool(values[key])


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(number) for number in (value if isinstance(value, list | tuple) else [value]))


def _pair(value: Any, key: str) -> tuple[int, int]:
    """H, W of a number, a list [H, W] or an object with height and width."""
    if isinstance(value, dict) and "shortest_edge" in value:
        value = value["shortest_edge"]
    if isinstance(value, dict):
        if "height" not in value or "width" not in value:
            raise UserError(f"{key} has the keys {', '.join(value) or 'none'}, expected height and width")
        value = [value["height"], value["width"]]
    sides = value if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) for side in sides):
        raise UserError(f"{key} is {value!r}, expected height and width in whole pixels")
    return sides[0], sides[1]


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
