"""Types of the recipe's values."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    Field,
)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
CropShare = Annotated[float, Field(gt=0, le=1)]
SmallShare = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
# More than any machine has; so many more would only fight, or not start at all.
MAX_THREADS = 1024
