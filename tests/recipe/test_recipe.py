from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from erde.common.errors import UserError
from erde.recipe.load import load_config, shipped_recipes
from erde.recipe.losses import ERDEConfig
from erde.recipe.schema import Config
from erde.recipe.validation import validate
from tests.helpers.checks import user_error

RECIPE: dict[str, Any] = {
    "student": {"backbone": "resnet8", "exits": 2},
    "arms": {
        "erde": {"loss": {"name": "erde", "beta": 0.3}},
        "kd": {"loss": "kd", "student": {"exits": 3}, "distillation": {"alpha": 0.5}},
    },
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(recipe: str | Path, *overrides: str) -> str:
    """The message of the UserError that loading gives; always one line."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 300
    return message


# ---------------------------------------------------------------- what is shipped


def test_the_shipped_recipes() -> None:
    assert shipped_recipes() == ["cifar10", "cifar10-subset", "cifar100", "digits", "svhn"]


@pytest.mark.parametrize("name", ["digits", "cifar10", "cifar100", "svhn", "cifar10-subset"])
def test_a_shipped_recipe_parses_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.arms
    assert load_config(write(tmp_path / "again.yaml", config.to_yaml())) == config


# ---------------------------------------------------------------- what is read


def test_values_are_read_where_they_stand(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.student.backbone == "resnet8"
    assert config.arms["erde"].loss == ERDEConfig(beta=0.3)
    assert config.arms["kd"].loss.name == "kd"
    assert config.train.epochs == 60


def test_switches_of_the_students_are_not_the_teachers(recipe: Path) -> None:
    config = load_config(recipe, ["train.gradient_equilibrium=true"])
    assert [config.train_of(arm).gradient_equilibrium for arm in ("teacher", "erde")] == [False, True]
    # Frozen at its start a teacher would learn nothing but its heads.
    config = load_config(recipe, ["train.freeze_backbone=true"])
    assert [config.train_of(arm).freeze_backbone for arm in ("teacher", "erde")] == [False, True]
    config = load_config(recipe, ["teacher.train.gradient_equilibrium=true"])
    assert [config.train_of(arm).gradient_equilibrium for arm in ("teacher", "erde")] == [True, False]
    config = load_config(recipe, ["train.image_weights=reached"])
    assert [config.train_of(arm).image_weights for arm in ("teacher", "erde")] == ["equal", "reached"]


def test_a_boosted_teacher_stands_behind_no_front(recipe: Path) -> None:
    assert load_config(recipe, ["teacher.boosted=true", "student.boosted=true"]).teacher.boosted
    with pytest.raises(UserError, match=r"teacher.boosted and cascade do not go together"):
        load_config(recipe, ["teacher.boosted=true", "cascade={}"])


def test_partial_differences_merge(recipe: Path) -> None:
    config = load_config(recipe, ["train.epochs=7", "train.batch_size=32", "teacher.train.epochs=9"])
    assert (config.train_of("teacher").epochs, config.train_of("teacher").batch_size) == (9, 32)
    assert config.train.epochs == 7
    assert (config.network_of("kd").backbone, config.network_of("kd").exits) == ("resnet8", 3)
    assert (config.network_of("erde").backbone, config.network_of("erde").exits) == ("resnet8", 2)
    config = load_config(recipe, ["distillation.temperature=2", "distillation.alpha=0.1"])
    assert (config.distillation_of("kd").alpha, config.distillation_of("kd").temperature) == (0.5, 2.0)
    assert (config.distillation_of("erde").alpha, config.distillation_of("erde").temperature) == (0.1, 2.0)


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=3", "train.epochs", 3),
        ("train.learning_rate=1e-3", "train.learning_rate", 0.001),
        ("train.channels_last=false", "train.channels_last", False),
        ("train.gradient_clip=null", "train.gradient_clip", None),
        ("data.name=a/b=c", "data.name", "a/b=c"),
        ("data.augmentation.cutout=8", "data.augmentation.cutout", 8),
        ("data.augmentation={flip: false}", "data.augmentation.flip", False),
        ("student.exits=[group1, group2]", "student.exits", ["group1", "group2"]),
        ("distillation.alpha=[0.1, 0.9]", "distillation.alpha", [0.1, 0.9]),
        ("distillation.alpha=rising", "distillation.alpha", "rising"),
        ("calibration.max_risks=[0.005, 0.02]", "calibration.max_risks", (0.005, 0.02)),
        ("teacher.disjoint=true", "teacher.disjoint", True),
        ("name=", "name", "run"),
    ],
)
def test_overrides(recipe: Path, override: str, path: str, value: Any) -> None:
    if override == "name=":
        assert refusal(recipe, override) == "name: expected a valid string, got None"
        return
    node: Any = load_config(recipe, [override])
    for key in path.split("."):
        node = getattr(node, key)
    assert node == value
    assert type(node) is type(value)


def test_overrides_in_an_arm(recipe: Path) -> None:
    config = load_config(recipe, ["arms.erde.loss.entropy_form=teacher", "arms.ce.loss=ce"])
    assert config.arms["erde"].loss == ERDEConfig(beta=0.3, entropy_form="teacher")
    assert list(config.arms) == ["erde", "kd", "ce"]
    # A loss that stands as its name is opened for its knobs.
    config = load_config(recipe, ["arms.x.loss=erde", "arms.x.loss.beta=[0.1, 0.2]"])
    assert config.arms["x"].loss == ERDEConfig(beta=[0.1, 0.2])


def test_the_last_override_wins(recipe: Path) -> None:
    assert load_config(recipe, ["train.epochs=3", "train.epochs=4"]).train.epochs == 4


def test_round_trip(recipe: Path, tmp_path: Path) -> None:
    config = load_config(
        recipe,
        [
            "arms.erde.loss.entropy_exits=all",
            "teacher.train={epochs: 9}",
            "data.mean=[0.1, 0.2, 0.3]",
            "seed=3",
        ],
    )
    again = load_config(write(tmp_path / "again.yaml", config.to_yaml()))
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert load_config(recipe) != config


def test_the_tree_is_frozen(recipe: Path) -> None:
    config = load_config(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("dta.name=x", "dta", "data"),
        ("train.epoch=3", "train.epoch", "train.epochs"),
        ("data.augmentation.flp=true", "data.augmentation.flp", "data.augmentation.flip"),
        ("teacher.bakbone=resnet8", "teacher.bakbone", "teacher.backbone"),
        ("teacher.train.epoch=3", "teacher.train.epoch", "teacher.train.epochs"),
        ("arms.erde.los=ce", "arms.erde.los", "arms.erde.loss"),
        ("arms.erde.loss.betta=3", "arms.erde.loss.betta", "arms.erde.loss.beta"),
        ("arms.kd.student.backbon=resnet8", "arms.kd.student.backbon", "arms.kd.student.backbone"),
        ("arms.kd.distillation.alfa=0.5", "arms.kd.distillation.alfa", "arms.kd.distillation.alpha"),
        ("calibration.max_risk=0.1", "calibration.max_risk", "calibration.max_risks"),
    ],
)
def test_unknown_key(recipe: Path, override: str, key: str, meant: str) -> None:
    assert refusal(recipe, override) == f"unknown key '{key}' (did you mean '{meant}'?)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.augmentation.zzz=1",
            "unknown key 'data.augmentation.zzz' (choose from: crop_padding, cutout, flip, resized_crop, views)",
        ),
        ("arms.kd.loss.zzz=1", "unknown key 'arms.kd.loss.zzz' (choose from: name, standardise, weight)"),
    ],
)
def test_unknown_key_that_is_like_no_other(recipe: Path, override: str, message: str) -> None:
    assert refusal(recipe, override) == message


@pytest.mark.parametrize(
    ("override", "start", "got"),
    [
        ("train.epochs=abc", "train.epochs: expected a valid integer", "'abc'"),
        ("train.epochs=2.5", "train.epochs: expected a valid integer", "2.5"),
        ("train.epochs=0", "train.epochs: expected greater than or equal to 1", "0"),
        ("train.learning_rate=0", "train.learning_rate: expected greater than 0", "0"),
        ("train.learning_rate=.inf", "train.learning_rate: expected a finite number", "inf"),
        ("train.milestones=[0.5, 1]", "train.milestones.1: expected less than 1", "1"),
        ("train.channels_last=3", "train.channels_last: expected a valid boolean", "3"),
        ("data.channels=2", "data.channels: expected 1 or 3", "2"),
        ("student=3", "student: expected a valid dictionary", "3"),
        (
            "student.head=cnv",
            "student.head: expected 'auto', 'erde', 'linear', 'conv', 'tower' or 'native'",
            "'cnv'",
        ),
        ("student.exits=0", "student.exits: expected", "0"),
        ("student.exits=many", "student.exits: expected 'auto' or", "'many'"),
        ("student.exits=[group1, 3]", "student.exits.1: expected a valid string", "3"),
        ("distillation.alpha=risin", "distillation.alpha: expected 'rising' or", "'risin'"),
        ("distillation.alpha=[0.1, 2]", "distillation.alpha.1: expected less than or equal to 1", "2"),
        ("teacher.train.epochs=-1", "teacher.train.epochs: expected greater than or equal to 1", "-1"),
        ("arms.erde.loss.beta=-1", "arms.erde.loss.beta: expected", "-1"),
        ("arms.erde.loss.entropy_form=x", "arms.erde.loss.entropy_form: expected 'negentropy'", "'x'"),
        ("arms.kd.student.dropout=1", "arms.kd.student.dropout: expected less than 1", "1"),
        ("arms.kd.distillation.alpha=1.5", "arms.kd.distillation.alpha: expected", "1.5"),
        ("arms.erde=3", "arms.erde: expected a valid dictionary", "3"),
        ("calibration.max_risks=[]", "calibration.max_risks: expected", "[]"),
        ("seed=-1", "seed: expected greater than or equal to 0", "-1"),
    ],
)
def test_wrong_type_or_range(recipe: Path, override: str, start: str, got: str) -> None:
    message = refusal(recipe, override)
    assert message.startswith(start)
    assert message.endswith(f", got {got}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.backbone=resnet-20",
            "student.backbone: unknown backbone 'resnet-20' (did you mean 'resnet20'?)",
        ),
        (
            "teacher.backbone=wrn40-2",
            "teacher.backbone: unknown backbone 'wrn40-2' (did you mean 'wrn-40-2'?)",
        ),
        (
            "arms.kd.student.backbone=resnet-8",
            "arms.kd.student.backbone: unknown backbone 'resnet-8' (did you mean 'resnet8'?)",
        ),
        ("arms.erde.loss=erd", "arms.erde.loss: unknown loss 'erd' (did you mean 'erde'?)"),
        ("arms.erde.loss={name: [ce]}", "arms.erde.loss: unknown loss '['ce']' (did you mean 'ce'?)"),
        ("arms.erde.loss=3", "arms.erde.loss: a loss needs a name, got 3; for example {name: erde}"),
        ("calibration.score=entropi", "calibration.score: unknown score 'entropi' (did you mean 'entropy'?)"),
        ("export.arm=erd", "export.arm is 'erd', which is not an arm (did you mean 'erde'?)"),
        ("export.precisions=[int8]", "export: precisions must hold fp32: int8 is made from it"),
        ("export.precisions=[]", "export: precisions must hold fp32: int8 is made from it"),
        ("export.precisions=[fp32, int8, int8]", "export: each of precisions once"),
        ("export.precisions=[fp32, int4]", "export.precisions.1: expected 'fp32' or 'int8', got 'int4'"),
        ("train.backbone_epochs=61", "train: backbone_epochs (61) exceeds epochs (60)"),
        ("teacher.train.backbone_epochs=61", "teacher.train: backbone_epochs (61) exceeds epochs (60)"),
    ],
)
def test_names_that_do_not_exist(recipe: Path, override: str, message: str) -> None:
    refused = refusal(recipe, override)
    assert refused == message


@pytest.mark.parametrize("name", ["teacher", "a/b", "..", "a b"])
def test_arm_names_are_folder_names(tmp_path: Path, name: str) -> None:
    path = write(
        tmp_path / "r.yaml", yaml.safe_dump({"arms": {name: {"loss": "ce"}}, "export": {"arm": name}})
    )
    assert "cannot name an arm" in refusal(path)


def test_the_name_of_the_arm_in_int8_is_taken(recipe: Path) -> None:
    both = "export.precisions=[int8, fp32]"
    assert load_config(recipe).export.int8_arm is None
    assert load_config(recipe, [both]).export.int8_arm == "erde-int8"
    taken = "arms.erde-int8.loss=ce"
    assert refusal(recipe, both, taken).startswith(
        "'erde-int8' cannot name an arm: with export.precisions int8"
    )
    assert "erde-int8" in load_config(recipe, [taken]).arms
    assert "erde-int8" in load_config(recipe, [both, taken, "export.arm=kd"]).arms


@pytest.mark.parametrize("override", ["train.epochs", "=3", ""])
def test_malformed_override(recipe: Path, override: str) -> None:
    assert refusal(recipe, override).startswith(f"'{override}' is not an override: expected KEY=VALUE")


def test_override_below_a_value(tmp_path: Path) -> None:
    path = write(tmp_path / "r.yaml", yaml.safe_dump({**RECIPE, "train": {"epochs": 3}}))
    assert (
        refusal(path, "train.epochs.x=3")
        == "override 'train.epochs.x=3': 'epochs' is a value, not a group of keys"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("arms: [1,", "is not valid YAML"),
        ("a: 1\n\tb: 2", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
        ("- a\n- b", "expected keys and values, got list"),
        ("", "expected keys and values, got NoneType"),
    ],
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    message = refusal(path)
    assert expected in message
    assert str(path) in message


def test_invalid_yaml_in_an_override(recipe: Path) -> None:
    assert refusal(recipe, "train.epochs=[").startswith("the value of 'train.epochs=[' is not valid YAML")


def test_unknown_recipe_names_the_nearest() -> None:
    assert "did you mean 'digits'?" in refusal("digit")


def test_a_missing_key_and_a_misspelt_one(tmp_path: Path) -> None:
    assert refusal(write(tmp_path / "a.yaml", "name: x")).startswith("the key 'arms' is missing")
    assert refusal(write(tmp_path / "b.yaml", "armz: {}")) == "unknown key 'armz' (did you mean 'arms'?)"
    assert refusal(write(tmp_path / "c.yaml", "arms: {erde: {}}")).startswith(
        "the key 'arms.erde.loss' is missing"
    )


def test_python_gives_the_same_errors() -> None:
    with pytest.raises(
        UserError, match=r"unknown key 'arms\.a\.loss\.bet' \(did you mean 'arms\.a\.loss\.beta'\?\)"
    ):
        validate(Config, {"arms": {"a": {"loss": {"name": "erde", "bet": 1}}}, "export": {"arm": "a"}})


# ---------------------------------------------------------------- the arm that is exported


def own_recipe(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


@pytest.mark.parametrize(
    ("text", "arm"),
    [
        ("arms: {kd: {loss: kd}}", "kd"),
        ("arms: {kd: {loss: kd}, small: {loss: ce, student: {exits: 1}}}", "kd"),
        ("student: {exits: 1}\narms: {small: {loss: ce}, kd: {loss: kd, student: {exits: 2}}}", "kd"),
        ("arms: {kd: {loss: kd}, erde: {loss: erde}}", "erde"),
        ("arms: {kd: {loss: kd}, ce: {loss: ce}}\nexport: {arm: ce}", "ce"),
        ("arms: {kd: {loss: kd}}\nexport: {precisions: [fp32, int8]}", "kd"),
    ],
)
def test_the_only_arm_with_early_exits_is_exported(text: str, arm: str, tmp_path: Path) -> None:
    assert own_recipe(tmp_path, text).export.arm == arm


@pytest.mark.parametrize("name", shipped_recipes())
def test_an_arm_of_its_own_in_a_shipped_recipe(name: str) -> None:
    assert load_config(name, ["arms={kd: {loss: kd}}"]).export.arm == "kd"


@pytest.mark.parametrize(
    "text", ["arms: {kd: {loss: kd}, ce: {loss: ce}}", "arms: {kd: {loss: kd}}\nexport: {arm: erde}"]
)
def test_between_several_the_recipe_must_say(text: str, tmp_path: Path) -> None:
    with user_error("export.arm is 'erde', which is not an arm"):
        own_recipe(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "train: {epochs: 3, backbone_epochs: 3}\narms: {erde: {loss: erde}}",
            "teacher: train.backbone_epochs is 3",
        ),
        (
            "train: {epochs: 3, backbone_epochs: 3}\nteacher: {train: {backbone_epochs: 0}}\narms: {erde: {loss: erde}}",
            "arm 'erde': train.backbone_epochs is 3, as many as train.epochs, so that the early exits would never be",
        ),
    ],
)
def test_early_exits_that_would_never_be_trained(text: str, words: str, tmp_path: Path) -> None:
    with user_error(words):
        own_recipe(tmp_path, text)


def test_a_network_with_one_exit_has_no_early_exits_to_train(tmp_path: Path) -> None:
    text = "teacher: {exits: 1}\ntrain: {epochs: 3, backbone_epochs: 3}\narms: {erde: {loss: ce, student: {exits: 1}}}"
    assert own_recipe(tmp_path, text).train.backbone_epochs == 3


def test_exits_are_chosen_by_their_time_for_students_only(recipe: Path) -> None:
    config = load_config(recipe, ["student.exits=auto", "arms.kd.student.exits=2"])
    assert [config.network_of(arm).exits for arm in ("erde", "kd", "teacher")] == ["auto", 2, 3]
    assert refusal(recipe, "teacher.exits=auto").startswith(
        "teacher: exits is 'auto', which is for students, whose exits are chosen by their time: give the teacher a number"
    )
