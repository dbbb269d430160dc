"""The training loop, compared with a plain loop of the published recipe."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pretrainings import (
    read_losses,
    read_metrics,
    small_recipe,
    streamed_data,
)

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.loader import open_loader  # noqa: E402
from converters.pretraining.log import (  # noqa: E402
    Evaluated,
    Saved,
    Started,
    Trained,
)
from converters.pretraining.optimizers import (  # noqa: E402
    build_optimizers,
    learning_rate,
)
from converters.pretraining.recipe import (  # noqa: E402
    ModelRecipe,
    OptimizerRecipe,
    PretrainRecipe,
)
from converters.pretraining.run import pretrain  # noqa: E402
from converters.reference import ReferenceOpenELM  # noqa: E402
from mlx_openelm.config import OpenELMConfig  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402
from mlx_openelm.recipe_loader import bundled_recipes, load_recipe  # noqa: E402
from mlx_openelm.text.tokenizer import Tokenizer  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    return small_recipe(tmp_path)


def losses(events):
    return [e.loss for e in events if isinstance(e, Trained)]


def test_a_run_learns_logs_and_writes_a_readable_checkpoint(recipe):
    events = []
    path = pretrain(replace(recipe, steps=40), on_event=events.append)
    curve = losses(events)
    assert len(curve) == 40
    assert curve[0] == pytest.approx(math.log(300), abs=0.7)
    assert curve[-1] < curve[0] - 0.8
    assert isinstance(events[0], Started)
    scores = [e for e in events if isinstance(e, Evaluated)]
    assert scores[-1].nats_per_token < scores[0].nats_per_token
    assert [e.step for e in events if isinstance(e, Saved)][-1] == 40
    run = Path(recipe.output)
    written = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["loss"] for r in written if r["event"] == "trained"] == curve
    from converters.formats.sources import open_source

    source = open_source(str(path))
    assert source.config == OpenELMConfig.from_file(run / "config.json")
    assert source.config.max_context_length == 32


def test_micro_batches_equal_the_whole_batch(recipe, tmp_path):
    events: dict = {1: [], 4: []}
    for micro in events:
        pretrain(
            replace(recipe, micro_batch_size=micro, output=str(tmp_path / str(micro))),
            on_event=events[micro].append,
        )
    assert losses(events[1]) == pytest.approx(losses(events[4]), abs=1e-5)


def test_padded_batches_count_their_tokens_not_their_rows(recipe, tmp_path):
    recipe = replace(recipe, data=streamed_data(tmp_path))
    curves = {}
    for micro in (1, 4):
        output = str(tmp_path / f"padded-{micro}")
        pretrain(replace(recipe, micro_batch_size=micro, output=output))
        curves[micro] = read_losses(output)
    assert curves[1] == pytest.approx(curves[4], abs=1e-5)


def test_activation_checkpointing_changes_no_result(recipe, tmp_path):
    other = replace(
        recipe, activation_checkpointing=True, output=str(tmp_path / "again")
    )
    kept: list[int] = []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for each in (recipe, other):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            pretrain(each)
    assert read_losses(recipe.output) == read_losses(other.output)
    assert kept[1] != kept[0]


def test_bf16_is_close_to_float32(recipe, tmp_path):
    half = replace(recipe, bf16=True, output=str(tmp_path / "half"))
    pretrain(recipe)
    pretrain(half)
    curve, expected = read_losses(half.output), read_losses(recipe.output)
    assert curve == pytest.approx(expected, abs=0.05)
    assert curve != pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hundred_steps_equal_a_plain_loop(recipe, tmp_path, streamed):
    """The plain loop is written from the published recipe, without the library."""
    if streamed:
        recipe = replace(recipe, data=streamed_data(tmp_path))
    recipe = replace(
        recipe,
        steps=100,
        micro_batch_size=2,
        optimizer=OptimizerRecipe(
            learning_rate=5e-3, final_learning_rate=5e-4, warmup_steps=10
        ),
        eval_every=1000,
        save_every=1000,
    )
    pretrain(recipe)
    run = Path(recipe.output)
    tokenizer = Tokenizer.from_file(run / "tokenizer.model")
    batches = plain_batches(recipe, tokenizer)
    torch.manual_seed(recipe.seed)
    model = ReferenceOpenELM(OpenELMConfig.from_file(run / "config.json"))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    free = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    expected, norms = [], []
    for step in range(100):
        if step < 10:
            rate = 1e-6 + (5e-3 - 1e-6) * step / 10
        else:
            turn = math.cos(math.pi * (step - 10) / (100 - 10 + 1))
            rate = 5e-4 + (5e-3 - 5e-4) / 2 * (1 + turn)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = next(batches)
        logits = model(inputs)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )
        squares = logits.logsumexp(-1)[targets != -100].square()
        optimizer.zero_grad()
        (loss + 1e-4 * squares.mean()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        expected.append(loss.item())
    records = read_metrics(recipe.output)
    curve = [record["loss"] for record in records]
    assert len(curve) == 100
    assert curve[-1] < curve[0] - 1
    assert curve == pytest.approx(expected, abs=1e-6)
    logged_norms = [record["gradient_norm"] for record in records]
    assert logged_norms == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1  # some are clipped


def plain_batches(recipe, tokenizer):
    """Yield the batches of `small_recipe`; packed ones without the library."""
    if not recipe.data.packing:
        loader = open_loader(recipe, tokenizer, 32)
        while True:
            batch = loader.next_batch()
            yield torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)
    text = Path(recipe.data.train[0]).read_text()
    stream = [*tokenizer.encode(text, bos=False), 2]
    count = (len(stream) - 31) // 32
    position = epoch = 0
    while True:
        rows = []
        while len(rows) < 4:
            rng = np.random.default_rng([recipe.seed, epoch])
            offset = rng.integers(32) if epoch else 0
            start = offset + 32 * rng.permutation(count)[position]
            rows.append(stream[start : start + 32])
            position += 1
            if position == count:
                position, epoch = 0, epoch + 1
        targets = torch.tensor(rows)
        bos = torch.ones(4, 1, dtype=torch.long)
        yield torch.cat([bos, targets[:, :-1]], 1), targets


def test_the_rate_warms_up_and_follows_a_cosine():
    recipe = OptimizerRecipe()  # the published 270M
    rates = [learning_rate(recipe, step, 350_000) for step in range(0, 350_000, 500)]
    assert rates[0] == 1e-6
    assert learning_rate(recipe, 2500, 350_000) == pytest.approx(2.65e-3, rel=1e-3)
    assert learning_rate(recipe, 5000, 350_000) == 5.3e-3
    middle = learning_rate(recipe, 5000 + 172_500, 350_000)
    assert middle == pytest.approx((5.3e-3 + 5.3e-4) / 2, rel=1e-3)
    assert learning_rate(recipe, 349_999, 350_000) == pytest.approx(5.3e-4, rel=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_matrices_decay_and_vectors_do_not():
    config = OpenELMConfig.scaled(
        num_layers=2, model_dim=32, head_dim=16, num_gqa_groups=1, vocab_size=50
    )
    model = ReferenceOpenELM(config)
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(model, OptimizerRecipe(name=name))
        groups = [g for o in optimizers for g in o.param_groups]
        params = [p for g in groups for p in g["params"]]
        assert len({id(p) for p in params}) == len(params)
        assert len(params) == len(list(model.parameters()))
        for group in groups:
            expected = 0.1 if group["params"][0].ndim >= 2 else 0.0
            assert group["weight_decay"] == expected
            assert len({p.ndim >= 2 for p in group["params"]}) == 1
        assert len(optimizers) == (1 if name == "adamw" else 2)


def test_every_bundled_recipe_is_valid():
    recipes = bundled_recipes()
    names = [name for name in recipes if name.startswith("pretrain/")]
    assert "pretrain/stories" in names
    for name in names:
        built = load_recipe(
            PretrainRecipe, name, {"steps": 7, "data.train": ["x"], "data.corpora": []}
        )
        assert built.steps == 7
        assert built.data.train == ("x",)
        if built.model != ModelRecipe():  # else the sizes come from --init
            assert built.model.build(4096).num_parameters > 1e6
        assert recipes[name].read_text().startswith("# ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {name: 270M}\ndata: {}\nstpes: 3\n",
            r"stpes \(did you mean steps\?\)",
        ),
        ("model: {name: 270M}\ndata: {trian: [a]}\n", r"data\.trian \(did you mean"),
        (
            "model: {name: 270M}\ndata: {}\nsteps: many\n",
            "steps is 'many', expected int",
        ),
        ("model: {name: 270M}\ndata: {}\nsteps: true\n", "steps is True"),
        ("model: {name: 270M}\ndata: {}\noptimizer: {name: sgd}\n", "adamw or muon"),
        ("optimizer: {learning_rate: -1}\n", r"optimizer\.learning_rate is -1\.0"),
        ("optimizer: {weight_decay: .nan}\n", r"optimizer\.weight_decay is nan"),
        ("optimizer: {betas: [0.9, 1.0]}\n", r"optimizer\.betas is \(0\.9, 1\.0\)"),
        ("optimizer: {clip_norm: 0}\n", r"optimizer\.clip_norm is 0\.0"),
        ("model: {head_dim: 0}\n", r"model\.head_dim is 0"),
        ("model: {ffn_multipliers: [0.5, .inf]}\n", r"ffn_multipliers is \(0\.5, inf"),
        ("- a\n- b\n", "holds a list"),
        ("model: [\n", "cannot be parsed"),
    ],
)
def test_errors_in_a_recipe_are_reported(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OpenELMError, match=message):
        load_recipe(PretrainRecipe, str(path), {})
