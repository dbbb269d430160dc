"""`--upload-repo`, against a small Hub on this machine."""

import json
import os
import pty
import re
import subprocess
import sys
import threading

import pytest
import yaml
from commands import call, expect_error, make_source
from hub_server import Hub, connect, environment_of, serve
from models import LINEARS, UNEVEN, make_factors, weights_of, write_peft_folder
from places import ROOT

from mlx_openelm.storage.hub import find_model
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.shards import write_json

# httpx, about a call in the Hub's client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload")
TOKEN = "hf_test"
REPO = "org/tale"
CONVERT = ("convert", "source", "--mlx-path", "out")
DATA = json.dumps({"text": "Once upon a time there was a king."}) + "\n"


def user(role="write", **more):
    token = {"displayName": "laptop", "role": role, **more}
    return {
        "type": "user",
        "name": "ann",
        "orgs": [{"name": "org"}],
        "auth": {"accessToken": token},
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(users={TOKEN: user()})
    with serve(hub):
        connect(hub, tmp_path / "home", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def here(tmp_path, monkeypatch):
    make_source(tmp_path / "here" / "source")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(*args):
    result = call(*args)
    assert result.exit_code == 0, result.output
    return result


def card_of(hub, repo=REPO):
    """Return the YAML header and the text of an uploaded card."""
    card = hub.revisions[repo]["main"]["README.md"].decode()
    _, header, text = card.split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.mark.parametrize("options", [(), ("--public",)])
def test_a_model_is_uploaded_and_loads_from_there(hub, here, options):
    result = run(*CONVERT, "--upload-repo", REPO, *options)
    assert result.stdout == "out\n"
    assert hub.private == {REPO: not options}
    visibility = "public" if options else "private"
    assert f"to the new {visibility} repository {REPO}, as ann" in result.stderr
    uploaded = hub.revisions[REPO]["main"]
    local = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    assert uploaded.keys() == local.keys() - {"model.safetensors.index.json"}
    assert all(local[n] == uploaded[n] for n in uploaded if n != "README.md")
    for name in uploaded.keys() - {"README.md"}:
        assert f"  {name}\n" in result.stderr
    _, text = card_of(hub)
    assert f"mlx-openelm generate --model {REPO}" in text
    assert f"mlx_lm.generate --model {REPO}" in text
    assert "THIS_FOLDER" not in text
    assert "- mlx-lm: yes\n" in text
    assert "- mlx-swift: no, it computes" in text
    assert "- llama.cpp: yes, after `mlx-openelm convert --to gguf`\n" in text
    load(str(find_model(REPO)))


def test_json_has_the_address(hub, here):
    report = json.loads(run(*CONVERT, "--json", "--upload-repo", REPO).stdout)
    assert report["uploaded"] == f"{hub.endpoint}/{REPO}"
    report = json.loads(run("convert", "source", "--mlx-path", "b", "--json").stdout)
    assert "uploaded" not in report


def test_the_card_has_origin_licence_and_receipt(hub, here):
    make_source(here / "OpenELM-270M-Instruct")
    run(*("convert", "OpenELM-270M-Instruct", "-q", "--q-group-size", 32),
        *("--mlx-path", "out", "--upload-repo", REPO))  # fmt: skip
    header, text = card_of(hub)
    assert header["library_name"] == "mlx"
    assert header["license"] == "apple-amlr"
    assert "from OpenELM-270M-Instruct (Hugging Face folder)" in text
    assert "Apple's licence" in text
    assert re.search(r"mean KL [\d.]+ nats", text)
    assert f"mlx_lm.chat --model {REPO}" in text  # it has a chat template


def test_a_folder_for_transformers_has_its_code_and_card(hub, here):
    run(*CONVERT, "--to", "hf", "--upload-repo", REPO)
    assert "modeling_openelm.py" in hub.revisions[REPO]["main"]
    header, text = card_of(hub)
    assert header["library_name"] == "transformers"
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in text
    assert "license" not in header  # unknown
    assert "The licence is that of the source." in text


def test_the_adapter_of_a_run_is_uploaded_without_the_data(hub, here):
    (here / "data.jsonl").write_text(DATA * 8)
    run(*CONVERT)
    run(*("lora", "--data", "data.jsonl", "--model", "out", "--iters", 4),
        *("--adapter-path", "tuned", "--upload-repo", REPO))  # fmt: skip
    assert (here / "tuned" / "recipe.yaml").is_file()
    uploaded = hub.revisions[REPO]["main"]
    names = {"adapter_config.json", "adapters.safetensors", "README.md"}
    assert uploaded.keys() == names
    assert str(here).encode() in (here / "tuned/adapter_config.json").read_bytes()
    assert all(str(here).encode() not in content for content in uploaded.values())
    config = json.loads(uploaded["adapter_config.json"])
    assert config["model"] == config["mlx_openelm"]["base"]["name"] == "out"
    _, text = card_of(hub)
    assert f"--adapter-path {REPO}" in text
    assert "An adapter of out." in text
    run(*("fuse", "--adapter-path", REPO, "--model", "out", "--save-path", "fused"),
        *("--upload-repo", "ann/f"))  # fmt: skip
    assert "model.safetensors" in hub.revisions["ann/f"]["main"]


def test_a_converted_adapter_names_its_base(hub, here):
    write_peft_folder(here / "theirs", make_factors(weights_of(UNEVEN), LINEARS))
    run("convert", "theirs", "--mlx-path", "ours", "--upload-repo", REPO)
    header, text = card_of(hub)
    assert header["base_model"] == "apple/OpenELM-270M"
    assert header["base_model_relation"] == "adapter"
    assert header["license"] == "apple-amlr"
    run("convert", "ours", "--to", "peft", "--mlx-path", "p", "--upload-repo", "ann/p")
    header, text = card_of(hub, "ann/p")
    assert header["library_name"] == "peft"
    assert 'PeftModel.from_pretrained(model, "ann/p")' in text


def test_a_folder_called_demo_has_no_licence_of_the_demo_model(hub, here):
    make_source(here / "demo-of-mine" / "demo")
    run("convert", "demo-of-mine/demo", "--mlx-path", "a", "--upload-repo", REPO)
    assert "license" not in card_of(hub)[0]
    write_peft_folder(here / "adapter", make_factors(weights_of(UNEVEN), LINEARS))
    run("convert", "demo", "--mlx-path", "b", "--upload-repo", "ann/b")
    run("convert", "b", "--mlx-path", "c", "--upload-repo", "ann/c")
    write_json(
        here / "adapter/adapter_config.json",
        json.loads((here / "adapter/adapter_config.json").read_text())
        | {"base_model_name_or_path": "demo"},
    )
    run("convert", "adapter", "--mlx-path", "d", "--upload-repo", "ann/d")
    assert {card_of(hub, f"ann/{n}")[0]["license"] for n in "bcd"} == {"apache-2.0"}


# Bad input -----------------------------------------------------------------------


def fail(here, *args, message):
    return expect_error(here, *CONVERT, *args, message=message)


def test_an_existing_repository_is_refused_before_the_work(hub, here):
    hub.add(REPO, {"config.json": b"{}"})
    fail(here, "--upload-repo", REPO, message=f"{REPO} exists already on the Hub")


def test_without_a_token(hub, here, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    message = "--upload-repo needs a Hub token with write access; log in with"
    fail(here, "--upload-repo", REPO, message=message)


def test_a_rejected_token(hub, here, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    fail(here, "--upload-repo", REPO, message="The Hub rejected your token")


def scoped(*permissions, name="org"):
    return {"scoped": [{"entity": {"name": name}, "permissions": permissions}]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (user("read"), "'laptop' of ann has no right to write to org; create one"),
        (user("fineGrained", fineGrained=scoped("repo.content.read")), "no right to"),
        (user("fineGrained", fineGrained=scoped("repo.write", name="ann")), "no right"),
        (user() | {"orgs": []}, "cannot write to org; it can to ann"),
    ],
)
def test_a_token_without_the_right_to_write(hub, here, answer, message):
    hub.users[TOKEN] = answer
    fail(here, "--upload-repo", REPO, message=message)


def test_a_fine_grained_token_with_the_right_to_write(hub, here):
    hub.users[TOKEN] = user("fineGrained", fineGrained=scoped("repo.write"))
    run(*CONVERT, "--upload-repo", REPO)


@pytest.mark.parametrize("name", ["tale", "a/b/c", "org/", "https://hf.co/org/tale"])
def test_a_name_that_is_no_id(hub, here, name):
    fail(here, "--upload-repo", name, message="expected ORG/NAME")


def test_other_wrong_uses(hub, here):
    fail(here, "--upload-repo", REPO, "--offline", message="needs the network")
    for args, message in (
        (("--public",), "needs --upload-repo"),
        (("--upload-repo", REPO, "--to", "gguf"), "uploads a folder"),
        (("--upload-repo", REPO, "--to", "gguf"), f"{REPO} FILE --private"),
    ):
        result = call(*CONVERT, *args)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    assert not hub.requests


@pytest.mark.parametrize("failing", ["preupload", "lfs/objects", "/commit/"])
def test_a_failed_upload_leaves_no_repository(hub, here, failing):
    hub.failing = failing
    result = call(*CONVERT, "--upload-repo", REPO)
    assert result.exit_code == 1
    assert f"error: out is complete, but was not uploaded to {REPO}: " in result.stderr
    assert "on fire" in result.stderr
    assert hub.deleted == [REPO]
    assert REPO not in hub.revisions
    assert call("verify", "out").exit_code == 0


def test_a_repository_that_cannot_be_deleted_is_named(hub, here):
    hub.failing, hub.keeps_repositories = "/commit/", True
    result = call(*CONVERT, "--upload-repo", REPO)
    assert result.exit_code == 1
    assert "on fire" in result.stderr
    assert f"{REPO}, which is new and incomplete, could not be deleted" in result.stderr


def test_ctrl_c_in_an_upload_leaves_no_repository(hub, here, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", stop)
    result = call(*CONVERT, "--upload-repo", REPO)
    assert result.exit_code == 130
    assert f"Interrupted. out is complete, but was not uploaded to {REPO}." in (
        result.stderr
    )
    assert hub.deleted == [REPO]


def test_a_repository_created_in_the_meantime_is_kept(hub, here, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.repo_exists", lambda *args: False)
    hub.add(REPO, {"config.json": b"{}"})
    result = call(*CONVERT, "--upload-repo", REPO)
    assert "the repository exists already; choose another name" in result.stderr
    assert hub.revisions[REPO]["main"] == {"config.json": b"{}"}


# On a terminal -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "options"), [("y", ("--quiet",)), ("n", ()), ("n", ("--public",))]
)
def test_it_asks_on_a_terminal(hub, here, tmp_path, answer, options):
    ours, theirs = pty.openpty()
    environment = environment_of(hub, tmp_path / "home")
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mlx_openelm",
            *CONVERT,
            "--upload-repo",
            REPO,
            *options,
        ],
        stdin=theirs,
        stderr=theirs,
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)},
    )
    os.close(theirs)
    shown, prompted = "", False
    timeout = threading.Timer(60, process.kill)
    timeout.start()
    try:
        while True:
            try:
                shown += os.read(ours, 4096).decode()
            except OSError:  # closed
                break
            if not prompted and "Upload? [y/N]" in shown:
                prompted = True
                assert REPO not in hub.revisions
                os.write(ours, f"{answer}\n".encode())
    finally:
        timeout.cancel()
        os.close(ours)
    assert process.wait() == 0, shown
    assert prompted, shown
    assert process.stdout.read() == "out\n"
    process.stdout.close()
    assert "model.safetensors" in shown
    assert (REPO in hub.revisions) == (answer == "y")
    assert (f"hf upload {REPO} out" in shown) == (answer == "n")
    assert ("--include=model.safetensors" in shown) == (answer == "n")
    assert (" --private" in shown) == (answer == "n" and not options)
