"""Where a bundle is: a folder, a name that comes with erde, or one on the hub; and the samples that may lie beside it."""

from __future__ import annotations

from pathlib import Path

from erde.bundle.hub import cached_folder, on_hub
from erde.common.images import SUFFIXES

FOLDER = Path(__file__).parent / "demos"
# In a bundle's folder, outside its seal.
SAMPLES = "samples"


def shipped_bundles() -> list[str]:
    """Names of the bundles in the package."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def bundle_folder(bundle: str | Path) -> Path:
    """The folder ``bundle`` if it is there, or else that of the shipped bundle with this name, if there is one.

    ``hf://OWNER/NAME[@REVISION]`` is a bundle on the Hugging Face hub: see :func:`erde.bundle.hub.cached_folder`.
    """
    if on_hub(bundle):
        return cached_folder(bundle)
    path = Path(bundle)
    return FOLDER / path if not path.exists() and str(path) in shipped_bundles() else path


def sample_images(folder: Path) -> list[Path]:
    """The image files in the folder ``samples`` of a bundle, by name; most bundles have none."""
    inside = folder / SAMPLES
    if not inside.is_dir():
        return []
    return sorted(path for path in inside.iterdir() if path.suffix.lower() in SUFFIXES)
