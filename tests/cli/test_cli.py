"""Commands that need no run: lists, costs, and how the command line fails."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from erde.cli import about, main
from erde.networks.attach import attach_exits
from erde.networks.backbones import build_backbone
from erde.networks.cost import NetworkCost, network_cost
from erde.policy.rule import SCORES
from erde.recipe.backbones import BACKBONES
from erde.recipe.load import load_config, shipped_recipes
from erde.recipe.losses import LOSSES
from erde.recipe.schema import ArmConfig, CascadeConfig


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["erde", *arguments])
    # Under `python -m pytest` click would take that for the program's name.
    monkeypatch.setattr(sys.modules["__main__"], "__package__", "")
    with pytest.raises(SystemExit) as stopped:
        main.main()
    captured = capsys.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


def keys_in(section: BaseModel, place: str = "") -> Iterator[str]:
    """The dotted keys below a section of a recipe."""
    for key, value in section:
        if isinstance(value, BaseModel):
            yield from keys_in(value, f"{place}{key}.")
        else:
            yield f"{place}{key}"


@pytest.mark.parametrize(
    ("topic", "names"),
    [
        ("recipes", set(shipped_recipes())),
        ("backbones", {*BACKBONES, "timm/<name>"}),
        ("losses", set(LOSSES)),
        (
            "keys",
            {
                *keys_in(load_config("digits")),
                *(f"arms.<arm>.{key}" for key in ArmConfig.model_fields),
                *(f"cascade.{key}" for key in CascadeConfig.model_fields),
            },
        ),
        ("scores", set(SCORES)),
        ("datasets", {"digits", "cifar10", "cifar100", "svhn"}),
    ],
)
def test_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], topic: str, names: set[str]
) -> None:
    code, out, _ = run(monkeypatch, capsys, "list", topic, "--json")
    lines = out.splitlines()
    assert code == 0
    assert set(json.loads(lines[-1])) == names
    assert {line.split()[0] for line in lines[:-1]} == names
    # Shapes of arrays are for those who read the code.
    assert "(B,)" not in out


def test_cost_is_that_of_the_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "cost",
        "resnet14",
        "--exits",
        "group1,group2_block1",
        "--head",
        "linear",
        "--classes",
        "7",
        "--json",
    )
    code, out, _ = run(monkeypatch, capsys, *arguments)
    network = attach_exits(
        build_backbone("resnet14", classes=7),
        ["group1", "group2_block1"],
        input_size=(3, 32, 32),
        head="linear",
    )
    expected = network_cost(network, (3, 32, 32))
    summary = json.loads(out.splitlines()[-1])
    assert code == 0
    assert summary["macs"] == list(expected.macs)
    assert summary["exit_names"] == ["group1_block2", "group2_block1", "final"]
    for macs in expected.macs:
        assert f"{macs:,}" in out


def test_cost_of_a_timm_model_draws_where_the_exits_stand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        monkeypatch, capsys, "cost", "timm/test_resnet", "--exits", "3", "--input-size", "3x64x64", "--json"
    )
    assert code == 0
    *lines, shares, last = out.splitlines()
    summary = json.loads(last)
    line = lines[-1].split("|")[1]
    for index, macs in enumerate(summary["macs"]):
        assert line.index(str(index)) == round(64 * macs / summary["macs"][-1])
        assert f"{macs / summary['no_exit_macs']:.0%}" in shares
        assert f"{summary['head_macs'][index]:,}" in out
    assert set(line) == {"-", "0", "1", "2"}


def test_the_table_of_costs_names_exits_that_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, by_table, _ = run(monkeypatch, capsys, "cost", "resnet8", "--exits", "group1,final")
    _, by_name, _ = run(monkeypatch, capsys, "cost", "resnet8", "--exits", "group1")
    assert by_table == by_name
    assert run(monkeypatch, capsys, "cost", "resnet8", "--exits", "final")[0] == 0


def test_shares_that_stand_close_do_not_run_into_each_other() -> None:
    cost = NetworkCost(("a", "b", "c", "final"), (10, 11, 50, 100), (1, 2, 3, 4), 100, 4)
    line, shares = about.draw(cost).splitlines()
    assert line == "MACs 0 |------01------------------------2-------------------------------3| 100"
    assert shares.split() == ["10%", "50%", "100%"]


def test_cost_of_a_wrong_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(monkeypatch, capsys, "cost", "resnet14", "--input-size", "32")
    assert code == 2
    assert err.startswith("error: --input-size is '32', expected channels x height x width")


def test_stopping_by_hand_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(about.LISTS, "losses", interrupt)
    code, _, err = run(monkeypatch, capsys, "list", "losses")
    assert code == 130
    # Only commands that have --resume speak of it.
    assert err == "stopped\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "digits"), "stopped; it continues with --resume"),
        (("--x", "train"), "stopped; it continues with --resume"),
        (("accelerate", "m.onnx"), "stopped; it continues with --resume"),
        (("distill", "runs/a"), "stopped; the same command continues it"),
        (("predict", "b", "x.png"), "stopped; with --out it continues with --resume"),
        (("ledger", "l.yaml"), "stopped; the same command continues it"),
        (("bench", "b"), "stopped"),
        ((), "stopped"),
    ],
)
def test_what_is_said_of_a_command_that_was_stopped(
    arguments: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["erde", *arguments])
    main._print_stopped()
    assert capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system", "/ro/run"), "/ro/run: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", "a", None, "b"), "a -> b: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 100_000), "..."),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("no number"), "no number"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    error: OSError, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setitem(about.LISTS, "losses", refuse)
    code, _, err = run(monkeypatch, capsys, "list", "losses")
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert len(err) < 2100


# The command line with a list of its own, so that no process imports torch.
PROCESS = """
import sys
from erde.cli import about, main
about.LISTS["losses"] = lambda: {str(number): "x" * 100 for number in range(10_000)}
sys.argv[1:] = ["list", "losses"]
main.main()
"""


TABLE = """
import sys
from rich.console import Console
from erde.cli import about, main
def show():
    Console().print("x\\n" * 100_000)
    return {"a": "b"}
about.LISTS["losses"] = show
sys.argv[1:] = ["list", "losses"]
main.main()
"""


def test_a_reader_of_a_table_that_goes_away() -> None:
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(TABLE)} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x\n", "")


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("{} | head -n 1; exit ${{PIPESTATUS[0]}}", 141),
        ("{} > /dev/full", 2),
        ("{} >&-", 0),
        ("{} 2>&- >/dev/null", 0),
        ("{} >&- 2>&-", 0),
    ],
)
def test_streams_that_end_early_or_take_nothing(shell: str, code: int) -> None:
    command = shell.format(f"{shlex.quote(sys.executable)} -c {shlex.quote(PROCESS)}")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    errors = done.stderr.splitlines()
    assert (
        errors == []
        if code != 2
        else errors == ["error: No space left on device: choose a place that can be read and written"]
    )


SLEEPER = """
import signal, sys, time
# Children of a shell's background jobs ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
from erde.cli import about, main
def sleep():
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        print("swept", flush=True)
about.LISTS["losses"] = sleep
sys.argv[1:] = ["list", "losses"]
main.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_both_signals_that_stop_say_so_and_sweep(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (code, "swept\n", "stopped\n")


# As torch has it, which takes every end of a DataLoader's worker for a failure.
GROUP = """
import signal, subprocess, sys, time
from erde.cli import about, main
def failed(*_):
    raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
def work():
    worker = subprocess.Popen(["sleep", "600"])
    try:
        print("begun", flush=True)
        time.sleep(600)
    finally:
        worker.wait()
        print("swept", flush=True)
signal.signal(signal.SIGCHLD, failed)
about.LISTS["losses"] = work
sys.argv[1:] = ["list", "losses"]
main.main()
"""


def test_a_whole_group_is_stopped() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GROUP],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (-signal.SIGTERM, "swept\n", "stopped\n")


def test_an_interrupt_while_the_command_line_is_imported_is_no_traceback() -> None:
    code = """
import builtins
from erde.__main__ import main
load = builtins.__import__
def interrupt(name, *arguments, **keywords):
    if name == "erde.cli.main":
        raise KeyboardInterrupt
    return load(name, *arguments, **keywords)
builtins.__import__ = interrupt
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_an_empty_argument_is_an_unset_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (("predict", "bundle", ""), ("bundle", "info", ""), ("run", "digits", "--out", "")):
        code, _, err = run(monkeypatch, capsys, *arguments)
        assert code == 2
        assert "one of the arguments is empty" in err


@pytest.mark.parametrize(
    "arguments", [("export",), ("export", "--plain", "x.onnx"), ("calibrate",), ("evaluate",)]
)
def test_what_is_one_process_refuses_several(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(monkeypatch, capsys, *arguments, str(tmp_path))
    assert code == 2
    assert err.startswith(f"error: erde {arguments[0]} is one process: start it without torchrun")


@pytest.mark.parametrize("name", ["../../x", "a/b", "/etc"])
def test_the_name_of_a_recipe_is_no_way_out_of_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(f"name: {name}\narms: {{erde: {{loss: erde}}}}\n")
    monkeypatch.setattr("erde.runs.chain.run", lambda *_, **__: pytest.fail("it ran"))
    code, _, err = run(monkeypatch, capsys, "run", str(path))
    assert (code, list(tmp_path.iterdir())) == (2, [path])
    assert "cannot name a folder" in err


@pytest.mark.parametrize(("module", "extra"), [("torch", "train"), ("scipy.stats", "analysis")])
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str, extra: str
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setitem(about.LISTS, "losses", missing)
    code, _, err = run(monkeypatch, capsys, "list", "losses")
    assert code == 2
    assert f"pip install 'erde[{extra}]'" in err


def test_a_bug_of_our_own_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("ours")

    monkeypatch.setitem(about.LISTS, "losses", broken)
    monkeypatch.setattr(sys, "argv", ["erde", "list", "losses"])
    with pytest.raises(KeyError, match="ours"):
        main.main()


# ---------------------------------------------------------------- bundles


def test_a_profile_from_the_command_line(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--threads", "1", "--batch-sizes", "1,3", "--rounds", "2", "--json")
    code, out, _ = run(monkeypatch, capsys, "bundle", "profile", str(bundle_copy), *arguments)
    assert code == 0
    written = json.loads((bundle_copy / "profile.json").read_text())
    assert json.loads(out.splitlines()[-1]) == written
    assert (written["threads"], written["rounds"], set(written["milliseconds"])) == (1, 2, {"1", "3"})
    assert len(written["gather_milliseconds"]) == 2
    assert all(value > 0 for times in written["milliseconds"].values() for value in times)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bundle", "profile", "BUNDLE", "--batch-sizes", "8"), "batch sizes 8 and 30 rounds: expected 1 among"),
        (("bundle", "profile", "BUNDLE", "--batch-sizes", "1,0"), "--batch-sizes is '1,0', expected numbers from 1 to 100,000"),
        (("bench", "BUNDLE", "--out", "bench.csv"), "--out is bench.csv, expected a name that ends in .json"),
        (("bench", "BUNDLE", "--batch-sizes", "1;8"), "--batch-sizes is '1;8', expected whole numbers such as 1,8,32"),
        (("bench", "BUNDLE", "--threads", "1,"), "--threads is '1,'"),
        (("bench", "BUNDLE", "--threads", "5000"), "--threads is '5000', expected numbers from 1 to 1,024"),
        (("predict", "BUNDLE", "x.png", "--threads", "5000"), "1024"),
        (("bundle", "profile", "BUNDLE", "--threads", "5000"), "1024"),
        (("cost", "resnet8", "--classes", "99999999999"), "classes is 99999999999, expected 1 to 100,000"),
        (("cost", "resnet8", "--input-size=-3x32x32"), "--input-size is '-3x32x32'"),
        (("cost", "resnet8", "--input-size=3x100000x32"), "the image size is 100000x32"),
        (("bench", "BUNDLE"), "names no data set: give --data FOLDER"),
        (("bench", "nowhere"), "no bundle at nowhere"),
        (("bench", "BUNDLE", "--out", "/dev/null/y.json"), "cannot create the folder /dev/null"),
    ],
)  # fmt: skip
def test_bad_arguments_of_bundle_commands(
    arguments: tuple[str, ...],
    message: str,
    tiny_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tiny_bundle) if argument == "BUNDLE" else argument for argument in arguments]
    code, _, err = run(monkeypatch, capsys, *given)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "option", "number"),
    [
        ((*command, *needed), option, number)
        for command, needed, option, numbers in (
            (("bench", "x"), (), "--seed", ("-1", "2147483648")),
            (("cascade", "x"), ("--data", "x", "--out", "y"), "--seed", ("-1", "2147483648")),
            (("accelerate", "x"), ("--images", "x", "--out", "y"), "--seed", ("-1", "18446744073709551616")),
            (("calibrate", "x"), (), "--seed", ("-1", "2147483648")),
            (("predict", "x"), (), "--batch-size", ("0", "10000000000000000000")),
            (("bench", "x"), (), "--images", ("0", "10000000000000000000")),
            (("bench", "x"), (), "--rounds", ("1", "10000000000000000000")),
            (("bundle", "profile", "x"), (), "--rounds", ("0", "10000000000000000000")),
            (("serve", "x"), (), "--max-batch", ("0", "10000000000000000000")),
            (("serve", "x"), (), "--max-queue", ("-1", "10000000000000000000")),
        )
        for number in numbers
    ],
)
def test_a_number_out_of_range(
    arguments: tuple[str, ...],
    option: str,
    number: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, err = run(monkeypatch, capsys, *arguments, option, number)
    assert code == 2
    assert f"Invalid value for '{option}'" in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------- version, help, completion


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import erde

    assert run(monkeypatch, capsys, "--version") == (0, f"erde {erde.__version__}\n", "")


def test_h_is_help_everywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["predict"], ["bundle"], ["bundle", "info"]):
        code, short, _ = run(monkeypatch, capsys, *command, "-h")
        assert code == 0
        assert "Usage:" in short
        assert short == run(monkeypatch, capsys, *command, "--help")[1]


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    # What the script of --show-completion asks at each press of the key.
    for words, expected in (("erde bu", ["bundle"]), ("erde predict --max", ["--max-exit", "--max-macs"])):
        with monkeypatch.context() as patch:
            patch.setenv("_ERDE_COMPLETE", "complete_bash")
            patch.setenv("COMP_WORDS", words)
            patch.setenv("COMP_CWORD", str(len(words.split()) - 1))
            code, out, _ = run(monkeypatch, capsys)
        assert (code, out.split()) == (0, expected)
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    code, out, _ = run(monkeypatch, capsys, "--show-completion")
    assert code == 0
    assert "_ERDE_COMPLETE=complete_bash" in out
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "csh")
    code, _, error = run(monkeypatch, capsys, "--show-completion")
    assert (code, error) == (2, "Shell csh not supported.\n")
