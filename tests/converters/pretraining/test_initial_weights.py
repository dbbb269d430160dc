"""The weights that pre-training starts from, as trainers store them."""

import numpy as np
import pytest
from models import UNEVEN, weights_of

from mlx_openelm.storage.shards import write_json
from mlx_openelm.tensor_names import EMBEDDING, HEAD

torch = pytest.importorskip("torch", reason="pre-training runs in PyTorch")

from converters.pretraining.initial_weights import read_initial  # noqa: E402 - needs torch

WEIGHTS = weights_of(UNEVEN)


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
def test_wrapped_weights_with_buffers_and_a_copied_head_are_read(tmp_path, key):
    state = {f"_orig_mod.{name}": torch.from_numpy(w) for name, w in WEIGHTS.items()}
    state["_orig_mod.causal_mask"] = torch.ones(4, 4, dtype=torch.bool)
    state[f"_orig_mod.{HEAD}"] = torch.from_numpy(WEIGHTS[EMBEDDING])
    torch.save({key: state, "epoch": 1} if key else state, tmp_path / "a.pt")
    write_json(tmp_path / "config.json", UNEVEN.to_dict())
    initial = read_initial(str(tmp_path / "a.pt"))
    assert initial.config == UNEVEN
    assert initial.weights.keys() == WEIGHTS.keys()
    for name, weight in initial.weights.items():
        np.testing.assert_array_equal(weight, WEIGHTS[name])
