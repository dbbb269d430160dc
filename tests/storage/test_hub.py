"""Models are downloaded from the Hub once, completely, and only the needed files."""

import errno
import hashlib
import json
import logging
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import call, make_source
from hub_server import Hub, commit_of, connect, environment_of, serve

from mlx_openelm.errors import OpenELMError
from mlx_openelm.storage.hub import (
    cached_snapshots,
    choose_model_files,
    find_model,
    snapshot_of,
)

CONFIG = b'{"model_type": "openelm"}'
WEIGHTS = bytes(range(256)) * 2000  # 512,000 bytes
ONE_FILE = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
SHARDS = {
    "config.json": CONFIG,
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "tokenizer.json": b"{}",
}
SECOND = "model-00002-of-00002.safetensors"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    with serve(hub):
        connect(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # before a new try
        yield hub


def read(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(name, **options):
    with pytest.raises(OpenELMError) as error:
        find_model(name, **options)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


# Downloads -----------------------------------------------------------------------


def test_only_the_needed_files_are_downloaded(hub):
    needed = {
        **ONE_FILE,
        "generation_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "tokenizer.model": b"a tokenizer",
    }
    more = ("README.md", "x.png", "pytorch_model.bin", "modeling_openelm.py", "a.gguf")
    deeper = ("original/consolidated.00.pth", "onnx/model.onnx", "model/x.safetensors")
    hub.add("org/name", needed | dict.fromkeys((*more, *deeper), b"not needed"))
    assert read(find_model("org/name")) == needed
    assert hub.sent == {name: len(content) for name, content in needed.items()}


@pytest.mark.parametrize(
    ("names", "needed"),
    [
        ("config.json model.safetensors pytorch_model.bin", "model.safetensors"),
        ("config.json weights.safetensors README.md", "weights.safetensors"),
        ("config.json pytorch_model.bin x.bin model.onnx", "pytorch_model.bin"),
        (
            "config.json pytorch_model-1-of-2.bin pytorch_model-2-of-2.bin "
            "pytorch_model.bin.index.json",
            "pytorch_model-1-of-2.bin pytorch_model-2-of-2.bin "
            "pytorch_model.bin.index.json",
        ),
        (
            "adapter_config.json adapters.safetensors 0000100_adapters.safetensors",
            "adapters.safetensors adapter_config.json",
        ),
        (
            "adapter_config.json adapter_model.safetensors adapter_model.bin",
            "adapter_config.json adapter_model.safetensors",
        ),
        ("adapter_config.json adapter_model.bin", None),
        ("config.json adapter_config.json adapter_model.bin tokenizer.json", None),
        ("config.json", "config.json model.safetensors"),
        ("model.safetensors", "config.json model.safetensors"),
        ("", "config.json model.safetensors"),
    ],
)
def test_weights_are_chosen_in_one_layout(names, needed):
    chosen = choose_model_files(names.split())
    expected = set((names if needed is None else needed).split())
    assert set(chosen) - expected <= {"config.json"}
    assert expected <= set(chosen)
    assert len(chosen) == len(set(chosen))


def test_a_repository_of_pytorch_files_is_downloaded_with_its_index(hub):
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    files = {
        "config.json": CONFIG,
        "pytorch_model.bin.index.json": json.dumps(index).encode(),
        "pytorch_model-00001-of-00001.bin": WEIGHTS,
    }
    hub.add("org/name", files | {"tf_model.h5": b"not needed"})
    assert read(find_model("org/name")) == files


def test_an_adapter_is_found_by_its_name_too(hub):
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    hub.add("org/adapter", files | {"README.md": b"not needed"})
    assert read(find_model("org/adapter")) == files


def test_branches_tags_and_commits_are_distinguished(hub):
    files = {name: {**ONE_FILE, "tokenizer.json": name.encode()} for name in "abc"}
    for revision, content in zip(("main", "v1", "a/b"), files.values(), strict=True):
        hub.add("org/name", content, revision)
    for revision, content in (
        (None, files["a"]),
        ("v1", files["b"]),
        ("a/b", files["c"]),
        (commit_of(files["b"]), files["b"]),
    ):
        folder = find_model("org/name", revision=revision)
        assert read(folder) == content
        assert snapshot_of(folder) == ("org/name", commit_of(content))
    assert hub.sent["model.safetensors"] == len(WEIGHTS)  # they share it


def test_a_token_stays_at_the_hub(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.add("org/name", ONE_FILE)
    find_model("org/name")
    assert hub.tokens == {"127.0.0.1": {"Bearer hf_secret"}}  # and not "localhost"


# The cache -----------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_a_complete_snapshot_needs_no_network(hub, offline):
    commit = hub.add("org/name", SHARDS)
    folder = find_model("org/name")
    before = len(hub.requests)
    hub.down = True
    assert find_model("org/name", offline=offline) == folder
    assert find_model("org/name", offline=offline, revision=commit) == folder
    assert len(hub.requests) == before


@pytest.mark.parametrize("listed", [True, False])
def test_an_incomplete_snapshot_is_completed_or_refused(hub, tmp_path, listed):
    hub.add("org/name", SHARDS)
    folder = find_model("org/name")
    if not listed:  # older clients do not cache the listing; only the index is left
        shutil.rmtree(folder.parents[1] / "trees")
    (folder / SECOND).resolve().unlink()  # leaves a dangling link
    assert f"without {SECOND};" in refused("org/name", offline=True)
    hub.sent.clear()
    assert read(find_model("org/name")) == SHARDS
    assert hub.sent == {SECOND: len(WEIGHTS)}


def test_a_missing_tokenizer_is_noticed_by_the_listing(hub):
    hub.add("org/name", SHARDS)
    folder = find_model("org/name")
    (folder / "tokenizer.json").unlink()
    assert "without tokenizer.json;" in refused("org/name", offline=True)
    hub.down = True
    assert "without tokenizer.json, and the request to the Hub" in refused("org/name")


def test_a_snapshot_of_another_program_without_weights_is_completed(hub):
    from huggingface_hub import hf_hub_download

    hub.add("org/name", ONE_FILE)
    hf_hub_download("org/name", "config.json")
    assert "without model.safetensors;" in refused("org/name", offline=True)
    assert read(find_model("org/name")) == ONE_FILE


def test_the_clients_check_finds_every_file_complete(hub):
    from huggingface_hub import HfApi

    hub.add("org/name", SHARDS)
    hub.cut_after, hub.cuts = 100_000, 3
    find_model("org/name")
    verified = HfApi().verify_repo_checksums("org/name")
    assert verified.checked_count == len(SHARDS)
    assert (verified.mismatches, verified.missing_paths) == ([], [])


def test_repositories_and_commits_are_read_from_the_cache(hub, tmp_path):
    commit = hub.add("org/some-name_1.0", ONE_FILE)
    folder = find_model("org/some-name_1.0")
    assert snapshot_of(folder) == ("org/some-name_1.0", commit)
    assert snapshot_of(tmp_path) is snapshot_of(folder.parent) is None
    assert snapshot_of(folder.with_name("main")) is None
    assert cached_snapshots() == [("org/some-name_1.0", folder)]


# Interruptions -------------------------------------------------------------------


def test_a_broken_connection_is_resumed(hub, caplog):
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    hub.add("org/name", ONE_FILE)
    hub.cut_after, hub.cuts = 200_500, 2
    assert read(find_model("org/name")) == ONE_FILE
    assert not caplog.records  # the client's retries are not shown
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert hub.ranges == ["bytes=200000-", "bytes=400000-"]  # in chunks of 1000
    assert hub.sent["model.safetensors"] == len(WEIGHTS) + 2 * 500


def test_an_interrupted_download_is_reported_and_resumes(hub):
    hub.add("org/name", SHARDS)
    hub.cut_after, hub.cuts = 200_500, 1

    def go_down(name):
        hub.down = name == SECOND

    hub.on_large = go_down
    message = refused("org/name")
    assert "download of org/name was interrupted" in message
    assert "repeat the command to resume it" in message
    hub.down, hub.on_large = False, None
    sent = dict(hub.sent)
    assert read(find_model("org/name")) == SHARDS
    assert hub.sent["model-00001-of-00002.safetensors"] == len(WEIGHTS) + 500
    assert hub.sent[SECOND] - sent[SECOND] < len(WEIGHTS)


def test_a_killed_download_resumes_from_where_it_stopped(hub, tmp_path):
    large = os.urandom(24_000_000)
    hub.add("org/name", {"config.json": CONFIG, "model.safetensors": large})
    hub.cut_after, hub.cuts, hub.stall = 15_000_000, 1, threading.Event()
    program = (
        "from mlx_openelm.storage.hub import find_model; print(find_model('org/name'))"
    )
    command = [sys.executable, "-c", program]
    environment = environment_of(hub, tmp_path / "other")
    blobs = tmp_path / "other/hub/models--org--name/blobs"
    with subprocess.Popen(command, env=environment) as process:
        assert hub.stalled.wait(60)
        while not any(part.stat().st_size for part in blobs.glob("*.incomplete")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (part,) = blobs.glob("*.incomplete")
    size = part.stat().st_size
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stderr == ""  # no bar without a terminal
    assert (Path(result.stdout.strip()) / "model.safetensors").read_bytes() == large
    assert hub.ranges == [f"bytes={size}-"]
    assert hub.sent["model.safetensors"] == 15_000_000 + len(large) - size
    assert not part.exists()


def test_a_part_of_another_file_is_discarded(hub, tmp_path):
    hub.add("org/name", ONE_FILE)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    part = tmp_path / f"home/hub/models--org--name/blobs/{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert "checksum" in refused("org/name")
    assert read(find_model("org/name")) == ONE_FILE


def test_two_threads_download_a_model_once(hub):
    hub.add("org/name", ONE_FILE)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(find_model, ["org/name"] * 2))
    assert [read(folder) for folder in folders] == [ONE_FILE]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


# Errors --------------------------------------------------------------------------


def test_a_missing_repository_may_be_private(hub):
    message = refused("no-such/model")
    assert "missing from the Hub or private" in message
    assert "`hf auth login`" in message


def test_the_error_for_a_gated_repository_explains_how_to_get_access(hub):
    hub.add("org/name", ONE_FILE)
    hub.gated.add("org/name")
    message = refused("org/name")
    assert f"accept its terms on {hub.endpoint}/org/name" in message
    assert "`hf auth login`" in message


def test_an_invalid_token_is_reported(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.add("org/name", ONE_FILE)
    hub.rejects_tokens = True
    assert "rejected your token" in refused("org/name")


def test_the_error_for_a_wrong_revision_lists_the_existing_ones(hub):
    hub.add("org/name", ONE_FILE)
    hub.add("org/name", ONE_FILE, "v1.0")
    message = refused("org/name", revision="v9")
    assert message == "org/name has no revision v9; it has main, v1.0."


def test_the_error_for_a_repository_without_a_model_lists_its_files(hub):
    hub.add("apple/OpenELM", {"LICENSE": b"", "README.md": b""})
    message = refused("apple/OpenELM")
    assert "has no model: config.json is missing" in message
    assert "its files are LICENSE, README.md" in message
    index = json.loads(SHARDS["model.safetensors.index.json"])
    index["weight_map"]["c"] = "model-c.safetensors"
    broken = {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/broken", SHARDS | broken)
    assert "its index names model-c.safetensors" in refused("org/broken")


def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(hub):
    hub.add("org/llama", ONE_FILE | {"config.json": b'{"model_type": "llama"}'})
    assert "model of type 'llama', not an OpenELM" in refused("org/llama")
    assert "model.safetensors" not in hub.sent


@pytest.mark.parametrize("name", ["a/b--c", "a/b.git", "-a/b", "a/b..c"])
def test_an_invalid_repository_name_is_reported(hub, name):
    assert name in refused(name)
    assert not hub.requests


def test_a_missing_network_is_reported(hub):
    hub.down = True
    message = refused("org/name")
    assert "the local cache has no model of that name" in message
    assert "the request to the Hub failed" in message


@pytest.mark.parametrize("variable", [True, False])
def test_offline_sends_no_request(hub, monkeypatch, variable):
    hub.add("org/name", ONE_FILE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", variable)
    message = refused("org/name", offline=not variable)
    assert "the local cache has no model of that name" in message
    assert "`offline` and HF_HUB_OFFLINE" in message
    assert not hub.requests


def test_a_full_disk_is_reported_before_the_download(hub, monkeypatch):
    hub.add("org/name", ONE_FILE)
    little = shutil.disk_usage("/")._replace(free=len(WEIGHTS) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: little)
    assert "free disk space, or set HF_HOME" in refused("org/name")
    assert not hub.sent


def test_a_disk_that_fills_up_during_the_download_is_reported(hub, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("org/name", ONE_FILE)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert "is full; free disk space and repeat" in refused("org/name")


def test_a_cache_that_cannot_be_written_is_reported(hub, tmp_path):
    hub.add("org/name", ONE_FILE)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file")
    assert "Cannot write into the Hub cache" in refused("org/name")


# Through the command line --------------------------------------------------------


def test_convert_downloads_with_a_bar_and_then_works_without_the_hub(hub, tmp_path):
    source = make_source(tmp_path / "source")
    commit = hub.add("org/OpenELM-small", read(source), "v2")
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "mlx_openelm", "convert", "org/OpenELM-small"]
    result = subprocess.run(
        [*command, "--revision", "v2"],
        env=environment_of(hub, tmp_path / "home") | {"TERM": "xterm"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    shown = os.read(screen, 100_000).decode()
    os.close(screen)
    assert (result.returncode, result.stdout) == (0, "OpenELM-small-mlx\n"), shown
    assert "model.safetensors: 100%" in shown
    first = read(tmp_path / "OpenELM-small-mlx")
    hub.down = True
    args = ("convert", "org/OpenELM-small", "--revision", commit, "--mlx-path")
    again = call(*args, tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert read(tmp_path / "again")["model.safetensors"] == first["model.safetensors"]
