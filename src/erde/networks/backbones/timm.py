"""Any classifier of timm's as a backbone: ``timm/<name>``."""

from __future__ import annotations

import difflib
from typing import Any

from torch import library, nn

from erde.common.errors import UserError
from erde.recipe.backbones import TIMM

# torchvision registers meta kernels for two operators, which its build for another torch does not bring: with a CPU-only
# torch the import fails on the first of them. Only their schemas are needed.
_MISSING = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []


def import_timm() -> Any:
    """The ``timm`` package, also where torchvision's compiled operators are missing.

    Raises:
        ImportError, RuntimeError: any other failure of the import, as it is.
    """
    try:
        import timm
    except RuntimeError as error:
        if not _is_missing_operator(error):
            raise
        _declare_operators()
        import timm
    return timm


def _is_missing_operator(error: RuntimeError) -> bool:
    return any(str(error) == f"operator torchvision::{name} does not exist" for name in _MISSING)


def _declare_operators() -> None:
    fragment: Any = library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _MISSING:
        fragment.define(name + _SCHEMA)
    _declared.append(fragment)  # the declarations live as long as the object


def check_name(name: str) -> None:
    """Raise where timm has no model of the name ``timm/<name>``; offers the nearest names."""
    timm = import_timm()
    wanted = name.removeprefix(TIMM)
    if timm.is_model(wanted.split(".")[0]):
        return
    matches = difflib.get_close_matches(wanted, timm.list_models(), n=3, cutoff=0.5)
    if matches:
        hint = f" (did you mean {' or '.join(repr(TIMM + match) for match in matches)}?)"
    else:
        hint = " (timm.list_models() names them)"
    raise UserError(f"unknown backbone '{name}'{hint}")


def timm_model(
    name: str,
    *,
    classes: int,
    channels: int = 3,
    image_size: tuple[int, int] | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """The timm model ``timm/<name>`` with a classifier for ``classes``.

    ``image_size`` (H, W) is passed on to models that are built for one size, such as vision transformers. ``pretrained``
    takes timm's weights from its cache or the network.

    Raises:
        UserError: an unknown name, weights that cannot be had, a size that the model does not take.
    """
    timm = import_timm()
    check_name(name)
    arguments: dict[str, Any] = {"num_classes": classes, "in_chans": channels, "pretrained": pretrained}
    wanted = name.removeprefix(TIMM)
    try:
        model: nn.Module = _create(timm, wanted, arguments, image_size)
    except UserError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = (
            "timm's weights for it cannot be had here: pretrained=false starts from random ones"
            if pretrained
            else (
                f"timm cannot build it for {classes} classes, {channels} channels and images of {image_size}"
            )
        )
        raise UserError(f"backbone '{name}': {reason} ({text})") from error
    return model


def _create(timm: Any, name: str, arguments: dict[str, Any], image_size: tuple[int, int] | None) -> nn.Module:
    if image_size is not None:
        # Only models built for a fixed size take this argument; the others raise a TypeError.
        try:
            model: nn.Module = timm.create_model(name, img_size=image_size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        else:
            return model
    built: nn.Module = timm.create_model(name, **arguments)
    return built


def default_input_size(name: str) -> tuple[int, int, int]:
    """(C, H, W) of the images that ``timm/<name>`` was made for."""
    timm = import_timm()
    check_name(name)
    settings = timm.get_pretrained_cfg(name.removeprefix(TIMM))
    channels, height, width = settings.input_size if settings is not None else (3, 224, 224)
    return channels, height, width
