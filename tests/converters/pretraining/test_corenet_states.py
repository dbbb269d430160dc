"""Full training states of CoreNet: resumed, and written from ours.

The states come from a plain loop with torch's AdamW, saved as CoreNet saves them.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from commands import call, expect_error
from models import small_tokenizer
from pretrainings import job, read_losses, read_metrics, run_ranks, small_recipe

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.checkpoints import (  # noqa: E402
    as_json,
)
from converters.pretraining.loader import open_loader  # noqa: E402
from converters.pretraining.log import Noted, Saved  # noqa: E402
from converters.pretraining.recipe import TokenizerRecipe  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from converters.reference import ReferenceOpenELM  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402
from mlx_openelm.tensor_names import HEAD  # noqa: E402
from mlx_openelm.text.tokenizer import Tokenizer  # noqa: E402

ITERATIONS = 5


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small_tokenizer().model_proto)
    recipe = small_recipe(tmp_path)
    return replace(
        recipe,
        tokenizer=TokenizerRecipe(path=str(path)),
        data=replace(recipe.data, heldout=()),
        save_every=1,
        keep_last=20,
    )


class PlainLoop:
    """Pre-training as published, with torch alone."""

    def __init__(self, recipe, *, tied: bool = True) -> None:
        self.tokenizer = Tokenizer.from_file(Path(recipe.tokenizer.path))
        config = recipe.model.build(self.tokenizer.vocab_size)
        torch.manual_seed(7)
        self.model = ReferenceOpenELM(replace(config, share_input_output_layers=tied))
        named = list(self.model.named_parameters())
        self.named = [
            [(n, p) for n, p in named if p.ndim > 1],
            [(n, p) for n, p in named if p.ndim == 1],
        ]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in group], "weight_decay": decay}
                for group, decay in zip(self.named, (0.1, 0.0), strict=True)
            ],
            betas=(0.9, 0.95),
            eps=1e-8,
        )

    def update(self, step: int, inputs, targets, *, steps: int = 12) -> float:
        """One update of the schedule of `small_recipe`; returns the loss."""
        if step < 4:
            rate = 1e-6 + (5e-3 - 1e-6) * step / 4
        else:
            turn = math.cos(math.pi * (step - 4) / (steps - 4 + 1))
            rate = 5.3e-4 + (5e-3 - 5.3e-4) / 2 * (1 + turn)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logits = self.model(inputs)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )
        squares = logits.logsumexp(-1)[targets != -100].square()
        self.optimizer.zero_grad()
        (loss + 1e-4 * squares.mean()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def state(self, form: str) -> dict:
        """The state as CoreNet saves it: with DDP, or with FSDP (keyed by name)."""
        optimizer = self.optimizer.state_dict()
        for group, named in zip(optimizer["param_groups"], self.named, strict=True):
            group["param_names"] = [name for name, _ in named]
        weights = {
            "classifier.weight" if name == HEAD else name: tensor
            for name, tensor in self.model.state_dict().items()
        }
        if form == "fsdp":
            names = [name for group in self.named for name, _ in group]
            optimizer["state"] = {
                names[i]: {**moment, "step": moment["step"].item()}
                for i, moment in optimizer["state"].items()
            }
            for group in optimizer["param_groups"]:
                group["params"] = group.pop("param_names")
        else:
            weights = {f"module.{name}": tensor for name, tensor in weights.items()}
        return {
            "iterations": ITERATIONS,
            "epoch": 0,
            "model_state_dict": weights,
            "optim_state_dict": optimizer,
            "best_metric": math.inf,
            "is_interval_ckpt": True,
            **({} if form == "fsdp" else {"gradient_scaler_state_dict": {}}),
        }

    def train(self) -> None:
        generator = torch.Generator().manual_seed(1)
        for step in range(ITERATIONS):
            tokens = torch.randint(
                3, self.tokenizer.vocab_size, (4, 33), generator=generator
            )
            self.update(step, tokens[:, :-1], tokens[:, 1:])


def assert_close(stored: dict, model, atol: float = 1e-6) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, atol=atol, rtol=0)


@pytest.mark.parametrize("form", ["ddp", "fsdp"])
def test_a_run_resumes_from_a_state_of_corenet(recipe, tmp_path, form):
    plain = PlainLoop(recipe)
    plain.train()
    theirs = tmp_path / "apple" / f"training_checkpoint_epoch_0_iter_{ITERATIONS}.pt"
    theirs.parent.mkdir()
    torch.save(plain.state(form), theirs)
    notes = []

    def note(event):
        if isinstance(event, Noted):
            notes.append(event.text)

    loader = open_loader(recipe, plain.tokenizer, 32)
    pretrain(recipe, resume=str(theirs), on_event=note)
    run = Path(recipe.output)
    losses = []
    for step in range(ITERATIONS, 12):
        batch = loader.next_batch()
        inputs, targets = map(torch.from_numpy, (batch.inputs, batch.targets))
        losses.append(plain.update(step, inputs, targets))
        stored = torch.load(run / f"checkpoint_epoch_0_iter_{step + 1}.pt")
        assert_close(stored, plain.model, 1e-6 if step == ITERATIONS else 1e-5)
    assert read_losses(run) == pytest.approx(losses, abs=1e-5)
    assert read_losses(run)[0] == pytest.approx(losses[0], abs=1e-6)
    assert len(notes) == 1
    assert f"after {ITERATIONS} iterations" in notes[0]
    assert "start at the beginning of an epoch" in notes[0]
    assert read_metrics(run, "noted")[0]["text"] == notes[0]
    rates = [record["learning_rate"] for record in read_metrics(run)]
    assert len(rates) == 12 - ITERATIONS


@pytest.mark.proof
def test_sharded_processes_resume_from_a_sharded_state(recipe, tmp_path):
    plain = PlainLoop(recipe)
    plain.train()
    theirs = tmp_path / "theirs.pt"
    torch.save(plain.state("fsdp"), theirs)
    pretrain(recipe, resume=str(theirs))
    sharded = replace(recipe, parallel="fsdp", output=str(tmp_path / "sharded"))
    runs = [job(sharded, resume=str(theirs))]
    assert run_ranks(tmp_path, runs) == [["done"]] * 2
    losses = read_losses(sharded.output)
    assert losses == pytest.approx(read_losses(recipe.output), abs=1e-5)
    assert losses[0] == pytest.approx(read_losses(recipe.output)[0], abs=1e-6)


def test_the_same_command_continues_a_run_that_resumed_from_corenet(recipe, tmp_path):
    plain = PlainLoop(recipe)
    plain.train()
    theirs = tmp_path / "theirs.pt"
    torch.save(plain.state("ddp"), theirs)
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole, resume=str(theirs))

    class Cut(Exception):
        pass

    def cut(event):
        if isinstance(event, Saved) and event.step == 8:
            raise Cut

    with pytest.raises(Cut):
        pretrain(recipe, resume=str(theirs), on_event=cut)
    pretrain(recipe, resume=str(theirs))
    assert read_metrics(recipe.output, "started")[-1]["first_step"] == 8
    assert read_losses(recipe.output) == read_losses(whole.output)
    other = tmp_path / "other.pt"
    other.write_bytes(theirs.read_bytes())
    with pytest.raises(OpenELMError, match=r"did not start from .*other\.pt"):
        pretrain(recipe, resume=str(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("iterations"), "no position to resume from"),
        (lambda state: state.pop("optim_state_dict"), "is no training state"),
        (
            lambda state: [g.pop("param_names") for g in groups_of(state)],
            "have no param_names",
        ),
        (
            lambda state: state["optim_state_dict"]["state"].pop(3),
            r"layers\.\S+ has no exp_avg, exp_avg_sq, step",
        ),
        (
            lambda state: groups_of(state)[0]["param_names"].reverse(),
            r"exp_avg of \S+ has shape",
        ),
        (lambda state: state.update(iterations=12), r"after 12 iterations.*`steps`"),
    ],
)
def test_states_that_do_not_fit_are_refused(recipe, tmp_path, change, message):
    plain = PlainLoop(recipe)
    plain.train()
    state = plain.state("ddp")
    change(state)
    torch.save(state, tmp_path / "theirs.pt")
    with pytest.raises(OpenELMError, match=message):
        pretrain(recipe, resume=str(tmp_path / "theirs.pt"))


def groups_of(state: dict) -> list[dict]:
    return state["optim_state_dict"]["param_groups"]


def test_muon_does_not_resume_from_a_state_of_adamw(recipe, tmp_path):
    plain = PlainLoop(recipe)
    plain.train()
    torch.save(plain.state("ddp"), tmp_path / "theirs.pt")
    muon = replace(recipe, optimizer=replace(recipe.optimizer, name="muon"))
    with pytest.raises(OpenELMError, match="has no momentum_buffer"):
        pretrain(muon, resume=str(tmp_path / "theirs.pt"))
    init = replace(recipe, init=str(tmp_path / "theirs.pt"))
    with pytest.raises(OpenELMError, match="not both"):
        pretrain(init, resume=str(tmp_path / "theirs.pt"))
    with pytest.raises(OpenELMError, match="is not a file"):
        pretrain(recipe, resume=str(tmp_path / "gone.pt"))


# Written -------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_torch_loads_what_export_writes(recipe, tmp_path, tied):
    if not tied:
        plain = PlainLoop(recipe, tied=False)
        torch.save(plain.model.state_dict(), tmp_path / "untied.pt")
        recipe = replace(recipe, init=str(tmp_path / "untied.pt"))
    keep = replace(recipe, keep_states=None, output=str(tmp_path / "kept"))
    pretrain(keep)
    source = Path(keep.output) / "training_checkpoint_epoch_0_iter_9.pt"
    (tmp_path / "recipe.json").write_text(json.dumps(as_json(keep)))
    command = ("pretrain", "-c", str(tmp_path / "recipe.json"), "--export", "corenet")
    result = call(*command, "--resume", str(source))
    assert result.exit_code == 0, result.stderr
    written = Path(result.stdout.strip())
    assert written == Path(keep.output) / "corenet" / source.name
    state = torch.load(written, weights_only=True)
    assert state["iterations"] == 9
    assert not {"resume"} & state.keys()
    plain = PlainLoop(recipe, tied=tied)
    weights = state["model_state_dict"]
    assert ("classifier.weight" in weights) == (not tied)
    if not tied:
        weights[HEAD] = weights.pop("classifier.weight")
    plain.model.load_state_dict(weights)
    for group, named in zip(groups_of(state), plain.named, strict=True):
        spelled = ["classifier.weight" if n == HEAD else n for n, _ in named]
        assert group.pop("param_names") == spelled
    plain.optimizer.load_state_dict(state["optim_state_dict"])
    loader = open_loader(recipe, plain.tokenizer, 32)
    for step in range(12):
        batch = loader.next_batch()
        if step >= 9:
            inputs, targets = map(torch.from_numpy, (batch.inputs, batch.targets))
            plain.update(step, inputs, targets)
    last = Path(keep.output) / "checkpoint_epoch_0_iter_12.pt"
    assert_close(torch.load(last), plain.model)
    other = replace(recipe, output=str(tmp_path / "other"), init=None)
    pretrain(other, resume=str(written))  # as from CoreNet
    assert read_metrics(other.output, "started")[0]["first_step"] == 9
    assert (
        call(*command)
        .stdout.strip()
        .endswith("corenet/" + source.name.replace("9", "12"))
    )


def test_a_sharded_export_is_keyed_by_name(recipe, tmp_path):
    recipe = replace(recipe, parallel="fsdp", steps=2)
    pretrain(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(as_json(recipe)))
    result = call(
        "pretrain", "-c", str(tmp_path / "recipe.json"), "--export", "corenet"
    )
    state = torch.load(result.stdout.strip(), weights_only=True)
    optimizer = state["optim_state_dict"]
    assert optimizer["state"].keys() == state["model_state_dict"].keys()
    assert "gradient_scaler_state_dict" not in state
    assert [n for g in groups_of(state) for n in g["params"]] == [
        *(n for n, w in state["model_state_dict"].items() if w.ndim > 1),
        *(n for n, w in state["model_state_dict"].items() if w.ndim == 1),
    ]
    muon = replace(recipe.optimizer, name="muon")
    recipe = replace(
        recipe, parallel="ddp", optimizer=muon, output=str(tmp_path / "muon")
    )
    pretrain(recipe)
    (tmp_path / "recipe.json").write_text(json.dumps(as_json(recipe)))
    expect_error(
        tmp_path,
        *("pretrain", "-c", str(tmp_path / "recipe.json"), "--export", "corenet"),
        message="which CoreNet does not have",
    )
