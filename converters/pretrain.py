"""The reference training loop: OpenELM's recipe in PyTorch, one process or several.

Follows the published pre-training (facts of CoreNet's OpenELM recipes): AdamW on
matrices with decay and on vectors without, linear warm-up, cosine, clipping, z-loss.
A batch is a function of (seed, step) and the model has no dropout, so weights and
optimizer state are all that a resumed run needs to go on exactly.

Start it with `mlx-openelm pretrain -c RECIPE`, or several processes with
`torchrun --nproc-per-node N -m mlx_openelm pretrain -c RECIPE`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from converters.corpus import (
    IGNORED,
    PackedSequences,
    PaddedSequences,
    Sequences,
    read_corpus,
    step_batch,
    train_tokenizer,
)
from converters.reference import ReferenceOpenELM, summed_loss
from mlx_openelm.config import BOS_ID, EOS_ID, read_mapping
from mlx_openelm.errors import OpenELMError
from mlx_openelm.pretrain_recipe import OptimizerRecipe, PretrainRecipe
from mlx_openelm.tokenizer import Tokenizer

LAST = "training_checkpoint_last.pt"
AVERAGE = "checkpoint_average.pt"


@dataclass(frozen=True, slots=True)
class Started:
    """What is about to be trained; token counts are of one epoch."""

    num_parameters: int
    num_documents: int
    num_sequences: int
    num_tokens: int
    dropped: dict[str, int]
    steps: int
    first_step: int


@dataclass(frozen=True, slots=True)
class Trained:
    """Means since the last report: loss in nats per token, without z-loss."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Held-out text, windows each begun with BOS."""

    step: int
    nats_per_token: float
    bits_per_byte: float


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    path: Path


Event = Started | Trained | Evaluated | Saved


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run, and the device that it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


def pretrain(
    recipe: PretrainRecipe,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train an OpenELM from nothing and return the path of its final weights.

    Events reach `on_event` in the first process only, and `metrics.jsonl` as well.

    Raises:
        OpenELMError: the data or the recipe is unusable, the output exists and `resume`
            is off, or there is nothing to resume.
        KeyboardInterrupt: on SIGINT, after a checkpoint.
        SystemExit: with 143 on SIGTERM, after a checkpoint.
    """
    with _processes() as processes, _stop_signals() as stop:
        return _Run(recipe, processes, resume, on_event).train(stop)


class _Run:
    """The state of one run: data, model, optimizers and the step that comes next."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        processes: Processes,
        resume: bool,
        on_event: Callable[[Event], None],
    ) -> None:
        self.recipe, self.processes, self.on_event = recipe, processes, on_event
        self.output = Path(recipe.output)
        _check(recipe, processes, resume)
        data = recipe.data
        corpus = read_corpus(
            data.train,
            exclude=(*data.exclude, *data.heldout),
            document_start=data.document_start,
        )
        self.tokenizer = self._prepare_tokenizer(corpus.documents)
        self.config = recipe.model.build(self.tokenizer.vocab_size)
        length = self.config.max_context_length
        self.sequences: Sequences = (
            PackedSequences(corpus.documents, self.tokenizer, length)
            if data.packing
            else PaddedSequences(corpus.documents, self.tokenizer, data, length)
        )
        self.heldout = (
            _HeldOut(data.heldout, self.tokenizer, recipe) if data.heldout else None
        )
        torch.manual_seed(recipe.seed)
        torch.set_float32_matmul_precision("high")  # TF32 where the device has it
        self.model = ReferenceOpenELM(self.config).to(processes.device)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.step = self._load_last() if resume else 0
        loss: nn.Module = _SummedLoss(self.model, recipe)
        if recipe.compile:
            loss.compile()
        if processes.count > 1:
            loss = DistributedDataParallel(loss)
        self.loss = loss
        if processes.first:
            self._write_json("config.json", self.config.to_dict())
            self._write_json("recipe.json", dataclasses.asdict(recipe))
            self._write_json("generation_config.json", generation_config(recipe))
        self._emit(
            Started(
                num_parameters=self.config.num_parameters,
                num_documents=len(corpus.documents),
                num_sequences=len(self.sequences),
                num_tokens=self.sequences.num_tokens,
                dropped=dict(self.sequences.dropped),
                steps=recipe.steps,
                first_step=self.step,
            )
        )

    def train(self, stop: list[int]) -> Path:
        recipe = self.recipe
        losses: list[Tensor] = []
        norm = torch.zeros(())
        since, tokens = time.perf_counter(), 0
        while self.step < recipe.steps:
            loss, norm, count = self._update()
            losses.append(loss)
            tokens += count
            self.step += 1
            last = self.step == recipe.steps
            if self.step % recipe.report_every == 0 or last:
                mean = float(torch.stack(losses).mean())
                elapsed = time.perf_counter() - since
                rate = learning_rate(recipe.optimizer, self.step - 1, recipe.steps)
                self._emit(
                    Trained(self.step, mean, rate, float(norm), tokens / elapsed)
                )
                if not math.isfinite(mean):
                    raise OpenELMError(
                        f"The loss is {mean} at step {self.step}; the last checkpoint "
                        "is whole. Lower optimizer.learning_rate."
                    )
                losses, tokens, since = [], 0, time.perf_counter()
            if self.heldout and (self.step % recipe.eval_every == 0 or last):
                paused = time.perf_counter()
                self._emit(self.heldout.score(self.model, self.step))
                since += time.perf_counter() - paused
            if self._agree_to_stop(stop):
                self._save()
                if stop[0] == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(128 + stop[0])
            if self.step % recipe.save_every == 0 or last:
                self._save()
        return self._average()

    def _update(self) -> tuple[Tensor, Tensor, int]:
        """Take one optimizer step; return loss, gradient norm and tokens counted."""
        recipe, processes = self.recipe, self.processes
        batch = step_batch(
            self.sequences,
            step=self.step,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            rank=processes.rank,
            ranks=processes.count,
        )
        inputs, targets = (
            torch.from_numpy(part).to(processes.device)
            for part in (batch.inputs, batch.targets)
        )
        total = (targets != IGNORED).sum().double()
        if processes.count > 1:
            dist.all_reduce(total)
        micro = recipe.micro_batch_size or len(inputs)
        parts = list(zip(inputs.split(micro), targets.split(micro), strict=True))
        cross_entropy = torch.zeros((), dtype=torch.float64, device=processes.device)
        for i, (x, y) in enumerate(parts):
            with self._synchronised(i == len(parts) - 1):
                loss_sum, objective_sum = self.loss(x, y)
                # DDP averages over processes; tokens are to be averaged over all.
                (objective_sum * (processes.count / total).float()).backward()
            cross_entropy += loss_sum.detach().double()
        if processes.count > 1:
            dist.all_reduce(cross_entropy)
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), recipe.optimizer.clip_norm
        )
        rate = learning_rate(recipe.optimizer, self.step, recipe.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return cross_entropy / total, norm, int(total)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        if isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return contextlib.nullcontext()

    def _agree_to_stop(self, stop: list[int]) -> bool:
        """Stop all processes at the same step, whichever got the signal."""
        if self.processes.count == 1:
            return bool(stop)
        asked = torch.tensor([stop[0] if stop else 0], device=self.processes.device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            stop[:] = [int(asked.item())]
        return bool(stop)

    # Disk ------------------------------------------------------------------------

    def _prepare_tokenizer(self, documents: tuple[str, ...]) -> Tokenizer:
        kept = self.output / "tokenizer.model"
        if self.processes.first and not kept.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            given = self.recipe.tokenizer.path
            tokenizer = (
                Tokenizer.from_file(Path(given))
                if given
                else train_tokenizer(documents, self.recipe.tokenizer)
            )
            _write(kept, lambda path: path.write_bytes(tokenizer.model_proto))
        self.processes.wait()
        return Tokenizer.from_file(kept)

    def _save(self) -> None:
        """Write the state to go on from, and the weights alone; keep the last ones."""
        if self.processes.first:
            weights = {k: v.cpu() for k, v in self.model.state_dict().items()}
            state = {
                "iterations": self.step,
                "epoch": 0,
                "model_state_dict": weights,
                "optim_state_dict": [o.state_dict() for o in self.optimizers],
                "best_metric": math.inf,
                "is_interval_ckpt": True,
            }
            name = f"checkpoint_epoch_0_iter_{self.step}.pt"
            _write(self.output / name, lambda path: torch.save(weights, path))
            _write(self.output / LAST, lambda path: torch.save(state, path))
            for old in self._weights_on_disk()[: -self.recipe.keep_last]:
                old.unlink()
            self._emit(Saved(self.step, self.output / LAST))
        self.processes.wait()

    def _weights_on_disk(self) -> list[Path]:
        found = self.output.glob("checkpoint_epoch_0_iter_*.pt")
        return sorted(found, key=lambda path: int(path.stem.rsplit("_", 1)[1]))

    def _average(self) -> Path:
        path = self.output / AVERAGE
        if self.processes.first:
            chosen = self._weights_on_disk()[-self.recipe.average_last :]
            average = average_checkpoints(chosen)
            _write(path, lambda staged: torch.save(average, staged))
            if self.heldout and len(chosen) > 1:
                self.model.load_state_dict(average)
                self._emit(self.heldout.score(self.model, self.step))
        self.processes.wait()
        return path

    def _load_last(self) -> int:
        path = self.output / LAST
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise OpenELMError(
                f"{path} is damaged, so the run cannot go on ({_first_line(error)})."
            ) from error
        self.model.load_state_dict(state["model_state_dict"])
        for optimizer, saved in zip(
            self.optimizers, state["optim_state_dict"], strict=True
        ):
            optimizer.load_state_dict(saved)
        return int(state["iterations"])

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        _write(self.output / name, lambda path: path.write_text(text))

    def _emit(self, event: Event) -> None:
        if not self.processes.first:
            return
        record = {"event": type(event).__name__.lower(), **dataclasses.asdict(event)}
        with (self.output / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(record, default=str) + "\n")
        self.on_event(event)


class _SummedLoss(nn.Module):
    """Tokens in, loss sums out: the part that is compiled and wrapped for DDP."""

    def __init__(self, model: ReferenceOpenELM, recipe: PretrainRecipe) -> None:
        super().__init__()
        self.model = model
        self.bf16 = recipe.bf16
        self.z_loss = recipe.optimizer.z_loss

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(inputs)
        return summed_loss(logits, targets, z_loss=self.z_loss)


class _HeldOut:
    """Windows of held-out text, spread evenly, each begun with BOS."""

    def __init__(
        self, patterns: tuple[str, ...], tokenizer: Tokenizer, recipe: PretrainRecipe
    ) -> None:
        documents = read_corpus(patterns).documents
        windows = PackedSequences(documents, tokenizer, recipe.eval_window)
        every = max(1, len(windows) // recipe.eval_sequences)
        chosen = range(0, len(windows), every)[: recipe.eval_sequences]
        # The order of places does not matter; epoch 0 starts at offset 0.
        self.batch = windows.batch(chosen, recipe.seed, 0)
        num_bytes = sum(len(text.encode()) for text in documents)
        self.bytes_per_token = num_bytes / windows.num_tokens

    @torch.no_grad()
    def score(self, model: ReferenceOpenELM, step: int) -> Evaluated:
        device = next(model.parameters()).device
        total = 0.0
        for start in range(0, len(self.batch.inputs), 16):
            rows = slice(start, start + 16)
            inputs = torch.from_numpy(self.batch.inputs[rows]).to(device)
            targets = torch.from_numpy(self.batch.targets[rows]).to(device)
            total += float(summed_loss(model(inputs), targets)[0])
        nats = total / self.batch.targets.size
        return Evaluated(step, nats, nats / math.log(2) / self.bytes_per_token)


def generation_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return Hugging Face's generation_config.json: sampled if the recipe says how."""
    said = dataclasses.asdict(recipe.generation).items()
    chosen = {key: value for key, value in said if value is not None}
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    return ids | ({"do_sample": True, **chosen} if chosen else {})


def learning_rate(recipe: OptimizerRecipe, step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine to the final rate."""
    if step < recipe.warmup_steps:
        share = step / recipe.warmup_steps
        first = recipe.warmup_learning_rate
        return first + share * (recipe.learning_rate - first)
    share = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps + 1)
    height = 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    span = recipe.learning_rate - recipe.final_learning_rate
    return recipe.final_learning_rate + span * height


def build_optimizers(
    model: ReferenceOpenELM, recipe: OptimizerRecipe
) -> list[torch.optim.Optimizer]:
    """Return AdamW (decay on matrices alone), or Muon for the layers' matrices too."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.name == "muon":
        hidden = [p for p in model.layers.parameters() if p.ndim >= 2]
        matrices = [p for p in matrices if all(p is not h for h in hidden)]
        optimizers.append(
            torch.optim.Muon(
                hidden,
                lr=recipe.learning_rate,
                weight_decay=recipe.weight_decay,
                adjust_lr_fn="match_rms_adamw",  # so that one rate serves both
            )
        )
    optimizers.append(
        torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
        )
    )
    return optimizers


def average_checkpoints(paths: list[Path]) -> dict[str, Tensor]:
    """Return the mean, accumulated in float64, in the first one's dtypes."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in paths:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in weights.items():
            dtypes.setdefault(name, value.dtype)
            total[name] = total.get(name, 0) + value.double()
    return {
        name: (value / len(paths)).to(dtypes[name]) for name, value in total.items()
    }


def _check(recipe: PretrainRecipe, processes: Processes, resume: bool) -> None:
    output = Path(recipe.output)
    share, rest = divmod(recipe.batch_size, processes.count)
    if rest or share < 1:
        raise OpenELMError(
            f"batch_size {recipe.batch_size} cannot be shared by {processes.count} "
            "processes; make it a multiple."
        )
    if not recipe.data.train:
        raise OpenELMError("The recipe names no text: set data.train, or say --data.")
    if resume:
        if not (output / LAST).exists():
            raise OpenELMError(
                f"There is nothing to resume: {output / LAST} is missing."
            )
        saved = read_mapping(output / "recipe.json")
        now = json.loads(json.dumps(dataclasses.asdict(recipe)))
        changed = sorted(k for k in now if now[k] != saved.get(k) and k in _DECISIVE)
        if changed:
            differences = "; ".join(f"{k}: {saved.get(k)} -> {now[k]}" for k in changed)
            raise OpenELMError(
                f"Cannot resume {output} with another recipe ({differences}); "
                "use the old one, or another output."
            )
    elif processes.first and (output / "metrics.jsonl").exists():
        raise OpenELMError(
            f"{output} holds a run already; say --resume to go on, or another --output."
        )


_DECISIVE = ("model", "data", "tokenizer", "optimizer", "steps", "batch_size", "seed")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, flush to the disk, then take its name."""
    staged = path.with_name(f".{path.name}.part")
    write(staged)
    with staged.open("rb") as written:
        os.fsync(written.fileno())
    staged.replace(path)


@contextlib.contextmanager
def _processes() -> Iterator[Processes]:
    """Join the processes that torchrun started; alone otherwise."""
    cuda = torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(0, 1, device)
        return
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list, to be looked at between two steps."""
    seen: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: seen.append(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
