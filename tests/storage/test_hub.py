"""Models come from the Hub once, whole, and no more of them than is needed."""

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
WEIGHTS = bytes(range(256)) * 2000  # 512,000 bytes, none of them where it is by chance
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
    with pytest.raises(OpenELMError) as refusal:
        find_model(name, **options)
    said = str(refusal.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


# What is fetched -----------------------------------------------------------------


def test_a_first_download_brings_what_is_needed_and_nothing_else(hub):
    needed = {
        **ONE_FILE,
        "generation_config.json": b"{}",
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


def test_a_repository_of_pytorchs_files_comes_with_its_index(hub):
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


def test_branches_tags_and_commits_are_told_apart(hub):
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
def test_what_is_whole_in_the_cache_needs_no_network(hub, offline):
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
    if not listed:  # as older clients leave it: the index alone tells what is missing
        shutil.rmtree(folder.parents[1] / "trees")
    (folder / SECOND).resolve().unlink()  # the link stays and leads nowhere
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
    assert "without tokenizer.json, and asking the Hub failed" in refused("org/name")


def test_a_snapshot_that_others_left_without_weights_is_completed(hub):
    from huggingface_hub import hf_hub_download

    hub.add("org/name", ONE_FILE)
    hf_hub_download("org/name", "config.json")
    assert "without model.safetensors;" in refused("org/name", offline=True)
    assert read(find_model("org/name")) == ONE_FILE


def test_the_clients_own_check_finds_every_file_whole(hub):
    from huggingface_hub import HfApi

    hub.add("org/name", SHARDS)
    hub.cut_after, hub.cuts = 100_000, 3
    find_model("org/name")
    verified = HfApi().verify_repo_checksums("org/name")
    assert verified.checked_count == len(SHARDS)
    assert (verified.mismatches, verified.missing_paths) == ([], [])


def test_repositories_and_commits_are_read_off_the_cache(hub, tmp_path):
    commit = hub.add("org/some-name_1.0", ONE_FILE)
    folder = find_model("org/some-name_1.0")
    assert snapshot_of(folder) == ("org/some-name_1.0", commit)
    assert snapshot_of(tmp_path) is snapshot_of(folder.parent) is None
    assert snapshot_of(folder.with_name("main")) is None
    assert cached_snapshots() == [("org/some-name_1.0", folder)]


# Interruptions -------------------------------------------------------------------


def test_a_cut_connection_is_taken_up_where_it_broke(hub, caplog):
    logging.getLogger("huggingface_hub").addHandler(caplog.handler)
    hub.add("org/name", ONE_FILE)
    hub.cut_after, hub.cuts = 200_500, 2
    assert read(find_model("org/name")) == ONE_FILE
    assert not caplog.records  # the client's addresses and retries are no news
    logging.getLogger("huggingface_hub").removeHandler(caplog.handler)
    assert hub.ranges == ["bytes=200000-", "bytes=400000-"]  # in chunks of 1000
    assert hub.sent["model.safetensors"] == len(WEIGHTS) + 2 * 500


def test_an_interrupted_download_says_so_and_goes_on(hub):
    hub.add("org/name", SHARDS)
    hub.cut_after, hub.cuts = 200_500, 1

    def go_down(name):
        hub.down = name == SECOND

    hub.on_large = go_down
    said = refused("org/name")
    assert "download of org/name was interrupted" in said
    assert "goes on from where it stopped" in said
    hub.down, hub.on_large = False, None
    sent = dict(hub.sent)
    assert read(find_model("org/name")) == SHARDS
    assert hub.sent["model-00001-of-00002.safetensors"] == len(WEIGHTS) + 500
    assert hub.sent[SECOND] - sent[SECOND] < len(WEIGHTS)


def test_a_killed_download_goes_on_from_where_it_stopped(hub, tmp_path):
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
    had = part.stat().st_size
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.stderr == ""  # no bar where there is no terminal
    assert (Path(ran.stdout.strip()) / "model.safetensors").read_bytes() == large
    assert hub.ranges == [f"bytes={had}-"]
    assert hub.sent["model.safetensors"] == 15_000_000 + len(large) - had
    assert not part.exists()


def test_a_part_that_is_not_of_this_file_is_thrown_away(hub, tmp_path):
    hub.add("org/name", ONE_FILE)
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    part = tmp_path / f"home/hub/models--org--name/blobs/{digest}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    assert "checksum" in refused("org/name")
    assert read(find_model("org/name")) == ONE_FILE


def test_two_at_once_download_it_once(hub):
    hub.add("org/name", ONE_FILE)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(find_model, ["org/name"] * 2))
    assert [read(folder) for folder in folders] == [ONE_FILE]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


# Refusals ------------------------------------------------------------------------


def test_a_missing_repository_may_be_private(hub):
    said = refused("no-such/model")
    assert "no repository of that name, or a private one" in said
    assert "`hf auth login`" in said


def test_a_gated_repository_says_how_to_get_in(hub):
    hub.add("org/name", ONE_FILE)
    hub.gated.add("org/name")
    said = refused("org/name")
    assert f"accept its terms on {hub.endpoint}/org/name" in said
    assert "`hf auth login`" in said


def test_a_token_that_is_no_good_is_named(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.add("org/name", ONE_FILE)
    hub.knows_nobody = True
    assert "does not accept your token" in refused("org/name")


def test_a_wrong_revision_is_named_beside_the_right_ones(hub):
    hub.add("org/name", ONE_FILE)
    hub.add("org/name", ONE_FILE, "v1.0")
    said = refused("org/name", revision="v9")
    assert said == "org/name has no revision v9; it has main, v1.0."


def test_a_repository_without_a_model_says_what_it_has(hub):
    hub.add("apple/OpenELM", {"LICENSE": b"", "README.md": b""})
    said = refused("apple/OpenELM")
    assert "holds no model: it has no config.json, but LICENSE, README.md" in said
    index = json.loads(SHARDS["model.safetensors.index.json"])
    index["weight_map"]["c"] = "model-c.safetensors"
    broken = {"model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/broken", SHARDS | broken)
    assert "its index names model-c.safetensors" in refused("org/broken")


def test_another_kind_of_model_is_refused_before_its_weights_come(hub):
    hub.add("org/llama", ONE_FILE | {"config.json": b'{"model_type": "llama"}'})
    assert "model of type 'llama', and no OpenELM" in refused("org/llama")
    assert "model.safetensors" not in hub.sent


@pytest.mark.parametrize("name", ["a/b--c", "a/b.git", "-a/b", "a/b..c"])
def test_what_cannot_be_a_repository_is_no_traceback(hub, name):
    assert name in refused(name)
    assert not hub.requests


def test_no_network_is_said_at_once(hub):
    hub.down = True
    said = refused("org/name")
    assert "no model of that name in the local cache" in said
    assert "asking the Hub failed" in said


@pytest.mark.parametrize("variable", [True, False])
def test_offline_asks_for_nothing(hub, monkeypatch, variable):
    hub.add("org/name", ONE_FILE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", variable)
    said = refused("org/name", offline=not variable)
    assert "no model of that name in the local cache" in said
    assert "`offline` and HF_HUB_OFFLINE" in said
    assert not hub.requests


def test_a_full_disk_is_noticed_before_the_start(hub, monkeypatch):
    hub.add("org/name", ONE_FILE)
    little = shutil.disk_usage("/")._replace(free=len(WEIGHTS) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: little)
    assert "make room, or set HF_HOME" in refused("org/name")
    assert not hub.sent


def test_a_disk_that_fills_up_is_named(hub, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("org/name", ONE_FILE)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert "is full; make room and repeat the command" in refused("org/name")


def test_a_cache_that_cannot_be_written_is_named(hub, tmp_path):
    hub.add("org/name", ONE_FILE)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "hub").write_text("a file")
    assert "Cannot write into the Hub cache" in refused("org/name")


# Through the command line --------------------------------------------------------


def test_convert_takes_a_hub_id_with_a_bar_and_again_without_the_hub(hub, tmp_path):
    source = make_source(tmp_path / "source")
    commit = hub.add("org/OpenELM-small", read(source), "v2")
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    command = [sys.executable, "-m", "mlx_openelm", "convert", "org/OpenELM-small"]
    ran = subprocess.run(
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
    assert (ran.returncode, ran.stdout) == (0, "OpenELM-small-mlx\n"), shown
    assert "model.safetensors: 100%" in shown
    first = read(tmp_path / "OpenELM-small-mlx")
    hub.down = True
    args = ("convert", "org/OpenELM-small", "--revision", commit, "--mlx-path")
    again = call(*args, tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert read(tmp_path / "again")["model.safetensors"] == first["model.safetensors"]
