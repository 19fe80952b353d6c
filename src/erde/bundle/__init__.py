"""The bundle, erde's deployable folder: manifest, card, seal, check of graphs, the hub. May import: policy, common."""

from __future__ import annotations

from erde.bundle.card import model_card
from erde.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    MAX_TOLERANCE,
    Manifest,
    ReferenceSample,
    Stage,
    uncalibrated,
)
from erde.bundle.sealing import (
    MAX_FILE_BYTES,
    MAX_MANIFEST_BYTES,
    canonical_hash,
    file_hash,
    read,
    seal,
    seal_of,
    stages_hash,
    write,
)

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "MAX_FILE_BYTES",
    "MAX_MANIFEST_BYTES",
    "MAX_TOLERANCE",
    "Manifest",
    "ReferenceSample",
    "Stage",
    "canonical_hash",
    "file_hash",
    "model_card",
    "read",
    "seal",
    "seal_of",
    "stages_hash",
    "uncalibrated",
    "write",
]
