"""Distillation: the loss against PyTorch, the teacher and its cache, whole runs."""

import dataclasses
import json
import math
import os
import shutil
import signal
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from commands import call, expect_error, make_source
from models import TEXT, UNEVEN, build, small_tokenizer, weights_of
from trainings import make_model, make_recipe, make_samples

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.further_objectives import teacher_cache
from mlx_openelm.finetuning.further_objectives.choice import make_objective
from mlx_openelm.finetuning.further_objectives.distillation import Distillation
from mlx_openelm.finetuning.further_objectives.teacher import TeacherFolder
from mlx_openelm.finetuning.preparation import prepare
from mlx_openelm.finetuning.recipe import FinetuneRecipe
from mlx_openelm.finetuning.run import finetune
from mlx_openelm.finetuning.run_checks import refuse_other_settings
from mlx_openelm.storage.model_folder import open_folder
from mlx_openelm.training.arrays import flatten

WIDE = replace(UNEVEN, model_dim=128, ffn_dims=(160, 224, 96))  # the teacher


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A student "small" and a teacher "large", in one folder."""
    folder = tmp_path_factory.mktemp("distillation")
    make_source(folder / "small")
    make_source(folder / "large", config=WIDE)
    lines = [s.strip() + "." for s in TEXT.split(".") if s.strip()] * 2
    with (folder / "train.jsonl").open("w") as opened:
        for i, line in enumerate(lines):
            opened.write(
                json.dumps({"prompt": line[: 9 + i], "completion": line}) + "\n"
            )
    return folder


def recipe_of(folders, target, **changes):
    recipe = FinetuneRecipe(
        data=str(folders / "train.jsonl"),
        model=str(folders / "small"),
        adapter_path=str(target),
        objective="distill",
        teacher=str(folders / "large"),
        iters=8,
        batch_size=4,
        learning_rate=3e-3,
        steps_per_eval=4,
        save_every=3,
        steps_per_report=2,
    )
    return dataclasses.replace(recipe, **changes)


def weights(folder):
    return (folder / "adapters.safetensors").read_bytes()


# The loss ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize(
    ("weight", "temperature", "cached"),
    [(0.7, 2.0, False), (1.0, 1.0, False), (0.7, 2.0, True), (0.0, 2.0, False)],
)
def test_loss_and_gradient_are_those_of_pytorch(
    folders, tmp_path, method, weight, temperature, cached
):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from adapted_in_torch import in_torch

    from converters.reference import ReferenceOpenELM

    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 5}
    recipe = make_recipe(
        objective="distill", teacher="large", fine_tune_type=method, rank=4,
        distill_weight=weight, temperature=temperature,
        **(cache if cached else {}),
    )  # fmt: skip
    model, samples = make_model(recipe), make_samples()[:6]
    reference, trained = in_torch(model, recipe.scale)
    objective = make_objective(recipe)
    teacher = TeacherFolder("large", open_folder(folders / "large"), 300)
    objective.open_cache(teacher, [samples])
    objective.load_teacher(teacher)
    theirs = ReferenceOpenELM(WIDE)
    theirs.load_state_dict(
        {n: torch.from_numpy(w) for n, w in weights_of(WIDE).items()}
    )
    total = 0.0
    for sample in samples:
        tokens = torch.from_numpy(sample.tokens.astype(np.int64))
        places = np.flatnonzero(sample.loss_mask)
        targets = tokens[places]
        logits = reference(tokens[None, :-1])[0, places - 1]
        with torch.no_grad():
            taught = theirs(tokens[None, :-1])[0, places - 1] / temperature
        log_p, log_q = taught.log_softmax(-1), (logits / temperature).log_softmax(-1)
        if cached:
            best = log_p.topk(5, dim=-1)
            p = best.values.exp()
            known = (p * (p.log() - log_q.gather(1, best.indices))).sum(-1)
            outside = torch.ones_like(log_q).scatter(1, best.indices, 0.0)
            rest_q, rest_p = (log_q.exp() * outside).sum(-1), 1 - p.sum(-1)
            kl = known + rest_p * (rest_p.log() - rest_q.log())
        else:
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        plain = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        total = total + (1 - weight) * plain + weight * temperature**2 * kl.sum()
    total.backward()

    batch = objective.collate(samples)
    value, gradient = nn.value_and_grad(model, lambda m: objective.loss(m, batch)[0])(
        model
    )
    assert value.item() == pytest.approx(total.item(), rel=1e-4)
    assert objective.evaluate(model, batch).loss == pytest.approx(
        total.item(), rel=1e-4
    )
    flat = flatten(gradient)
    assert flat.keys() == trained.keys()
    for name, parameter in trained.items():
        want, got = parameter.grad.numpy(), np.array(flat[name])
        assert np.abs(got - want).max() <= 1e-4 * max(np.abs(want).max(), 1e-3), name


# Runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["in memory", "cached"])
def test_a_run_learns_and_resumes_with_the_same_bytes(folders, tmp_path, cached):
    cache = {"teacher_cache": str(tmp_path / "cache")} if cached else {}
    recipe = recipe_of(folders, tmp_path / "run", distill_weight=1.0, **cache)

    def stop(event):
        if event["event"] == "step" and event["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, on_event=stop)
    report = finetune(recipe, resume=True)
    whole = finetune(dataclasses.replace(recipe, adapter_path=str(tmp_path / "whole")))
    assert report.last_loss < report.first_loss - 0.1
    assert weights(report.path) == weights(whole.path)


def test_a_run_resumes_with_a_moved_teacher_but_not_with_another(there):
    recipe = recipe_of(there, there / "run")

    def stop(event):
        if event["event"] == "step" and event["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(recipe, on_event=stop)
    (there / "large").rename(there / "moved")
    make_source(there / "large", weights_of(WIDE, seed=7), config=WIDE)
    with pytest.raises(OpenELMError, match="the teacher has changed"):
        finetune(recipe, resume=True)
    assert finetune(replace(recipe, teacher=str(there / "moved")), resume=True)


def test_processes_with_other_teachers_are_refused(there):
    class FirstRank:
        rank = 1

        def broadcast_text(self, text):
            return text if text != identity["teacher"] else "another fingerprint"

    prepared = prepare(recipe_of(there, there / "run"))
    identity = prepared.describe_inputs()
    with pytest.raises(OpenELMError, match="1 has other weights of the teacher than"):
        refuse_other_settings(prepared, identity, FirstRank())


def test_cached_and_whole_distributions_train_almost_alike(folders, tmp_path):
    cached = recipe_of(
        folders, tmp_path / "cached", teacher_cache=str(tmp_path / "cache"),
        teacher_top_k=300,
    )  # fmt: skip
    losses = [
        finetune(recipe).last_loss
        for recipe in (cached, recipe_of(folders, tmp_path / "whole"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_cache_is_computed_once_and_resumes(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "PART", 5)
    recipe = recipe_of(folders, tmp_path / "a", teacher_cache=str(tmp_path / "cache"))
    seen = []

    def stop(done, total, unit):
        if "teacher" in unit:
            seen.append(done)
            if len(seen) == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        finetune(recipe, on_progress=stop)
    note = f"{tmp_path / 'cache'} keeps 15 records that the teacher has read."
    assert stopped.value.__notes__ == [note]
    parts = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(parts) == 3  # of 5 samples in two batches each
    kept = [part.read_bytes() for part in parts]
    finetune(recipe, on_progress=stop)
    assert [part.read_bytes() for part in parts] == kept
    assert seen[7] == 15 + 4
    seen.clear()
    finetune(replace(recipe, adapter_path=str(tmp_path / "b")), on_progress=stop)
    assert not seen
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_plan_has_the_memory_of_the_teacher(folders, tmp_path):
    recipe = recipe_of(folders, tmp_path / "run")
    memory = prepare(recipe).plan.memory
    cached = prepare(replace(recipe, teacher_cache=str(tmp_path / "c"))).plan.memory
    sizes = sum(array.nbytes for array in flatten(build(WIDE).parameters()).values())
    assert memory.teacher == sizes
    assert memory.total - cached.total == sizes
    assert cached.teacher == 0
    assert not (tmp_path / "c").exists()


def test_the_command(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ("lora", "--data", folders / "train.jsonl", "--model", folders / "large",
               "--objective", "distill", "--teacher", folders / "small")  # fmt: skip
    plan = call(*options, "--dry-run")
    assert plan.exit_code == 0, plan.stderr
    assert "has fewer parameters than the model" in plan.stderr
    assert "teacher 0.00" in plan.stderr
    run = call(*options, "--iters", "2", "--json", "--teacher-cache", "cache")
    assert run.exit_code == 0, run.stderr
    assert json.loads(run.stdout)["steps"] == 2


# Bad input -----------------------------------------------------------------------


@pytest.fixture
def there(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "small", "small")
    shutil.copytree(folders / "large", "large")
    shutil.copy(folders / "train.jsonl", "train.jsonl")
    return tmp_path


OPTIONS = ("lora", "--data", "train.jsonl", "--model", "small", "--iters", "2")
DISTILL = (*OPTIONS, "--objective", "distill", "--teacher", "large")
PAIRS = (*OPTIONS, "--objective")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*OPTIONS, "--objective", "distill"), "--objective distill needs a --teacher"),
        ((*OPTIONS, "--teacher", "large"), "--teacher requires --objective distill"),
        ((*OPTIONS, "--teacher-cache", "c"), "--teacher-cache requires"),
        ((*OPTIONS, "--temperature", "2"), "--temperature requires --objective distil"),
        ((*OPTIONS, "--distill-weight", "1"), "--distill-weight requires"),
        ((*OPTIONS, "--teacher-top-k", "9"), "--teacher-top-k requires --objective"),
        ((*OPTIONS, "--orpo-weight", "1"), "--orpo-weight requires --objective orpo"),
        ((*OPTIONS, "--dpo-beta", "1"), "--dpo-beta requires --objective dpo, not sft"),
        ((*DISTILL, "--dpo-loss", "hinge"), "--dpo-loss requires --objective dpo"),
        ((*PAIRS, "dpo", "--z-loss", "1"), "--z-loss requires --objective sft or dist"),
        ((*PAIRS, "orpo", "--z-loss", "1"), "or distill, not orpo"),
        ((*PAIRS, "orpo", "--dpo-beta", "1"), "--dpo-beta requires --objective dpo"),
        ((*PAIRS, "dpo", "--turns", "last"), "--turns requires --objective"),
        ((*PAIRS, "dpo", "--no-mask-prompt"), "--mask-prompt requires --objective"),
        ((*PAIRS, "orpo", "--completion-key", "a"), "--completion-key requires"),
        ((*DISTILL, "--teacher-top-k", "9"), "--teacher-top-k requires a --teacher-ca"),
        ((*DISTILL, "--teacher", "nowhere"), "--teacher: There is no folder nowhere"),
        ((*DISTILL, "--teacher", "demo"), "another vocabulary"),
        ((*DISTILL, "--teacher", "org/name", "--offline"), "--teacher: org/name"),
        ((*DISTILL, "--teacher", ""), "--teacher is empty"),
        ((*DISTILL, "--teacher-cache", ""), "--teacher-cache is empty"),
        ((*DISTILL, "--distill-weight", "1.5"), "--distill-weight is 1.5"),
        ((*DISTILL, "--distill-weight", "nan"), "--distill-weight is nan"),
        ((*DISTILL, "--distill-weight", "1", "--z-loss", "1"), "--z-loss is a part of"),
        ((*DISTILL, "--temperature", "0"), "--temperature is 0"),
        ((*DISTILL, "--teacher-top-k", "0"), "--teacher-top-k is 0"),
        ((*DISTILL, "--teacher-cache", "small"), "is not a cache of a teacher"),
        ((*DISTILL, "--teacher-cache", "train.jsonl"), "is not a cache of a teacher"),
        ((*DISTILL, "--adapter-path", "a", "--teacher-cache", "a"), "separate folders"),
        ((*DISTILL, "--adapter-path", "a/b", "--teacher-cache", "a"), "separate folde"),
        ((*DISTILL, "--teacher-cache", "adapters"), "need separate folders"),
    ],
    ids=lambda value: " ".join(value[7:]) if isinstance(value, tuple) else "",
)
def test_what_does_not_fit_is_refused(there, options, message):
    expect_error(there, *options, message=message)


def test_a_teacher_of_a_shorter_context_is_refused(there):
    make_source(there / "short", config=replace(WIDE, max_context_length=32))
    message = ["short is 32 tokens", "--max-seq-length 64; pass 32 or less"]
    expect_error(there, *DISTILL, "--teacher", "short", message=message)


@pytest.mark.parametrize("cache", [(), ("--teacher-cache", "c")])
def test_a_teacher_with_nan_is_refused(there, cache):
    make_source(there / "bad", config=WIDE)
    file = there / "bad" / "model.safetensors"
    weights = mx.load(str(file))
    name = next(name for name in weights if name.endswith("norm.weight"))
    weights[name] = weights[name] * math.nan
    mx.save_safetensors(str(file), weights, {"format": "pt"})
    message = ["bad are damaged: transformer.norm.weight", "use another --teacher"]
    result = call(*DISTILL, "--teacher", "bad", *cache)
    assert (result.exit_code, result.stdout) == (1, "")
    for words in message:
        assert words in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_cache_of_all_tokens_gives_the_whole_divergence(
    folders, tmp_path, temperature
):
    teacher = TeacherFolder("large", open_folder(folders / "large"), 300)
    cache = {"teacher_cache": str(tmp_path / "cache"), "teacher_top_k": 300}
    losses = []
    for options in ({}, cache):
        recipe = make_recipe(
            objective="distill", teacher="large", distill_weight=1.0,
            temperature=temperature, **options,
        )  # fmt: skip
        model, samples = make_model(recipe), make_samples()[:6]
        objective = make_objective(recipe)
        objective.open_cache(teacher, [samples])
        objective.load_teacher(teacher)
        losses.append(objective.loss(model, objective.collate(samples))[0].item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_another_cache_is_noticed(there):
    cached = (*DISTILL, "--teacher-cache", "cache", "--quiet")
    assert call(*cached, "--adapter-path", "one").exit_code == 0
    for options, message in (
        (("--temperature", "3"), "with another --temperature"),
        (("--teacher-top-k", "9"), "with another --teacher-top-k"),
        (("--teacher", "small"), "with another teacher"),
        (("--no-mask-prompt",), "with other data"),
    ):
        expect_error(there, *cached, "--adapter-path", "two", *options, message=message)
        expect_error(there, *cached, *options, "--dry-run", message=message)
    assert call(*cached, "--dry-run").exit_code == 0


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing"])
def test_damaged_parts_of_a_cache_are_computed_again(there, damage):
    cached = (*DISTILL, "--teacher-cache", "cache", "--quiet")
    assert call(*cached, "--adapter-path", "one").exit_code == 0
    part = there / "cache" / "00000.safetensors"
    before = part.read_bytes()
    if damage == "truncated":
        part.write_bytes(before[:-1])
    elif damage == "foreign":
        mx.save_safetensors(str(part), {"tokens": mx.zeros((2, 2))}, {"format": "mlx"})
    else:
        part.unlink()
    assert call(*cached, "--adapter-path", "two").exit_code == 0
    assert part.read_bytes() == before
    one, two = (there / name / "adapters.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_part_that_is_damaged_during_a_run_is_an_error(there, monkeypatch):
    cached = (*DISTILL, "--teacher-cache", "cache", "--adapter-path", "one")
    collate = Distillation.collate

    def truncate(self, samples):
        part = there / "cache" / "00000.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
        return collate(self, samples)

    monkeypatch.setattr(Distillation, "collate", truncate)
    result = call(*cached)
    assert result.exit_code == 1
    assert "damaged or missing; repeat the command" in result.stderr


def test_what_the_teacher_cannot_compute_is_skipped_and_named(folders, tmp_path):
    recipe = recipe_of(folders, tmp_path / "run", teacher=str(tmp_path / "bad"))
    table = weights_of(WIDE)["token_embeddings.weight"].copy()
    word = small_tokenizer().encode("wood", bos=False)[0]
    table[word] = 3e38  # overflows in the first layer
    make_source(tmp_path / "bad", {"token_embeddings.weight": table}, config=WIDE)
    events = []
    with pytest.raises(OpenELMError, match=r"not finite in 3 batches.*train.jsonl:"):
        finetune(recipe, on_event=events.append)
    assert any(event["event"] == "skip" for event in events)
