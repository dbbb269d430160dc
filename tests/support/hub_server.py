"""A small Hugging Face Hub on the loopback address, for the real client.

It serves what huggingface_hub reads: a repository's listing, tree and refs, and files
with ETag, commit and size headers. As on the Hub, large files are at another origin and
support ranges. For uploads it creates and deletes repositories and takes commits, with
large files by Git LFS.
"""

import base64
import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".pth", ".onnx", "tokenizer.model")


@dataclass
class Hub:
    """The files and the behaviour of the server, and the requests it received.

    Attributes:
        revisions: files by repository and name of a branch or tag.
        gated: repositories whose files are refused.
        rejects_tokens: every token is refused.
        cut_after: bytes of a large file after which the connection is closed.
        cuts: how often that happens.
        on_large: called with the name of each requested large file.
        stall: instead of closing the connection, wait until this event is set.
        stalled: set when that wait starts.
        requests: method and path of each request, in order.
        sent: number of bytes sent of each file.
        ranges: received Range headers.
        tokens: received Authorization headers, by host.
        users: the answers to "who am I", by token; other tokens are refused.
        private: the visibility of each created repository.
        deleted: deleted repositories.
        failing: part of the path of requests that fail.
        keeps_repositories: repositories cannot be deleted.
    """

    revisions: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    rejects_tokens: bool = False
    cut_after: int = 0
    cuts: int = 0
    on_large: Callable[[str], None] | None = None
    stall: threading.Event | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    users: dict[str, dict[str, Any]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    failing: str | None = None
    keeps_repositories: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)
    endpoint: str = ""
    down: bool = False

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Add files as a branch or tag; return the commit."""
        self.revisions.setdefault(repo, {})[revision] = files
        return commit_of(files)


def commit_of(files: dict[str, bytes]) -> str:
    digest = hashlib.sha1()
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha1(content).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[None]:
    """Serve the hub during the block, and set its endpoint."""

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        hub.down = True  # for connections that are kept alive
        if hub.stall is not None:
            hub.stall.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.hub.down:
            self.close_connection = True
            return
        split = urlsplit(self.path)
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        query = parse_qs(split.query)
        self.hub.requests.append(f"{self.command} {unquote(split.path)}")
        if token := self.headers.get("Authorization"):
            host = self.headers["Host"].split(":")[0]
            self.hub.tokens.setdefault(host, set()).add(token)
        if parts == ["api", "whoami-v2"]:
            user = self.hub.users.get(str(token).removeprefix("Bearer "))
            if user is None:
                self._refuse(401, "", "Invalid credentials in Authorization header")
            else:
                self._json(user)
        elif token and self.hub.rejects_tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif parts[0] == "cdn":
            self._send_large(parts[1])
        elif "resolve" not in parts and parts[:2] != ["api", "models"]:
            self._refuse(404, "", "Nothing is there")
        elif parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:], query)
        else:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    # Uploads:

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if self.hub.failing and self.hub.failing in path:
            self._refuse(400, "", "The disk of the Hub is on fire")
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "preupload" in parts:
            self._json({"files": [_mode(f) for f in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            stored = [
                {
                    "oid": each["oid"],
                    "size": each["size"],
                    "actions": {
                        "upload": {"href": f"{self.hub.endpoint}/store/{each['oid']}"}
                    },
                }
                for each in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": stored})
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            files = self._take_commit(body)
            commit = self.hub.add(repo, files)
            self._json({"commitUrl": f"{repo}/commit/{commit}", "commitOid": commit})
        else:
            self._refuse(404, "", "Nothing is there")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[self.path.rsplit("/", 1)[-1]] = body
        self._send(200, b"", {})

    def do_DELETE(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        repo = f"{given['organization']}/{given['name']}"
        if self.hub.keeps_repositories:
            self._refuse(403, "", "The token may not delete")
            return
        del self.hub.revisions[repo]
        self.hub.deleted.append(repo)
        self._json({})

    def _create(self, given: dict[str, Any]) -> None:
        repo = f"{given['organization']}/{given['name']}"
        if repo in self.hub.revisions:
            self._refuse(409, "", "You already created this model repo")
            return
        self.hub.private[repo] = given["visibility"] == "private"
        self.hub.add(repo, {})
        self._json({"url": f"{self.hub.endpoint}/{repo}", "name": repo})

    def _take_commit(self, body: bytes) -> dict[str, bytes]:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        return files

    def _api(self, repo: str, rest: list[str], query: dict[str, list[str]]) -> None:
        if repo not in self.hub.revisions:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif rest == ["refs"]:
            refs = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": "0" * 40}
                for name in self.hub.revisions[repo]
            ]
            self._json({"branches": refs, "converts": [], "tags": []})
        elif (files := self._files(repo, rest[1] if rest else "main")) is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif rest and rest[0] == "tree":
            self._json(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": _git_sha1(content),
                    }
                    | ({"lfs": _lfs(content, "oid")} if name.endswith(LARGE) else {})
                    for name, content in files.items()
                ]
            )
        else:
            siblings = [
                {"rfilename": name, "size": len(content)}
                | ({"lfs": _lfs(content, "sha256")} if name.endswith(LARGE) else {})
                for name, content in files.items()
            ]
            if "blobs" not in query:
                siblings = [{"rfilename": name} for name in files]
            self._json({"id": repo, "sha": commit_of(files), "siblings": siblings})

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        files = self._files(repo, revision)
        if repo not in self.hub.revisions:
            self._refuse(401, "RepoNotFound", "Repository not found")
        elif files is None:
            self._refuse(404, "RevisionNotFound", "Invalid rev id")
        elif repo in self.hub.gated:
            self._refuse(401, "GatedRepo", "Access to this model is restricted")
        elif name not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = files[name]
            headers = {"X-Repo-Commit": commit_of(files)}
            if not name.endswith(LARGE):
                headers["ETag"] = f'"{_git_sha1(content)}"'
                if self.command == "GET":
                    self._count(name, len(content))
                self._send(200, content, headers)
                return
            digest = hashlib.sha256(content).hexdigest()
            other_origin = self.hub.endpoint.replace("127.0.0.1", "localhost")
            headers |= {
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{other_origin}/cdn/{digest}",
            }
            self._send(302, b"", headers)

    def _send_large(self, digest: str) -> None:
        name, content = next(
            (name, content)
            for revisions in self.hub.revisions.values()
            for files in revisions.values()
            for name, content in files.items()
            if hashlib.sha256(content).hexdigest() == digest
        )
        headers: dict[str, str] = {}
        byte_range = self.headers.get("Range")
        start = 0
        if byte_range:
            self.hub.ranges.append(byte_range)
            start = int(byte_range.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = (
                f"bytes {start}-{len(content) - 1}/{len(content)}"
            )
        body = content[start:]
        until = len(body)
        if self.hub.cuts:
            self.hub.cuts -= 1
            until = min(until, self.hub.cut_after)
        self._count(name, until)
        if self.hub.on_large is not None:
            self.hub.on_large(name)
        self._send(206 if byte_range else 200, body, headers, until=until)

    def _files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        revisions = self.hub.revisions.get(repo, {})
        by_commit = {commit_of(files): files for files in revisions.values()}
        return revisions.get(revision) or by_commit.get(revision)

    def _count(self, name: str, num_bytes: int) -> None:
        self.hub.sent[name] = self.hub.sent.get(name, 0) + num_bytes

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self._send(200, body, {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        *,
        until: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[:until])
        if until is not None and until < len(body):
            self.wfile.flush()
            if self.hub.stall is not None:
                self.hub.stalled.set()
                self.hub.stall.wait()
            self.close_connection = True


def _mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _lfs(content: bytes, digest_key: str) -> dict[str, object]:
    digest = hashlib.sha256(content).hexdigest()
    return {digest_key: digest, "size": len(content), "pointerSize": 134}


def connect(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Configure the client in this process to use the hub and a separate cache."""
    from huggingface_hub import close_session, constants

    cache = home / "hub"
    close_session()  # connections to another test's server
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # it is another server
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return cache


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """Return the environment of a process that uses the hub and a separate cache."""
    return os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "0",
        "NO_PROXY": "*",
    }
