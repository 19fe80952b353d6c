"""A run folder: who may write into it, what a resume may change, and what the baselines are called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import yaml
from PIL import Image

from erde.cli import main
from erde.common import progress
from erde.common.errors import UserError
from erde.evaluation import run_folder
from erde.networks.backbones import build_backbone
from erde.recipe.load import load_config
from erde.recipe.schema import Config
from erde.runs import chain, networks
from erde.runs.calibrating import calibrate
from erde.runs.evaluating import evaluate
from erde.runs.exporting import export_without_exits
from erde.runs.folder import Run
from erde.runs.networks import trained_network
from erde.runs.opening import existing_run, open_run, with_whole_paths
from erde.runs.training import distill
from tests.common.test_files import dead_process
from tests.helpers.checks import entries, user_error

SMALL: dict[str, Any] = {
    "name": "small",
    "device": "cpu",
    "threads": 1,
    "data": {
        "name": "digits", "channels": 1, "tune_size": 300, "certify_size": 300, "test_size": 100,
        "augmentation": {"crop_padding": 1, "flip": False},
    },
    "student": {"backbone": "resnet8x0.25"},
    "train": {"epochs": 2, "batch_size": 64},
    # The first arm has the name of a baseline.
    "arms": {
        "no-exit": {"loss": "ce", "student": {"exits": 1}},
        "early": {"loss": "ce"},
    },
    "calibration": {"max_risks": [0.05], "reference": "no_exit_network"},
}  # fmt: skip


def recipe(folder: Path, *overrides: str) -> Config:
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL), encoding="utf-8")
    return load_config(path, overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only: see ``run_copy``."""
    folder = tmp_path_factory.mktemp("small")
    chain.run(recipe(folder), folder / "run")
    return folder / "run"


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run for a test to change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---------------------------------------------------------------- baselines


def logits_of(graph: Path, images: Any) -> Any:
    return onnxruntime.InferenceSession(str(graph)).run(None, {"images": images})[0]


def test_an_arm_that_is_called_no_exit_is_not_the_exported_arms_baseline(finished: Path) -> None:
    baselines = finished / "baselines"
    assert entries(baselines) == ["arm+no-exit.onnx", "no-exit.onnx"]
    with existing_run(finished, read_only=True) as run:
        images = run.data.test.images[:20]
    for graph, arm in (("no-exit", "early"), ("arm+no-exit", "no-exit")):
        expected = run_folder.read_logits(finished, arm)[2].logits[-1, :20]
        assert np.allclose(logits_of(baselines / f"{graph}.onnx", images), expected, atol=1e-4), graph


def test_the_progress_of_a_run_says_which_arm_of_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0.0)
    with open_run(recipe(tmp_path, "train.epochs=1"), tmp_path / "run", resume=False) as run:
        distill(run)
    said = capsys.readouterr().err
    assert "early (arm 1 of 2): 1/" in said
    assert "no-exit (arm 2 of 2): 1/" in said


def test_a_file_that_is_there_is_not_exported_over(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "network.onnx"
    path.write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["erde", "export", str(finished), "--plain", str(path)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    assert f"{path} is there already: choose another name, or remove it" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"


# ---------------------------------------------------------------- one writer at a time

HOLDER = """
import sys
from pathlib import Path
from erde.common.files import Lock
lock = Lock(Path(sys.argv[1]) / ".lock", "it")
print("begun", flush=True)
sys.stdin.read()
"""


def test_while_one_process_writes_into_a_run_others_may_only_read(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_copy)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    partial = run_copy / "arms" / "early" / f".stages.{holder.pid}-12345678.partial"
    partial.mkdir()
    (run_copy / "log.jsonl").write_bytes(b'{"torn": ')
    before = sorted(str(path) for path in run_copy.rglob("*"))
    writers = [
        ("distill", str(run_copy), "--arm", "early"),
        ("export", str(run_copy)),
        ("calibrate", str(run_copy)),
        ("evaluate", str(run_copy)),
        ("run", str(tmp_path / "small.yaml"), "--out", str(run_copy), "--resume"),
    ]
    recipe(tmp_path)
    for command in writers:
        monkeypatch.setattr(sys, "argv", ["erde", *command])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"the run {run_copy} is being written by process {holder.pid} on " in error, command
        assert "wait until it has ended, or stop it" in error
    export_without_exits(existing_run(run_copy, read_only=True), "early", tmp_path / "plain.onnx")
    assert sorted(str(path) for path in run_copy.rglob("*")) == before
    assert (run_copy / "log.jsonl").read_bytes() == b'{"torn": '
    holder.communicate()
    with existing_run(run_copy):
        assert (run_copy / ".lock").exists()
    assert not partial.exists()
    assert not (run_copy / ".lock").exists()


def test_of_two_that_start_the_same_run_the_slower_one_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def meanwhile(_: Run) -> None:
        folder.mkdir()
        (folder / "config.yaml").write_text("of another process")

    monkeypatch.setattr("erde.runs.training.check", meanwhile)
    with user_error("is not empty: continue it with --resume"):
        open_run(recipe(tmp_path), folder, resume=False)
    assert entries(folder) == ["config.yaml"]
    assert (folder / "config.yaml").read_text() == "of another process"


def test_a_start_that_was_killed_leaves_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text('{"pid": 1}')
    (tmp_path / "run" / f".config.yaml.{dead_process()}-12345678.partial").write_text("half")
    monkeypatch.setattr("erde.runs.training.check", lambda _: None)
    open_run(recipe(tmp_path), tmp_path / "run", resume=False).close()
    assert entries(tmp_path / "run") == ["config.yaml", "log.jsonl", "splits.json"]


# ---------------------------------------------------------------- what a resume may change


def edit_saved(run: Path, change: Any) -> None:
    value = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    change(value)
    (run / "config.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")


def test_a_key_that_came_later_has_its_default(run_copy: Path, tmp_path: Path) -> None:
    edit_saved(run_copy, lambda value: [value["train"].pop(key) for key in ("gamma", "momentum", "ema")])
    for _ in range(2):
        with open_run(recipe(tmp_path), run_copy, resume=True) as run:
            trained = run.config.train
            assert (trained.gamma, trained.momentum, trained.ema) == (0.1, 0.9, None)
    # The run's settings are written down from then on.
    assert yaml.safe_load((run_copy / "config.yaml").read_text(encoding="utf-8"))["train"]["gamma"] == 0.1
    with user_error(r"there train\.ema is None, now it is 0\.7"):
        open_run(recipe(tmp_path, "train.ema=0.7"), run_copy, resume=True)


def test_a_run_keeps_the_defaults_that_it_began_with(run_copy: Path, tmp_path: Path) -> None:
    def older(value: dict[str, Any]) -> None:
        value["teacher"]["dropout"] = value["student"]["dropout"] = 0.45

    edit_saved(run_copy, older)
    with open_run(recipe(tmp_path), run_copy, resume=True) as run:
        assert (run.config.teacher.dropout, run.config.student.dropout) == (0.45, 0.45)
    # What the command names is compared.
    with user_error(
        r"there student\.dropout is 0\.45, now it is 0\.1; give the same recipe .* goes on as it began"
    ):
        open_run(recipe(tmp_path, "student.dropout=0.1"), run_copy, resume=True)
    with open_run(load_config(run_copy / "config.yaml"), run_copy, resume=True) as run:
        assert run.config.student.dropout == 0.45


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- 1", "expected keys and values"),
        ("a: [", "not valid YAML"),
        ("name: x\nnew_key: 1\n", "unknown key 'new_key'"),
    ],
)
def test_a_damaged_recipe_is_one_line(run_copy: Path, text: str, words: str) -> None:
    (run_copy / "config.yaml").write_text(text)
    with user_error(rf"config\.yaml.*{words}"):
        existing_run(run_copy)
    assert not (run_copy / ".lock").exists()


def test_damaged_files_of_a_run_are_one_line(run_copy: Path) -> None:
    damaged = {"splits.json": "[1]", "arms/early/stages/stages.json": '{"files": 3}'}
    for name, text in damaged.items():
        (run_copy / name).write_text(text)
        with user_error(f"{Path(name).name} is damaged"), existing_run(run_copy) as run:
            _ = run.data
            run.stages("early")
        (run_copy / name).unlink()


def test_what_a_resume_refuses_leaves_the_saved_recipe(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run_copy / "config.yaml").read_bytes()

    def refuse(_: Run) -> None:
        raise UserError("no room for the cache")

    monkeypatch.setattr("erde.runs.training.check", refuse)
    with user_error("no room"):
        open_run(recipe(tmp_path, "teacher.cache=true"), run_copy, resume=True)
    assert (run_copy / "config.yaml").read_bytes() == before
    assert not (run_copy / ".lock").exists()


def test_finished_arms_need_neither_their_starting_weights_nor_timms(
    run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_saved(run_copy, lambda value: value["student"].update(weights="gone.safetensors", pretrained=True))
    asked = []
    build = build_backbone

    def watch(name: str, **settings: Any) -> Any:
        asked.append(settings["pretrained"])
        return build(name, **{**settings, "pretrained": False})

    monkeypatch.setattr(networks, "build_backbone", watch)
    overrides = ("student.weights=gone.safetensors", "student.pretrained=true")
    with open_run(recipe(tmp_path, *overrides), run_copy, resume=True) as run:
        distill(run)
        trained_network(run, "early")
    assert asked
    assert not any(asked)
    (run_copy / "arms/early/checkpoints/final.safetensors").unlink()
    with user_error("gone.safetensors"):
        open_run(recipe(tmp_path, *overrides), run_copy, resume=True)


def test_weights_of_an_arm_are_named_by_their_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("start.safetensors").touch()
    config = recipe(tmp_path, "arms.early.student={weights: start.safetensors, exits: 2}")
    arms = with_whole_paths(config).arms
    assert arms["early"].student == {"weights": str(tmp_path / "start.safetensors"), "exits": 2}
    assert arms["no-exit"] == config.arms["no-exit"]
    assert with_whole_paths(recipe(tmp_path)) == recipe(tmp_path)


def test_calibrating_does_not_read_the_bundle(run_copy: Path) -> None:
    (run_copy / "bundle" / "profile.json").write_text("damaged")
    with existing_run(run_copy) as run:
        calibrate(run)


def test_a_new_policy_takes_the_old_results_away(run_copy: Path) -> None:
    with existing_run(run_copy) as run:
        calibrate(run)
    assert (run_copy / "results.json").exists()
    policy = run_copy / "arms" / "early" / "policy.json"
    policy.write_text("{}")
    with existing_run(run_copy) as run:
        calibrate(run)
        assert not (run_copy / "results.json").exists()
        assert not (run_copy / "report.html").exists()
        evaluate(run)
    assert (run_copy / "results.json").exists()


def test_a_fold_that_is_too_small_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    arms = "arms={erde: {loss: {name: erde, wrong_test: held_out}}}"
    overrides = (
        arms,
        "calibration.reference=final_exit",
        "teacher.train_subset=80",
        "data.train_subset=80",
        "teacher.cross_fit=2",
    )
    with user_error("batch_size is 64, 'teacher, fold 1 of 2' trains on 40 images"):
        open_run(recipe(tmp_path, *overrides), tmp_path / "run", resume=False)
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_with_another_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import erde
    from tests.helpers.checks import save_by_class

    digits = erde.load_data("digits", channels=1, tune_size=300, certify_size=500, test_size=200)
    folder = save_by_class(digits.train, tmp_path / "images")
    # So that the two ways to hold images measure different means.
    monkeypatch.setattr("erde.data.load.STREAMED_NORMALISATION_IMAGES", 50)
    monkeypatch.setattr("erde.runs.training.check", lambda _: None)
    data = (f"data.name={folder}", "data.tune_size=100", "data.certify_size=100", "data.test_size=100")
    for name, begins, goes_on in (("resident", "4", "1e-6"), ("streamed", "1e-6", "4")):
        run = tmp_path / name
        with open_run(recipe(tmp_path, *data, f"data.memory_limit_gib={begins}"), run, resume=False) as first:
            expected = first.data
        with open_run(
            recipe(tmp_path, *data, f"data.memory_limit_gib={goes_on}"), run, resume=True
        ) as second:
            resumed = second.data
        assert isinstance(resumed.train.images, np.ndarray) != isinstance(expected.train.images, np.ndarray)
        assert (resumed.mean, resumed.std) == (expected.mean, expected.std)
        assert resumed.fingerprints() == expected.fingerprints()
        assert existing_run(run, read_only=True).data.mean == expected.mean
    Image.new("L", (8, 8), 7).save(next(folder.rglob("*.png")))
    with (
        open_run(
            recipe(tmp_path, *data, "data.memory_limit_gib=1e-6"), tmp_path / "resident", resume=True
        ) as opened,
        user_error("is not the one that this run started with"),
    ):
        _ = opened.data


def test_a_run_knows_its_local_data_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import erde
    from tests.helpers.checks import save_by_class

    digits = erde.load_data("digits", channels=1, tune_size=300, certify_size=500, test_size=200)
    save_by_class(digits.tune, tmp_path / "images")
    monkeypatch.delenv("ERDE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("erde.runs.training.check", lambda _: None)
    data = ("data.name=images", "data.tune_size=50", "data.certify_size=50", "data.test_size=50")
    open_run(recipe(tmp_path, *data), tmp_path / "run", resume=False).close()
    with open_run(recipe(tmp_path, *data), tmp_path / "run", resume=True) as run:
        expected = run.data.fingerprints()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert existing_run(tmp_path / "run", read_only=True).data.fingerprints() == expected


def test_a_strangers_recipe_makes_no_folder_for_its_cache(run_copy: Path, tmp_path: Path) -> None:
    edit_saved(run_copy, lambda value: value["teacher"].update(cache=str(tmp_path / "far" / "away")))
    with user_error(r"teacher\.cache in .*config\.yaml is .*, which is not a folder"):
        existing_run(run_copy)
    (tmp_path / "far" / "away").mkdir(parents=True)
    existing_run(run_copy).close()


def test_stretches_of_train_share_its_memory(digits: Any) -> None:
    share = digits.train_share(100, 50)
    assert np.shares_memory(share.images, digits.train.images)
    assert np.array_equal(share.images, digits.train.images[50:150])


# ---------------------------------------------------------------- a bundle does not contradict its evaluation


def test_stages_that_are_not_those_of_the_logits_are_not_sealed(run_copy: Path) -> None:
    shutil.rmtree(run_copy / "bundle")
    stages = run_copy / "arms" / "early" / "stages"
    shutil.copy(run_copy / "arms" / "no-exit" / "stages" / "stage_0.onnx", stages / "stage_2.onnx")
    with (
        user_error(r"stage_2\.onnx .*is not the file that .*logits\.npz came from"),
        existing_run(run_copy) as run,
    ):
        evaluate(run, again=True)
    assert not (run_copy / "bundle").exists()


def test_logits_that_the_stages_do_not_give_are_not_sealed(run_copy: Path) -> None:
    before = json.loads((run_copy / "bundle" / "manifest.json").read_text())["seal"]
    path = run_copy / "arms" / "early" / "logits.npz"
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["test_logits"] = changed["test_logits"][:, :, ::-1]
    np.savez(path, **changed)
    with user_error("of 100 test images.*nothing is sealed.*erde export"), existing_run(run_copy) as run:
        evaluate(run, again=True)
    assert json.loads((run_copy / "bundle" / "manifest.json").read_text())["seal"] == before
    assert not list(run_copy.rglob("*.partial"))


def test_another_network_than_the_exported_one_is_not_sealed(run_copy: Path) -> None:
    other = run_copy / "arms" / "early" / "checkpoints" / "final.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(other)
    save_file(
        {name: tensor.flip(0) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}, other
    )
    with user_error("torch answers .* of 100 test images otherwise"), existing_run(run_copy) as run:
        evaluate(run, again=True)
