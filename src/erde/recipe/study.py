"""Studies: one recipe with several seeds, its arms held against one of them; and ledgers, which list studies."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from erde.common.errors import UserError, nearest
from erde.common.yaml_reader import read_yaml_file
from erde.recipe.load import load_config
from erde.recipe.schema import Config
from erde.recipe.types import Section
from erde.recipe.validation import validate


class StudyConfig(Section):
    """What ``erde study`` reads."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """Of the study; its folder is `runs/<name>` without `--out`."""
    recipe: str
    """A shipped recipe's name, or a YAML file, as of `erde run`."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """One run for each. A study can be continued with more of them."""
    reference: str
    """The arm that every other arm is held against, seed by seed."""
    keys: dict[str, Any] = Field({})
    """Keys of the recipe, dotted, with the values of this study, such as `train.epochs: 60`."""
    one_teacher: bool = False
    """Train the teacher with the first seed only; it teaches all. The intervals are then about students of this teacher."""

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice: its run would count twice")
        return seeds

    def config(self, seed: int, overrides: Iterable[str] = ()) -> Config:
        """The recipe of one run. Arms are trained in one go, on the same batches; all runs have the same splits."""
        keys = {"train.together": True, "data.split_seed": self.seeds[0], **self.keys}
        config = load_config(
            self.recipe,
            [*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides, f"seed={seed}"],
        )
        if self.reference not in config.arms:
            raise UserError(
                f"reference: no arm '{self.reference}' in the recipe{nearest(self.reference, config.arms)}"
            )
        return config


class LedgerConfig(Section):
    """What ``erde ledger`` reads."""

    studies: Annotated[list[StudyConfig], Field(min_length=1)]
    """Studies, as of `erde study`, or paths to their files from the ledger's folder on."""

    @field_validator("studies")
    @classmethod
    def _names(cls, studies: list[StudyConfig]) -> list[StudyConfig]:
        names = [study.name for study in studies]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name '{name}' is given twice: each study needs its own")
        return studies


def load_study(path: Path) -> StudyConfig:
    """The study in a YAML file."""
    if not path.is_file():
        raise UserError(f"no study at {path}: give a YAML file with name, recipe, seeds and reference")
    return validate(StudyConfig, _read_keys(path))


def load_ledger(path: Path) -> LedgerConfig:
    """The ledger in a YAML file."""
    if not path.is_file():
        raise UserError(f"no ledger at {path}: give a YAML file with a list of studies")
    tree = _read_keys(path)
    studies = tree.get("studies")
    if isinstance(studies, list):
        tree["studies"] = [
            load_study(path.parent / study) if isinstance(study, str) else study for study in studies
        ]
    return validate(LedgerConfig, tree)


def _read_keys(path: Path) -> dict[str, Any]:
    tree = read_yaml_file(path, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree
