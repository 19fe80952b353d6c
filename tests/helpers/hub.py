"""A stand-in for the Hugging Face hub on this machine: the requests that huggingface_hub makes to push and pull a model.

Written from the hub's protocol, and not from erde: it knows nothing of bundles, and keeps whatever it was sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_a_token_that_nobody_may_see"


@dataclass
class Repository:
    """Commits are whole states: the files by path, as bytes."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def state(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def commit(self, branch: str, changes: dict[str, bytes], message: str = "") -> str:
        before = self.state(branch)
        files = {**(before[1] if before else {}), **changes}
        name = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[name], self.branches[branch], self.messages[name] = files, name, message
        return name


@dataclass
class Hub:
    """The server's state, for a test to look at and to spoil."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    # (method, path, JSON or bytes of the body)
    requests: list[tuple[str, str, Any]] = field(default_factory=list)
    cut: str | None = None  # the download of this file breaks off halfway
    hang: threading.Event | None = None  # ... or stops there, after this was set
    failure: int | None = None  # the status of every answer

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to take this for the hub."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return {
            **clean,
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": self.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": TOKEN,
        }

    def posts(self, kind: str) -> list[Any]:
        """The bodies that were sent to ``/api/models/OWNER/NAME/<kind>/...``."""
        pattern = re.compile(rf"/api/models/[^/]+/[^/]+/{kind}/")
        return [body for method, path, body in self.requests if method == "POST" and pattern.match(path)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _handle(self) -> None:
        body: Any = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "json" in (self.headers.get("Content-Type") or ""):
            lines = [json.loads(line) for line in body.splitlines()]
            body = lines if "ndjson" in str(self.headers["Content-Type"]) else lines[0]
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, unquote(path), body))
        if self.hub.failure is not None:
            return self._answer(self.hub.failure, {"error": "out of order"})
        if path == "/api/repos/create":
            return self._create(body)
        if path == "/api/validate-yaml":
            good = body["content"].startswith("---\n") and "license: none-such" not in body["content"]
            return self._answer(
                200 if good else 400, {"errors": [] if good else [{"message": "no metadata"}]}
            )
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+)", self._about),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._modes),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._large),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            match = re.fullmatch(pattern, path)
            if match:
                groups = [unquote(group) for group in match.groups()]
                repository = self.hub.repositories.get(groups[0])
                if repository is None or (repository.private and not self._knows_token()):
                    return self._answer(401, {"error": "Repository not found"}, "RepoNotFound")
                return answer(repository, body, *groups)
        if path.startswith("/large/") and self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/large/")
            self.hub.large[path.removeprefix("/large/")] = body
            return self._answer(200, {})
        return self._answer(404, {"error": "unknown"})

    def _knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _create(self, body: Any) -> None:
        name = f"{body['organization']}/{body['name']}"
        if not self._knows_token():
            # What no server should do: to say the key aloud.
            return self._answer(401, {"error": f"bad credentials {self.headers.get('Authorization')}"})
        place = {"url": f"{self.hub.address}/{name}"}
        if name in self.hub.repositories:
            return self._answer(409, {"error": "there already", **place})
        self.hub.repositories[name] = repository = Repository(private=body.get("visibility") == "private")
        repository.commit("main", {".gitattributes": b"*.onnx filter=lfs\n"}, "initial commit")
        return self._answer(200, place)

    def _about(self, repository: Repository, _: Any, name: str) -> None:
        self._answer(
            200,
            {
                "id": name,
                "private": repository.private,
                "sha": repository.branches["main"],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [],
            },
        )

    def _branch(self, repository: Repository, _: Any, __: str, branch: str) -> None:
        if not self._knows_token():
            return self._answer(403, {"error": "no"})
        if branch in repository.branches:
            return self._answer(409, {"error": "there already"})
        repository.branches[branch] = repository.branches["main"]
        return self._answer(200, {})

    def _modes(self, repository: Repository, body: Any, _: str, branch: str) -> None:
        if branch not in repository.branches:
            return self._answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".onnx") else "regular",
                "shouldIgnore": False,
            }
            for file in body["files"]
        ]
        return self._answer(200, {"files": files})

    def _large(self, _: Repository, body: Any, __: str) -> None:
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.address}/large/{item['oid']}"}}}
            for item in body["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, body: Any, name: str, branch: str) -> None:
        if not self._knows_token():
            return self._answer(403, {"error": "no"})
        changes = {}
        for item in body[1:]:
            value = item["value"]
            large = item["key"] == "lfsFile"
            changes[value["path"]] = (
                self.hub.large[value["oid"]] if large else base64.b64decode(value["content"])
            )
        commit = repository.commit(branch, changes, body[0]["value"]["summary"])
        return self._answer(
            200,
            {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.address}/{name}/commit/{commit}"},
        )

    def _file(self, repository: Repository, _: Any, __: str, revision: str, path: str) -> None:
        state = repository.state(revision)
        if state is None:
            return self._answer(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        commit, files = state
        if path not in files:
            return self._answer(404, {"error": "Entry not found"}, "EntryNotFound", commit)
        content = files[path]
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if path == self.hub.cut:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            if self.hub.hang is not None:
                self.hub.hang.set()
                self.rfile.read(1)  # until the other side goes away
            self.close_connection = True
            return None
        self.wfile.write(content)
        return None

    def _answer(self, status: int, value: Any, code: str | None = None, commit: str | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (
            ("X-Error-Code", code),
            ("X-Repo-Commit", commit),
            ("X-HF-Warning", "topic; you are somebody unknown"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
        ):
            if text is not None:
                self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A hub without repositories, on a free port of the loopback."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
