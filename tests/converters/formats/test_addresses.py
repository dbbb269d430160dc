"""Checkpoints at web addresses, from a small server on this machine."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import call, expect_error
from hub_server import Hub, connect, serve
from models import UNEVEN, small_tokenizer, weights_of, write_hugging_face, write_pt

from converters.conversion.run import convert
from mlx_openelm.storage import address_download
from mlx_openelm.storage.hub import find_released, is_file_address
from mlx_openelm.storage.loading import load

pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

PATH = "/270M/checkpoint_average.pt"


@dataclass
class Server:
    """Files by path, and how requests are answered.

    Attributes:
        cut: bytes after which the connection is closed; None: send all.
        redirections: to other addresses, by path.
        ranges: it supports byte ranges.
        versions: it sends ETags.
    """

    files: dict[str, bytes]
    cut: int | None = None
    redirections: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    versions: bool = True
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    address: str = ""


class Handler(BaseHTTPRequestHandler):
    here: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        here, wanted = self.here, self.headers.get("Range")
        here.requests.append(f"{self.path} {wanted or 'all'}")
        if self.path in here.redirections:
            self.answer(302, b"", {"Location": here.redirections[self.path]})
        elif self.path not in here.files:
            self.answer(404, b"")
        else:
            content = here.files[self.path]
            headers = {"ETag": f'"{hash(content)}"'} if here.versions else {}
            start = 0
            if wanted and here.ranges:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    return self.answer(416, b"")
                end = len(content)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{end}"
            if self.path.endswith(".html.pt"):
                headers["Content-Type"] = "text/html; charset=utf-8"
            self.answer(206 if start else 200, content[start:], headers)
        return None

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: self.here.cut]
        self.here.sent += len(sent)
        self.wfile.write(sent)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server without encryption, which the tests but one allow."""
    weights = write_pt(tmp_path / "a.pt", weights_of(UNEVEN)).read_bytes()
    here = Server({PATH: weights})
    handler = type("Bound", (Handler,), {"here": here})
    listening = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    here.address = f"http://127.0.0.1:{listening.server_port}"
    monkeypatch.setattr(address_download, "SCHEME", "http")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here/tokenizer.model").write_bytes(small_tokenizer().model_proto)
    yield here
    listening.shutdown()
    listening.server_close()
    thread.join()


def run(address, *args):
    options = ("--tokenizer", "tokenizer.model", "--mlx-path", "out", "--force")
    result = call("convert", address, *options, *args)
    assert result.exit_code == 0, result.output
    return result


def fail(tmp_path, address, *args, message):
    options = ("--tokenizer", "tokenizer.model", "--mlx-path", "out")
    here = tmp_path / "here"
    return expect_error(here, "convert", address, *options, *args, message=message)


def sha256(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()


def test_a_checkpoint_is_downloaded_once_and_its_hash_is_shown(server, tmp_path):
    url, digest = server.address + PATH, sha256(server.files[PATH])
    assert f"From {url}, sha256:{digest}." in run(url).stderr
    assert f"sha256:{digest}." in run(url, "--offline").stderr
    assert server.requests == [f"{PATH} all"]
    source = json.loads((tmp_path / "here/out/config.json").read_text())["mlx_openelm"]
    assert source["source"]["address"] == url
    assert source["source"]["files"] == {"checkpoint_average.pt": f"sha256:{digest}"}
    assert url in (tmp_path / "here/out/README.md").read_text()
    local = convert(tmp_path / "a.pt", "local", tokenizer="tokenizer.model").path
    weights = [
        (p / "model.safetensors").read_bytes() for p in (local, tmp_path / "here/out")
    ]
    assert weights[0] == weights[1]


def test_progress_is_reported_in_bytes(server):
    seen = []
    address_download.download_address(
        server.address + PATH,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    size = len(server.files[PATH])
    assert seen[-1] == (size, size)


def test_a_download_that_ends_half_way_resumes(server, tmp_path):
    url, size = server.address + PATH, len(server.files[PATH])
    server.cut = 100_000
    fail(tmp_path, url, message=[f"The download of {url} was interrupted", "resume it"])
    server.cut = None
    run(url)
    assert server.requests == [f"{PATH} all", f"{PATH} bytes=100000-"]
    assert server.sent == size


def test_a_server_without_ranges_sends_the_whole_file(server, tmp_path):
    server.cut, server.ranges = 100_000, False
    fail(tmp_path, server.address + PATH, message="interrupted")
    server.cut = None
    run(server.address + PATH)


@pytest.mark.parametrize("longer", [True, False])
def test_a_file_that_changed_half_way_is_not_resumed(server, tmp_path, longer):
    url = server.address + PATH
    server.cut = 100_000
    fail(tmp_path, url, message="interrupted")
    server.cut = None
    other = write_pt(tmp_path / "b.pt", weights_of(UNEVEN, seed=1)).read_bytes()
    server.files[PATH] = other if longer else other[:100_000]
    fail(tmp_path, url, message="has changed since its download began")
    server.files[PATH] = other
    assert sha256(other) in run(url).stderr


def test_an_expected_hash_is_checked(server, tmp_path):
    url, digest = server.address + PATH, sha256(server.files[PATH])
    message = f"has the hash sha256:{digest}, not the expected sha256:{'0' * 64}"
    fail(tmp_path, f"{url}#sha256={'0' * 64}", message=message)
    run(f"{url}#sha256={digest}")
    fail(tmp_path, f"{url}#sha256={'0' * 64}", "--force", message="expected sha256:0")
    fail(tmp_path, f"{url}#md5=1", message="expected #sha256= and 64 hexadecimal")


def test_weights_in_safetensors_come_with_their_config(server, tmp_path):
    folder = write_hugging_face(tmp_path / "hf", UNEVEN, weights_of(UNEVEN))
    for path in folder.iterdir():
        server.files[f"/mlx/{path.name}"] = path.read_bytes()
    run(f"{server.address}/mlx/model.safetensors")
    assert load("out")[0].config == UNEVEN
    assert len(server.requests) == 2


# Bad input -----------------------------------------------------------------------


def test_plain_http_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(address_download, "SCHEME", "https")
    fail(tmp_path, server.address + PATH, message="use its https:// address")
    assert not server.requests


def test_a_redirection_to_plain_http_is_refused(server, tmp_path):
    server.redirections["/to.pt"] = server.address + PATH
    run(f"{server.address}/to.pt")
    server.redirections["/out.pt"] = "ftp://127.0.0.1/a.pt"
    fail(tmp_path, f"{server.address}/out.pt", "--force", message="redirects to ftp://")
    server.redirections["/ever.pt"] = "/ever.pt"
    fail(tmp_path, f"{server.address}/ever.pt", "--force", message="more than 10 times")


def test_what_is_not_a_checkpoint(server, tmp_path):
    fail(tmp_path, f"{server.address}/none.pt", message="the server answers 404")
    server.files["/login.html.pt"] = b"<html>"
    fail(tmp_path, f"{server.address}/login.html.pt", message="is a web page")
    server.files["/text.pt"] = b"not a checkpoint"
    fail(tmp_path, f"{server.address}/text.pt", message="text.pt")
    fail(
        tmp_path, f"{server.address}/page", message="is a web address, but not the page"
    )
    fail(tmp_path, server.address + PATH, "--offline", message="is not in the cache")
    fail(
        tmp_path,
        server.address + PATH,
        "--revision",
        "x",
        message="applies to a Hub id",
    )


def test_an_unreachable_server(server, tmp_path):
    fail(
        tmp_path, "http://127.0.0.1:9/a.pt", message=["was interrupted", "the network"]
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("https://a.example/b/c.pt", True),
        ("http://a.example/c.ckpt", True),
        ("https://a.example/c.safetensors#sha256=0", True),
        ("https://huggingface.co/a/b/resolve/main/c.pt", False),
        ("https://a.example/c", False),
        ("c.pt", False),
        ("/a/c.pt", False),
    ],
)
def test_which_names_are_addresses_of_files(name, expected):
    assert is_file_address(name) == expected


# Released names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("OpenELM-270M-Instruct", "apple/OpenELM-270M-Instruct"),
        ("OpenELM-1.1B", "apple/OpenELM-1_1B"),
        ("openelm-3b", "apple/OpenELM-3B"),
        ("OpenELM-7B", None),
    ],
)
def test_released_names(name, expected):
    assert find_released(name) == expected


def test_a_bare_released_name_is_downloaded_unless_it_is_a_folder(
    tmp_path, monkeypatch
):
    name = "OpenELM-270M-Instruct"
    folder = write_hugging_face(tmp_path / name, UNEVEN, weights_of(UNEVEN))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    hub = Hub()
    hub.add(f"apple/{name}", files)
    with serve(hub):
        connect(hub, tmp_path / "home", monkeypatch)
        report = convert(name, "out", tokenizer="none")
        assert report.kind == "Hugging Face folder"
        requests = len(hub.requests)
        monkeypatch.chdir(tmp_path)
        convert(name, "again", tokenizer="none")
        assert len(hub.requests) == requests


# Secrets ---------------------------------------------------------------------------


def test_user_password_and_query_are_nowhere_shown_or_stored(server, tmp_path):
    host = server.address.removeprefix("http://")
    path = f"{PATH}?signature=SECRET"
    server.files[path] = server.files[PATH]
    url = f"http://ann:SECRET@{host}{path}"
    result = run(url, "--json")
    assert server.requests == [f"{path} all"]
    assert f"http://{host}{PATH}" in result.stdout
    assert "SECRET" not in result.output
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in written if b"SECRET" in p.read_bytes()]
    assert "SECRET" not in call("verify", "out", "--against", url).output
    path = path.replace("checkpoint", "none")
    for wrong, message in (
        (url.replace("checkpoint", "none"), "the server answers 404"),
        (f"{url}#sha256={'0' * 64}", "not the expected sha256:"),
        (f"{url}#md5=1", "expected #sha256="),
    ):
        result = call("convert", wrong, "--mlx-path", "other")
        assert message in result.stderr
        assert "SECRET" not in result.output
    assert call("convert", url, "--to", "peft").exit_code == 1


def test_a_file_without_a_version_is_downloaded_from_the_start(server, tmp_path):
    server.versions = False
    server.cut = 100_000
    fail(tmp_path, server.address + PATH, message="interrupted")
    server.cut = None
    other = write_pt(tmp_path / "b.pt", weights_of(UNEVEN, seed=1)).read_bytes()
    assert len(other) == len(server.files[PATH])
    server.files[PATH] = other
    assert sha256(other) in run(server.address + PATH).stderr


def test_a_wrong_hash_of_a_stored_file_names_the_file_to_remove(server, tmp_path):
    url = server.address + PATH
    run(url)
    other = write_pt(tmp_path / "b.pt", weights_of(UNEVEN, seed=1)).read_bytes()
    server.files[PATH] = other
    (stored,) = (tmp_path / "home").rglob("checkpoint_average.pt")
    expected = f"{url}#sha256={sha256(other)}"
    fail(tmp_path, expected, "--force", message=f"Remove {stored} to download it again")
    stored.unlink()
    run(expected)


def test_ctrl_c_keeps_what_was_downloaded(server, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(address_download, "_describe", stop)
        result = call("convert", server.address + PATH, "--mlx-path", "out")
    assert result.exit_code == 130
    assert "Interrupted. Repeat the command to resume the download." in result.stderr
    assert not (tmp_path / "here/out").exists()
    run(server.address + PATH)
