"""Raw and averaged weights, copied heads and counters in checkpoints."""

import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import UNEVEN, make_factors, weights_of, write_peft_folder
from safetensors.numpy import load_file, save_file

from converters.formats.adapter_reader import open_adapter
from converters.formats.sources import open_path
from mlx_openelm.storage.shards import write_json
from mlx_openelm.tensor_names import EMBEDDING, HEAD

torch = pytest.importorskip("torch", reason="needs PyTorch to write .pt files")

from converters.pretraining.initial_weights import read_initial  # noqa: E402 - needs torch

WEIGHTS = weights_of(UNEVEN)
NORM = "norm.weight"
OPTION = (
    "`mlx-openelm convert` with `weights` ema uses the moving average (EMA) instead."
)


def state(factor: float = 1.0, prefix: str = "") -> dict:
    return {
        prefix + n: torch.from_numpy(w * np.float32(factor)) for n, w in WEIGHTS.items()
    }


RAW, MEAN, LIST = state(), state(0.5), list(state(0.5).values())
ONLINE = {
    **state(prefix="online_model."),
    **state(0.5, prefix="ema_model."),
    "initted": torch.tensor(True),
    "step": torch.tensor(3),
}
LIT = {
    **state(prefix="model."),
    **state(0.5, prefix="model_ema."),
    "model_ema.decay": torch.tensor(0.9),
    "model_ema.num_updates": torch.tensor(7),
}
NAMED = [  # what is saved, the key that is read, the key of the average
    ({"model": RAW, "averaged_model": MEAN}, "model", "averaged_model"),
    ({"model": RAW, "model_average": MEAN}, "model", "model_average"),
    ({"model": RAW, "emaModel": MEAN}, "model", "emaModel"),
    ({"model": RAW, "EMA": MEAN}, "model", "EMA"),
    ({"model": RAW, "ema-weights": MEAN}, "model", "ema-weights"),
    ({"params": RAW, "params_ema": MEAN}, "params", "params_ema"),
    ({"model": {"model": RAW, "ema": MEAN}}, "model.model", "model.ema"),
    (
        {"state_dict": RAW, "callbacks": {"EMACallback": {"ema_state_dict": MEAN}}},
        "state_dict",
        "callbacks.EMACallback.ema_state_dict",
    ),
    (
        {"current_model_state": RAW, "state_dict": MEAN},
        "current_model_state",
        "state_dict",
    ),
    (ONLINE, "all", "ema_model.*"),
    ({"state_dict": LIT}, "state_dict", "state_dict model_ema.*"),
]


def read_norm(path, weights=None) -> float:
    read = open_path(path, weights).tensors[NORM].read()
    return float((read / WEIGHTS[NORM])[0])


def save(folder, saved):
    folder.mkdir(exist_ok=True)
    torch.save(saved, folder / "a.pt")
    write_json(folder / "config.json", UNEVEN.to_dict())
    return folder / "a.pt"


@pytest.mark.parametrize(("saved", "key", "average"), NAMED)
def test_an_average_is_named_and_can_be_chosen(tmp_path, saved, key, average):
    path = save(tmp_path, saved)
    expected = f"Weights: {key} of a.pt, not {average}."
    assert open_path(path).notes[:2] == (expected, OPTION)
    assert (read_norm(path), read_norm(path, "ema")) == (1.0, 0.5)
    initial = read_initial(str(path))
    assert initial.notes[:2] == (expected, OPTION)
    np.testing.assert_array_equal(initial.weights[NORM], WEIGHTS[NORM])


@pytest.mark.parametrize(
    ("saved", "unused"),
    [
        ({"model": RAW, "shadow_params": LIST, "decay": 0.9}, "shadow_params"),
        ({"model": RAW, "ema": {"shadow_params": LIST}}, "ema.shadow_params"),
        ({"model": RAW, "optimizers": [{"ema": tuple(LIST)}]}, "optimizers.0.ema"),
        ({"model": RAW, "teacher": MEAN}, "teacher"),
        ({"model": RAW, "extra": {"old": MEAN}}, "extra.old"),
    ],
)
def test_other_copies_of_the_weights_are_named(tmp_path, saved, unused):
    path = save(tmp_path, saved)
    note = f"Weights: model of a.pt, not {unused}."
    assert note in open_path(path).notes
    assert OPTION not in open_path(path).notes
    assert read_initial(str(path)).notes == (note,)
    message = ["has no EMA weights", "leave out --weights"]
    expect_error(tmp_path, "convert", path, "--weights", "ema", message=message)


def test_what_is_no_copy_of_the_weights_is_not_named(tmp_path):
    moments = {n: {"exp_avg": t, "exp_avg_sq": t, "step": 3} for n, t in RAW.items()}
    saved = {
        "model": RAW,
        "optimizer": {"state": moments, "exp_avg": MEAN},
        "ema_losses": {"a": torch.ones(3)},
        "averages": [torch.ones(2)],
        "ema_decay": 0.9,
    }
    path = save(tmp_path, saved)
    assert open_path(path).notes == ("Sizes from config.json.",)
    assert read_initial(str(path)).notes == ()


def test_pretraining_starts_from_an_average_alone(tmp_path):
    path = save(tmp_path, {"ema_state_dict": MEAN, "step": 3})
    initial = read_initial(str(path))
    assert initial.notes == ("Weights: ema_state_dict (moving average, EMA) of a.pt.",)
    np.testing.assert_array_equal(
        initial.weights[NORM], WEIGHTS[NORM] * np.float32(0.5)
    )


def test_the_average_in_a_bin_folder_is_named_and_can_be_chosen(tmp_path):
    path = save(tmp_path / "folder", {"model": RAW, "ema": MEAN})
    path.rename(path.with_name("pytorch_model.bin"))
    folder = path.parent
    expected = "Weights: model of pytorch_model.bin, not ema."
    assert open_path(folder).notes[:2] == (expected, OPTION)
    assert (read_norm(folder), read_norm(folder, "ema")) == (1.0, 0.5)


def test_the_average_in_an_adapter_is_named(tmp_path):
    factors = make_factors(WEIGHTS, ("layers.0.attn.qkv_proj",))
    folder = write_peft_folder(tmp_path / "adapter", factors)
    path = folder / "adapter_model.safetensors"
    parts = {n: torch.from_numpy(t) for n, t in load_file(path).items()}
    path.unlink()
    torch.save({"model": parts, "ema": parts}, folder / "adapter_model.bin")
    notes = open_adapter(folder).notes
    assert "Weights: model of adapter_model.bin, not ema." in notes


# Copies of a tied head -----------------------------------------------------------


def padded(table, value=0.0):
    return torch.cat([table, torch.full((128, table.shape[1]), value)])


TABLE = RAW[EMBEDDING]
COPIES = {
    "bfloat16 head": (TABLE, TABLE.bfloat16()),
    "float16 head": (TABLE, TABLE.half()),
    "bfloat16 table": (TABLE.bfloat16(), TABLE),
    "padded head": (TABLE, padded(TABLE)),
    "padded table": (padded(TABLE, 0.25), TABLE),
    "both": (TABLE, padded(TABLE).bfloat16()),
}


@pytest.mark.parametrize(("table", "head"), COPIES.values(), ids=COPIES)
def test_a_copy_in_another_dtype_or_with_padding_rows_is_left_out(
    tmp_path, table, head
):
    path = save(tmp_path, {**RAW, EMBEDDING: table, HEAD: head})
    rows = UNEVEN.vocab_size
    for with_config in (True, False):
        source = open_path(path)
        assert source.config.share_input_output_layers, with_config
        assert source.config.vocab_size == rows
        assert f"Left out {HEAD}, a copy of the tied embedding." in source.notes
        if with_config:
            assert read_initial(str(path)).config.vocab_size == rows
            (tmp_path / "config.json").unlink()


def test_rows_that_are_not_padding_or_differ_are_not_a_copy(tmp_path):
    trained = torch.cat([TABLE, TABLE[:128]])
    changed = TABLE.clone()
    changed[0, 0] += 0.01
    for head in (trained, changed.bfloat16(), TABLE[:, :-1]):
        path = save(tmp_path, {**RAW, HEAD: head})
        expect_error(tmp_path, "convert", path, message="differs from it")


@pytest.mark.parametrize("longer", [HEAD, EMBEDDING])
def test_a_folder_with_such_a_copy_leads_to_a_model(tmp_path, longer):
    table = WEIGHTS[EMBEDDING]
    long = np.concatenate([table, np.zeros((128, UNEVEN.model_dim), "f4")])
    folder = make_source(tmp_path / "folder", {HEAD: table, longer: long})
    message = "`mlx-openelm convert"
    expect_error(tmp_path, "generate", "Hi", "--model", folder, message=message)
    made = tmp_path / "made"
    result = call("convert", folder, "--mlx-path", made)
    assert result.exit_code == 0, result.stderr
    assert open_path(made).config == UNEVEN


# Counters and masks --------------------------------------------------------------

LEFT_OUT = {
    "layers.0.attn.bias": np.ones((1, 1, 4, 4), bool),
    "num_batches_tracked": np.array([3], np.int64),
    "step": np.array(3, np.int64),
    "scale": np.array(0.5, np.float32),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_tensors_that_carry_no_weights_are_left_out(tmp_path, suffix):
    folder = make_source(tmp_path / "folder")
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **LEFT_OUT}
    path.unlink()
    if suffix == "safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
        message = "`mlx-openelm convert"
        expect_error(tmp_path, "generate", "Hi", "--model", folder, message=message)
    else:
        path = folder / f"pytorch_model.{suffix}"
        torch.save({n: torch.from_numpy(t) for n, t in tensors.items()}, path)
    source = open_path(path if suffix == "pt" else folder)
    assert source.tensors.keys() == WEIGHTS.keys()
    assert any(
        note.startswith("Left out ") and "and 1 more: buffers" in note
        for note in source.notes
    )
    if suffix == "pt":
        assert read_initial(str(path)).weights.keys() == WEIGHTS.keys()


def test_integers_in_place_of_weights_are_refused(tmp_path):
    whole = {**RAW, NORM: RAW[NORM].to(torch.int32)}
    message = "norm.weight is stored as int32"
    expect_error(tmp_path, "convert", save(tmp_path, whole), message=message)


def test_the_key_of_deepspeed_is_read(tmp_path):
    assert read_norm(save(tmp_path, {"module": RAW, "global_steps": 3})) == 1.0
