"""The documents: their examples run, their links lead somewhere, and they name what is there."""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import BaseModel

import erde
import erde.runtime
from erde.recipe.keys import keys_of
from erde.recipe.load import load_config, shipped_recipes
from erde.recipe.losses import ControllerConfig, LossConfig
from erde.recipe.schema import Config
from erde.runtime.batch import ANSWERS
from tests.helpers import api_page, key_tables
from tests.helpers.hand_made_bundle import convolution_bundle
from tests.runtime.test_batch import check_parity, png, some_images

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
# Their Python blocks, in this order, are one script; so are their console blocks.
TUTORIALS = [DOCS / "python.md", DOCS / "command-line.md", DOCS / "calibration.md"]
DOCUMENTS = [
    README,
    *(ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "LOG.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "results")),
    *sorted(DOCS.rglob("*.md")),
]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document whose info string is ``language``."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(path: Path) -> list[str]:
    """The lines that start with ``$ `` in the console blocks of a document."""
    lines = [line for block in blocks(path, "console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines), "console blocks hold commands only"
    return [line.removeprefix("$ ") for line in lines]


def execute(command: str | list[str], folder: Path) -> str:
    """Run a command in ``folder`` as a reader would, with this environment's ``erde``; its output."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
    }
    environment.pop("ERDE_DATA", None)
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def after_python(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the Python blocks of the tutorials ran as one script, and what they printed."""
    folder = tmp_path_factory.mktemp("tutorials")
    parts = [block for path in TUTORIALS for block in blocks(path, "python")]
    assert len(parts) == 5
    return folder, execute([sys.executable, "-c", "\n".join(parts)], folder)


@pytest.mark.slow
def test_python_of_the_tutorials_runs(after_python: tuple[Path, str]) -> None:
    folder, out = after_python
    assert (folder / "bundle" / "manifest.json").is_file()
    assert len(list((folder / "photos").iterdir())) == 20
    accuracy = re.search(r"^accuracy (\S+)$", out, re.M)
    assert accuracy is not None, out
    # Ten classes: chance is 10 %.
    assert float(accuracy[1]) > 0.5


def tutorial_commands() -> list[str]:
    return [line for path in TUTORIALS for line in commands(path)]


def test_the_tutorials_have_their_commands() -> None:
    # Here and not in the slow test that runs them: whoever adds a command sees it at once.
    lines = tutorial_commands()
    assert len(lines) == 18
    assert all(line.startswith("erde ") for line in lines)


@pytest.mark.slow
def test_commands_of_the_tutorials_run(after_python: tuple[Path, str]) -> None:
    folder, _ = after_python
    lines = tutorial_commands()
    output = {line: execute(line, folder) for line in lines}
    assert {"results.json", "report.html", "bundle"} <= {
        path.name for path in (folder / "runs/first").iterdir()
    }
    with (folder / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == sorted(f"photos/{number}.png" for number in range(20))
    assert (folder / "student.onnx").is_file()
    assert "intact" in output["erde bundle verify runs/first/bundle"]
    assert set(output["erde list recipes"].split()) >= set(shipped_recipes())


@pytest.mark.slow
def test_a_trained_model_gets_exits_as_in_the_readme(tmp_path: Path) -> None:
    (script,) = blocks(README, "python")
    (command,) = commands(README)
    # The model's own answers must stay as they were, as the text says.
    before = "model.eval()\nkept = model(images := torch.rand(5, 1, 8, 8))\n"
    after = "model.eval()\nassert torch.equal(model(images), kept)\n"
    head, line, tail = script.partition("network = ")
    assert line
    out = execute([sys.executable, "-c", f"import torch\n{head}{before}{line}{tail}{after}"], tmp_path)
    assert "risk-2 " in out
    assert "early answer gets wrong" in out
    execute(command, tmp_path)


def test_recipes_of_the_documents_are_valid() -> None:
    lines = [
        line
        for path in (README, *DOCS.glob("*.md"))
        for block in blocks(path, "text")
        for line in block.replace("\\\n", " ").splitlines()
        if " erde run " in line
    ]
    assert len(lines) > 5
    for line in lines:
        recipe, *overrides = shlex.split(line.split(" erde run ")[1], comments=True)
        if recipe.endswith(".yaml"):
            continue
        overrides = [part for part in overrides if "=" in part]
        config = load_config(recipe, overrides)
        # No override is lost to a later one.
        for override in overrides:
            key, _, text = override.partition("=")
            value = yaml.safe_load(text)
            if isinstance(value, str | int):
                assert operator.attrgetter(key)(config) == value, line


def prose(path: Path) -> str:
    """A document without its fenced blocks, in which brackets are code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ +(.*)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(path: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(path)):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        linked = path if not name else path.parent / name
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(target)
    assert not missing


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


@pytest.mark.parametrize("path", key_tables.DOCUMENTS, ids=lambda path: path.name)
def test_key_tables_are_those_of_the_models(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == key_tables.written(text), f"write the tables anew: {key_tables.COMMAND}"


def test_every_key_has_a_meaning_and_is_in_one_table() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in key_tables.DOCUMENTS)
    tables = re.findall(r"<!-- keys of (.+?) -->", text)
    # ce has no keys of its own.
    assert sorted([*tables, "the loss `ce`"]) == sorted(key_tables.PLACES)
    # A controller's keys are those of dynamickd.
    known = {*key_tables.PLACES.values(), LossConfig, ControllerConfig}
    for place, model in key_tables.PLACES.items():
        for field in model.model_fields.values():
            assert set(models_in(field.annotation)) <= known
        for key in keys_of(model):
            assert key.meaning or key.name == "name", f"{key.name} of {place} has no meaning"


def test_the_python_api_is_that_of_the_docstrings() -> None:
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), (
        f"write the page anew: {api_page.COMMAND}"
    )


def test_every_public_name_is_in_the_python_api() -> None:
    listed = {name for names in api_page.GROUPS.values() for name in names}
    public = {f"erde.{name}" for name in erde._HOMES} | {
        f"erde.runtime.{name}" for name in erde.runtime.__all__
    }
    assert public <= listed


def test_a_docstring_becomes_markdown() -> None:
    text = """Sum ``a`` and :func:`b`, shape (N, K).

    Args:
        first, second: of N images,
            not of others.
        third: another.

    Raises:
        UserError: no ``a``.

    An end.
    """
    assert api_page.markdown(inspect.cleandoc(text)).splitlines() == [
        "Sum `a` and `b`, shape (N, K).", "",
        "Args:", "", "- `first`, `second`: of N images, not of others.", "- `third`: another.", "",
        "Raises:", "", "- `UserError`: no `a`.", "", "An end.",
    ]  # fmt: skip


def test_promises_quotes_what_its_figures_show() -> None:
    text = " ".join((DOCS / "promises.md").read_text(encoding="utf-8").split())
    numbers = json.loads((ROOT / "benchmarks/results/promise-figures.json").read_text(encoding="utf-8"))
    few, many = numbers["sizes"]["230"]["saved"], numbers["sizes"]["2500"]["saved"]
    assert f"`erde` stops at {numbers['walk']['most_accepted']}." in text
    broken = numbers["sizes"]["2500"]["broken"]
    assert f"{broken} of 1,000 promises were broken" in text
    assert f"one of the {1000 - broken} or one of the {broken}" in text
    assert f"{numbers['naive']['broken']} of 1,000 promises were broken" in text
    assert f"between {100 * few['5 %']:.0f} and {100 * few['95 %']:.0f} % of the MACs" in text
    assert f"it was {100 * many['5 %']:.0f} to {100 * many['95 %']:.0f} %" in text
    assert f"would have saved {100 * numbers['best_saved']:.0f} %" in text
    # The page says that none is broken more often than it may be.
    assert all(size["broken"] <= 100 for size in numbers["sizes"].values())


def named_functions() -> list[tuple[str, str]]:
    """(dotted name, file) of what method.md links to in the package."""
    text = prose(ROOT / "docs" / "method.md")
    return re.findall(r"\[`([\w.]+)`\]\(\.\./(src/erde/[\w/]+\.py)\)", text)


def test_functions_of_method_exist() -> None:
    named = named_functions()
    assert len(named) > 30
    wrong = []
    for name, file in named:
        module = file.removeprefix("src/").removesuffix(".py").replace("/", ".")
        rest = f"erde.{name}".removeprefix(f"{module}.")
        if rest == f"erde.{name}" or not _is_defined(module, rest):
            wrong.append((name, file))
    assert not wrong


def test_every_dotted_name_in_method_is_linked_or_a_key() -> None:
    text = prose(ROOT / "docs" / "method.md")
    linked = {name for name, _ in named_functions()}
    keys = {key for key in Config.model_fields if key != "name"}
    others = set(re.findall(r"`([a-z_]+(?:\.\w+)+)`", text)) - linked
    unknown = set()
    for name in others:
        if name.endswith((".json", ".onnx")):
            continue
        first, *rest = name.split(".")
        if first in keys:
            model = next(models_in(Config.model_fields[first].annotation))
            if rest[0] in model.model_fields:
                continue
        unknown.add(name)
    assert unknown <= {"losses.kd.kd_loss"}, unknown


def _is_defined(module: str, name: str) -> bool:
    value: Any = importlib.import_module(module)
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return callable(value)


def test_no_file_speaks_of_the_place_where_it_was_written() -> None:
    # Put together from parts, so that this file does not contain them.
    words = re.compile(
        "|".join((r"/" + r"work\b", r"\.\./" + "shared", "index" + "-url", "trusted" + "-host"))
    )
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert README in files
    hits = []
    for path in files:
        if not path.is_file():
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1
        ):
            if words.search(line):
                hits.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not hits


@pytest.mark.slow
def test_python_of_backbones_runs(tmp_path: Path) -> None:
    examples = blocks(ROOT / "docs" / "backbones.md", "python")
    assert len(examples) == 6
    out = execute([sys.executable, "-c", "\n".join(examples)], tmp_path)
    assert (tmp_path / "own-bundle" / "manifest.json").is_file()
    # What the comments say is what is printed.
    lines = [line for block in examples for line in block.splitlines() if line.startswith("print")]
    promised = [line.split("  # ")[1] for line in lines if "  # " in line]
    assert len(promised) == 5
    assert [line for line in out.splitlines() if line.startswith("['")] == promised


# The module that each example of bulk.md needs, and what its program has before.
BULK = {
    "Ray Data": ("ray.data", "import erde, ray\nray.init(num_cpus=4, include_dashboard=False)\n"),
    "Spark": (
        "pyspark",
        "from pyspark.sql import SparkSession\nspark = SparkSession.builder.master('local[2]').getOrCreate()\n",
    ),
    "Dask": ("dask.dataframe", "import erde\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", BULK)
def test_python_of_bulk_runs(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    module, before = BULK[engine]
    pytest.importorskip(module, reason=f"{module} is not installed")
    if engine == "Spark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java, which is not installed")
    text = (DOCS / "bulk.md").read_text(encoding="utf-8")
    (example,) = re.findall(rf"^### {engine}\n\n```python\n(.*?)^```$", text, re.M | re.S)
    for place in ("/mnt/", "s3://bucket/"):
        example = example.replace(place, f"{tmp_path}/")
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(300)
    (tmp_path / "images").mkdir()
    for start in (0, 100, 200):
        rows = range(start, start + 100)
        table = pa.table({"id": pa.array(rows, pa.int64()), "image": [png(images[row]) for row in rows]})
        pq.write_table(table, tmp_path / f"images/{start}.parquet")
    execute([sys.executable, "-c", before + example], tmp_path)
    answers = pq.read_table(tmp_path / "answers").sort_by("id")
    assert set(answers.column_names) == {"id", *ANSWERS}
    columns = {name: answers[name].to_numpy() for name in answers.column_names}
    assert columns["id"].tolist() == list(range(300))
    check_parity(columns, bundle, images)
