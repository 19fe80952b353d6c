"""Bundles on the Hugging Face hub: sent, fetched, and opened by their name there, ``hf://OWNER/NAME[@REVISION]``.

A repository holds the sealed files as they are, but for the card: README.md is the hub's page there, which anybody with
the right may edit, so that the sealed one travels as ``CARD_THERE``. Needs huggingface_hub (the extra ``hub``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from erde.bundle.card import model_card
from erde.bundle.manifest import MANIFEST, Manifest
from erde.bundle.sealing import CARD, read, read_manifest, seal_of
from erde.common.errors import UserError, in_one_line
from erde.common.files import make_folder, replacing_folder

CARD_THERE = "bundle-card.md"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
# A path has a single slash after the colon: pathlib takes two for one.
_PLACE = re.compile(
    r"(?:hf:/{1,2})?(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>(?!.*\.\.)\w[\w./-]*))?", re.ASCII
)
_SEAL = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """A repository of the hub, and a branch, tag or commit of it; None is its main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def named(cls, text: str | Path) -> Place:
        """The place of ``hf://OWNER/NAME[@REVISION]``, or without ``hf://``; :class:`UserError` if it is none."""
        text = text.as_posix() if isinstance(text, Path) else text
        match = _PLACE.fullmatch(text)
        if match is None:
            shown = in_one_line(re.sub(r"^hf:/+", "hf://", text))
            raise UserError(
                f"'{shown}' names no bundle on the hub: expected OWNER/NAME, such as me/digits, or with a "
                "revision OWNER/NAME@v1"
            )
        return cls(match["repository"], match["revision"])

    def __str__(self) -> str:
        return f"hf://{self.repository}{f'@{self.revision}' if self.revision else ''}"


def on_hub(bundle: str | Path) -> bool:
    """Whether ``bundle`` is written as a name on the hub."""
    return (bundle.as_posix() if isinstance(bundle, Path) else bundle).startswith("hf:/")


def cached_folder(bundle: str | Path) -> Path:
    """The folder of a bundle on the hub, in the hub's own cache; downloaded and verified if it is not there yet.

    The hub is asked which commit the revision is. Without a network it is the one that was seen last.

    Raises:
        UserError: whatever is wrong with the name, the network, the rights, or the bundle, in one line.
    """
    place = Place.named(bundle)
    manifest_file = _download(place, MANIFEST)
    # models--OWNER--NAME/snapshots/COMMIT/manifest.json. What the cache keeps itself are links, which no bundle may have.
    folder = manifest_file.parents[2] / "erde" / manifest_file.parent.name / place.repository.split("/")[1]
    if not folder.is_dir():
        make_folder(folder.parent)
        _fetch(place, manifest_file, folder)
    return folder


def pull(place: Place, out: Path, seal: str | None = None) -> Manifest:
    """Download a bundle to the new folder ``out``, which is there once everything is verified; its manifest.

    Args:
        place: where it is.
        out: the folder.
        seal: the one that is expected, 64 hexadecimal digits; any without it.

    Raises:
        UserError: as :func:`cached_folder`; ``out`` is there; another seal.
    """
    if seal is not None and not _SEAL.fullmatch(seal):
        raise UserError(
            f"the seal '{in_one_line(seal)}' is none: expected the 64 hexadecimal digits that erde push prints"
        )
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} is there: give another folder, which will be made")
    manifest_file = _download(place, MANIFEST)
    make_folder(out.parent)
    return _fetch(place, manifest_file, out, seal)


def push(
    folder: Path,
    place: Place,
    *,
    private: bool = False,
    message: str | None = None,
    license_name: str | None = None,
) -> tuple[str, Manifest]:
    """Send a verified bundle to the hub in a single commit; the commit's address and the manifest.

    The repository and the branch ``place.revision`` are made if they are not there. Other files there stay.

    Args:
        folder: the bundle's.
        place: where it goes; a revision is a branch.
        private: that nobody else may see it.
        message: of the commit; the bundle's name and seal without it.
        license_name: of the bundle, as the hub names it (``apache-2.0``); the page names none without it.

    Raises:
        UserError: as :func:`cached_folder`; a public repository that is to be private.
    """
    manifest = read(folder)
    page = hub_page(manifest, place, license_name)
    with _hub(place, writes=True):
        from huggingface_hub import CommitOperationAdd, HfApi

        hub = HfApi()
        hub.create_repo(place.repository, private=private or None, exist_ok=True)
        if private and not hub.repo_info(place.repository).private:
            raise UserError(f"{place} is public: give another name, or make it private on its page first")
        if place.revision is not None:
            hub.create_branch(place.repository, branch=place.revision, exist_ok=True)
        files = [CommitOperationAdd(_name_there(name), folder / name) for name in (MANIFEST, *manifest.files)]
        commit = hub.create_commit(
            place.repository,
            [*files, CommitOperationAdd(CARD, page.encode())],
            commit_message=message or f"{in_one_line(manifest.name)}, seal {seal_of(manifest)[:12]}",
            revision=place.revision,
        )
    return commit.commit_url, manifest


def hub_page(manifest: Manifest, place: Place, license_name: str | None) -> str:
    """README.md for the hub: what it wants to know as YAML, the card, and how to get the bundle from there."""
    import yaml

    about = {
        **({"license": license_name} if license_name else {}),
        "library_name": "erde",
        "pipeline_tag": "image-classification",
        "tags": ["early-exit", "onnx"],
    }
    return (
        f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n\n{model_card(manifest)}\n## From the hub\n\n"
        f"```text\n$ pip install '.[hub]'  # in a copy of the erde repository\n$ erde predict {place} image.png\n"
        f"$ erde pull {place} --out FOLDER\n```\n\nSeal: `{seal_of(manifest)}`\n"
    )


def _name_there(name: str) -> str:
    return CARD_THERE if name == CARD else name


def _fetch(place: Place, manifest_file: Path, folder: Path, seal: str | None = None) -> Manifest:
    """Write the bundle of a downloaded manifest to ``folder``, in one step, if it is what its seal says."""
    commit = Place(place.repository, manifest_file.parent.name)
    with replacing_folder(folder) as partial:
        shutil.copyfile(manifest_file, partial / MANIFEST)
        try:
            manifest = read_manifest(partial)
            if seal is not None and seal_of(manifest) != seal:
                raise UserError(
                    f"{place} has the seal {seal_of(manifest)}, expected {seal}: it is another bundle"
                )
            for name in manifest.files:
                os.replace(_download(commit, _name_there(name), partial), partial / name)
            # What huggingface_hub notes beside its downloads.
            shutil.rmtree(partial / ".cache", ignore_errors=True)
            return read(partial)
        except UserError as error:
            raise UserError(str(error).replace(str(partial), str(place))) from error


def _download(place: Place, name: str, folder: Path | None = None) -> Path:
    """A file of a repository, into the hub's cache or into ``folder``; its path."""
    with _hub(place):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            return Path(hf_hub_download(place.repository, name, revision=place.revision, local_dir=folder))
        except RemoteEntryNotFoundError as error:
            raise UserError(
                f"no bundle at {place}: it has no {name} (erde push sends what is needed)"
            ) from error


@contextlib.contextmanager
def _hub(place: Place, writes: bool = False) -> Iterator[None]:
    """Whatever huggingface_hub says in the block, in one line of our own: its texts may hold addresses and keys."""
    try:
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ModuleNotFoundError as error:
        raise UserError(
            f"{place} needs huggingface_hub, which is not installed: pip install 'erde[hub]'"
        ) from error
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of each attempt
    try:
        # Some of its bars would fill a log file.
        with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            yield
    except UserError:
        raise
    except Exception as error:  # of httpx2, of hf_xet, of the system
        if isinstance(error, OSError) and error.errno is not None:  # a disk, a permission
            raise
        raise UserError(f"{place}: {_reason(error, writes)}") from error
    finally:
        log.setLevel(level)


def _reason(error: BaseException, writes: bool) -> str:
    from huggingface_hub import errors

    # Wrapped around the real reason: no file in the cache either, or a thread that failed.
    while isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "the hub is needed, and HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, errors.HFValidationError):
        return (
            "the hub knows no such names: expected letters, digits, '-', '_' and '.', neither '--' nor '..'"
        )
    if writes and status in (401, 403, 404):
        return f"the hub takes nothing there without a token that may write: {LOG_IN}"
    if isinstance(error, errors.GatedRepoError):
        return f"access is granted on request: ask on its page, then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such model, or it is private: check the name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision: expected a branch, a tag or a commit"
    if status in (401, 403):
        return f"the hub refuses the token: {LOG_IN}"
    if status is not None:
        return f"the hub answered {status}: try again later"
    if type(error) is ValueError:  # the page's YAML, or a file that the storage refuses
        return f"the hub refuses it: {in_one_line(str(error))}"
    return f"the hub cannot be reached, or the line broke ({type(error).__name__}): check the network and try again"
