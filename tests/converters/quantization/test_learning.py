"""Learned scales: gradients as in PyTorch, resumed runs, and never a worse model."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import expect_error, make_source
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from models import EVEN, TEXT, small_tokenizer, weights_of

import converters.quantization.learning as learning
from converters.conversion.run import convert
from converters.quantization.calibration import learning_windows
from converters.quantization.learning_amount import LearningAmount
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model import head_divergence
from mlx_openelm.model.head_divergence import (
    Outputs,
    PlainHead,
    head_of,
    hidden_rows,
    total_divergence,
)
from mlx_openelm.model.learned_scales import LearnedEmbedding, LearnedLinear
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import pack_weight, unpack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.storage.loading import load_model
from mlx_openelm.storage.model_folder import open_folder

UNEVEN_GROUPS = ("-q", "--q-group-size", "32", "--learn", "2steps")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = make_source(tmp_path_factory.mktemp("learning") / "source", config=EVEN)
    (folder / "text.txt").write_text(TEXT)
    return folder


def quantize(source, target, learn="12steps", **options):
    chosen = {"bits": 3, "group_size": 32, "calibration": source / "text.txt"}
    return convert(source, target, learn=learn, **(chosen | options))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """The folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("learned") / "whole"
    quantize(source, folder)
    return folder


@pytest.fixture(scope="module")
def rounded(source, tmp_path_factory):
    """The folder of the same quantization without learning."""
    folder = tmp_path_factory.mktemp("learned") / "rounded"
    quantize(source, folder, None)
    return folder


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# Gradients -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "size"), [(2, 32), (3, 64), (4, 128), (8, 64)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("block", [4096, 128], ids=["whole", "blocks"])
def test_gradients_of_scales_and_biases_are_those_of_pytorch(
    monkeypatch, bits, size, tied, block
):
    monkeypatch.setattr(head_divergence, "BLOCK", block)  # of 300 tokens
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from torch.nn.utils import parametrize

    from converters.reference import ReferenceOpenELM

    config = replace(
        EVEN, model_dim=128, ffn_dims=(128, 256, 128), share_input_output_layers=tied,
        num_query_heads=(4, 4, 4), num_kv_heads=(2, 4, 2),
    )  # fmt: skip
    packing = Packing(bits, size)
    student, reference = OpenELM(config), ReferenceOpenELM(config)
    state = {n: torch.from_numpy(w) for n, w in weights_of(config).items()}
    reference.load_state_dict(state)
    modules = dict(reference.named_modules())
    rng, expected, packed = np.random.default_rng(0), {}, []

    class Learned(torch.nn.Module):
        def __init__(self, integers, scales, biases, a, c):
            super().__init__()
            self.integers = integers.reshape(*scales.shape, -1)
            self.mean = self.integers.mean(-1)
            self.scales, self.biases = scales, biases
            self.a, self.c = torch.nn.Parameter(a), torch.nn.Parameter(c)

        def forward(self, weight):
            scale = self.scales * (1 + self.a)
            bias = self.biases + (self.scales - scale) * self.mean
            bias = bias + self.scales * self.c
            return (scale[..., None] * self.integers + bias[..., None]).flatten(1)

    def as_torch(array):
        return torch.from_numpy(np.array(array))

    for path, module in student.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        name = path.removeprefix("transformer.")
        weight = mx.array(weights_of(config)[f"{name}.weight"])
        parts = pack_weight(packing, weight)
        kind = LearnedEmbedding if isinstance(module, nn.Embedding) else LearnedLinear
        layer = kind(packing, parts, mx.float32)
        layer.a, layer.c = (
            mx.array(0.02 * rng.standard_normal(layer.a.shape, np.float32))
            for _ in range(2)
        )
        one = mx.ones_like(parts["scales"])
        integers = mx.dequantize(
            parts["weight"], one, mx.zeros_like(one), group_size=size, bits=bits
        )
        arrays = (integers, parts["scales"], parts["biases"], layer.a, layer.c)
        learned = Learned(*map(as_torch, arrays))
        parametrize.register_parametrization(modules[name], "weight", learned)
        expected[path] = learned
        packed.append((path, layer))
    student.update_modules(tree_unflatten(packed))
    plain = {n: w for n, w in weights_of(config).items() if w.ndim == 1}
    student.load_weights(
        [(f"transformer.{n}", mx.array(w)) for n, w in plain.items()], strict=False
    )
    tokens = rng.integers(3, 300, (2, 20))
    rows = rng.standard_normal((40, 24), np.float32)
    head = rng.standard_normal((300, 24), np.float32)
    linear = nn.Linear(24, 300, bias=False)
    linear.weight = mx.array(head)

    def loss(model):
        taught = Outputs(mx.array(rows), PlainHead(linear))
        hidden = hidden_rows(model, mx.array(tokens))
        return total_divergence(Outputs(hidden, head_of(model)), taught)

    value, gradients = nn.value_and_grad(student, loss)(student)
    log_p = torch.from_numpy(rows @ head.T).log_softmax(-1)
    log_q = reference(torch.from_numpy(tokens)).log_softmax(-1).flatten(0, 1)
    theirs = (log_p.exp() * (log_p - log_q)).sum()
    theirs.backward()
    assert value.item() == pytest.approx(theirs.item(), rel=1e-4)
    flat = dict(tree_flatten(gradients))
    assert len(expected) == 13 + (not tied)
    for path, learned in expected.items():
        for name in ("a", "c"):
            want = getattr(learned, name).grad.numpy()
            got = np.array(flat[f"{path}.{name}"])
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max(), (path, name)


def test_untrained_layers_are_the_stored_weights():
    weight = mx.random.normal((96, 128), key=mx.random.key(0)).astype(mx.bfloat16)
    packing = Packing(4, 64)
    parts = pack_weight(packing, weight)
    layer = LearnedLinear(packing, parts, mx.float32)
    unpacked = unpack_weight(packing, parts, mx.float32)
    assert (layer.weight() == unpacked).all()
    layer.a, layer.c = layer.a + 0.013, layer.c - 0.027
    stored = layer.stored_parts()
    assert stored["scales"].dtype == stored["biases"].dtype == mx.bfloat16
    assert (layer.weight() == unpack_weight(packing, parts | stored, mx.float32)).all()


# Results ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 2, "group_size": 32},
        {"bits": 4, "group_size": 64},
        {"bits": "auto:5", "group_size": None},
        {"bits": 3, "teacher_bits": 8},
        {"bits": 3, "embed_bits": 3, "keep": "proj_2"},
        {"bits": 3, "dtype": "float16"},
    ],
    ids=str,
)
def test_the_receipt_has_the_error_before_and_after(source, tmp_path, options):
    report = quantize(source, tmp_path / "learned", **options)
    record, receipt = report.learned, report.receipt
    assert 0 < record.best_step <= record.steps == 12
    assert record.learned_tokens == 12 * 2 * 64
    if "teacher_bits" not in options:  # else the record is measured against it
        assert receipt.mean_kl == pytest.approx(record.mean_kl_after, rel=1e-3)
        assert receipt.top1_agreement == pytest.approx(record.top1_after)
        assert receipt.mean_kl < receipt.mean_kl_rounded
    assert record.mean_kl_after < record.mean_kl_before
    assert receipt.tokens == record.tokens
    rounded = quantize(
        source, tmp_path / "rounded", None, **{**options, "teacher_bits": None}
    )
    names = {n: open_folder(tmp_path / n).read() for n in ("learned", "rounded")}
    same = {n for n, a in names["learned"].items() if (a == names["rounded"][n]).all()}
    assert same == {n for n in names["rounded"] if n.endswith(".weight")}
    metadata = open_folder(tmp_path / "learned").metadata
    assert metadata["receipt"]["mean_kl_rounded"] == record.mean_kl_before
    assert metadata["learned"]["best_step"] == record.best_step
    assert rounded.learned is None
    assert rounded.num_bytes == report.num_bytes


def test_the_same_seed_gives_the_same_bytes(source, whole, tmp_path):
    for name, seed in (("same", 0), ("other", 4)):
        quantize(source, tmp_path / name, seed=seed)
    same, other = tmp_path / "same", tmp_path / "other"
    assert weights(same) == weights(whole)
    assert weights(other) != weights(whole)
    a, b = (json.loads((f / "config.json").read_text()) for f in (same, whole))
    assert a == b
    assert not (same / "learning").exists()


def test_learning_never_ends_worse_than_it_began(
    source, rounded, tmp_path, monkeypatch
):
    monkeypatch.setattr(learning, "RATE", 3.0)
    report = quantize(source, tmp_path / "learned")
    assert report.learned.best_step == 0
    assert report.learned.mean_kl_after == report.learned.mean_kl_before
    assert "plain rounding were kept" in " ".join(report.notes)
    assert weights(tmp_path / "learned") == weights(rounded)


def test_a_better_choice_that_measures_worse_in_the_receipt_is_not_kept(
    source, tmp_path, monkeypatch
):
    measure, references = learning.measure, []

    def worse_at_the_end(student, reference):
        result = measure(student, reference)
        last = len(references) > 1 and reference is references[0]
        references.append(reference)
        return replace(result, kl=result.kl + last)

    monkeypatch.setattr(learning, "measure", worse_at_the_end)
    report = quantize(source, tmp_path / "learned")
    assert report.learned.best_step == 0
    assert report.receipt.mean_kl == pytest.approx(report.receipt.mean_kl_rounded)


def test_the_best_step_is_kept_not_the_last(source, tmp_path, monkeypatch):
    measure, references, at_best = learning.measure, [], []

    def worse_at_step_12(student, reference):
        result = measure(student, reference)
        references.append(reference)
        if reference is not references[0]:  # the report's is the first
            times = sum(each is reference for each in references)
            if times == 2:  # step 10
                at_best.append(measure(student, references[0]).kl)
            return replace(result, kl=result.kl + (times == 3))
        return result

    monkeypatch.setattr(learning, "measure", worse_at_step_12)
    report = quantize(source, tmp_path / "learned")
    assert report.learned.best_step == 10
    assert report.learned.mean_kl_after == at_best[0]
    assert report.receipt.mean_kl == pytest.approx(at_best[0], rel=1e-3)


def test_no_window_is_both_learned_from_and_measured():
    tokenizer = small_tokenizer()
    for copies in (1, 3, 10):
        windows = learning_windows(tokenizer, TEXT * copies, EVEN, window=16)
        ids = tokenizer.encode(TEXT * copies, bos=False)
        count = len(ids) // 16
        parts = [windows.learn, windows.choose, windows.report]
        assert sum(part.shape[0] for part in parts) == count
        assert 1 <= windows.choose.shape[0] == windows.report.shape[0] <= 8
        rows = sorted(tuple(row) for part in parts for row in part[:, 1:].tolist())
        assert rows == sorted(tuple(ids[i * 16 : i * 16 + 16]) for i in range(count))


# Stopped runs ----------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("how", "at"),
    [
        (KeyboardInterrupt, 1),
        (KeyboardInterrupt, 7),
        (SystemExit, 7),
        (Killed, 7),
        (KeyboardInterrupt, 12),
    ],
)
def test_a_stopped_run_resumes_with_the_same_bytes(
    source, whole, tmp_path, monkeypatch, how, at
):
    monkeypatch.setattr(learning, "SAVE_SECONDS", 0.0)
    target, seen = tmp_path / "stopped", []

    def stop(progress):
        if progress.units.startswith("steps"):
            seen.append(progress.done)
            if progress.done == at:
                raise how

    with pytest.raises(how) as stopped:
        quantize(source, target, on_progress=stop)
    if how is not Killed:  # that removes the staging folder, as an error does
        assert "resumes from its last save" in stopped.value.__notes__[0]
    seen.clear()
    quantize(source, target, on_progress=lambda p: stop_never(p, seen))
    assert weights(target) == weights(whole)
    for name in ("config.json", "README.md"):
        text = (whole / name).read_text()
        assert (target / name).read_text() == text.replace("whole", "stopped")
    if how is not Killed and at > 1:
        assert seen[0] >= at - 1  # the steps before were not repeated


def stop_never(progress, seen):
    if progress.units.startswith("steps"):
        seen.append(progress.done)


def test_a_killed_run_resumes_with_the_same_bytes(source, whole, tmp_path):
    script = f"""
import os
from pathlib import Path
import mlx_openelm
import converters.quantization.learning as learning
from converters.conversion.run import convert
learning.SAVE_SECONDS = 0.0
def kill(progress):
    if progress.units.startswith("steps") and progress.done == 7:
        os._exit(9)
convert({str(source)!r}, {str(tmp_path / "killed")!r}, learn="12steps", bits=3,
        group_size=32, calibration=Path({str(source / "text.txt")!r}), on_progress=kill)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode == 9
    assert not (tmp_path / "killed").exists()
    seen = []
    quantize(source, tmp_path / "killed", on_progress=lambda p: stop_never(p, seen))
    assert seen[0] == 7  # step 6 was the last save
    assert weights(tmp_path / "killed") == weights(whole)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_minutes_become_steps_once(source, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(learning.time, "perf_counter", lambda: float(next(clock)))
    seen = []

    def stop(progress):
        if progress.units.startswith("steps"):
            seen.append((progress.done, progress.total))
            if progress.done == 5 and len(seen) == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "learned", "0.17", on_progress=stop)
    clock = iter(range(0, 10**7, 10))  # ten times slower
    report = quantize(source, tmp_path / "learned", "0.17", on_progress=stop)
    assert report.learned.steps == 9  # 10 s; one of a step, one of an evaluation
    assert seen[5:] == [(done, 9) for done in range(seen[5][0], 10)]


# Bad input -------------------------------------------------------------------------


def test_text_to_choose_by_that_is_not_finite_is_an_error(
    source, tmp_path, monkeypatch
):
    compute, calls = learning.measure, []

    def measure(student, reference):
        calls.append(reference)
        found = compute(student, reference)
        return found if len(calls) == 1 else replace(found, kl=math.nan)

    monkeypatch.setattr(learning, "measure", measure)
    seen = []
    with pytest.raises(OpenELMError, match="is not finite, so the weights are damaged"):
        quantize(
            source, tmp_path / "learned", on_progress=lambda p: stop_never(p, seen)
        )
    assert not seen  # before the first step


def test_a_batch_that_is_not_finite_is_skipped_and_named(source, tmp_path, monkeypatch):
    compute, calls = learning._Divergence.loss, []

    def loss(self, model, batch):
        value, margins = compute(self, model, batch)
        calls.append(batch)
        return value * (math.nan if len(calls) in bad else 1.0), margins

    monkeypatch.setattr(learning._Divergence, "loss", loss)
    bad = {4}
    report = quantize(source, tmp_path / "learned")
    assert len(report.learned.skipped) == 2
    assert "Skipped batches" in " ".join(report.notes)
    assert report.receipt.mean_kl < report.receipt.mean_kl_rounded
    bad, calls[:] = {5, 6, 7}, []
    with pytest.raises(OpenELMError, match="3 batches in a row, up to step 7"):
        quantize(source, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--q-mode", "mxfp4", "--learn", "5"], "powers of two"),
        (["--q-mode", "nvfp4", "--learn", "5"], "numbers of 8 bits"),
        (["--learn", "5"], "--learn trains a quantization; add --q-bits"),
        (["-q", "--learn", "0"], "pass minutes (10), or a number of steps"),
        (["-q", "--learn", "-3"], "pass minutes"),
        (["-q", "--learn", "nan"], "pass minutes"),
        (["-q", "--learn", "inf"], "pass minutes"),
        (["-q", "--learn", "0steps"], "pass minutes"),
        (["-q", "--learn", "1e3steps"], "pass minutes"),
        (["-q", "--learn", ""], "pass minutes"),
        (["-q", "--learn", "5", "--to", "gguf"], "--learn requires --to mlx, not gguf"),
        (["-q", "--learn", "5", "--tokenizer", "none"], "--learn needs a tokenizer"),
        (["-q", "--learn", "5", "--teacher-bits", "7"], "--teacher-bits is 7"),
        (["-q", "--teacher-bits", "8"], "--teacher-bits requires --learn"),
        (["-q", "--seed", "3"], "--seed requires --learn"),
        ([*UNEVEN_GROUPS, "--calibration", "short.txt"], "needs at least 192"),
        ([*UNEVEN_GROUPS, "--calibration", "none.txt"], "none.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_learned_is_refused(here, options, message):
    (here / "short.txt").write_text(TEXT[:100])
    expect_error(here, "convert", "source", "--mlx-path", "out", *options,
                 message=message)  # fmt: skip


def test_a_source_of_these_packed_weights_has_nothing_to_learn(rounded, tmp_path):
    report = quantize(rounded, tmp_path / "again")
    assert report.learned is None
    assert "Nothing was learned" in " ".join(report.notes)


def test_amounts():
    assert LearningAmount.parse("10") == LearningAmount(None, 10.0)
    assert LearningAmount.parse("0.5") == LearningAmount(None, 0.5)
    assert LearningAmount.parse("200steps") == LearningAmount(200, None)
    assert LearningAmount.parse("1step") == LearningAmount(1, None)


# Other tools -----------------------------------------------------------------------


@pytest.mark.interop
def test_stock_mlx_lm_opens_the_folder(whole):
    from mlx_lm.utils import dequantize_model
    from mlx_lm.utils import load_model as load_in_mlx_lm

    def widen(array):  # as we compute on the Linux CPU
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.float32) if floating else array

    theirs, _ = load_in_mlx_lm(whole)
    theirs.update(tree_map(widen, theirs.parameters()))
    dequantize_model(theirs)
    ours = load_model(open_folder(whole))
    tokens = mx.array([[1, 5, 80, 3, 44, 211]])
    want, got = np.array(ours(tokens)), np.array(theirs(tokens))
    assert np.abs(want - got).max() <= 1e-4 * np.abs(want).max()
