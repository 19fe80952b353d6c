"""Studies: one recipe with several seeds, its arms held against one of them; and ledgers, which list studies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from erde.common.errors import UserError, nearest
from erde.common.yaml_reader import read_yaml, read_yaml_file
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
        keys = [f"{key}={_as_text(key, value)}" for key, value in self.keys.items()]
        config = load_config(self.recipe, [*self._shared([*keys, *overrides]), f"seed={seed}"])
        if self.reference not in config.arms:
            raise UserError(
                f"reference: no arm '{self.reference}' in the recipe{nearest(self.reference, config.arms)}"
            )
        first = seed == self.seeds[0]
        if self.one_teacher and not first and config.held_out_arms and not config.teacher.trained:
            raise UserError(
                f"study {self.name}: one_teacher gives seed {seed} a trained teacher, without the answers to unseen images that "
                "erde's wrong_test 'held_out' asks for: set one_teacher: false, or another wrong_test"
            )
        return config

    def _shared(self, overrides: Iterable[str]) -> Iterator[str]:
        """``overrides``, with what all runs share where they do not set it."""
        shared = {"train": ("together", "true"), "data": ("split_seed", str(self.seeds[0]))}
        yield from (f"{section}.{key}={value}" for section, (key, value) in shared.items())
        for override in overrides:
            yield override
            section, _, text = override.partition("=")
            if section in shared:
                # The whole section was replaced.
                key, value = shared[section]
                given = read_yaml(text, f"the value of '{override[:200]}'")
                if isinstance(given, dict) and key not in given:
                    yield f"{section}.{key}={value}"


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


def _as_text(key: str, value: Any) -> str:
    """A key's value as JSON, which is YAML."""
    try:
        return json.dumps(value)
    except TypeError as error:  # YAML also has dates, sets and bytes
        raise UserError(
            f"keys: the value of '{key}', or one in it, is no text, number, list or mapping ({error}): put a date in quotes"
        ) from error


def _read_keys(path: Path) -> dict[str, Any]:
    tree = read_yaml_file(path, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {type(tree).__name__}")
    return tree
