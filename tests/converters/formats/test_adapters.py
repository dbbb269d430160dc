"""Adapters of CoreNet, PEFT and mlx-lm, read, merged and written, checked by each."""

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN, build, weights_of, write_hugging_face

from converters.formats.adapter_reader import (
    check_fits,
    merge,
    open_adapter,
    split_checkpoint,
    with_rows,
)
from converters.formats.adapter_writer import (
    corenet_adapter_tensors,
    write_mlx_adapter,
    write_peft_adapter,
)
from converters.formats.pickle_machine import PtStorage, PtTensor
from converters.formats.pt_archive import PtArchive
from converters.formats.pt_reader import read_checkpoint
from converters.formats.pt_writer import TensorToWrite, write_pt
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import attach
from mlx_openelm.storage.weight_reader import WeightFile
from mlx_openelm.tensor_names import EMBEDDING, HEAD, map_to_corenet, to_folder

torch = pytest.importorskip("torch", reason="needs PyTorch for the reference")

from converters.reference import ReferenceOpenELM  # noqa: E402

nn = torch.nn

TOKENS = np.array([[1, 5, 9, 200, 7, 299], [1, 250, 3, 3, 8, 77]])
TABLE = "token_embeddings"
LINEARS = [
    name.removesuffix(".weight")
    for name, shape in UNEVEN.tensor_shapes().items()
    if len(shape) == 2 and name != EMBEDDING
]
UNTIED = replace(UNEVEN, share_input_output_layers=False)
WEIGHTS = weights_of(UNEVEN)

# An adapter made with numpy, and its effect in torch ---------------------------------


def make_factors(method, modules, *, rank=4, seed=3):
    """Return torch's A (R, I) or (R, V), B (O, R) or (D, R) and m (O,), by module."""
    rng = np.random.default_rng(seed)
    made = {}
    for name in modules:
        out, into = WEIGHTS[f"{name}.weight"].shape
        if name == TABLE:
            out, into = into, out
        made[name] = {
            "A": 0.3 * rng.standard_normal((rank, into), dtype=np.float32),
            "B": 0.1 * rng.standard_normal((out, rank), dtype=np.float32),
        }
        if method == "dora" and name != TABLE:
            lengths = np.linalg.norm(WEIGHTS[f"{name}.weight"], axis=1)
            stretch = 1 + 0.2 * rng.standard_normal(out, dtype=np.float32)
            made[name]["m"] = lengths * stretch
    return made


class Adapted(nn.Module):
    """A layer with an unmerged adapter, by the formulas of the two papers."""

    def __init__(self, layer, factors, scale):
        super().__init__()
        self.weight = layer.weight  # used by a tied head
        self.scale = scale
        self.A, self.B = (torch.from_numpy(factors[n]) for n in "AB")
        self.m = torch.from_numpy(factors["m"]) if "m" in factors else None
        self.is_embedding = isinstance(layer, nn.Embedding)

    def forward(self, x):
        if self.is_embedding:
            return self.weight[x] + self.scale * (
                self.B @ self.A[:, x.flatten()]
            ).T.view(*x.shape, -1)
        y = x @ self.weight.T + self.scale * ((x @ self.A.T) @ self.B.T)
        if self.m is None:
            return y
        direction = self.weight + self.scale * self.B @ self.A
        return y * (self.m / direction.norm(dim=1))


def reference(config=UNEVEN, weights=WEIGHTS):
    model = ReferenceOpenELM(config).eval()
    model.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()})
    return model


@torch.no_grad()
def torch_logits(factors, scales=None):
    model = reference()
    for name, parts in factors.items():
        scale = scales[name] if scales else 1.0
        adapted = Adapted(model.get_submodule(name), parts, scale)
        model.set_submodule(name, adapted)
    return model(torch.from_numpy(TOKENS)).numpy()


def write_corenet(path, factors, name="lora", changes=None):
    """Write base and adapter as CoreNet does; `changes` to None remove a tensor."""
    state = {}
    for full, weight in WEIGHTS.items():
        module = full.removesuffix(".weight")
        if module not in factors:
            state[full] = weight
            continue
        state[f"{module}.base_layer.weight"] = weight
        for part, array in factors[module].items():
            if part == "m":
                state[f"{module}.lora_magnitude_vector.{name}"] = array
            elif module == TABLE:
                state[f"{module}.lora_embedding_{part}.{name}"] = array
            else:
                state[f"{module}.lora_{part}.{name}.weight"] = array
    state |= changes or {}
    kept = {n: torch.from_numpy(a) for n, a in state.items() if a is not None}
    torch.save(kept, path)
    return path


# The same in MLX ---------------------------------------------------------------------


def read_corenet(path):
    stored = read_checkpoint(path).tensors
    mapped = map_to_corenet(stored)
    return split_checkpoint({ours: stored[n] for ours, n in mapped.items()}, path)


def mlx_model(config, weights):
    model = OpenELM(config)
    model.load_weights([(to_folder(n), mx.array(w)) for n, w in weights.items()])
    return model


def logits_of(model):
    return np.array(model(mx.array(TOKENS)))


def merged_weights(adapter):
    """Merge into a model whose head keeps the base's embedding, as in CoreNet."""
    weights = {n: mx.array(w) for n, w in WEIGHTS.items()} | {HEAD: WEIGHTS[EMBEDDING]}
    for name, module in adapter.modules.items():
        merged = merge(weights[f"{name}.weight"], module)
        assert (merged.shape, merged.dtype) == (module.shape, mx.float32)
        weights[f"{name}.weight"] = merged
    return weights


def merged_logits(adapter):
    return logits_of(mlx_model(UNTIED, merged_weights(adapter)))


def write_mlx(folder, adapter, config=UNEVEN):
    folder.mkdir()
    return write_mlx_adapter(folder, adapter, config=config, base="base", metadata={})


def write_peft(folder, adapter, config=UNEVEN):
    folder.mkdir()
    return write_peft_adapter(folder, adapter, config=config, base="base")


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-4)
    assert np.abs(expected - logits_of(build(UNEVEN))).max() > 0.3


def assert_same_adapter(actual, expected):
    """Compare every factor bit for bit, B times its scale."""
    assert actual.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        ours, theirs = actual.modules[name].read(), module.read()
        assert actual.modules[name].shape == module.shape
        assert ours.keys() == theirs.keys()
        ours["b"] *= actual.modules[name].scale
        theirs["b"] *= module.scale
        for part in theirs:
            assert mx.array_equal(ours[part], theirs[part]), f"{name} {part}"


BOTH = [("lora", True), ("lora", False), ("dora", True), ("dora", False)]


# CoreNet -----------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "embedding"), BOTH)
def test_a_corenet_adapter_merged_or_separate_has_torchs_logits(
    tmp_path, method, embedding
):
    factors = make_factors(method, [TABLE, *LINEARS] if embedding else LINEARS)
    expected = torch_logits(factors)
    base, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    assert {n: t.shape for n, t in base.items()} == UNEVEN.tensor_shapes()
    assert all(np.array_equal(t.read(), WEIGHTS[n]) for n, t in base.items())
    assert (adapter.method, adapter.modules.keys()) == (method, factors.keys())
    assert "scale 1.0" in adapter.notes[0]
    assert_same(merged_logits(adapter), expected)

    notes = write_mlx(tmp_path / "apart", adapter, UNEVEN)
    assert [n for n in notes if "inputs only" in n] == list(notes)
    assert len(notes) == embedding
    model = build(UNEVEN)
    attach(model, tmp_path / "apart")
    assert_same(logits_of(model), expected)


def test_a_checkpoint_without_an_adapter_is_unchanged(tmp_path):
    base, adapter = read_corenet(write_corenet(tmp_path / "x.pt", {}))
    assert adapter is None
    assert list(base) == list(WEIGHTS)


def test_the_name_of_an_adapter_is_arbitrary(tmp_path):
    path = write_corenet(tmp_path / "x.pt", make_factors("dora", LINEARS), name="own")
    _, adapter = read_corenet(path)
    assert adapter.method == "dora"


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_names_shapes_and_order_are_apples(shared, case):
    """Split Apple's state dict of the 270M, and combine it again."""
    path = shared / "golden" / f"corenet-OpenELM-270M-{case}.shapes.json"
    shapes = {n: tuple(s) for n, s in json.loads(path.read_text()).items()}
    archive = PtArchive(WeightFile(path, 0, 0), {})
    one = PtStorage(archive, "data/0", "float32", np.dtype("<f4"), 1)
    stored = {
        name: PtTensor(shape, (0,) * len(shape), 0, one)
        for name, shape in shapes.items()
    }
    base, adapter = split_checkpoint(stored, path)
    config = OpenELMConfig.preset("270M", vocab_size=32128)
    assert {n: t.shape for n, t in base.items()} == config.tensor_shapes()
    assert adapter.method == case
    check_fits(adapter, config)
    layers = [int(name.split(".")[1]) for name in adapter.modules if name != TABLE]
    assert layers == sorted(layers)
    plain = {n: TensorToWrite(t.shape, mx.float32, None) for n, t in base.items()}
    written, notes = corenet_adapter_tensors(adapter, plain)
    assert {n: t.shape for n, t in written.items()} == shapes
    assert list(written) == list(shapes)
    assert not notes
    count = sum(np.prod(s) for n, s in shapes.items() if ".lora_" in n)
    assert sum(m.num_parameters for m in adapter.modules.values()) == count


QKV, OUT = "layers.1.attn.qkv_proj", "layers.1.attn.out_proj"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({f"{QKV}.lora_B.lora.weight": None}, [f"{QKV} lacks B"]),
        (
            {f"{QKV}.lora_A.lora.weight": None, f"{QKV}.lora_B.lora.weight": None},
            [f"{QKV} lacks A and B"],  # the magnitude is still there
        ),
        ({f"{QKV}.base_layer.weight": None}, [f"{QKV} has an adapter, but no base"]),
        (
            {"layers.0.attn_norm.base_layer.weight": np.ones(64, np.float32)},
            ["layers.0.attn_norm has a base_layer, but no adapter"],
        ),
        (
            {f"{QKV}.lora_A.lora.weight": np.ones((3, 64), np.float32)},
            [f"{QKV} has A [64, 3] and B [4, 192], which have no product"],
        ),
        (
            {f"{QKV}.lora_A.lora.weight": np.ones((4, 63), np.float32)},
            [f"{QKV} adapts [192, 63], its base_layer is [192, 64]"],
        ),
        (
            {f"{QKV}.lora_A.lora.weight": np.ones(4, np.float32)},
            [f"{QKV} has A [4] and B"],
        ),
        (
            {f"{QKV}.lora_magnitude_vector.lora": np.ones((1, 192), np.float32)},
            [f"{QKV} has a magnitude [1, 192] for 192 outputs"],
        ),
        (
            {f"{TABLE}.lora_magnitude_vector.lora": np.ones(300, np.float32)},
            [f"{TABLE} has a magnitude, but DoRA is for linears"],
        ),
        (
            {f"{QKV}.lora_C.lora.weight": np.ones(4, np.float32)},
            [f"{QKV}.lora_C.lora.weight' is unknown"],
        ),
        (
            {f"{QKV}.base_layer.bias": np.ones(192, np.float32)},
            [f"{QKV}.base_layer.bias' is unknown"],
        ),
        (
            {f"{QKV}.weight": np.ones((192, 64), np.float32)},
            [f"{QKV}.weight is stored both plain and as a base_layer"],
        ),
        (
            {f"{QKV}.lora_embedding_A.lora": np.ones((4, 64), np.float32)},
            [f"{QKV} has A twice", f"{QKV} has an adapter for an embedding"],
        ),
        (
            {f"{QKV}.lora_A.second.weight": np.ones((4, 64), np.float32)},
            ["more than one adapter: lora, second"],
        ),
        (  # all in one message
            {
                f"{QKV}.lora_B.lora.weight": None,
                f"{OUT}.lora_A.lora.weight": None,
                f"{OUT}.base_layer.weight": None,
            },
            [f"{QKV} lacks B", f"{OUT} lacks A", f"{OUT} has an adapter, but no base"],
        ),
    ],
)
def test_a_checkpoint_with_an_incomplete_adapter_is_refused(
    tmp_path, changes, expected
):
    factors = make_factors("dora", [TABLE, *LINEARS])
    path = write_corenet(tmp_path / "x.pt", factors, changes=changes)
    expect_error(lambda: read_corenet(path), str(path), *expected)


def expect_error(call, *expected):
    with pytest.raises(OpenELMError) as caught:
        call()
    message = str(caught.value)
    assert re.fullmatch(r"\S.*\.", message), message
    for words in expected:
        assert words in message, message


def test_integers_and_nan_are_refused(tmp_path):
    factors = make_factors("lora", LINEARS)
    name = f"{QKV}.lora_A.lora.weight"
    changes = {name: np.ones((4, 64), np.int64)}
    path = write_corenet(tmp_path / "x.pt", factors, changes=changes)
    expect_error(lambda: read_corenet(path), f"{name} is stored as int64")

    factors[QKV]["B"][3, 1] = np.nan
    _, adapter = read_corenet(write_corenet(tmp_path / "y.pt", factors))
    weight = mx.array(WEIGHTS[f"{QKV}.weight"])
    expect_error(lambda: merge(weight, adapter.modules[QKV]), QKV, "NaN")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_factors_of_every_float_are_read(tmp_path, dtype):
    factors = make_factors("lora", [TABLE, *LINEARS])
    path = write_corenet(tmp_path / "x.pt", factors)
    state = {n: t.to(dtype) for n, t in torch.load(path).items()}
    torch.save(state, path)
    _, adapter = read_corenet(path)
    for name, parts in factors.items():
        expected = torch.from_numpy(parts["A"].T).to(dtype).float().numpy()
        np.testing.assert_array_equal(adapter.modules[name].read()["a"], expected)


# mlx-lm ------------------------------------------------------------------------------


def varied(method, modules):
    """Return factors of two ranks, and two different scales, by module."""
    factors = make_factors(method, modules)
    other = make_factors(method, modules, rank=7, seed=4)
    scales = dict.fromkeys(modules, 1.5)
    for name in modules[1::3]:
        factors[name] = other[name]
    for name in modules[2::4]:
        scales[name] = 0.7
    return factors, scales


def with_scales(adapter, scales):
    modules = {n: replace(m, scale=scales[n]) for n, m in adapter.modules.items()}
    return replace(adapter, modules=modules)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Return a function that computes stock mlx-lm's logits of base and adapter."""
    folder = tmp_path_factory.mktemp("stock")
    write_hugging_face(folder / "tied", UNEVEN, WEIGHTS)
    untied = WEIGHTS | {HEAD: WEIGHTS[EMBEDDING]}
    write_hugging_face(folder / "untied", UNTIED, untied)

    def run(base, adapter):
        from mlx_lm.utils import load_adapters, load_model

        model, _ = load_model(folder / base)
        return logits_of(load_adapters(model, str(adapter)).eval())

    return run


@pytest.mark.interop
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "modules",
    [
        LINEARS,
        [name for name in LINEARS if not name.startswith("layers.0.")],  # last blocks
        LINEARS[:5],  # blocks that differ
    ],
    ids=["all", "last", "uneven"],
)
def test_stock_mlx_lm_reads_written_adapters(tmp_path, stock, method, modules):
    factors, scales = varied(method, modules)
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    adapter = with_scales(adapter, scales)
    expected = torch_logits(factors, scales)
    for name, config in {"known": UNEVEN, "unknown": None}.items():
        notes = write_mlx(tmp_path / name, adapter, config)
        assert any("rank 7" in note for note in notes)
        assert any("scales other than 1.5" in note for note in notes)
        assert_same(stock("tied", tmp_path / name), expected)
        model = build(UNEVEN)
        attach(model, tmp_path / name)
        assert_same(logits_of(model), expected)


@pytest.mark.interop
def test_an_embedding_of_an_untied_base_is_adapted_as_stock_mlx_lm_does(
    tmp_path, stock
):
    factors = make_factors("lora", [TABLE, *LINEARS])
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    write_mlx(tmp_path / "a", adapter, UNTIED)
    assert_same(stock("untied", tmp_path / "a"), torch_logits(factors))


@pytest.mark.interop
def test_an_mlx_lm_adapter_of_a_tied_embedding_changes_the_logits_too(tmp_path, stock):
    """`adapts_tied_head` is set, and the merged model stays tied."""
    factors = make_factors("lora", [TABLE, *LINEARS])
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    write_mlx(
        tmp_path / "a", adapter, UNTIED
    )  # the folder does not name the base's type
    read = open_adapter(tmp_path / "a")
    assert read.adapts_tied_head
    weights = merged_weights(read)
    del weights[HEAD]
    assert_same(logits_of(mlx_model(UNEVEN, weights)), stock("tied", tmp_path / "a"))


def test_keys_are_relative_if_the_last_blocks_have_the_same_modules(tmp_path):
    def keys(modules, config):
        factors = make_factors("lora", modules)
        _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_mlx(folder, adapter, config)
        written = json.loads((folder / "adapter_config.json").read_text())
        return written["lora_parameters"]["keys"], written["num_layers"]

    inner = ["attn.out_proj", "attn.qkv_proj", "ffn.proj_1", "ffn.proj_2"]
    paths = [f"transformer.layers.{i}.{name}" for i in range(3) for name in inner]
    assert keys(LINEARS, UNEVEN) == (inner, 3)
    assert keys(LINEARS[4:], UNEVEN) == (inner, 2)
    assert keys(LINEARS[:4], UNEVEN) == (paths[:4], 3)
    assert keys(LINEARS[:4] + LINEARS[5:6], UNEVEN) == (paths[:5], 3)
    assert keys(LINEARS[:-1], UNEVEN) == (paths[:-1], 3)  # the last block lacks one
    assert keys(LINEARS, None) == (paths, 3)
    with_table = keys([TABLE, *LINEARS], UNTIED)
    assert with_table == ([*inner, "transformer.token_embeddings"], 3)


def test_metadata_and_base_are_in_the_config(tmp_path):
    factors = make_factors("lora", LINEARS)
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    (tmp_path / "a").mkdir()
    metadata = {"template": "alpaca", "version": "1"}
    write_mlx_adapter(
        tmp_path / "a", adapter, config=None, base="my/base", metadata=metadata
    )
    read = open_adapter(tmp_path / "a")
    assert (read.base, read.metadata) == ("my/base", metadata)
    assert (read.dropout, read.name, read.kind) == (0.1, "a", "mlx-lm adapter")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"fine_tune_type": "full"}, ["full fine-tune", "fuse"]),
        ({"fine_tune_type": "ia3"}, ["'ia3'"]),
        ({"fine_tune_type": "dora"}, [f"{QKV} has no magnitude, but the config is"]),
        ({"lora_parameters": {"alpha": 16}}, ["lora_parameters.scale"]),
        ({"lora_parameters": None}, ["lora_parameters.scale"]),
        ({"lora_parameters": {"scale": float("nan")}}, ["lora_parameters.scale"]),
        ({"lora_parameters": {"scale": 10**400}}, ["lora_parameters.scale"]),
        ({"lora_parameters": {"scale": 1, "dropout": "much"}}, ["dropout 'much'"]),
    ],
)
def test_an_invalid_mlx_config_is_refused(tmp_path, changes, expected):
    folder = mlx_folder(tmp_path, make_factors("lora", LINEARS))
    change_config(folder, changes)
    expect_error(lambda: open_adapter(folder), str(folder), *expected)


def mlx_folder(tmp_path, factors, config=UNEVEN):
    _, adapter = read_corenet(write_corenet(tmp_path / "made.pt", factors))
    write_mlx(tmp_path / "adapter", adapter, config)
    return tmp_path / "adapter"


def change_config(folder, changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_mlx_folder_with_other_tensors_is_refused_with_their_names(tmp_path):
    folder = mlx_folder(tmp_path, make_factors("lora", LINEARS))
    path = folder / "adapters.safetensors"
    tensors = dict(mx.load(str(path)))
    del tensors[f"transformer.{QKV}.lora_b"]
    tensors["transformer.norm.weight"] = mx.ones(64)
    tensors["a\nb.lora_a"] = mx.ones((64, 4))
    mx.save_safetensors(str(path), tensors)
    expected = [f"{QKV} lacks B", "transformer.norm.weight' is unknown", r"a\nb"]
    expect_error(lambda: open_adapter(folder), str(path), *expected)
    path.write_bytes(b"not safetensors")
    expect_error(lambda: open_adapter(folder), str(path), "damaged")
    path.unlink()
    expect_error(lambda: open_adapter(folder), "no adapters.safetensors")
    (folder / "adapter_config.json").unlink()
    expect_error(lambda: open_adapter(folder), "no adapter_config.json")


def test_an_old_mlx_config_is_read_with_a_note_on_its_alpha(tmp_path):
    folder = mlx_folder(tmp_path, make_factors("lora", LINEARS))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["lora_layers"] = config.pop("num_layers")
    config["lora_parameters"] = {"rank": 4, "alpha": 16, "scale": 10.0, "dropout": 0.0}
    del config["fine_tune_type"]
    path.write_text(json.dumps(config))
    adapter = open_adapter(folder)
    assert {module.scale for module in adapter.modules.values()} == {10.0}
    assert "Ignored alpha" in adapter.notes[0]


# PEFT --------------------------------------------------------------------------------


class Outer(nn.Module):
    """The reference with Hugging Face's names and the attributes that PEFT requires."""

    def __init__(self):
        super().__init__()
        self.transformer = reference()
        self.config = SimpleNamespace(model_type="openelm", to_dict=lambda: {})

    def forward(self, tokens):
        return self.transformer(tokens)

    def prepare_inputs_for_generation(self):
        raise NotImplementedError


@torch.no_grad()
def peft_logits(wrapped):
    return wrapped.eval().get_base_model()(torch.from_numpy(TOKENS)).numpy()


def save_with_peft(folder, **options):
    """Save an adapter without zeros with PEFT; return PEFT's logits."""
    peft = pytest.importorskip("peft", reason="needs PEFT")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(Outer(), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return peft_logits(wrapped)


PARTS = ["qkv_proj", "out_proj", "proj_1", "proj_2"]


@pytest.mark.interop
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": [*PARTS, TABLE], "r": 4, "lora_alpha": 8},
        {"target_modules": PARTS, "r": 4, "lora_alpha": 6, "use_dora": True},
        {
            "target_modules": r".*\.(qkv_proj|proj_1)",
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "lora_dropout": 0.25,
            "rank_pattern": {"layers.1.attn.qkv_proj": 2, "proj_1": 3},
            "alpha_pattern": {
                r"^transformer\.layers\.2\.ffn\.proj_1": 1,
                "qkv_proj": 3,
            },
        },
    ],
    ids=["lora with embedding", "dora", "rslora with patterns"],
)
def test_a_peft_adapter_has_pefts_logits(tmp_path, options):
    expected = save_with_peft(tmp_path / "adapter", **options)
    adapter = open_adapter(tmp_path / "adapter")
    check_fits(adapter, UNEVEN)
    assert adapter.dropout == options.get("lora_dropout", 0.0)
    assert_same(merged_logits(adapter), expected)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = {n: torch.from_numpy(np.array(a)) for n, a in mx.load(str(path)).items()}
    (tmp_path / "bin").mkdir()
    torch.save(stored, tmp_path / "bin" / "adapter_model.bin")
    config = (tmp_path / "adapter" / "adapter_config.json").read_text()
    (tmp_path / "bin" / "adapter_config.json").write_text(config)
    assert_same_adapter(open_adapter(tmp_path / "bin"), adapter)


@pytest.mark.interop
def test_pefts_dora_of_an_embedding_is_refused(tmp_path):
    """It scales columns, mlx-lm's scales rows, and CoreNet has none."""
    options = {"target_modules": [*PARTS, TABLE], "r": 4, "use_dora": True}
    save_with_peft(tmp_path / "adapter", **options)
    expect_error(
        lambda: open_adapter(tmp_path / "adapter"),
        f"{TABLE} has a magnitude, but DoRA is for linears",
    )


@pytest.mark.interop
@pytest.mark.parametrize(
    ("method", "modules"),
    [
        ("lora", [TABLE, *LINEARS]),
        ("dora", LINEARS),
        ("dora", LINEARS[4:]),
        ("lora", LINEARS[1:6]),
    ],
    ids=["lora with embedding", "dora", "last blocks", "uneven"],
)
def test_peft_reads_written_adapters(tmp_path, method, modules):
    peft = pytest.importorskip("peft", reason="needs PEFT")
    factors, scales = varied(method, modules)
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    adapter = with_scales(adapter, scales)
    expected = torch_logits(factors, scales)
    for name, config in {"known": UNEVEN, "unknown": None}.items():
        write_peft(tmp_path / name, adapter, config)
        loaded = peft.PeftModel.from_pretrained(Outer(), tmp_path / name)
        assert_same(peft_logits(loaded), expected)
        config = loaded.peft_config["default"]
        assert config.base_model_name_or_path == "base"
        assert config.inference_mode


def peft_folder(tmp_path, factors, scale=2.0):
    _, adapter = read_corenet(write_corenet(tmp_path / "made.pt", factors))
    write_peft(tmp_path / "peft", with_scales(adapter, dict.fromkeys(factors, scale)))
    return tmp_path / "peft"


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"fan_in_fan_out": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [7]},
        {"init_lora_weights": "pissa"},
        {"use_dora": "yes"},
        {"use_something_newer": {"x": 1}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unsupported_peft_settings_are_refused_with_their_names(tmp_path, changes):
    folder = peft_folder(tmp_path, make_factors("lora", LINEARS))
    change_config(folder, changes)
    expect_error(lambda: open_adapter(folder), *changes, "merge_and_unload")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"r": 5}, [f"{QKV} has rank 4, the config 5", OUT]),
        ({"r": None}, ["r is None"]),
        ({"lora_alpha": "8"}, ["lora_alpha is '8'"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha is inf"]),
        ({"rank_pattern": {"x": "4"}}, ["rank_pattern is {'x': '4'}"]),
        ({"alpha_pattern": [1]}, ["alpha_pattern is [1]"]),
        ({"alpha_pattern": {"(a+)+": 1}}, ["regular expressions", "(a+)+"]),
        ({"lora_dropout": 1}, ["lora_dropout 1"]),
        ({"use_dora": True}, [f"{QKV} has no magnitude, but the config is for dora"]),
    ],
)
def test_an_invalid_peft_config_is_refused(tmp_path, changes, expected):
    folder = peft_folder(tmp_path, make_factors("lora", LINEARS))
    change_config(folder, changes)
    expect_error(lambda: open_adapter(folder), str(folder), *expected)


def test_other_tensors_of_peft_are_refused_with_their_names(tmp_path):
    folder = peft_folder(tmp_path, make_factors("lora", LINEARS))
    path = folder / "adapter_model.safetensors"
    tensors = dict(mx.load(str(path)))
    unusual = [
        f"base_model.model.transformer.{TABLE}.weight",
        f"base_model.model.transformer.{QKV}.lora_A.default.weight",
    ]
    mx.save_safetensors(str(path), tensors | dict.fromkeys(unusual, mx.ones((4, 64))))
    expected = [f"{name}' is unknown" for name in unusual]
    expect_error(lambda: open_adapter(folder), *expected)
    path.unlink()
    expect_error(lambda: open_adapter(folder), "no adapter_model.safetensors")


def test_peft_names_without_transformer_are_read(tmp_path):
    folder = peft_folder(tmp_path, make_factors("dora", LINEARS))
    short = shutil.copytree(folder, tmp_path / "short")
    renamed = {}
    for name, array in mx.load(str(folder / "adapter_model.safetensors")).items():
        end = ".weight" if name.endswith("magnitude_vector") else ""  # both occur
        renamed[name.replace("transformer.", "") + end] = array
    mx.save_safetensors(str(short / "adapter_model.safetensors"), renamed)
    assert_same_adapter(open_adapter(short), open_adapter(folder))


UNUSUAL = [None, -1, 0, 1.5, 10**400, float("nan"), "x", [], [[]], {}, {"": {}}, True]


@pytest.mark.parametrize("kind", ["mlx", "peft"])
def test_no_value_of_a_config_causes_a_traceback(tmp_path, kind):
    make = {"mlx": mlx_folder, "peft": peft_folder}[kind]
    folder = make(tmp_path, make_factors("dora", LINEARS))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    inner = config.get("lora_parameters", {})
    changed = [config | {key: value} for key in config for value in UNUSUAL]
    changed += [
        config | {"lora_parameters": inner | {key: value}}
        for key in inner
        for value in UNUSUAL
    ]
    refused = 0
    for unusual in changed:
        path.write_text(json.dumps(unusual))
        try:
            adapter = open_adapter(folder)
        except OpenELMError:
            refused += 1
        else:
            check_fits(adapter, UNEVEN)
    assert 30 < refused < len(changed)


# Round trips -------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_mlx_to_peft_and_back_is_the_same_bit_for_bit(tmp_path, method):
    factors = make_factors(method, LINEARS)
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    write_mlx(tmp_path / "a", with_scales(adapter, dict.fromkeys(LINEARS, 2.0)))
    first = open_adapter(tmp_path / "a")
    write_peft(tmp_path / "b", first)
    write_mlx(tmp_path / "c", open_adapter(tmp_path / "b"))
    old, new = (mx.load(str(tmp_path / f / "adapters.safetensors")) for f in "ac")
    assert old.keys() == new.keys()
    assert all(mx.array_equal(old[name], new[name]) for name in old)
    old, new = (
        json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in "ac"
    )
    assert old == new


@pytest.mark.parametrize(("method", "embedding"), BOTH)
def test_mlx_to_corenet_and_back_is_the_same_bit_for_bit(tmp_path, method, embedding):
    modules = [TABLE, *LINEARS] if embedding else LINEARS
    factors = make_factors(method, modules)
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    adapter = with_scales(adapter, dict.fromkeys(modules, 0.5))
    if method == "lora":
        write_mlx(tmp_path / "a", adapter, UNTIED)
        adapter = replace(open_adapter(tmp_path / "a"), adapts_tied_head=False)
    written, notes = corenet_adapter_tensors(adapter, base_tensors(WEIGHTS))
    assert "scale" in notes[0]
    write_pt(tmp_path / "y.pt", written)
    base, read_back = read_corenet(tmp_path / "y.pt")
    assert all(np.array_equal(t.read(), WEIGHTS[n]) for n, t in base.items())
    assert_same_adapter(read_back, adapter)
    state = torch.load(tmp_path / "y.pt")  # torch reads the same
    assert state.keys() == torch.load(tmp_path / "x.pt").keys()
    for name, expected in torch.load(tmp_path / "x.pt").items():
        factor = 0.5 if re.search(r"lora_(embedding_)?B", name) else 1.0
        assert torch.equal(state[name], factor * expected), name


def base_tensors(weights):
    def reader(weight):
        return lambda: mx.array(weight)

    return {
        n: TensorToWrite(w.shape, mx.float32, reader(w)) for n, w in weights.items()
    }


def test_an_embeddings_adapter_is_cut_or_padded(tmp_path):
    _, adapter = read_corenet(
        write_corenet(tmp_path / "x.pt", make_factors("lora", [TABLE]))
    )
    whole = adapter.modules[TABLE].read()["a"]
    for rows in (300, 290, 310):
        fitted = with_rows(adapter, rows)
        check_fits(fitted, replace(UNEVEN, vocab_size=rows))
        parts = fitted.modules[TABLE].read()
        assert parts["a"].shape == (rows, 4)
        assert mx.array_equal(parts["a"][:290], whole[:290])
        assert not parts["a"][300:].any()
    assert with_rows(replace(adapter, modules={}), 7).modules == {}


def test_a_base_that_does_not_fit_is_refused_with_all_differences(tmp_path):
    factors = make_factors("lora", [TABLE, *LINEARS])
    _, adapter = read_corenet(write_corenet(tmp_path / "x.pt", factors))
    other = replace(
        UNEVEN,
        num_query_heads=(2, 4),
        num_kv_heads=(1, 4),
        ffn_dims=(96, 128),
        vocab_size=301,
    )
    expected = [
        "token_embeddings adapts shape [300, 64], the base has [301, 64]",
        "layers.1.ffn.proj_1 adapts shape [320, 64], the base has [256, 64]",
        "layers.2.ffn.proj_2 adapts shape [64, 64], the base has no such weight",
    ]
    expect_error(lambda: check_fits(adapter, other), *expected)
    for write in (write_mlx, write_peft):
        expect_error(
            lambda w=write: w(tmp_path / w.__name__, adapter, other), *expected
        )
        assert not list((tmp_path / write.__name__).iterdir())


def test_unsupported_adapters_are_refused_with_an_alternative(tmp_path):
    def read(method, modules):
        factors = make_factors(method, modules)
        return read_corenet(write_corenet(tmp_path / "x.pt", factors))[1]

    inputs = read("lora", [TABLE, *LINEARS])
    both = replace(inputs, adapts_tied_head=True)
    for config in (UNEVEN, None):
        refuse_write(tmp_path, write_peft, both, config, "only the inputs", "`merge`")
    tensors = base_tensors(WEIGHTS)
    expect_error(lambda: corenet_adapter_tensors(both, tensors), "CoreNet", "`merge`")
    mixed = read("dora", [TABLE, *LINEARS])
    expected = "LoRA on token_embeddings and"
    refuse_write(tmp_path, write_peft, mixed, UNTIED, expected)
    both = replace(mixed, adapts_tied_head=True)
    refuse_write(tmp_path, write_mlx, both, UNTIED, expected)


def refuse_write(tmp_path, write, adapter, config, *expected):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    expect_error(lambda: write(folder, adapter, config), *expected)
    assert not list(folder.iterdir())
