from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from erde.bundle.manifest import MANIFEST
from erde.bundle.profile import PROFILE
from erde.common.errors import UserError
from erde.runtime.session import Session
from tests.helpers import fuzz_bundles
from tests.helpers.fuzz_bundles import (
    GOOD,
    IMAGES,
    Draw,
    Examiner,
    Watch,
    change_bytes,
    change_json,
    change_message,
    examine,
    reseal,
    snapshot,
    use,
    write_manifest,
)
from tests.helpers.hand_made_bundle import convolution_bundle

STAGES = ("stage_0.onnx", "stage_1.onnx", "stage_2.onnx")


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """A folder with the bundle ``original``, which has a profile, and ``other``, a bundle of another task."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    convolution_bundle(folder / "original")
    convolution_bundle(folder / "other", seed=1, classes=3, channels=1)
    profile = Session(folder / "original", threads=1).profile(rounds=1, batch_sizes=(1, 8))
    # The same on every machine. An image more or less in a batch hardly matters to the second stage.
    times = {1: [1.0, 1.0, 1.0], 8: [4.0, 1.1, 4.0]}
    fixed = {"machine": "any", "milliseconds": times, "gather_milliseconds": [0.1, 0.1]}
    profile.model_copy(update=fixed).write(folder / "original" / PROFILE)
    return folder


@pytest.fixture
def examiner(scratch: Path) -> Iterator[Examiner]:
    examiner = Examiner(scratch)
    yield examiner
    examiner.close()


def copy_of(scratch: Path, name: str) -> Path:
    folder = scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(scratch / "original", folder))


# ---------------------------------------------------------------- mutations at random


def mutate_json(draw: Draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from((MANIFEST, MANIFEST, MANIFEST, PROFILE)))
    value = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        change_json(draw, value)
    path.write_text(json.dumps(value), encoding="utf-8")


def mutate_graph(draw: Draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from(STAGES))
    model = onnx.load(path)
    for _ in range(draw(st.integers(1, 2))):
        change_message(draw, model if not draw(st.integers(0, 3)) else model.graph)
    path.write_bytes(model.SerializeToString())


def mutate_bytes(draw: Draw, folder: Path) -> None:
    path = folder / draw(st.sampled_from((MANIFEST, PROFILE, "README.md", *STAGES)))
    path.write_bytes(change_bytes(draw, path.read_bytes()))


def mutate_files(draw: Draw, folder: Path) -> None:
    name = draw(st.sampled_from((MANIFEST, PROFILE, *STAGES)))
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    change = draw(st.sampled_from(("missing", "folder", "link", "pipe", "endless", "huge", "swap", "other")))
    if change == "folder":
        path.mkdir()
    elif change == "link":
        (folder / "aside").write_bytes(content)
        path.symlink_to("aside")
    elif change == "pipe":
        os.mkfifo(path)
    elif change == "endless":
        path.symlink_to("/dev/zero")
    elif change == "huge":
        path.touch()
        os.truncate(path, 2**40)  # takes no room on the disk
    elif change == "swap":
        shutil.copy(folder / "stage_1.onnx" if name != "stage_1.onnx" else folder / "stage_2.onnx", path)
    elif change == "other":
        path.write_bytes((folder.parent / "other" / name).read_bytes() if name != PROFILE else b"{}")


MUTATIONS = {"json": mutate_json, "graph": mutate_graph, "bytes": mutate_bytes, "files": mutate_files}


def hunt(scratch: Path, examiner: Examiner, examples: int) -> Counter[tuple[str, bool, str]]:
    """How often which mutation, sealed anew or not, had which outcome; all of them good."""
    outcomes: Counter[tuple[str, bool, str]] = Counter()

    @settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.data())
    def search(data: st.DataObject) -> None:
        folder = copy_of(scratch, "mutated")
        name = data.draw(st.sampled_from(("json", "json", "graph", "graph", "graph", "bytes", "files")))
        MUTATIONS[name](data.draw, folder)
        resealed = data.draw(st.sampled_from((True, True, True, False)))
        resealed = resealed and reseal(folder)
        outcome, detail = examiner(folder, resealed)
        outcomes[name, resealed, outcome] += 1
        assert outcome in GOOD, f"{outcome}: {detail}"

    search()
    return outcomes


def test_mutated_bundles(scratch: Path, examiner: Examiner) -> None:
    outcomes = hunt(scratch, examiner, 400)
    print(outcomes)
    assert {name for name, _, _ in outcomes} == set(MUTATIONS)
    # The hunt is worth its name: neither outcome is a rarity, under the old seal or a new one.
    for resealed, outcome, least in (
        (True, "answered", 20), (True, "refused", 80), (False, "refused", 20), (False, "answered", 3),
    ):  # fmt: skip
        assert sum(outcomes[name, resealed, outcome] for name in MUTATIONS) >= least, (resealed, outcome)


@pytest.mark.slow
def test_many_mutated_bundles(scratch: Path, examiner: Examiner) -> None:
    hunt(scratch, examiner, 4000)


# ---------------------------------------------------------------- forgeries by name, all sealed anew


def forge_graph(edit: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        path = folder / "stage_1.onnx"
        model = onnx.load(path)
        edit(model)
        path.write_bytes(model.SerializeToString())

    return forge


def forge_manifest(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        edit(value)
        write_manifest(folder, value)

    return forge


def append(kind: str, domain: str = "", **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    """Put a node of one input behind the logits."""

    def edit(model: onnx.ModelProto) -> None:
        model.graph.node[-1].output[0] = "before"
        model.graph.node.append(helper.make_node(kind, ["before"], ["logits"], domain=domain, **attributes))
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    return edit


def add_loop(model: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info
    inputs = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("a", 1, None)]
    nodes = [helper.make_node("Identity", ["on"], ["on_"]), helper.make_node("Identity", ["a"], ["a_"])]
    outputs = [value("on_", TensorProto.BOOL, []), value("a_", 1, None)]
    model.graph.node[-1].output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array(2**62), "times"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "true"))
    body = helper.make_graph(nodes, "body", inputs, outputs)
    model.graph.node.append(helper.make_node("Loop", ["times", "true", "before"], ["logits"], body=body))


def hide_loop(folder: Path) -> None:
    """A loop behind a key with bits beyond the 32nd, which ONNX Runtime drops."""
    forge_graph(add_loop)(folder)
    path = folder / "stage_1.onnx"
    content = path.read_bytes()
    graph = onnx.load_model_from_string(content).graph.SerializeToString()
    start = content.rindex(b"\x3a", 0, content.index(graph))  # the key of field 7
    path.write_bytes(content[:start] + bytes((0xBA, 0x80, 0x80, 0x80, 0x10)) + content[start + 1 :])


def move_weights(where: str) -> Callable[[Path], None]:
    def forge(folder: Path) -> None:
        model = onnx.load(folder / "stage_1.onnx")
        tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        for path in (folder / "weights.bin", folder.parent / "outside.bin"):
            path.write_bytes(tensor.raw_data)
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", where), ("length", str(length))):
            tensor.external_data.add(key=key, value=text)
        (folder / "stage_1.onnx").write_bytes(model.SerializeToString())

    return forge


def fix_rows(model: onnx.ModelProto) -> None:
    """Right for the two images of the reference sample only."""
    model.graph.node[-1].output[0] = "before"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 4]), "two"))
    model.graph.node.append(helper.make_node("Reshape", ["before", "two"], ["logits"]))


def lose_rows(model: onnx.ModelProto) -> None:
    """Rows beyond the second are dropped."""
    model.graph.node[-1].output[0] = "before"
    for name, number in (("from", 0), ("to", 2), ("axis", 0)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    model.graph.node.append(helper.make_node("Slice", ["before", "from", "to", "axis"], ["logits"]))


def ask_for_memory(model: onnx.ModelProto) -> None:
    """A few bytes that ask for a terabyte."""
    graph = model.graph
    graph.node[-1].output[0] = "before"
    graph.initializer.append(numpy_helper.from_array(np.array([2**38]), "size"))
    graph.initializer.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "naught"))
    graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["much"]))
    graph.node.append(helper.make_node("ReduceMin", ["much"], ["least"], keepdims=0))
    graph.node.append(helper.make_node("Mul", ["least", "naught"], ["none"]))
    graph.node.append(helper.make_node("Add", ["before", "none"], ["logits"]))


def rename_stage(name: str) -> Callable[[Path], None]:
    """The stage lies, whole, where its new name leads."""

    def forge(folder: Path) -> None:
        content = (folder / "stage_1.onnx").read_bytes()
        (folder / "sub").mkdir()
        for path in (folder / "sub" / "s.onnx", folder / "s.ort", folder.parent / "outside.bin"):
            path.write_bytes(content)
        value = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        value["files"][name] = value["files"].pop("stage_1.onnx")
        value["stages"][1]["file"] = name
        write_manifest(folder, value)

    return forge


def nest(value: dict[str, Any]) -> None:
    node: Any = value["provenance"]
    for _ in range(255):
        node["deeper"] = {}
        node = node["deeper"]


def make_sparse(folder: Path) -> None:
    os.truncate(folder / "stage_1.onnx", 2**31)


FORGERIES: dict[str, Callable[[Path], None]] = {
    "an endless loop": forge_graph(add_loop),
    "a loop behind a long key": hide_loop,
    "an operator that crashes": forge_graph(append("Inverse", "com.microsoft")),
    "right for two images": forge_graph(fix_rows),
    "rows are lost": forge_graph(lose_rows),
    "a terabyte": forge_graph(ask_for_memory),
    "a sparse file": make_sparse,
    **{f"weights at {where!r}": move_weights(where)
       for where in ("weights.bin", "../outside.bin", "/dev/zero", "*/_ORT_MEM_ADDR_/*")},
    **{f"a stage at {name[:20]!r}": rename_stage(name)
       for name in ("../outside.bin", "sub/s.onnx", "s.ort", "..", "", "/dev/zero", "a\0b", "s\n.onnx", "x" * 300 + ".onnx")},
    "provenance 255 levels deep": forge_manifest(nest),
    "half a character": forge_manifest(lambda value: value.update(name="\ud800")),
    "a loose tolerance": forge_manifest(lambda value: value["reference_sample"].update(tolerance=1e9)),
    "a version of tomorrow": forge_manifest(lambda value: value.update(format_version=4)),
    "an integer of 400 digits": forge_manifest(lambda value: value["stages"][0].update(macs=10**400)),
    "another reference image": forge_manifest(
        lambda value: value["reference_sample"].update(images=base64.b64encode(bytes(2 * 192)).decode())
    ),
    "a shape of 2^80 pixels": forge_manifest(lambda value: value.update(input_shape=[2**40, 2**40, 3])),
}  # fmt: skip


def test_forgeries_are_refused(scratch: Path, examiner: Examiner) -> None:
    outcomes = {}
    for name, forge in FORGERIES.items():
        folder = copy_of(scratch, "forged")
        forge(folder)
        reseal(folder)
        outcomes[name] = examiner(folder, True)
    bad = {name: outcome for name, outcome in outcomes.items() if not outcome[0].startswith("refused")}
    assert not bad


def test_provenance_that_is_no_mapping_answers(scratch: Path, examiner: Examiner) -> None:
    folder = copy_of(scratch, "forged")
    forge_manifest(lambda value: value.update(provenance={"recipe": {"data": ["digits"]}, "splits": 3}))(
        folder
    )
    assert reseal(folder)
    assert examiner(folder, True) == ("answered", "")


# ---------------------------------------------------------------- the examiner sees what it looks for


@pytest.fixture
def watch(scratch: Path) -> Watch:
    return Watch(scratch)


def outcome(monkeypatch: pytest.MonkeyPatch, watch: Watch, scratch: Path, deed: Callable[..., object]) -> str:
    monkeypatch.setattr(fuzz_bundles, "use", deed)
    return examine(scratch / "original", None, watch)[0]


def test_a_whole_bundle_answers(watch: Watch, scratch: Path) -> None:
    expected = use(Session(scratch / "original", threads=1), IMAGES)
    assert examine(scratch / "original", expected, watch) == ("answered", "")
    assert examine(scratch / "original", expected[::-1], watch)[0] == "WRONG ANSWER"


def test_exceptions_are_seen(monkeypatch: pytest.MonkeyPatch, watch: Watch, scratch: Path) -> None:
    for error, expected in (
        (UserError("wrong"), "refused"),
        (UserError("two\nlines"), "NOT ONE LINE"),
        (UserError("\x1b[31m"), "NOT ONE LINE"),
        (UserError("x" * 10_000), "LONG ERROR"),
        (UserError("std::bad_alloc"), "refused for memory"),
        (IndexError("x"), "RAISED"),
        (SystemExit(2), "RAISED"),
    ):

        def fail(*_: object, error: BaseException = error) -> None:
            raise error

        assert outcome(monkeypatch, watch, scratch, fail) == expected


def test_files_are_watched(monkeypatch: pytest.MonkeyPatch, watch: Watch, scratch: Path) -> None:
    prey, outside = scratch / "original", scratch / "outside"
    outside.touch()

    def behind_python(*_: object) -> list[object]:
        watch.allowed = None  # as a library would, without Python's hook
        (prey / "newer").touch()
        return []

    deeds: list[Callable[..., object]] = [
        lambda *_: (prey / "new").touch(),
        lambda *_: outside.read_bytes(),
        lambda *_: outside.open("a").close(),
        lambda *_: outside.rename(outside.with_name("moved")),
        lambda *_: (prey / ".." / "more").mkdir(),
        lambda *_: os.system("true"),
    ]
    for deed in deeds:
        assert outcome(monkeypatch, watch, scratch, deed) == "TOUCHED FILES"
    assert outcome(monkeypatch, watch, scratch, behind_python) == "WROTE FILES"
    assert outcome(monkeypatch, watch, scratch, lambda *_: (prey / "README.md").read_bytes()) == "answered"


SABOTAGE = """
import os, time
from tests.helpers import fuzz_bundles

def examine(folder, *_):
    {"abort": os.abort, "sleep": lambda: time.sleep(100), "grow": lambda: bytearray(2**32)}.get(folder.name, int)()
    return "answered", ""

fuzz_bundles.examine = examine
fuzz_bundles.main()
"""


def test_a_process_that_dies_hangs_or_grows_is_replaced(scratch: Path) -> None:
    examiner = Examiner(scratch, command=SABOTAGE)
    outcomes = {}
    try:
        for name in ("first", "sleep", "abort", "grow", "last"):
            # The one that hangs is asked in a process that is up: a second is long.
            examiner.seconds = 1 if name == "sleep" else 60
            outcomes[name] = examiner(scratch / name, True)
    finally:
        examiner.close()
    assert [outcomes[name][0] for name in outcomes] == ["answered", "HUNG", "CRASHED", "CRASHED", "answered"]
    assert "Aborted" in outcomes["abort"][1]
    assert "MemoryError" in outcomes["grow"][1]


def test_a_session_leaves_nothing_at_home(tmp_path: Path) -> None:
    # ONNX Runtime is one of those that would: its telemetry keeps a data base below the cache folder.
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    folder = convolution_bundle(tmp_path / "bundle")
    before = snapshot(tmp_path)
    kept = ("CI", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")
    environment = {name: value for name, value in os.environ.items() if name not in kept}
    environment |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(home))
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import sys, numpy\n"
        "from erde.runtime import Session\n"
        "session = Session(sys.argv[1], threads=1)\n"
        "session.predict(numpy.zeros((2, 8, 8, 3), numpy.uint8))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, cwd=elsewhere, check=True)
    assert snapshot(tmp_path) == before
