"""``erde predict`` on Parquet files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import erde
from erde.runtime.predict_shards import SETTINGS, predict_shards
from erde.runtime.session import Session
from tests.common.test_files import dead_process
from tests.e2e.conftest import erde as command
from tests.e2e.conftest import erde_process
from tests.helpers.checks import entries, user_error
from tests.helpers.hand_made_bundle import convolution_bundle
from tests.runtime.test_batch import check_parity, png, some_images


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return convolution_bundle(tmp_path / "bundle")


def write_shards(folder: Path, shards: int, rows: int, **options: Any) -> Path:
    """Shards ``0.parquet``, ... of encoded images in Hugging Face's form, numbered through in ``id``."""
    folder.mkdir()
    images = some_images(shards * rows)
    for shard in range(shards):
        numbers = range(shard * rows, (shard + 1) * rows)
        table = pa.table(
            {
                "id": pa.array(numbers, pa.int32()),
                "image": [{"bytes": png(images[number]), "path": f"{number}.png"} for number in numbers],
                "note": [f"row {number}" for number in numbers],
            }
        )
        pq.write_table(table, folder / f"{shard}.parquet", **options)
    return folder


def read(out: Path) -> dict[str, Any]:
    """All answers as columns, the shards in the order of their numbers."""
    files = sorted(out.glob("*.parquet"), key=lambda path: int(path.stem))
    table = pa.concat_tables([pq.read_table(path) for path in files])
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_are_those_of_the_session(workers: int, bundle: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 3, 50, row_group_size=20)
    out = tmp_path / "new" / "answers"
    summary = predict_shards(bundle, [folder], out, keep=["note", "id"], workers=workers, batch_size=16)
    assert entries(out) == ["0.parquet", "1.parquet", "2.parquet", SETTINGS]
    assert entries(out.parent) == ["answers"]
    answers = read(out)
    check_parity(answers, bundle, some_images(150))
    assert answers["id"].tolist() == list(range(150))
    assert answers["note"][7] == "row 7"
    schema = pq.read_schema(out / "1.parquet")
    assert schema.names[:2] == ["note", "id"]
    assert schema.field("id").type == pa.int32()
    assert schema.field("error").type == pa.string()
    assert pq.read_metadata(out / "1.parquet").num_row_groups == 3
    expected = Session(bundle, threads=1).predict(some_images(150))
    rates = (np.bincount(expected.exits, minlength=3) / 150).tolist()
    assert summary == {
        "images": 150, "failed": 0, "exit_rates": rates, "mean_macs": expected.macs.mean(), "shards": 3, "out": str(out),
    }  # fmt: skip


def test_bytes_paths_and_no_rows(bundle: Path, tmp_path: Path) -> None:
    images = some_images(4)
    encoded = [png(image) for image in images]
    for number, content in enumerate(encoded):
        (tmp_path / f"{number}.png").write_bytes(content)
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    pq.write_table(pa.table({"image": pa.array(encoded, pa.binary())}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": paths}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "2.parquet")
    files = [tmp_path / f"{number}.parquet" for number in range(3)]
    predict_shards(bundle, files, tmp_path / "answers")
    check_parity(read(tmp_path / "answers"), bundle, np.concatenate([images, images]))
    assert pq.read_metadata(tmp_path / "answers" / "2.parquet").num_rows == 0


@pytest.mark.parametrize("kind", ["path", "struct"])
def test_the_column_of_images_can_be_kept(kind: str, bundle: Path, tmp_path: Path) -> None:
    images = some_images(4)
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(png(image))
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    cells: list[Any] = paths if kind == "path" else [{"bytes": None, "path": path} for path in paths]
    pq.write_table(pa.table({"seen": cells, "id": range(4)}), tmp_path / "0.parquet")
    out = tmp_path / "answers"
    predict_shards(bundle, [tmp_path / "0.parquet"], out, column="seen", keep=["id", "seen"])
    answers = read(out)
    check_parity(answers, bundle, images)
    assert list(answers)[:2] == ["id", "seen"]
    assert answers["seen"].tolist() == cells


def test_text_that_is_not_utf_8_is_a_row_with_a_reason(bundle: Path, tmp_path: Path) -> None:
    images = some_images(2)
    (tmp_path / "0.png").write_bytes(png(images[0]))
    raw = [os.fsencode(tmp_path / "0.png"), b"gone-\xff.png", None]
    paths = pa.array(raw, pa.binary()).view(pa.string())
    content = pa.array([None, png(images[1]), b"none"], pa.binary())
    pq.write_table(pa.table({"image": paths}), tmp_path / "0.parquet")
    structs = pa.StructArray.from_arrays([content, paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": structs}), tmp_path / "1.parquet")
    files = [tmp_path / f"{number}.parquet" for number in range(2)]
    assert predict_shards(bundle, files, tmp_path / "answers", keep=["image"])["images"] == 3
    texts, pairs = (
        pq.read_table(tmp_path / "answers" / file.name, columns=["error"])["error"] for file in files
    )
    first, second, third = texts.to_pylist()
    assert first == ""
    assert "gone-\\udcff.png cannot be read" in second
    assert third == "there is no image: the row is empty"
    # Bytes are an image whatever their name is.
    assert pairs.to_pylist()[:2] == ["", ""]


def test_a_broken_image_is_a_row_and_the_exit_code_is_3(bundle: Path, tmp_path: Path) -> None:
    good = png(some_images(1)[0])
    table = pa.table({"picture": pa.array([good, b"no image", None], pa.binary()), "id": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "in.parquet")
    out, _ = command(
        "predict", str(bundle), str(tmp_path / "in.parquet"), "--out", str(tmp_path / "answers"),
        "--image-column", "picture", "--keep", "id", "--operating-point", "other", "--json", code=3,
    )  # fmt: skip
    assert out.startswith("1 images (2 failed): ")
    assert json.loads(out.splitlines()[-1])["failed"] == 2
    rows = pq.read_table(tmp_path / "answers" / "in.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["a", "b", "c"]
    assert [row["label"] < 0 for row in rows] == [False, True, True]
    assert rows[0]["operating_point"] == "other"
    assert "not a readable image" in rows[1]["error"]
    assert "row is empty" in rows[2]["error"]


def children(process: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True
    ).stdout
    return [int(number) for number in listed.split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_command_goes_on_without_answering_twice(bundle: Path, tmp_path: Path) -> None:
    folder, out = write_shards(tmp_path / "shards", 40, 100), tmp_path / "answers"
    arguments = ["predict", str(bundle), str(folder), "--out", str(out), "--workers", "2", "--keep", "id"]
    process = erde_process(*arguments)
    deadline = time.monotonic() + 120
    while not list(out.glob("*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # it could be done before its workers are listed
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while any(map(alive, workers)):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.01)
    before = {path.name: path.stat().st_ino for path in out.glob("*.parquet")}
    assert 0 < len(before) < 40
    # As a worker that is killed amid a shard leaves it.
    (out / f".39.parquet.{process.pid}-00000000.partial").write_bytes(b"PAR1")

    assert "continue it with --resume" in command(*arguments, code=2)[1]
    summary = json.loads(command(*arguments, "--resume", "--json")[0].splitlines()[-1])
    assert summary["images"] == 4000
    assert sum(summary["exit_rates"]) == pytest.approx(1)
    assert entries(out) == sorted([SETTINGS, *(f"{number}.parquet" for number in range(40))])
    assert {name: (out / name).stat().st_ino for name in before} == before, "answered twice"
    answers = read(out)
    assert Counter(answers["id"]) == dict.fromkeys(range(4000), 1)
    check_parity(answers, bundle, some_images(4000))


def test_a_killed_worker_is_an_error_in_a_line(bundle: Path, tmp_path: Path) -> None:
    folder, out = write_shards(tmp_path / "shards", 40, 100), tmp_path / "answers"
    process = erde_process("predict", str(bundle), str(folder), "--out", str(out), "--workers", "2")
    deadline = time.monotonic() + 120
    while not list(out.glob("*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)  # likewise
    for worker in children(process.pid):
        with suppress(OSError):  # it ended meanwhile
            if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text():
                os.kill(worker, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("error: a worker process was killed")
    assert err.count("\n") == 1


def test_resume_refuses_what_was_begun_otherwise(bundle: Path, tmp_path: Path) -> None:
    folder, out = write_shards(tmp_path / "shards", 2, 5), tmp_path / "answers"
    # Nothing begun is no error, and neither is a start that was killed while it wrote the settings.
    out.mkdir()
    (out / f".settings.json.{dead_process()}-12345678.partial").write_text("half")
    predict_shards(bundle, [folder], out, resume=True)
    assert entries(out) == ["0.parquet", "1.parquet", SETTINGS]
    again = predict_shards(bundle, [folder], out, resume=True)
    assert again["images"] == 10
    with user_error("has answers of an earlier command: continue it with --resume"):
        predict_shards(bundle, [folder], out)
    with user_error("was begun with another operating_point"):
        predict_shards(bundle, [folder], out, resume=True, operating_point="other")
    with user_error("was begun with another keep"):
        predict_shards(bundle, [folder], out, resume=True, keep=["id"])
    shutil.rmtree(bundle)
    convolution_bundle(tmp_path / "other", seed=1).rename(bundle)
    with user_error("was begun with another bundle: give what was given then"):
        predict_shards(bundle, [folder], out, resume=True)
    shutil.rmtree(bundle)
    shutil.rmtree(tmp_path / "bundle-stages")
    convolution_bundle(bundle)
    pq.write_table(pq.read_table(folder / "0.parquet")[:3], folder / "0.parquet")
    with user_error(r"0.parquet has answers to 5 rows, .*0.parquet has 3: it has changed"):
        predict_shards(bundle, [folder], out, resume=True)
    (out / "0.parquet").write_bytes(b"")
    with user_error("0.parquet has no answers of erde: remove it"):
        predict_shards(bundle, [folder], out, resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with user_error("full, which has other files"):
        predict_shards(bundle, [folder], tmp_path / "full", resume=True)


def test_a_folder_named_as_a_shard_is_searched(bundle: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 2, 5)
    write_shards(folder / "train.parquet", 1, 3)  # as Spark and Dask write
    out = tmp_path / "answers"
    assert predict_shards(bundle, [folder], out)["shards"] == 3
    assert entries(out / "train.parquet") == ["0.parquet"]
    assert predict_shards(bundle, [folder], out, resume=True)["images"] == 13


def test_answers_below_the_shards_are_no_shards(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "shards", 2, 5)
    predict_shards(bundle, [folder], folder / "answers")
    (folder / "answers" / "1.parquet").unlink()  # as a command that was stopped leaves it
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder / "answers")
    for out in (folder / "answers", Path("link"), Path("shards/../shards/answers")):
        assert predict_shards(bundle, [Path("shards")], out, resume=True)["shards"] == 2
    assert entries(folder / "answers") == ["0.parquet", "1.parquet", SETTINGS]


def test_the_folder_of_answers_may_be_the_present_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "shards", 1, 3)
    (tmp_path / "answers").mkdir()
    monkeypatch.chdir(tmp_path / "answers")
    assert predict_shards(bundle, [folder], Path("."))["images"] == 3
    assert entries(tmp_path / "answers") == ["0.parquet", SETTINGS]
    with user_error("--out is /: expected a folder of its own for the answers"):
        predict_shards(bundle, [folder], Path("/"))


def test_refusals_write_nothing(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = write_shards(tmp_path / "shards", 2, 3), tmp_path / "answers"

    def refused(match: str, *shards: Path, **options: Any) -> None:
        with user_error(match):
            predict_shards(bundle, shards or [folder], out, **options)
        assert not out.exists()

    refused("0.parquet has no column 'picture'.*name it with --image-column", column="picture")
    refused("0.parquet has no column 'number'.*name it with --keep", keep=["number"])
    refused("column 'id' of .* holds int32, expected encoded images", column="id")
    refused("operating point", operating_point="fast")
    refused("max_macs is inf, expected a finite number", max_macs=float("inf"))
    refused("no shard at ", tmp_path / "gone.parquet")
    (tmp_path / "empty").mkdir()
    refused("no shard below the folder ", tmp_path / "empty")
    refused("would both be answered in ", folder / "0.parquet", folder)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    refused("torn.parquet is not a readable Parquet file", tmp_path / "torn.parquet")
    with user_error("where .*0.parquet itself is"):
        predict_shards(bundle, [folder], folder)
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(r"--ray needs Ray, which is not installed: pip install 'erde\[ray\]'", ray=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(r"Parquet shards need pyarrow: pip install 'erde\[batch\]'")


def test_options_that_do_not_go_together(bundle: Path, tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 1, 2)
    begin = ["predict", str(bundle), str(folder)]
    shard = ["predict", str(bundle), str(folder / "0.parquet")]
    assert "with --workers, a folder for Parquet shards" in command(*begin, "--out", "answers", code=2)[1]
    assert "expected a folder for the answers" in command(*shard, code=2)[1]
    assert "expected a folder for the answers" in command(*shard, "--out", "a.csv", code=2)[1]
    late = [*shard, "--out", str(tmp_path / "answers"), "--deadline-ms", "5"]
    assert "--deadline-ms is not for Parquet shards" in command(*late, code=2)[1]
    for option in ("--keep", "--image-column"):
        assert f"{option} is for Parquet shards" in command(*begin, option, "id", code=2)[1]


# ---------------------------------------------------------------- Ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ray with two processors and, on this machine, processes of its own."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'erde[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_a_cluster_that_lets_nobody_in(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class RayError(Exception):
        pass

    def refuse(**options: Any) -> None:
        raise errors.pop()

    errors = [ConnectionError("nobody at head:6379\nfor long"), RayError("no token")]
    exceptions = SimpleNamespace(RayError=RayError)
    ray = SimpleNamespace(is_initialized=lambda: False, init=refuse, exceptions=exceptions)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    folder, out = write_shards(tmp_path / "shards", 1, 2), tmp_path / "answers"
    with user_error(r"no way into Ray's cluster \(no token\): check RAY_ADDRESS and.* RAY_AUTH_TOKEN"):
        predict_shards(bundle, [folder], out, ray=True)
    with user_error(r"no way into Ray's cluster \(nobody at head:6379\)"):
        predict_shards(bundle, [folder], out, ray=True, resume=True)
    assert predict_shards(bundle, [folder], out, resume=True)["images"] == 2


@pytest.mark.slow
def test_ray(cluster: Any, bundle: Path, tmp_path: Path) -> None:
    folder, out = write_shards(tmp_path / "shards", 5, 40), tmp_path / "answers"
    summary = predict_shards(bundle, [folder], out, keep=["id"], workers=2, ray=True)
    assert summary["images"] == 200
    answers = read(out)
    assert answers["id"].tolist() == list(range(200))
    check_parity(answers, bundle, some_images(200))
    with user_error("has no answers of erde|has answers of an earlier"):
        predict_shards(bundle, [folder], out, keep=["id"], workers=2, ray=True)


@pytest.mark.slow
def test_ray_data_with_actors(cluster: Any, bundle: Path, tmp_path: Path) -> None:
    data = pytest.importorskip("ray.data")
    folder = write_shards(tmp_path / "shards", 4, 50)
    table = pq.read_table(folder / "3.parquet").to_pylist()
    table[7]["image"]["bytes"] = b"no image"
    pq.write_table(pa.Table.from_pylist(table), folder / "3.parquet")
    answers = data.read_parquet(str(folder)).map_batches(
        erde.Predictor,
        fn_constructor_kwargs={"bundle": str(bundle), "keep": ["id"]},
        batch_size=16,
        compute=data.ActorPoolStrategy(size=1),  # the other processor is for the tasks that read
    )
    answers.write_parquet(str(tmp_path / "answers"))
    rows = sorted(pq.read_table(tmp_path / "answers").to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(200))
    assert [row["id"] for row in rows if row["error"]] == [157]
    good = [row for row in rows if not row["error"]]
    columns = {name: np.array([row[name] for row in good]) for name in good[0]}
    check_parity(columns, bundle, np.delete(some_images(200), 157, axis=0))
