"""Bundles that come with erde, by name, to try it at once; and the sample images that a bundle may have beside it."""

from __future__ import annotations

from pathlib import Path

from erde.common.images import SUFFIXES

FOLDER = Path(__file__).parent / "demos"
# In a bundle's folder, outside its seal.
SAMPLES = "samples"


def shipped_bundles() -> list[str]:
    """Names of the bundles in the package."""
    return sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def bundle_folder(bundle: str | Path) -> Path:
    """The folder ``bundle`` if it is there, or else that of the shipped bundle with this name, if there is one."""
    path = Path(bundle)
    return FOLDER / path if not path.exists() and str(path) in shipped_bundles() else path


def sample_images(folder: Path) -> list[Path]:
    """The image files in the folder ``samples`` of a bundle, by name; most bundles have none."""
    inside = folder / SAMPLES
    if not inside.is_dir():
        return []
    return sorted(path for path in inside.iterdir() if path.suffix.lower() in SUFFIXES)
