"""Types of the recipe's sections and values."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field

from erde.common.model import Frozen

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]
SmallShare = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# More than any machine has; so many more would only fight, or not start at all.
MAX_THREADS = 1024


class Section(Frozen):
    """Keys of a recipe. The text under a key is its meaning, in the documents and in ``erde list keys``."""

    model_config = ConfigDict(use_attribute_docstrings=True)
