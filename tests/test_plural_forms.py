"""Messages have the singular for one of a thing."""

from dataclasses import replace

import pytest
from models import UNEVEN, build, small_tokenizer

from converters.pretraining.corpus_files import find_files
from converters.quantization.calibration import calibration_windows, learning_windows
from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.report.history import describe_end, read_history
from mlx_openelm.finetuning.trainable import choose_modules
from mlx_openelm.reporting.run_history import group_samples

ONE_LAYER = replace(UNEVEN, num_query_heads=(2,), num_kv_heads=(1,), ffn_dims=(96,))


def calibrate():
    calibration_windows(small_tokenizer(), "t", UNEVEN, num_tokens=9)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (calibrate, "has 1 token, but needs at least 64"),
        (lambda: learning_windows(small_tokenizer(), "t", UNEVEN), "has 1 token,"),
        (lambda: choose_modules(build(ONE_LAYER), num_layers=2), "has 1 layer; use 1"),
        (
            lambda: find_files(["/x{1..1}.txt"]),
            "1 file of the recipe's data is missing",
        ),
    ],
    ids=["calibration", "learning", "layers", "files"],
)
def test_errors(work, message):
    with pytest.raises(OpenELMError) as caught:
        work()
    assert message in str(caught.value)


def test_a_run_of_one_step():
    end = {"event": "end", "step": 1, "reason": "done"}
    assert describe_end(read_history([end], likelihood=True)) == "1 step was trained."
    rows = [{"event": "sample", "step": 1, "prompt": "a", "text": "b"}]
    assert "After 1 step'" in repr(list(group_samples(rows)))
