"""The base of all typed trees that erde reads and writes: recipes, manifests, results, profiles."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A node that does not change, has no unknown keys, and holds finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
