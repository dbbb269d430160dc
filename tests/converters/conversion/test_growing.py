"""Growing a model: the larger one has the same logits."""

import itertools
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from commands import call, expect_error, make_source, replace_last
from models import (
    UNEVEN,
    make_factors,
    raw_tensors,
    weights_of,
    write_mlx_lm_adapter,
    write_pt,
)

import mlx_openelm
from converters.conversion import growing
from converters.conversion.growing import Growth, grow, grow_config, grow_tensor
from converters.formats.pt_reader import read_checkpoint
from converters.formats.sources import open_source
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.tensor_names import EMBEDDING, HEAD, to_folder

torch = pytest.importorskip("torch", reason="needs PyTorch for the reference")

TOKENS = np.array([[1, 17, 255, 3, 99, 99, 0, 42, 7], [1, 5, 5, 5, 298, 12, 30, 31, 2]])
UNTIED = replace(UNEVEN, share_input_output_layers=False)
FORMS = {"tied": UNEVEN, "untied": UNTIED}


def torch_logits(config: OpenELMConfig, weights: dict[str, np.ndarray]) -> np.ndarray:
    from converters.reference import ReferenceOpenELM

    model = ReferenceOpenELM(config)
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).numpy()


def mlx_logits(config: OpenELMConfig, weights: dict[str, np.ndarray]) -> np.ndarray:
    model = OpenELM(config)
    model.load_weights([(to_folder(n), mx.array(w)) for n, w in weights.items()])
    return np.array(model(mx.array(TOKENS)))


def read_grown(checkpoint: Path) -> tuple[OpenELMConfig, dict[str, np.ndarray]]:
    """Read a grown model with torch.load, not with `pt_reader`."""
    config = OpenELMConfig.from_file(checkpoint.with_name("config.json"))
    state = torch.load(checkpoint, weights_only=True)
    return config, {name: tensor.numpy() for name, tensor in state.items()}


def assert_same_logits(expected: np.ndarray, checkpoint: Path) -> None:
    config, weights = read_grown(checkpoint)
    for logits in (torch_logits(config, weights), mlx_logits(config, weights)):
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


def logits_of_source(name: str | Path) -> np.ndarray:
    source = open_source(str(name), offline=True)
    weights = {
        name: np.array(tensor.read().astype(mx.float32))
        for name, tensor in source.tensors.items()
    }
    return torch_logits(source.config, weights)


# Equal logits --------------------------------------------------------------------


@pytest.mark.parametrize("noise_db", [None, 10.0])
@pytest.mark.parametrize(
    ("width", "ffn"), [(2, 2), (2, 4), (3, 2), (3, 4), (1, 2), (2, 1)]
)
@pytest.mark.parametrize("form", FORMS)
def test_a_grown_model_has_the_logits_of_its_source(
    tmp_path, form, width, ffn, noise_db
):
    config = FORMS[form]
    source = make_source(tmp_path / "source", config=config)
    report = grow(
        source, tmp_path / "grown", width=width, ffn=ffn, noise_db=noise_db, seed=3
    )
    assert_same_logits(torch_logits(config, weights_of(config)), report.path)
    grown, weights = read_grown(report.path)
    assert grown.model_dim == width * 64
    assert grown.ffn_dims == tuple(ffn * dim for dim in config.ffn_dims)
    assert grown.num_parameters == report.num_parameters > report.before
    assert all(weight.dtype == np.float32 for weight in weights.values())


def test_the_grown_demo_has_the_same_logits(tmp_path):
    report = grow("demo", tmp_path / "grown", width=2, noise_db=10, offline=True)
    assert_same_logits(logits_of_source("demo"), report.path)


@pytest.mark.proof
@pytest.mark.parametrize(
    ("width", "ffn", "noise_db"), list(itertools.product((2, 3), (2, 4), (None, 10.0)))
)
def test_the_demo_grown_by_any_factor_has_the_same_logits(
    tmp_path, width, ffn, noise_db
):
    report = grow(
        "demo", tmp_path / "x", width=width, ffn=ffn, noise_db=noise_db, offline=True
    )
    assert_same_logits(logits_of_source("demo"), report.path)


@pytest.mark.parametrize("form", FORMS)
def test_a_grown_model_can_grow_again(tmp_path, form):
    config = FORMS[form]
    source = make_source(tmp_path / "source", config=config)
    once = grow(source, tmp_path / "once", width=2, ffn=3, noise_db=10)
    twice = grow(once.path, tmp_path / "twice", width=3, ffn=2, noise_db=10, seed=1)
    assert_same_logits(torch_logits(config, weights_of(config)), twice.path)
    assert read_grown(twice.path)[0].model_dim == 6 * config.model_dim


def test_a_single_key_value_head_stays_single():
    """Layer 0 of UNEVEN has one; the others grow with the query heads."""
    grown = grow_config(UNEVEN, Growth(2, 2))
    assert (grown.num_query_heads, grown.num_kv_heads) == ((4, 8, 12), (1, 8, 4))


@pytest.mark.parametrize("kind", ["packed", "corenet", "half"])
def test_any_source_that_converts_grows(tmp_path, kind):
    source = make_source(tmp_path / "source")
    if kind == "packed":
        source = tmp_path / "packed"
        mlx_openelm.convert(
            tmp_path / "source", source, bits=8, group_size=32, receipt=False
        )
    elif kind == "corenet":  # its embedding has padding rows
        source = tmp_path / "source" / "corenet.pt"
        mlx_openelm.convert(tmp_path / "source", source, to="corenet")
    else:
        source = write_pt(
            tmp_path / "source" / "x.pt", weights_of(UNEVEN), None, "half"
        )
    report = grow(source, tmp_path / "grown", width=2, noise_db=20)
    assert_same_logits(logits_of_source(source), report.path)
    unpacked = any("Dequantized 13 tensors" in note for note in report.notes)
    assert unpacked == (kind == "packed")


# Sizes and tensors ---------------------------------------------------------------


def blocks_of(weight: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return (rows, columns, out, in)."""
    out, into = weight.shape[0] // rows, weight.shape[1] // columns
    return weight.reshape(rows, out, columns, into).transpose(0, 2, 1, 3)


def parts_of(name: str, weight: np.ndarray, config: OpenELMConfig) -> list[np.ndarray]:
    """The linears that a tensor holds: q, k and v, or gate and up."""
    layer = int(name.split(".")[1]) if name.startswith("layers") else 0
    if "qkv_proj" in name:
        q, k = config.num_query_heads[layer], config.num_kv_heads[layer]
        return np.split(weight, [q * config.head_dim, (q + k) * config.head_dim])
    return np.split(weight, 2) if "proj_1" in name else [weight]


@pytest.mark.parametrize(("width", "ffn"), [(2, 3), (3, 2), (4, 5)])
def test_noise_cancels_in_pairs_of_columns_and_has_its_level(width, ffn):
    weights, growth = weights_of(UNTIED), Growth(width, ffn, 10.0, 0)
    config = grow_config(UNTIED, growth)
    for name, weight in weights.items():
        rng = np.random.default_rng(5)
        grown = grow_tensor(name, weight, UNTIED, growth, rng)
        assert grown.shape == config.tensor_shapes()[name]
        if weight.ndim == 1 or name in (EMBEDDING, HEAD):
            plain = grow_tensor(name, weight, UNTIED, Growth(width, ffn), rng)
            np.testing.assert_array_equal(grown, plain)
            continue
        pairs = zip(
            parts_of(name, grown, config), parts_of(name, weight, UNTIED), strict=True
        )
        for large, small in pairs:
            rows, columns = (
                large.shape[0] // small.shape[0],
                large.shape[1] // small.shape[1],
            )
            blocks, block = blocks_of(large, rows, columns), small / columns
            noise = blocks - block
            for row, left in itertools.product(range(rows), range(0, columns - 1, 2)):
                plus, minus = noise[row, left], noise[row, left + 1]
                np.testing.assert_allclose(plus, -minus, atol=1e-6)
                ratio = np.mean(block**2) / np.mean(plus**2)
                assert ratio == pytest.approx(10, rel=1e-3)
            if columns % 2:
                assert not noise[:, -1].any()
            different = noise[:, : columns // 2 * 2 : 2].reshape(-1, block.size)
            assert len(np.unique(different[:, 0])) == rows * (columns // 2)


@pytest.mark.parametrize("width", [2, 3])
def test_each_head_has_its_own_noise_level(width):
    """As in the authors' code, which clones queries, keys and values head by head."""
    H, layer = UNTIED.head_dim, 2
    name = f"layers.{layer}.attn.qkv_proj.weight"
    weight = weights_of(UNTIED)[name].copy()
    heads = len(weight) // H
    weight *= np.repeat(2.0 ** np.arange(heads), H)[:, None].astype(np.float32)
    growth = Growth(width, 2, 10.0)
    grown = grow_tensor(name, weight, UNTIED, growth, np.random.default_rng(1))
    queries, keys = UNTIED.num_query_heads[layer], UNTIED.num_kv_heads[layer]
    sources = [
        *(list(range(queries)) * width),
        *(list(range(queries, queries + keys)) * width),
        *(list(range(queries + keys, heads)) * width),
    ]
    assert len(grown) == len(sources) * H
    for number, head in enumerate(sources):
        block = weight[head * H : (head + 1) * H] / width
        copies = grown[number * H : (number + 1) * H].reshape(H, width, -1)
        noise = copies[:, 0] - block
        ratio = np.mean(np.square(block)) / np.mean(np.square(noise))
        assert ratio == pytest.approx(10, rel=1e-3), (number, head)


def test_without_noise_all_copies_are_identical():
    weights, growth = weights_of(UNEVEN), Growth(3, 2)
    name = "layers.2.attn.out_proj.weight"
    rng = np.random.default_rng(0)
    grown = grow_tensor(name, weights[name], UNEVEN, growth, rng)
    expected = np.tile(weights[name] / np.float32(3), (3, 3))
    np.testing.assert_array_equal(grown, expected)


def test_the_seed_decides_the_noise(tmp_path):
    source = make_source(tmp_path / "source")
    files = [
        grow(source, tmp_path / str(i), width=2, noise_db=10, seed=seed).path
        for i, seed in enumerate((0, 0, 1))
    ]
    first, again, other = (file.read_bytes() for file in files)
    assert first == again != other


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    layers = 24
    config = OpenELMConfig(
        model_dim=64,
        head_dim=16,
        num_query_heads=(4,) * layers,
        num_kv_heads=(2,) * layers,
        ffn_dims=(128,) * layers,
        vocab_size=300,
        max_context_length=64,
    )
    source = make_source(tmp_path / "source", config=config)
    growth = Growth(4, 4, 10.0)
    shapes = grow_config(config, growth).tensor_shapes().values()
    largest = max(4 * np.prod(shape) for shape in shapes)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        tensors = growing.grown_tensors(open_source(str(source)), growth)
        growing.write_pt(tmp_path / "grown.pt", tensors)
        peak = tracemalloc.get_traced_memory()[1] + mx.get_peak_memory() - before
    finally:
        tracemalloc.stop()
    assert peak < 8 * largest < (tmp_path / "grown.pt").stat().st_size / 3


@pytest.mark.parametrize("noise_db", [None, 10.0])
def test_copies_stay_identical_in_training_unless_noise_was_added(noise_db):
    from converters.reference import ReferenceOpenELM, summed_loss

    growth, weights = Growth(2, 2, noise_db), weights_of(UNTIED)
    model = ReferenceOpenELM(grow_config(UNTIED, growth))
    for number, (name, parameter) in enumerate(model.named_parameters()):
        rng = np.random.default_rng(number)
        grown = grow_tensor(name, weights[name], UNTIED, growth, rng)
        parameter.data = torch.from_numpy(np.ascontiguousarray(grown))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.from_numpy(TOKENS)
    for _ in range(3):
        loss, _ = summed_loss(model(tokens[:, :-1]), tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    one, other = model.token_embeddings.weight.detach().chunk(2, dim=1)
    assert torch.allclose(one, other, atol=1e-6) == (noise_db is None)


# The folder ----------------------------------------------------------------------


def test_the_folder_has_the_layout_of_a_pre_training_run(here):
    (here / "source" / "generation_config.json").write_text('{"temperature": 0.5}')
    result = call("grow", "source", "--width", 2, "--noise-db", 10, "--seed", 4)
    assert (result.exit_code, result.stdout) == (0, "source-grown/checkpoint.pt\n")
    assert "Untied the output head" in result.stderr
    grown = here / "source-grown"
    assert sorted(path.name for path in grown.iterdir()) == [
        *("checkpoint.pt", "config.json", "generation_config.json", "tokenizer.model")
    ]
    for name in ("generation_config.json", "tokenizer.model"):
        assert (grown / name).read_bytes() == (here / "source" / name).read_bytes()
    config = json.loads((grown / "config.json").read_text())
    assert config["ffn_dims"] == [192, 320, 128]
    assert config["num_query_heads"] == [4, 8, 12]
    assert config["share_input_output_layers"] is False
    assert config["mlx_openelm"]["growth"] == {
        **{"width": 2, "ffn": 2, "noise_db": 10.0, "seed": 4}
    }
    written = read_checkpoint(grown / "checkpoint.pt").tensors
    expected = grow_config(UNEVEN, Growth(2, 2)).tensor_shapes()
    assert {name: tensor.shape for name, tensor in written.items()} == expected


def test_json_describes_the_grown_model(here):
    args = ("source", "--width", 1, "--ffn", 2, "--noise-db", 10, "-o", "x", "--json")
    result = call("grow", *args)
    report = json.loads(result.stdout)
    assert report["path"] == "x/checkpoint.pt"
    assert (report["width"], report["ffn"], report["noise_db"]) == (1, 2, 10.0)
    assert report["before"] == UNEVEN.num_parameters < report["num_parameters"]
    assert any("no copies" in note for note in report["notes"])
    assert call("grow", "source", "--width", 2, "-o", "y", "--quiet").stderr == ""


def test_force_replaces_only_grown_models(here):
    assert call("grow", "source", "--width", 2, "-o", "x").exit_code == 0
    again = ("grow", "source", "--width", 3, "-o", "x")
    expect_error(here, *again, message="x exists already")
    assert call(*again, "--force").exit_code == 0
    assert read_grown(here / "x" / "checkpoint.pt")[0].model_dim == 3 * 64
    (here / "x" / "notes.txt").write_text("mine")
    expect_error(here, *again, "--force", message="so --force does not replace it")


def test_force_does_not_replace_a_pre_training_run(here):
    """Although it also has a checkpoint and a config."""
    for name in ("config.json", "tokenizer.model", "checkpoint_epoch_0_iter_10.pt"):
        (here / "run").mkdir(exist_ok=True)
        (here / "run" / name).write_text("{}")
    again = ("grow", "source", "--width", 2, "-o", "run", "--force")
    expect_error(here, *again, message="so --force does not replace it")


@pytest.mark.parametrize(("width", "ffn"), [(2, 3), (1, 2)])
@pytest.mark.interop
def test_stock_mlx_lm_opens_a_grown_model(tmp_path, width, ffn):
    from mlx_lm.utils import load_model

    source = make_source(tmp_path / "source")
    report = grow(source, tmp_path / "grown", width=width, ffn=ffn, noise_db=10)
    mlx_openelm.convert(report.path, tmp_path / "mlx", dtype="float32")
    model, _ = load_model(tmp_path / "mlx")
    expected = torch_logits(UNEVEN, weights_of(UNEVEN))
    np.testing.assert_allclose(
        np.array(model(mx.array(TOKENS))), expected, rtol=0, atol=1e-4
    )


def test_convert_reads_all_of_a_grown_checkpoint(tmp_path):
    report = grow(make_source(tmp_path / "source"), tmp_path / "grown", width=2)
    mlx_openelm.convert(report.path, tmp_path / "mlx", dtype="float32")
    _, weights = read_grown(report.path)
    written = raw_tensors(tmp_path / "mlx")
    assert written == {
        to_folder(name): ("mlx.core.float32", weight.tobytes())
        for name, weight in weights.items()
    }
    assert (tmp_path / "mlx" / "tokenizer.model").is_file()


# Errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", 1], "--width 1 and --ffn 1 leave the model unchanged"),
        (["--width", 0], "--width is 0; it must be at least 1"),
        (["--width", -2], "--width is -2; it must be at least 1"),
        (["--width", 2, "--ffn", 0], "--ffn is 0; it must be at least 1"),
        (["--width", 2, "--noise-db", "nan"], "--noise-db is nan; it must be 0"),
        (["--width", 2, "--noise-db", "inf"], "--noise-db is inf; it must be 0"),
        (["--width", 2, "--noise-db", -3], "--noise-db is -3; it must be 0"),
        (["--width", 2, "--seed", -1], "--seed is -1; it must be 0"),
        (["--width", 10**9], "model_dim is 64000000000, not a positive integer"),
        (["--width", 10**7], "free some space or choose another disk"),
        (["--width", 2, "-o", "source"], "source exists already"),
        (["--width", 2, "-o", "source", "--force"], "source holds the source itself"),
        (["--width", 2, "-o", "x.pt"], "must name a folder; leave out the .pt"),
        (["--width", 2, "--tokenizer", "model/config.json"], "tokenizer"),
    ],
)
def test_errors_of_options_are_reported(here, flags, message):
    expect_error(here, "grow", "source", *flags, message=message)


def test_growing_an_adapter_is_refused(here):
    factors = make_factors(weights_of(UNEVEN), ("layers.0.attn.out_proj",))
    write_mlx_lm_adapter(here / "adapter", factors)
    message = ["adapter is an adapter", "convert adapter --merge"]
    expect_error(here, "grow", "adapter", "--width", 2, message=message)


def test_a_missing_or_damaged_source_is_reported_and_nothing_is_written(here):
    expect_error(here, "grow", "no.pt", "--width", 2, message="no.pt does not exist")
    name = "layers.2.ffn.proj_2.weight"
    broken = {name: replace_last(weights_of(UNEVEN)[name], np.nan)}
    make_source(here / "broken", broken)
    expect_error(here, "grow", "broken", "--width", 2, message=f"{name} holds NaN")
    make_source(here / "alone" / "source")
    (here / "alone" / "source" / "tokenizer.model").unlink()
    message = "No tokenizer was found next to alone/source"
    expect_error(here, "grow", "alone/source", "--width", 2, message=message)


def test_a_model_without_a_tokenizer_grows_with_tokenizer_none(here):
    (here / "source" / "tokenizer.model").unlink()
    result = call("grow", "source", "--width", 2, "--tokenizer", "none")
    assert result.exit_code == 0
    assert "No tokenizer was written" in result.stderr
    assert not (here / "source-grown" / "tokenizer.model").exists()


def test_a_small_disk_is_reported_before_anything_is_written(here, monkeypatch):
    from converters.conversion import model_folder as folder_writing

    usage = folder_writing.shutil.disk_usage(here)._replace(free=1_000_000)
    monkeypatch.setattr(folder_writing.shutil, "disk_usage", lambda path: usage)
    message = "x needs 2 MB, but its disk has only 1 MB free"
    expect_error(here, "grow", "source", "--width", 2, "-o", "x", message=message)


def test_the_python_api_checks_the_factors():
    with pytest.raises(OpenELMError, match="`width` 1 and `ffn` 1"):
        Growth(1, 1, 10.0)
