"""Bundles on the hub: what is sent, what comes back, and all that is refused, against a stand-in on this machine."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

import erde
from erde.bundle.hub import CARD_THERE, Place
from erde.bundle.sealing import read, seal, seal_of
from erde.bundle.shipped import FOLDER, bundle_folder
from erde.cli.options import _bundle_folder
from erde.runtime import Session
from tests.helpers.checks import entries, user_error
from tests.helpers.command import run_command
from tests.helpers.hub import TOKEN, Hub, Repository, hub_stand_in

DEMO = FOLDER / "digits-demo"
SEAL = seal_of(read(DEMO))
# What its seal covers: the samples beside it are not sent.
SEALED = ["README.md", "manifest.json", "stage_0.onnx", "stage_1.onnx", "stage_2.onnx"]
NAME = "me/digits"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The stand-in, in the place of the hub for huggingface_hub in this process; a cache of the test's own."""
    home = tmp_path / "home"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with hub_stand_in() as server:
        for name, value in {
            "ENDPOINT": server.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "agents"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            assert hasattr(constants, name)
            monkeypatch.setattr(constants, name, value)
        # Attempts are repeated after a pause.
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield server


@pytest.fixture
def shared(hub: Hub) -> Repository:
    """``digits-demo`` on the hub, as a plain upload of what erde push has to send: erde had no hand in it."""
    files = {CARD_THERE if name == "README.md" else name: (DEMO / name).read_bytes() for name in SEALED}
    repository = hub.repositories[NAME] = Repository()
    repository.commit("main", {**files, "README.md": b"# Anything"})
    return repository


class Command:
    """``erde`` in this process, and what it printed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> str:
        assert run_command(self._monkeypatch, *arguments) == 0, self._capsys.readouterr().err
        captured = self._capsys.readouterr()
        assert TOKEN not in captured.out + captured.err
        return captured.out

    def refusal(self, *arguments: str) -> str:
        """The one line of a command that ends with exit code 2."""
        assert run_command(self._monkeypatch, *arguments) == 2
        captured = self._capsys.readouterr()
        assert TOKEN not in captured.out + captured.err
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def same_files(folder: Path) -> None:
    """``folder`` holds the sealed files, byte for byte, and nothing else."""
    assert entries(folder) == SEALED
    for name in SEALED:
        assert (folder / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_what_is_pushed_comes_back_the_same(hub: Hub, command: Command, tmp_path: Path) -> None:
    out = command("push", "digits-demo", NAME, "--license", "cc-by-4.0", "--message", "First", "--json")
    repository = hub.repositories[NAME]
    commit = repository.branches["main"]
    assert f"{hub.address}/{NAME}/commit/{commit}" in out
    assert f"\nseal: {SEAL}\n" in out
    assert json.loads(out.splitlines()[-1])["seal"] == SEAL
    # One commit holds all.
    (body,) = hub.posts("commit")
    assert sorted(item["value"]["path"] for item in body[1:]) == sorted([*SEALED, CARD_THERE])
    assert [item["key"] for item in body].count("lfsFile") == 3
    assert repository.messages[commit] == "First"
    assert not repository.private
    files = repository.commits[commit]
    for name in SEALED:
        assert files[CARD_THERE if name == "README.md" else name] == (DEMO / name).read_bytes()
    about, page = files["README.md"].decode().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(about) == {
        "license": "cc-by-4.0",
        "library_name": "erde",
        "pipeline_tag": "image-classification",
        "tags": ["early-exit", "onnx"],
    }
    assert "UCI Machine Learning Repository" in page
    # No index has erde: a stranger who reads the page needs a copy of the repository.
    assert re.findall("pip install .*", page) == ["pip install '.[hub]'  # in a copy of the erde repository"]
    assert SEAL in page
    assert f"{SEAL}\n" in command("pull", NAME, "--out", "new/copy", "--seal", SEAL)
    same_files(tmp_path / "new" / "copy")
    assert entries(tmp_path / "new") == ["copy"]


def test_a_branch_a_private_repository_and_no_licence(
    hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command("push", "digits-demo", NAME, "--branch", "tests/v1", "--private")
    repository = hub.repositories[NAME]
    assert repository.private
    assert "manifest.json" not in repository.commits[repository.branches["main"]]
    commit = repository.branches["tests/v1"]
    assert b"license" not in repository.commits[commit]["README.md"].split(b"---\n")[1]
    assert b"erde pull hf://me/digits@tests/v1 --out" in repository.commits[commit]["README.md"]
    assert SEAL[:12] in repository.messages[commit]
    command("pull", NAME, "--revision", "tests/v1", "--out", "by-name")
    command("pull", f"hf://{NAME}@{commit}", "--out", "by-commit")
    same_files(tmp_path / "by-name")
    same_files(tmp_path / "by-commit")
    monkeypatch.delenv("HF_TOKEN")
    line = command.refusal("pull", NAME, "--out", "without")
    assert line == (
        "hf://me/digits: there is no such model, or it is private: check the name, or log in with `hf auth login`, or "
        "set HF_TOKEN"
    )
    assert not Path("without").exists()


def test_a_public_repository_stays_as_it_is_where_a_private_one_was_asked_for(
    hub: Hub, shared: Repository, command: Command
) -> None:
    assert "hf://me/digits is public" in command.refusal("push", "digits-demo", NAME, "--private")
    assert len(shared.commits) == 1


def test_names_on_the_hub_are_bundles_everywhere(hub: Hub, shared: Repository, command: Command) -> None:
    session = Session(f"hf://{NAME}", threads=1)
    expected = erde.load("digits-demo", threads=1)
    samples = expected.samples()
    assert session.predict(samples).exits.tolist() == expected.predict(samples).exits.tolist()
    assert session.folder.name == "digits"  # what erde serve calls it
    same_files(session.folder)
    assert bundle_folder(Path(f"hf://{NAME}")) == session.folder
    # It is there now: the hub only says which commit it is.
    hub.requests.clear()
    rows = command("predict", f"hf://{NAME}", str(samples[0])).splitlines()
    assert json.loads(rows[0])["class"] == samples[0].stem
    downloads = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
    assert downloads == []
    assert SEAL[:12] in command("bundle", "verify", f"hf://{NAME}@main")
    assert "# erde" not in command("bundle", "info", f"hf://{NAME}")
    assert "the bundles are the same" in command("bundle", "diff", f"hf://{NAME}", "digits-demo")


def test_the_newest_is_opened_unless_a_revision_is_named(
    hub: Hub, shared: Repository, tmp_path: Path
) -> None:
    first = shared.branches["main"]
    Session(f"hf://{NAME}", threads=1)
    changed = Path(shutil.copytree(DEMO, tmp_path / "changed"))
    new = seal(changed, read(changed).model_copy(update={"name": "newer"}))
    shared.commit("main", {"manifest.json": (changed / "manifest.json").read_bytes()})
    assert seal_of(erde.load(f"hf://{NAME}", threads=1).manifest) == new
    assert seal_of(erde.load(f"hf://{NAME}@{first}", threads=1).manifest) == SEAL


def test_without_a_network_there_is_what_was_opened_before(
    hub: Hub, shared: Repository, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    Session(f"hf://{NAME}", threads=1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert "intact" in command("bundle", "verify", f"hf://{NAME}")
    for arguments in (
        ("predict", "hf://me/other"),
        ("pull", NAME, "--out", "copy"),
        ("push", "digits-demo", NAME),
    ):
        line = command.refusal(*arguments)
        assert "the hub is needed, and HF_HUB_OFFLINE is set: unset it" in line
    assert hub.requests == []
    assert not Path("copy").exists()


def test_the_page_is_free_and_the_rest_is_sealed(
    hub: Hub, shared: Repository, command: Command, tmp_path: Path
) -> None:
    content = (DEMO / "stage_1.onnx").read_bytes()
    spoilt = {
        "stage_1.onnx": content[:-1] + bytes([content[-1] ^ 1]),
        CARD_THERE: b"# Another card",
        "manifest.json": (DEMO / "manifest.json").read_bytes().replace(b"digits", b"Digits", 1),
    }
    for name, changed in spoilt.items():
        assert changed != shared.commits[shared.branches["main"]][name]
        shared.commit("spoilt", {**shared.commits[shared.branches["main"]], name: changed})
        line = command.refusal("pull", f"{NAME}@spoilt", "--out", "copy")
        sealed_name = "README.md" if name == CARD_THERE else name
        assert line.startswith(f"bundle hf://me/digits@spoilt: {sealed_name} does not match its ")
        with user_error(f"bundle hf://me/digits@spoilt: {sealed_name} does not match its "):
            Session("hf://me/digits@spoilt", threads=1)
    cache = tmp_path / "home" / "hub" / "models--me--digits" / "erde"
    assert [path for path in cache.rglob("*") if path.is_file() or path.name == "digits"] == []
    assert not Path("copy").exists()
    shared.commit("main", {"README.md": b"# Corrected"})
    command("pull", NAME, "--out", "copy")
    same_files(Path("copy"))
    assert entries(tmp_path) == ["copy", "home"]


def test_only_the_seal_that_was_asked_for(
    hub: Hub, shared: Repository, command: Command, tmp_path: Path
) -> None:
    other = "0" * 64
    line = command.refusal("pull", NAME, "--out", "copy", "--seal", other)
    assert line == f"hf://me/digits has the seal {SEAL}, expected {other}: it is another bundle"
    # Nothing was downloaded for it but the manifest.
    assert not [path for _, path, _ in hub.requests if path.endswith(".onnx")]
    hub.requests.clear()
    assert "expected the 64 hexadecimal digits" in command.refusal(
        "pull", NAME, "--out", "copy", "--seal", SEAL[:12]
    )
    assert hub.requests == []
    assert entries(tmp_path) == ["home"]


def test_a_cached_bundle_is_verified_each_time(hub: Hub, shared: Repository, command: Command) -> None:
    folder = Session(f"hf://{NAME}", threads=1).folder
    (folder / "stage_2.onnx").write_bytes((folder / "stage_1.onnx").read_bytes())
    assert "stage_2.onnx does not match its checksum" in command.refusal("bundle", "verify", f"hf://{NAME}")


def test_a_line_that_breaks_leaves_nothing(
    hub: Hub, shared: Repository, command: Command, tmp_path: Path
) -> None:
    hub.cut = "stage_1.onnx"
    line = command.refusal("pull", NAME, "--out", "copy")
    assert "the hub cannot be reached, or the line broke" in line
    assert entries(tmp_path) == ["home"]
    assert "the line broke" in command.refusal("predict", f"hf://{NAME}")
    hub.cut = None
    command("pull", NAME, "--out", "copy")
    same_files(Path("copy"))


def erde_process(hub: Hub, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "erde", *arguments],
        env={**hub.environment, "HF_HOME": str(tmp_path / "home"), **environment},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_pull_that_is_stopped_leaves_nothing(hub: Hub, shared: Repository, tmp_path: Path) -> None:
    hub.cut, hub.hang = "stage_1.onnx", threading.Event()
    process = erde_process(hub, tmp_path, "pull", NAME, "--out", "copy")
    assert hub.hang.wait(60)
    assert [name for name in entries(tmp_path) if name.endswith(".partial")]
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM, (out, err)
    assert entries(tmp_path) == ["home"]


def test_the_real_command_takes_its_settings_from_the_environment(hub: Hub, tmp_path: Path) -> None:
    outputs = []
    for arguments, environment in (
        (("push", "digits-demo", NAME), {}),
        (("predict", f"hf://{NAME}", str(DEMO / "samples")), {}),
        (("predict", f"hf://{NAME}", str(DEMO / "samples")), {"HF_HUB_OFFLINE": "1"}),
    ):
        process = erde_process(hub, tmp_path, *arguments, **environment)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert TOKEN not in out + err
        outputs.append(out)
    assert f"seal: {SEAL}" in outputs[0]
    assert len(outputs[1].splitlines()) == 3
    assert outputs[1] == outputs[2]


@pytest.mark.parametrize(
    "name", ["digits", "me/", "a/b/c", "me/digits@", "me/digits@a/../b", "me/di gits", "hf://"]
)
def test_bad_names(hub: Hub, command: Command, name: str) -> None:
    assert "names no bundle on the hub: expected OWNER/NAME" in command.refusal("pull", name, "--out", "copy")
    with user_error("names no bundle on the hub|no bundle at"):
        erde.load(name if name.startswith("hf:") else f"hf://{name}")
    assert hub.requests == []


def test_a_bad_name_is_printed_as_it_was_given(hub: Hub, command: Command) -> None:
    # pathlib keeps one slash of the two.
    assert command.refusal("predict", "hf://bad", "pics").startswith("'hf://bad' names no bundle on the hub")
    assert hub.requests == []


def test_other_refusals(hub: Hub, shared: Repository, command: Command, tmp_path: Path) -> None:
    for name in ("me/digits--", "me/a..b"):
        assert "the hub knows no such names" in command.refusal("pull", name, "--out", "copy")
    assert "there is no such model, or it is private" in command.refusal("pull", "me/other", "--out", "copy")
    assert "there is no such revision" in command.refusal("pull", f"{NAME}@v9", "--out", "copy")
    assert "names a revision, and --revision is v2" in command.refusal(
        "pull", f"{NAME}@v1", "--revision", "v2", "--out", "copy"
    )
    hub.repositories["me/torch"] = Repository()
    hub.repositories["me/torch"].commit("main", {"model.safetensors": b"..."})
    line = command.refusal("bundle", "verify", "hf://me/torch")
    assert line == "no bundle at hf://me/torch: it has no manifest.json (erde push sends what is needed)"
    hub.repositories["me/torch"].commit("main", {"manifest.json": b'{"files": ["model.safetensors"]}'})
    assert "bundle hf://me/torch has format version None" in command.refusal("predict", "hf://me/torch")
    assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]
    hub.requests.clear()
    (tmp_path / "there").mkdir()
    assert "there is there: give another folder" in command.refusal("pull", NAME, "--out", "there")
    assert hub.requests == []
    assert entries(tmp_path) == ["home", "there"]


def test_an_incomplete_bundle_is_refused(hub: Hub, shared: Repository, command: Command) -> None:
    del shared.commits[shared.branches["main"]]["stage_2.onnx"]
    assert "it has no stage_2.onnx" in command.refusal("pull", NAME, "--out", "copy")


def test_nothing_is_sent_of_a_broken_bundle(hub: Hub, command: Command, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(DEMO, tmp_path / "broken"))
    (broken / "stage_0.onnx").write_bytes(b"")
    assert "stage_0.onnx does not match its checksum" in command.refusal("push", "broken", NAME)
    assert hub.requests == []


def test_pushing_without_the_right_to(
    hub: Hub, shared: Repository, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "the hub takes nothing there without a token that may write"
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN}x")  # the stand-in repeats it in its answer
    assert words in command.refusal("push", "digits-demo", "you/digits")
    assert words in command.refusal("push", "digits-demo", NAME)
    monkeypatch.delenv("HF_TOKEN")
    assert words in command.refusal("push", "digits-demo", "you/digits")
    assert len(shared.commits) == 1


def test_a_licence_that_the_hub_does_not_know(hub: Hub, command: Command) -> None:
    line = command.refusal("push", "digits-demo", NAME, "--license", "none-such")
    assert "the hub refuses it: Invalid metadata in README.md." in line
    assert hub.posts("commit") == []


def test_a_hub_that_is_out_of_order(hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failure = 503
    assert "hf://me/digits: the hub answered 503" in command.refusal("pull", NAME, "--out", "copy")
    assert "hf://me/digits: the hub answered 503" in command.refusal("push", "digits-demo", NAME)
    # Nobody listens at port 9.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    )
    for arguments in (("pull", NAME, "--out", "copy"), ("push", "digits-demo", NAME)):
        assert "the hub cannot be reached, or the line broke (ConnectError)" in command.refusal(*arguments)


def test_a_missing_package_is_named(hub: Hub, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("huggingface_hub")]:
        monkeypatch.setitem(sys.modules, name, None)
    for arguments in (
        ("pull", NAME, "--out", "c"),
        ("push", "digits-demo", NAME),
        ("predict", f"hf://{NAME}"),
    ):
        line = command.refusal(*arguments)
        assert line == "hf://me/digits needs huggingface_hub, which is not installed: pip install 'erde[hub]'"


def test_a_full_disk_is_not_the_hubs_fault(
    hub: Hub, shared: Repository, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    download = huggingface_hub.hf_hub_download

    def on_full_disk(repository: str, name: str, **settings: Any) -> str:
        if name == "stage_0.onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return download(repository, name, **settings)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", on_full_disk)
    assert "no space left on the disk while writing copy" in command.refusal("pull", NAME, "--out", "copy")
    assert entries(tmp_path) == ["home"]


def test_a_shell_that_completes_a_line_downloads_nothing(hub: Hub) -> None:
    given = Path(f"hf://{NAME}")
    context = SimpleNamespace(resilient_parsing=True)
    assert _bundle_folder(context, given) == given
    assert hub.requests == []


def test_places() -> None:
    assert Place.named("hf://me/digits@v1/x") == Place.named(Path("hf://me/digits@v1/x"))
    assert str(Place.named("me/digits@v1/x")) == "hf://me/digits@v1/x"
    assert str(Place.named("me/digits")) == "hf://me/digits"


def test_the_commands_of_the_document_work(hub: Hub, command: Command) -> None:
    document = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```console\n(.*?)^```$", document, re.M | re.S)
    shutil.copyfile(DEMO / "samples" / "8.png", "my-digit.png")
    lines = [shlex.split(line)[2:] for line in block.splitlines()]
    answers = [command(*arguments) for arguments in lines]
    assert [arguments[0] for arguments in lines] == ["push", "predict", "pull", "bundle"]
    assert json.loads(answers[1])["class"] == "8"
    assert "intact" in answers[3]
