"""What the program proposes: names of models, and the next command after each one."""

import json
import shlex

import pytest
from commands import call, expect_error
from models import UNEVEN, make_factors, weights_of, write_mlx_lm_adapter

from mlx_openelm.storage.hub import RELEASED, find_released

EIGHT = [
    f"apple/OpenELM-{size}{suffix}"
    for size in ("270M", "450M", "1_1B", "3B")
    for suffix in ("", "-Instruct")
]


def next_command(result):
    """Return the arguments in the last line on stderr."""
    assert result.exit_code == 0, result.stderr
    *_, heading, line = result.stderr.splitlines()
    assert heading == "Next:"
    program, *arguments = shlex.split(line)
    assert program == "mlx-openelm"
    return arguments


@pytest.fixture
def adapter(here):
    """An adapter of "model", in a folder whose name the shell would split."""
    modules = [
        name.removesuffix(".weight")
        for name, shape in UNEVEN.tensor_shapes().items()
        if len(shape) == 2 and "layers" in name
    ]
    path = here / "an adapter"
    write_mlx_lm_adapter(path, make_factors(weights_of(UNEVEN), modules))
    config = json.loads((path / "adapter_config.json").read_text())
    config["model"] = str(here / "model")
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def examples(here):
    records = [{"prompt": f"king {i}", "completion": "the queen"} for i in range(12)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (here / "examples.jsonl").write_text(text)
    return ("lora", "--data", "examples.jsonl", "--iters", "2")


# Names ---------------------------------------------------------------------------


def test_convert_without_a_source_lists_what_can_be_converted(here):
    result = call("convert")
    assert (result.exit_code, result.stdout) == (2, "")
    listed = [line.strip("│ ") for line in result.stderr.splitlines()]
    assert [line for line in listed if line in EIGHT] == EIGHT
    assert "demo" in listed
    assert ".pt" in result.stderr
    assert "folder" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("convert",),
        ("inspect",),
        ("generate", "Hi", "--model"),
        ("evaluate", "--tasks", "x.json", "--model"),
    ],
)
@pytest.mark.parametrize(
    ("name", "released"),
    [
        ("270M", "apple/OpenELM-270M"),
        ("OpenELM-270M", "apple/OpenELM-270M"),
        ("openelm-1.1B-instruct", "apple/OpenELM-1_1B-Instruct"),
    ],
)
def test_a_short_name_leads_to_the_released_model(here, args, name, released):
    expected = [f"`mlx-openelm convert {released}`", "demo", ".pt", "folder", *EIGHT]
    if args == ("convert",) and find_released(name):  # it is downloaded
        expected = [f"{released} is not a local folder", "local cache has no model"]
    expect_error(here, *args, name, message=expected)


def test_an_unknown_name_lists_what_can_be_used(here):
    message = expect_error(here, "generate", "Hi", "--model", "nowhere", message=EIGHT)
    assert "mlx-openelm convert" not in message


def test_a_wrong_hub_id_leads_to_the_released_model(here):
    correct = "`mlx-openelm convert apple/OpenELM-1_1B`"
    expect_error(here, "convert", "apple/OpenELM-1.1B", "--offline", message=correct)
    message = expect_error(
        here, "convert", "apple/OpenELM-1_1B", "--offline", message="cache"
    )
    assert "mlx-openelm convert" not in message
    assert list(RELEASED) == EIGHT


def test_a_repository_without_a_tokenizer_is_to_be_converted(here, monkeypatch):
    commit = "0" * 40
    snapshot = here / "hub/models--apple--OpenELM-270M/snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    (here / "model").rename(snapshot)
    for file in snapshot.glob("tokenizer*"):
        file.unlink()
    monkeypatch.setattr("mlx_openelm.storage.hub.download", lambda *a, **k: snapshot)
    expect_error(
        here,
        *("generate", "Hi", "--model", "apple/OpenELM-270M"),
        message="apple/OpenELM-270M has no tokenizer; `mlx-openelm convert apple/",
    )


# The model that is trained -------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ((), "model: the built-in demo; --model NAME trains another"),
        (("--model", "model"), "model: {here}/model"),
    ],
)
def test_the_first_line_of_lora_names_the_model(here, examples, args, line):
    result = call(*examples, *args, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.splitlines()[0] == line.format(here=here)


# The next command ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "proposed"),
    [
        ((), ["generate", "--model", "a b", "Once upon a time"]),
        (("--to", "hf"), ["generate", "--model", "a b", "Once upon a time"]),
        (("--tokenizer", "none"), ["verify", "a b"]),
    ],
)
def test_after_convert_the_next_command_uses_the_folder(here, args, proposed):
    source = here / "source"
    if "none" in args:
        (source / "tokenizer.model").unlink()
    result = call("convert", "source", "--mlx-path", "a b", *args)
    assert next_command(result) == proposed
    assert (
        call(*proposed, *(["-m", 3] if "generate" in proposed else [])).exit_code == 0
    )


def test_after_an_export_the_next_command_uses_the_file(here):
    result = call("convert", "source", "--to", "gguf", "--mlx-path", "a b.gguf")
    assert result.stderr.endswith("\nllama-cli -m 'a b.gguf' -p 'Once upon a time'\n")
    result = call("convert", "source", "--to", "corenet", "--mlx-path", "a b.pt")
    proposed = next_command(result)
    assert proposed == ["parity", "a b.pt"]
    pytest.importorskip("torch", reason="parity needs torch")
    assert call(*proposed, "--num-tokens", 4).exit_code == 0


def test_after_fuse_and_for_an_adapter_the_next_command_runs(here, adapter):
    for args in (
        ("fuse", "--adapter-path", adapter, "--save-path", "a fused model"),
        ("convert", adapter, "--mlx-path", "an mlx adapter"),
    ):
        proposed = next_command(call(*args))
        assert proposed[0] == "generate"
        assert args[-1] in proposed
        assert call(*proposed, "-m", 3).exit_code == 0
    proposed = next_command(call("convert", adapter, "--to", "peft"))
    assert proposed[:3] == ["fuse", "--adapter-path", "an adapter-peft"]
    assert call(*proposed).exit_code == 0
    corenet = ("--to", "corenet", "--mlx-path", "both.pt")
    proposed = next_command(call("convert", adapter, *corenet))
    assert call(*proposed).exit_code == 0


def test_after_lora_the_next_command_uses_the_adapter(here, examples):
    result = call(*examples, "--model", "model", "--adapter-path", "my run")
    proposed = next_command(result)
    assert proposed[:2] == ["generate", "--adapter-path"]
    assert proposed[2] in ("my run", "my run/best")
    assert proposed[3].startswith("king ")
    assert call(*proposed, "-m", 3).exit_code == 0


def test_after_grow_the_next_command_plans_the_training(here):
    result = call("grow", "source", "--width", 2, "-o", "a grown model")
    proposed = next_command(result)
    assert "a grown model/checkpoint.pt" in proposed
    assert call(*proposed).exit_code == 0


def test_after_pretrain_the_next_command_converts_the_weights(here, monkeypatch):
    pytest.importorskip("torch", reason="pre-training needs torch")
    weights = here / "my run" / "checkpoint_average.pt"
    monkeypatch.setattr("converters.pretraining.run.pretrain", lambda *a, **k: weights)
    result = call("pretrain", "-c", "pretrain/stories")
    assert next_command(result) == ["convert", str(weights)]


@pytest.mark.parametrize("flag", ["--quiet", "--json"])
def test_scripts_get_no_next_command(here, adapter, examples, flag):
    for args in (
        ("convert", "source"),
        ("convert", adapter),
        ("fuse", "--adapter-path", adapter, "--save-path", "fused"),
        ("grow", "source", "--width", 2),
        (*examples, "--model", "model"),
    ):
        result = call(*args, flag)
        assert result.exit_code == 0, result.stderr
        assert "Next:" not in result.stderr
