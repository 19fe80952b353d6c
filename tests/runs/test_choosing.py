"""``exits: auto`` in a run: the choice, the merged stages, and a run that was stopped right after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

from erde.bundle.sealing import read as read_bundle
from erde.calibration.exit_choice import ExitTimes
from erde.common.splits import TuneLogits
from erde.evaluation import run_folder
from erde.evaluation.results import Results
from erde.exporting.exit_times import measure_exits
from erde.exporting.onnx_files import export_stages
from erde.networks.network import EarlyExitNetwork
from erde.recipe.load import load_config
from erde.recipe.schema import Config
from erde.runs import chain, choosing, exporting
from erde.runs.calibrating import calibrate
from erde.runs.evaluating import evaluate
from erde.runs.networks import network_as_trained, trained_network
from erde.runs.opening import existing_run
from erde.runtime import Session
from tests.helpers.checks import user_error
from tests.runs.test_runs import SMALL

KEPT = ["group1_block1", "final"]


def recipe(folder: Path, *overrides: str) -> Config:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return load_config(path, ["student.exits=auto", *overrides])


def with_times(monkeypatch: pytest.MonkeyPatch, passing: tuple[float, float]) -> None:
    """Measure as ever, but take these milliseconds for what the two exits cost; each third of the network takes 1 ms."""
    measure = measure_exits

    def fixed(*arguments: Any, **keywords: Any) -> tuple[ExitTimes, TuneLogits]:
        times, logits = measure(*arguments, **{**keywords, "rounds": 1})
        assert times.stages.shape == (3, 3)
        stages = np.array([[end - start + 1.0 for end in range(3)] for start in range(3)])
        return ExitTimes(stages + np.array([*passing, 0.0]), 0.0), logits

    monkeypatch.setattr(choosing, "measure_exits", fixed)


class Stopped(BaseException):
    """Stands for the death of the process."""


@pytest.fixture(scope="module")
def stopped_and_resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was stopped between the choice and the export, resumed; and the choice as it was then."""
    folder = tmp_path_factory.mktemp("auto")

    def stop(network: EarlyExitNetwork, *rest: Any) -> Any:
        if len(network.stages) > 1:
            raise Stopped
        return export_stages(network, *rest)

    with pytest.MonkeyPatch.context() as patch:
        with_times(patch, (0.0, 50.0))
        patch.setattr(exporting, "export_stages", stop)
        with pytest.raises(Stopped):
            chain.run(recipe(folder), folder / "run")
    chosen = (folder / "run" / "arms" / "early" / "exits.json").read_text()
    assert not (folder / "run" / "arms" / "early" / "stages").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choosing, "measure_exits", lambda *_, **__: pytest.fail("measured anew"))
        chain.run(recipe(folder), folder / "run", resume=True)
    return folder / "run", chosen


def test_a_choice_stays_when_the_run_is_resumed(stopped_and_resumed: tuple[Path, str]) -> None:
    folder, chosen = stopped_and_resumed
    assert (folder / "arms" / "early" / "exits.json").read_text() == chosen
    assert not (folder / "arms" / "no-exit" / "exits.json").exists()
    (line,) = [
        json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines() if '"exits"' in line
    ]
    assert (line["arm"], line["kept"]) == ("early", KEPT[:1])
    assert line["time_saved"] > 0.05


def test_everything_after_the_choice_knows_only_the_exits_that_are_kept(
    stopped_and_resumed: tuple[Path, str],
) -> None:
    folder, _ = stopped_and_resumed
    results = Results.read(folder / "results.json")
    arm = results.arms["early"]
    assert [cost.name for cost in arm.cost] == KEPT
    assert arm.exit_choice is not None
    assert arm.exit_choice.chosen.exits == KEPT[:1]
    assert results.arms["no-exit"].exit_choice is None
    # Without the dropped head the last exit costs its first head more than the network without exits, and no more.
    assert arm.no_exit_macs < arm.cost[-1].macs < 1.1 * arm.no_exit_macs
    assert results.agreement.disagreements == results.agreement.torch_disagreements == 0
    assert results.agreement.images == 100
    assert len(run_folder.read_logits(folder, "early")[2].logits) == 2
    assert sorted(path.name for path in (folder / "bundle").glob("*.onnx")) == [
        "stage_0.onnx",
        "stage_1.onnx",
    ]
    outputs = [value.name for value in onnx.load(folder / "bundle" / "stage_1.onnx").graph.output]
    assert outputs == ["logits"]
    assert "Exits of early, chosen by time" in (folder / "report.html").read_text()


def test_the_reduced_network_of_a_run_gives_the_very_logits(stopped_and_resumed: tuple[Path, str]) -> None:
    with existing_run(stopped_and_resumed[0], read_only=True) as run:
        whole, reduced = network_as_trained(run, "early").eval(), trained_network(run, "early").eval()
        x = torch.randn(4, *run.data.input_size)
    assert (whole.exit_names, reduced.exit_names) == (["group1_block1", "group2_block1", "final"], KEPT)
    with torch.no_grad():
        assert torch.equal(reduced(x), whole(x)[[0, 2]])


def test_a_damaged_choice_is_one_line(stopped_and_resumed: tuple[Path, str], tmp_path: Path) -> None:
    path = run_folder.arm_folder(tmp_path, "early") / "exits.json"
    path.parent.mkdir(parents=True)
    path.write_text(stopped_and_resumed[1].replace('"chosen"', '"chosn"'))
    with user_error(
        r"exits\.json is damaged: remove it, logits\.npz and the folder stages there, and run erde export"
    ):
        run_folder.read_exit_choice(tmp_path, "early")


def test_where_no_exit_saves_time_the_final_one_alone_is_kept_and_the_chain_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_times(monkeypatch, (50.0, 50.0))
    config = recipe(tmp_path, "train.epochs=1", "export.precisions=[fp32, int8]")
    results = chain.run(config, tmp_path / "run")
    assert results is not None
    said = "early: none of 2 exits saves time (at 3 ms an image): only the final exit is kept"
    assert said in capsys.readouterr().err
    for name in ("early", "early-int8"):
        arm = results.arms[name]
        assert (arm.role, [cost.name for cost in arm.cost]) == ("fixed", ["final"])
        assert arm.cost[-1].macs == arm.no_exit_macs
        assert arm.exit_choice is not None
        assert not arm.exit_choice.chosen.exits
    assert [path.name for path in (tmp_path / "run" / "bundle").glob("*.onnx")] == ["stage_0.onnx"]
    assert (tmp_path / "run" / "report.html").exists()


def test_exits_that_are_chosen_anew_leave_nothing_of_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        with_times(patch, (0.0, 50.0))
        chain.run(recipe(tmp_path, "export.precisions=[fp32, int8]"), folder)
    assert len(read_bundle(folder / "bundle-int8").stages) == 2
    Session(folder / "bundle", threads=1).profile(rounds=1)
    # As docs/formats.md says.
    for name in ("exits.json", "logits.npz", "policy.json"):
        (folder / "arms" / "early" / name).unlink()
    shutil.rmtree(folder / "arms" / "early" / "stages")
    with_times(monkeypatch, (50.0, 50.0))
    with existing_run(folder) as run:
        exporting.export(run)
        calibrate(run)
        evaluate(run)
    results = Results.read(folder / "results.json")
    for name, bundle in (("early", "bundle"), ("early-int8", "bundle-int8")):
        assert [cost.name for cost in results.arms[name].cost] == ["final"]
        assert [stage.exit_name for stage in read_bundle(folder / bundle).stages] == ["final"]
    # Times of other stages are no times of these.
    assert results.arms["early"].curve.milliseconds is None
    assert not (folder / "bundle" / "profile.json").exists()


def test_a_backbone_without_a_place_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(tmp_path)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    monkeypatch.setattr("erde.runs.networks.build_backbone", lambda *_, **__: plain)
    with user_error("exits='auto' needs a place for an early exit, and Sequential has none"):
        chain.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
