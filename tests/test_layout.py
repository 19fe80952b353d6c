"""Rooms: what a newcomer may rely on. Layers and forbidden imports are import-linter's (pyproject.toml)."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import erde
from erde.losses import CRITERIA
from erde.recipe.losses import LOSSES

PUBLIC = [name for name in dir(erde) if name in erde._HOMES]
MODULES = [
    module for module in pkgutil.walk_packages(erde.__path__, "erde.") if module.name != "erde.__main__"
]


def test_every_public_name_is_there() -> None:
    assert len(PUBLIC) == len(erde._HOMES) > 10
    assert all(getattr(erde, name).__name__ == name for name in PUBLIC)


def test_no_module_bears_a_public_name() -> None:
    # Importing a module sets it as an attribute of its package: in erde itself it would take the function's place.
    assert not {module.name for module in MODULES} & {f"erde.{name}" for name in PUBLIC}


def test_every_room_says_what_belongs_there_and_is_small() -> None:
    rooms = [module.name for module in MODULES if module.ispkg]
    assert len(rooms) > 10
    for room in rooms:
        package = importlib.import_module(room)
        assert package.__doc__, room
        assert len(list(pkgutil.iter_modules(package.__path__))) <= 14, room


def test_losses_and_their_keys_are_the_same_names() -> None:
    assert list(CRITERIA) == list(LOSSES)
    assert all(config.model_fields["name"].default == name for name, config in LOSSES.items())


def test_reading_a_recipe_imports_no_torch() -> None:
    code = (
        "import sys, erde; config = erde.load_config('cifar10-subset', ['arms.erde.loss.beta=0.3']); "
        "print(config.arms['erde'].loss.beta, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.3", "False"]


def test_no_variable_has_a_name_that_says_nothing() -> None:
    names: list[tuple[str, str]] = []
    for path in [*Path(erde.__path__[0]).rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.append((path.name, node.id))
            elif isinstance(node, ast.arg):
                names.append((path.name, node.arg))
    assert not [name for name in names if name[1] in ("one", "found", "what")]
