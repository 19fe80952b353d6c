"""``erde.Predictor``: a bundle as a function from columns to columns."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import erde
from erde.runtime import batch
from erde.runtime.session import Session
from tests.helpers.checks import user_error
from tests.helpers.hand_made_bundle import convolution_bundle, pixel_bundle


def some_images(count: int, seed: int = 1) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def check_parity(
    answers: dict[str, NDArray[Any]], bundle: Path, images: NDArray[np.uint8], **limits: Any
) -> None:
    expected = Session(bundle, threads=1).predict(images, **limits)
    assert (answers["label"] == expected.labels).all()
    assert answers["class"].tolist() == expected.names
    # Batches of another size are computed in another order.
    assert np.allclose(answers["probability"], expected.probabilities.max(axis=1), atol=1e-6)
    assert (answers["exit"] == expected.exits).all()
    assert (answers["macs"] == expected.macs).all()
    assert set(answers["operating_point"]) == {expected.operating_point}
    assert set(answers["error"]) == {""}


@pytest.mark.parametrize("kind", ["array", "bytes", "paths", "struct", "list of arrays"])
def test_answers_are_those_of_the_session(kind: str, tmp_path: Path) -> None:
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(50)
    encoded = [png(image) for image in images]
    for number, content in enumerate(encoded):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = [str(tmp_path / f"{number}.png") for number in range(50)]
    column: Any = {
        "array": images,
        "bytes": np.array(encoded, dtype=object),
        "paths": np.array(paths),
        "struct": [
            {"bytes": content, "path": "gone.png"} if number % 2 else {"bytes": None, "path": paths[number]}
            for number, content in enumerate(encoded)
        ],
        "list of arrays": list(images),
    }[kind]
    for limits in ({}, {"operating_point": "other"}, {"max_exit": 1}, {"max_macs": 100.0}):
        predictor = erde.Predictor(bundle, column="picture", keep=["id"], batch_size=8, **limits)
        answers = predictor({"picture": column, "id": np.arange(50) * 3, "more": np.zeros(50)})
        assert list(answers) == ["id", *batch.ANSWERS]
        assert (answers["id"] == np.arange(50) * 3).all()
        check_parity(answers, bundle, images, **limits)
    assert len(set(answers["exit"])) == 1
    assert len(set(erde.Predictor(bundle)({"image": images})["exit"])) > 1


def test_only_arguments_are_pickled(tmp_path: Path) -> None:
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(9)
    predictor = erde.Predictor(bundle, operating_point="other")
    before = pickle.dumps(predictor)
    check_parity(predictor({"image": images}), bundle, images, operating_point="other")
    after = pickle.dumps(predictor)
    assert before == after
    assert len(after) < 1000
    check_parity(pickle.loads(after)({"image": images}), bundle, images, operating_point="other")


def test_a_process_opens_a_bundle_once_with_one_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    class Counted(Session):
        def __init__(self, path: Path, **keywords: Any) -> None:
            opened.append(keywords)
            super().__init__(path, **keywords)

    monkeypatch.setattr(batch, "Session", Counted)
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(40)
    copies = [pickle.dumps(erde.Predictor(bundle))] * 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda copy: pickle.loads(copy)({"image": images}), copies))
    assert opened == [{"threads": 1, "spinning": False, "engine": "onnxruntime"}]
    for part in answers:
        check_parity(part, bundle, images)


FORK = """
import multiprocessing, os, sys, threading
import numpy as np
import erde
from erde.runtime import batch
images = np.load(sys.argv[2])
predictor = erde.Predictor(sys.argv[1], threads=2)
labels = predictor({"image": images})["label"].tolist()
first, process, begun = predictor.session, os.getpid(), threading.Event()
class Waiting(batch.Session):
    def __init__(self, *arguments, **keywords):
        if os.getpid() == process:
            begun.set()
            threading.Event().wait()
        super().__init__(*arguments, **keywords)
batch.Session = Waiting
threading.Thread(target=lambda: erde.Predictor(sys.argv[1], threads=1).session, daemon=True).start()
begun.wait()
context = multiprocessing.get_context("fork")
reader, writer = context.Pipe(False)
def answer():
    writer.send((predictor({"image": images})["label"].tolist(), predictor.session is first))
child = context.Process(target=answer)
child.start()
given = reader.recv() if reader.poll(30) else "nothing"
child.kill()
assert given == (labels, False), given
assert predictor.session is first
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_opens_the_bundle_itself(tmp_path: Path) -> None:
    # It is forked while another thread opens a bundle, and so holds the lock.
    bundle = convolution_bundle(tmp_path / "bundle")
    np.save(tmp_path / "images.npy", some_images(40))
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(bundle), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, start_new_session=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_another_bundle_in_its_place_is_for_new_predictors(tmp_path: Path) -> None:
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(40)
    first = erde.Predictor(bundle)
    labels = first({"image": images})["label"]
    shutil.rmtree(bundle)
    convolution_bundle(tmp_path / "other", seed=1).rename(bundle)
    assert (first({"image": images})["label"] == labels).all()
    renewed = pickle.loads(pickle.dumps(first))({"image": images})
    check_parity(renewed, bundle, images)
    assert (renewed["label"] != labels).any()


def test_a_bad_image_is_a_row_with_a_reason(tmp_path: Path) -> None:
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(3)
    good = [png(image) for image in images]
    cells = [
        good[0], b"no image", None, good[1], {"bytes": b"zz", "path": "a\n.png"}, str(tmp_path / "gone.png"),
        float("nan"), images[:2], np.zeros(3), {"bytes": None, "path": None}, good[2],
    ]  # fmt: skip
    answers = erde.Predictor(bundle)({"image": cells})
    well = np.array([0, 3, 10])
    check_parity({name: values[well] for name, values in answers.items()}, bundle, images)
    bad = np.setdiff1d(np.arange(len(cells)), well)
    assert (answers["label"][bad] == -1).all()
    assert (answers["exit"][bad] == -1).all()
    assert (answers["macs"][bad] == 0).all()
    assert np.isnan(answers["probability"][bad]).all()
    assert set(answers["class"][bad]) == set(answers["operating_point"][bad]) == {""}
    reasons = answers["error"].tolist()
    assert "\n" not in "".join(reasons)
    assert reasons[1].startswith("the image is not a readable image")
    assert reasons[2] == reasons[6] == reasons[9] == "there is no image: the row is empty"
    assert reasons[4].startswith("a\\n.png is not a readable image")
    assert "gone.png cannot be read" in reasons[5]
    assert "holds 2 images" in reasons[7]
    assert "got float64 of shape (3,)" in reasons[8]


def test_an_image_on_which_a_stage_fails_is_a_row_with_a_reason(tmp_path: Path) -> None:
    bundle = pixel_bundle(tmp_path / "bundle")
    images = np.random.default_rng(0).integers(0, 256, (7, 3, 5, 1), dtype=np.uint8)
    images[:, :, -1] = 0
    images[4, 0, -1] = 1  # its first stage fails
    answers = erde.Predictor(bundle)({"image": images})
    assert "stage 0 fails" in answers["error"][4]
    assert answers["label"][4] == -1
    rest = np.delete(np.arange(7), 4)
    check_parity({name: values[rest] for name, values in answers.items()}, bundle, images[rest])


def test_an_empty_batch_has_columns_with_their_types(tmp_path: Path) -> None:
    answers = erde.Predictor(convolution_bundle(tmp_path / "bundle"))({"image": np.array([], dtype=object)})
    assert "".join(answers[name].dtype.kind for name in batch.ANSWERS) == "iUfiUiU"
    assert all(not len(values) for values in answers.values())


def test_a_table_of_pandas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(5)
    frame = pandas.DataFrame(
        {"image": [png(image) for image in images], "id": range(5)}, index=[9, 7, 5, 3, 1]
    )
    answers = erde.Predictor(bundle, keep=["id"])(frame)
    assert answers["id"].tolist() == [0, 1, 2, 3, 4]
    check_parity(answers, bundle, images)


@pytest.mark.parametrize("keep", [{"id"}, {"id": 1}.keys(), iter(["id"])], ids=["set", "keys", "iterator"])
def test_names_to_keep_come_in_any_collection(keep: Any, tmp_path: Path) -> None:
    bundle, images = convolution_bundle(tmp_path / "bundle"), some_images(2)
    answers = erde.Predictor(bundle, keep=keep)({"image": images, "id": [3, 4]})
    assert answers["id"].tolist() == [3, 4]


def test_refusals(tmp_path: Path) -> None:
    bundle = convolution_bundle(tmp_path / "bundle")
    with user_error("batch_size is 0"):
        erde.Predictor(bundle, batch_size=0)
    with user_error("keep is 'id', expected a list"):
        erde.Predictor(bundle, keep="id")
    with user_error("keep has 'label', which is a column of the answers"):
        erde.Predictor(bundle, keep=["label"])
    with user_error("keep has 'id' twice"):
        erde.Predictor(bundle, keep=["id", "path", "id"])
    with user_error(r"no column 'image' \(did you mean 'images'\?\)"):
        erde.Predictor(bundle)({"images": []})
    with user_error("no column 'id'"):
        erde.Predictor(bundle, keep=["id"])({"image": []})
    with user_error(r"column 'image' holds int64 of shape \(4,\)"):
        erde.Predictor(bundle)({"image": np.arange(4)})
    with user_error("no operating point 'fast'|fast"):
        erde.Predictor(bundle, operating_point="fast")({"image": some_images(1)})
    with user_error("max_exit is 7"):
        erde.Predictor(bundle, max_exit=7)({"image": some_images(1)})
    with user_error(f"no bundle at {tmp_path / 'gone'} on the machine "):
        erde.Predictor(tmp_path / "gone")({"image": some_images(1)})
