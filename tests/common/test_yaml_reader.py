from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from erde.common.yaml_reader import MAX_BYTES, MAX_DEPTH, read_yaml, read_yaml_file
from erde.recipe.load import load_config, shipped_recipes
from tests.helpers.checks import user_error

# Nine lines that stand for 10^9 values.
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 5000 + "]" * 5000, f"more than {MAX_DEPTH} levels"),
        ("a: " * 100, "not valid YAML"),
        ("seed: " + "1" * 5000, "more than 40 digits"),
        ("seed: 0x" + "f" * 5000, "more than 40 digits"),
        ("seed: 2020-13-45", "does not fit its type: month must be in 1..12"),
        ("seed: !!timestamp word", "does not fit its type"),
        ("seed: !!int abc", "does not fit its type"),
        ("seed: !!float abc", "does not fit its type"),
        ("seed: !!bool abc", "does not fit its type"),
        ("seed: !!python/object:os.system ls", "not valid YAML"),
        (LAUGHS, "more than 100,000 values, aliases written out"),
        ("a: &a [*a]", "an alias within its own anchor"),
        ("a: &a {b: *a}", "an alias within its own anchor"),
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice"),
        ("train: {epochs: 1, epochs: 2}", "the key 'epochs' occurs twice"),
        ("a: " + "x" * 20_000, "more than 10,000 characters"),
        ("a: 1\n" * 300_000, f"longer than {MAX_BYTES:,} bytes"),
        ("? [a]\n: b", "unhashable key"),
        ("a: \x00", "not valid YAML"),
        ("a: *b", "undefined alias"),
    ],
)
def test_hostile_yaml_is_one_short_line(text: str, words: str) -> None:
    started = time.monotonic()
    with user_error("recipe x .*" + words.replace(".", r"\.").replace("[", r"\[")) as _:
        read_yaml(text, "recipe x")
    assert time.monotonic() - started < 20
    with pytest.raises(ValueError) as caught:
        read_yaml(text, "recipe x")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "a: 1",
        "- [1, 2.5, true, null, 2020-12-31]",
        "a: &x {b: 1}\nc: *x\nd: {<<: *x, b: 2}",
        "",
        "a: {b: [c, {d: e}]}",
    ],
)
def test_plain_yaml_is_what_safe_load_gives(text: str) -> None:
    assert read_yaml(text, "it") == yaml.safe_load(text)


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_recipes_pass_through_it(recipe: str) -> None:
    text = load_config(recipe).to_yaml()
    assert read_yaml(text, "it") == yaml.safe_load(text)


@pytest.mark.parametrize("value", [LAUGHS.replace("\n", " "), "1" * 5000, "[" * 5000])
def test_values_of_the_command_line_too(value: str) -> None:
    with user_error("the value of 'seed="):
        load_config("digits", [f"seed={value}"])


def test_a_huge_value_is_not_printed(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    # Within the limits, and still some 90,000 values where a number is expected.
    laughs = "\n".join(LAUGHS.splitlines()[:4])
    path.write_text(f"{laughs}\ntrain: {{epochs: *d}}\narms: {{erde: {{loss: erde}}}}\n")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert len(str(caught.value)) < 500
    path.write_text("arms: {erde: {loss: [" + ", ".join("x" * 90 for _ in range(900)) + "]}}\n")
    with pytest.raises(ValueError, match="a loss needs a name") as caught:
        load_config(path)
    assert len(str(caught.value)) < 1000


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with user_error("recipe x cannot be read: Is a directory"):
        read_yaml_file(tmp_path, "recipe x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 10**9),
        ("data.image_size", 100_000),
        ("data.workers", 10**6),
        ("train.epochs", 10**12),
        ("data.augmentation.crop_padding", 10**6),
    ],
)
def test_numbers_that_no_machine_can_do(key: str, value: Any) -> None:
    with user_error(f"{key}: expected .*less than or equal to"):
        load_config("digits", [f"{key}={value}"])
