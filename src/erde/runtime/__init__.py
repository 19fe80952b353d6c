"""Bundles in ONNX Runtime, with the base install only. May import: bundle, policy, common."""

from __future__ import annotations

from erde.runtime.prediction import Prediction
from erde.runtime.session import Session

__all__ = ["Prediction", "Session"]
