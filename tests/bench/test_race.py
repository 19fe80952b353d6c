from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from erde import bundle
from erde.bench import race, real_images, show
from erde.chains.cascading import cascade
from erde.chains.preprocessing import Preprocessing
from erde.data.load import DataSplits
from erde.exporting.onnx_files import export_plain
from erde.networks.network import EarlyExitNetwork
from erde.runtime.session import Session
from tests.helpers.big_network import MEAN, STD, write_big_network, write_photos
from tests.helpers.checks import save_by_class, user_error


@pytest.fixture(scope="module")
def images(digits: DataSplits) -> NDArray[np.uint8]:
    return np.asarray(digits.test.images[:])


@pytest.fixture(scope="module")
def folder(
    tiny_bundle: Path,
    tiny_network: EarlyExitNetwork,
    digits: DataSplits,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle where a run has it: beside the same network without exits."""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(tiny_bundle, run / "bundle")
    path = run / "baselines" / "no-exit.onnx"
    export_plain(tiny_network, digits.image_shape, digits.mean, digits.std, path)
    shutil.copy(path, run / "baselines" / "small.onnx")
    return run / "bundle"


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    return folder.parent / "baselines" / "no-exit.onnx"


@pytest.fixture(scope="module")
def result(folder: Path, images: NDArray[np.uint8]) -> race.Bench:
    return race.bench(folder, images, data="digits", batch_sizes=(1, 7), threads=(1,), rounds=3)


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


def by_the_clock(clock: Clock, name: str, kind: race.Kind, seconds: Callable[[int], float]) -> race._Entry:
    """A contender whose call number n takes ``seconds(n)``, and whose images leave by turns at exits 0 and 1."""
    numbers = itertools.count()

    def call(images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        clock.now += seconds(next(numbers))
        if kind == "no-exits":
            return None
        exits = np.arange(len(images)) % 2
        return np.where(exits == 0, 20, 60), exits

    about = race.Contender(
        name=name, kind=kind, source="", precision="fp32", operating_point=None, certified=False, bytes=1
    )
    return race._Entry(about, lambda _: call, 100.0 if kind == "no-exits" else None, 2)


def measure(entries: list[race._Entry], size: int = 4, rounds: int = 5) -> list[race.Measurement]:
    images = np.zeros((9, 2, 2, 1), np.uint8)
    return race._race(entries, entries[0].about.name, images, 1, size, rounds, np.random.default_rng(0))


def test_times_and_shares_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("erde.bench.race.time.perf_counter", clock)
    whole, half = measure(
        [by_the_clock(clock, "whole", "no-exits", lambda _: 8e-3), by_the_clock(clock, "half", "fixed", lambda _: 3e-3)]
    )  # fmt: skip
    assert (whole.time_share, whole.macs_share, whole.time_per_macs_saved) == (1.0, 1.0, None)
    assert half.p50 == pytest.approx(3) == half.p99
    assert half.time_share == pytest.approx(3 / 8)
    assert half.time_share_quartiles == pytest.approx((3 / 8, 3 / 8))
    assert half.images_per_second == pytest.approx(4 / 3e-3)
    # Half of the images at 20 of 100 MACs, half at 60: 60 % saved; of the time 5/8.
    assert half.macs_share == pytest.approx(0.4)
    assert half.exit_rates == [0.5, 0.5]
    assert half.time_per_macs_saved == pytest.approx((5 / 8) / 0.6)
    assert half.calls == 5 * int(race.TURN_SECONDS / 8e-3)


def test_a_busy_round_does_not_move_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("erde.bench.race.time.perf_counter", clock)

    # All that runs in the third round is ten times slower: warm-up, then 25 calls and one unmeasured a round.
    def slow(seconds: float) -> Callable[[int], float]:
        return lambda number: seconds * (10 if 55 <= number < 81 else 1)

    _, half = measure(
        [by_the_clock(clock, "a", "no-exits", slow(10e-3)), by_the_clock(clock, "b", "fixed", slow(5e-3))]
    )
    assert half.time_share_quartiles == pytest.approx((0.5, 0.5))
    assert half.p99 == pytest.approx(50)


def test_every_contender_has_its_turn(result: race.Bench, tiny_bundle: Path, plain: Path) -> None:
    names = [contender.name for contender in result.contenders]
    kinds = {contender.name: contender.kind for contender in result.contenders}
    assert (kinds["no-exit.onnx"], kinds["small.onnx"]) == ("no-exits", "fixed")
    points = [point.name for point in bundle.read(tiny_bundle).operating_points]
    assert names == ["no-exit.onnx", *points, "every exit computed", "small.onnx"]
    assert result.reference == "no-exit.onnx"
    assert [(measurement.contender, measurement.batch_size) for measurement in result.measurements] == [
        (name, size) for size in (1, 7) for name in names
    ]
    certified = {contender.operating_point for contender in result.contenders if contender.certified}
    assert certified == {
        point.name for point in bundle.read(tiny_bundle).operating_points if point.certificate
    }
    assert result.contenders[0].bytes == plain.stat().st_size
    assert all(
        measurement.p50 <= measurement.p95 <= measurement.p99 and measurement.images_per_second > 0
        for measurement in result.measurements
    )


def test_macs_are_those_of_the_exits_that_were_taken(result: race.Bench, tiny_bundle: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    macs = np.array([stage.macs for stage in manifest.stages])
    for measurement in result.measurements:
        if measurement.contender == "no-exit.onnx":
            assert (measurement.macs_share, measurement.exit_rates) == (1.0, None)
            continue
        if measurement.contender == "small.onnx":
            assert (measurement.macs_share, measurement.exit_rates) == (None, None)
            continue
        assert measurement.exit_rates is not None
        assert sum(measurement.exit_rates) == pytest.approx(1)
        assert measurement.macs_share == pytest.approx(
            float(np.array(measurement.exit_rates) @ macs) / manifest.no_exit_macs
        )
        if measurement.contender in ("no-exit", "every exit computed"):
            assert measurement.exit_rates[:-1] == [0, 0]
    early = next(measurement for measurement in result.measurements if measurement.contender == "risk-10")
    assert early.exit_rates is not None
    assert early.exit_rates[0] > 0


def test_a_bundle_alone_is_its_own_reference(tiny_bundle: Path, images: NDArray[np.uint8]) -> None:
    result = race.bench(
        tiny_bundle, images, data="digits", against=[], points=["risk-10", "risk-10"], batch_sizes=(3,),
        threads=(1,), rounds=2,
    )  # fmt: skip
    assert [contender.name for contender in result.contenders] == [
        "no-exit",
        "risk-10",
        "every exit computed",
    ]
    assert result.reference == "no-exit"
    by_name = {measurement.contender: measurement for measurement in result.measurements}
    # Both are shares of the same work, in which all heads are computed.
    assert by_name["no-exit"].time_share == by_name["no-exit"].macs_share == 1.0
    assert by_name["every exit computed"].macs_share == 1.0


def test_a_chain_is_not_held_against_its_front(
    folder: Path, digits: DataSplits, images: NDArray[np.uint8], tmp_path: Path
) -> None:
    big = write_big_network(digits, tmp_path / "big.onnx")
    chain = folder.parent / "bundle-cascade"
    preprocessing = [Preprocessing(mean=(MEAN,), std=(STD,))]
    cascade(
        [folder, big], write_photos(digits, tmp_path / "photos", True), chain, preprocessing=preprocessing
    )
    raced = race.bench(
        chain, images, data="digits", points=["no-exit"], batch_sizes=(1,), threads=(1,), rounds=1
    )
    kinds = {contender.name: contender.kind for contender in raced.contenders}
    assert kinds["no-exit.onnx"] == "fixed"
    assert raced.reference == "no-exit"


def test_what_lies_beside_a_bundle(tmp_path: Path) -> None:
    for name in ("bundle", "bundle-int8", "baselines"):
        (tmp_path / name).mkdir()
    (tmp_path / "baselines" / "small.onnx").touch()
    assert race.find_rivals(tmp_path / "bundle") == [
        tmp_path / "bundle-int8",
        tmp_path / "baselines" / "small.onnx",
    ]
    assert race.find_rivals(tmp_path / "bundle-int8") == [tmp_path / "baselines" / "small.onnx"]


def test_it_is_written_and_drawn(
    result: race.Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result.write(tmp_path / "bench.json")
    assert race.Bench.model_validate(json.loads((tmp_path / "bench.json").read_text())) == result
    labels = []
    errorbar = Axes.errorbar

    def noted(axes: Axes, *values: Any, label: str, **settings: Any) -> Any:
        labels.append(label)
        return errorbar(axes, *values, label=label, **settings)

    monkeypatch.setattr(Axes, "errorbar", noted)
    figure = show.write_figure(result, tmp_path / "bench.png")
    assert figure is not None
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert "1 image a call, fp32" in labels
    assert not any(label.startswith("1 images") for label in labels)
    show.show(result)
    said = capsys.readouterr().out
    assert "every exit computed" in said
    assert "load before" in said


def test_points_that_are_slower_are_said(result: race.Bench) -> None:
    def timed(shares: dict[tuple[str, int], float]) -> race.Bench:
        def share(measurement: race.Measurement) -> float:
            return shares.get((measurement.contender, measurement.batch_size), 0.9)

        return result.model_copy(
            update={
                "measurements": [
                    measurement.model_copy(
                        update={
                            "time_share": share(measurement),
                            "time_share_quartiles": (share(measurement) - 0.1, share(measurement) + 0.1),
                        }
                    )
                    for measurement in result.measurements
                ]
            }
        )

    # What is slower within the spread of rounds, and what cannot be chosen, is not said.
    shares = {
        ("risk-5", 1): 3.23, ("risk-10", 1): 1.2, ("risk-10", 7): 1.05, ("no-exit", 7): 2.0, ("every exit computed", 7): 2.0
    }  # fmt: skip
    assert show.verdicts(timed(shares)) == [
        f"slower than {result.reference} at 1 thread, 1 image a call: risk-5 (323% of its time), "
        "risk-10 (120% of its time): exits do not pay there"
    ]
    assert show.verdicts(timed({})) == []


# ---------------------------------------------------------------- images and bad input


def test_images_of_a_folder(tiny_bundle: Path, digits: DataSplits, tmp_path: Path) -> None:
    folder = save_by_class(digits.test, tmp_path / "photos")
    images, data = real_images.load_images(tiny_bundle, str(folder), 50, seed=1)
    assert data == str(folder)
    assert images.shape == (50, 8, 8, 1)
    known = {image.tobytes() for image in digits.test.images[:]}
    assert {image.tobytes() for image in images} <= known
    assert len({image.tobytes() for image in images}) > 40
    again, _ = real_images.load_images(tiny_bundle, str(folder), 50, seed=1)
    assert np.array_equal(images, again)


def test_noise_is_no_image(tiny_bundle: Path) -> None:
    # This bundle was made in Python: it knows of no recipe.
    with user_error("names no data set: give --data FOLDER"):
        real_images.load_images(tiny_bundle, None, 10, 0)
    with user_error("no images to time with: .*--data FOLDER"):
        real_images.load_images(tiny_bundle, "no-such-thing-here", 10, 0)


def test_a_graph_of_another_task(tiny_bundle: Path, images: NDArray[np.uint8], tmp_path: Path) -> None:
    # The last stage gives logits only, and takes feature maps.
    last = tiny_bundle / "stage_2.onnx"
    with user_error("stage_2.onnx takes images of shape .*, the bundle"):
        race.bench(tiny_bundle, images, data="", against=[last], rounds=2)
    with user_error("nothing at .*missing.onnx: expected a bundle's folder or an ONNX file"):
        race.bench(tiny_bundle, images, data="", against=[tmp_path / "missing.onnx"], rounds=2)
    with user_error("threads are 0, expected 1 or more"):
        race.bench(tiny_bundle, images, data="", threads=(0,), rounds=2)
    with user_error("no operating point 'fast' in this bundle"):
        race.bench(tiny_bundle, images, data="", points=["fast"], rounds=2)


def test_names_tell_apart(tmp_path: Path) -> None:
    first, second, graph = tmp_path / "a" / "bundle", tmp_path / "b" / "bundle", tmp_path / "c.onnx"
    assert list(race._labels([first, graph]).values()) == ["bundle", "c.onnx"]
    assert list(race._labels([first, second, graph]).values()) == [
        "a/bundle",
        "b/bundle",
        f"{tmp_path.name}/c.onnx",
    ]
    with user_error("is given twice: name each bundle and each graph once"):
        race._labels([first, tmp_path / "a" / ".." / "a" / "bundle"])


def test_a_rung_that_another_bundle_lacks(
    tiny_bundle: Path, bundle_copy: Path, images: NDArray[np.uint8]
) -> None:
    manifest = bundle.read(bundle_copy)
    points = [point for point in manifest.operating_points if point.name in ("no-exit", "risk-5")]
    change = {"operating_points": points, "default_operating_point": "no-exit"}
    bundle.seal(bundle_copy, manifest.model_copy(update=change))
    result = race.bench(
        tiny_bundle, images, data="", against=[bundle_copy], points=["risk-10", "no-exit", "no-exit"],
        batch_sizes=(2,), threads=(1,), rounds=2,
    )  # fmt: skip
    other = f"{bundle_copy.parent.name}/bundle"
    names = [contender.name for contender in result.contenders]
    assert names == [
        "no-exit",
        "risk-10",
        "every exit computed",
        f"{other} no-exit",
        f"{other} every exit computed",
    ]
    assert len(
        {(measurement.contender, measurement.batch_size) for measurement in result.measurements}
    ) == len(result.measurements)


def test_time_is_not_credited_to_saved_macs_across_precisions(
    folder: Path, bundle_copy: Path, images: NDArray[np.uint8]
) -> None:
    bundle.seal(bundle_copy, bundle.read(bundle_copy).model_copy(update={"precision": "int8"}))
    result = race.bench(
        folder, images, data="", against=[bundle_copy, folder.parent / "baselines" / "no-exit.onnx"],
        points=["risk-10"], batch_sizes=(2,), threads=(1,), rounds=2,
    )  # fmt: skip
    assert result.reference == "baselines/no-exit.onnx"
    precisions = {contender.name: contender.precision for contender in result.contenders}
    for measurement in result.measurements:
        credited = measurement.time_per_macs_saved is not None
        saves = measurement.macs_share is not None and measurement.macs_share < 0.98
        assert credited == (saves and precisions[measurement.contender] == "fp32")
    assert any(
        precisions[measurement.contender] == "int8" and (measurement.macs_share or 1) < 0.98
        for measurement in result.measurements
    )


def test_another_task(tiny_bundle: Path, bundle_copy: Path, images: NDArray[np.uint8]) -> None:
    manifest = bundle.read(bundle_copy)
    sample = manifest.reference_sample
    logits = [[[*row, 0.0] for row in rows] for rows in sample.logits]
    more = {
        "classes": [*manifest.classes, "other"],
        "reference_sample": sample.model_copy(update={"logits": logits}),
        "score": "entropy",
        "score_parameters": None,
    }
    bundle.seal(bundle_copy, manifest.model_copy(update=more))
    with user_error("tells 11 classes, the one that is timed .* and 10: give bundles of the same task"):
        race.bench(tiny_bundle, images, data="", against=[bundle_copy], rounds=2)


def test_a_data_set_by_name(tiny_bundle: Path) -> None:
    images, data = real_images.load_images(tiny_bundle, "digits", 40, 0)
    assert (images.shape, data) == ((40, 8, 8, 1), "digits, test split")


@pytest.mark.parametrize(
    ("provenance", "message"),
    [
        ({"recipe": "digits"}, "names no data set"),
        ({"recipe": None}, "names no data set"),
        ({"recipe": {"data": "digits"}}, "names no data set"),
        ({"recipe": {"data": {"name": "digits", "new_key": 1}}}, "no images to time with: .*data.new_key"),
        ({"recipe": {"data": {"name": "somebody/else"}}}, "made from 'somebody/else', which is not a shipped data set"),
    ],
)  # fmt: skip
def test_provenance_is_free(provenance: dict[str, Any], message: str, bundle_copy: Path) -> None:
    bundle.seal(bundle_copy, bundle.read(bundle_copy).model_copy(update={"provenance": provenance}))
    with user_error(message):
        real_images.load_images(bundle_copy, None, 10, 0)


def test_a_bundle_that_knows_its_data(bundle_copy: Path) -> None:
    data = {"name": "digits", "channels": 1, "tune_size": 300, "certify_size": 500, "test_size": 200}
    recipe = {"data": data, "seed": 0, "of a later version": True}
    bundle.seal(bundle_copy, bundle.read(bundle_copy).model_copy(update={"provenance": {"recipe": recipe}}))
    images, said = real_images.load_images(bundle_copy, None, 1000, 0)
    assert (len(images), said) == (200, "digits, test split")


def test_its_bundle_stays_as_it_is(result: race.Bench, tiny_bundle: Path) -> None:
    assert not (tiny_bundle / "profile.json").exists()
    assert result.seal == bundle.canonical_hash(Session(tiny_bundle).manifest.model_dump(mode="json"))


def test_images_that_cannot_be_read_are_left_out(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = bundle.read(tiny_bundle).input_shape
    for index in range(3):
        Image.new("L", shape[:2], index).save(tmp_path / f"{index}.png")
    expected, _ = real_images.load_images(tiny_bundle, str(tmp_path), 10, seed=0)
    (tmp_path / "torn.png").write_text("no picture")
    images, _ = real_images.load_images(tiny_bundle, str(tmp_path), 10, seed=0)
    assert sorted(images[:, 0, 0, 0]) == sorted(expected[:, 0, 0, 0]) == [0, 1, 2]
    assert "1 images cannot be read and are left out, the first: " in capsys.readouterr().err
    for path in tmp_path.glob("?.png"):
        path.unlink()
    with user_error("no image can be read: .*torn.png"):
        real_images.load_images(tiny_bundle, str(tmp_path), 10, seed=0)
