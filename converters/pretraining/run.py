"""The training loop of pre-training: OpenELM's recipe in PyTorch.

Follows the published pre-training (facts of CoreNet's OpenELM recipes): AdamW with
weight decay on matrices only, linear warm-up, cosine schedule, gradient clipping,
z-loss. There is no dropout, and the seed determines the order of the text, so a run
resumes from weights, optimizer state and the position in the data.

Start it with `mlx-openelm pretrain -c RECIPE`, or with N processes:
`torchrun --nproc-per-node N -m mlx_openelm pretrain -c RECIPE`.
"""

import contextlib
import dataclasses
import math
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from converters.pretraining.checkpoints import (
    AVERAGE,
    LAST,
    WEIGHTS,
    Resume,
    average_checkpoints,
    files_on_disk,
    remove_old_files,
    save_training,
)
from converters.pretraining.heldout import continue_greedily
from converters.pretraining.loader import join_states
from converters.pretraining.log import (
    Event,
    Meter,
    Noted,
    RunLog,
    Sampled,
    Saved,
    Started,
)
from converters.pretraining.optimizers import (
    build_optimizers,
    learning_rate,
    take_step,
)
from converters.pretraining.packing import IGNORED, TokenBatch
from converters.pretraining.parallelism import parallelize
from converters.pretraining.plan import (
    count_flops_per_token,
    find_peak_flops,
)
from converters.pretraining.processes import Processes, join_processes, stop_signals
from converters.pretraining.recipe import PretrainRecipe
from converters.pretraining.report import RunReport
from converters.pretraining.setup import claim_folder, set_up
from converters.pretraining.training_states import (
    ResumePoint,
    load_weights,
    read_file,
    restore_state,
    write_checked,
)
from converters.reference import ReferenceOpenELM
from mlx_openelm.errors import OpenELMError


def pretrain(
    recipe: PretrainRecipe,
    *,
    resume: Resume = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Path:
    """Train an OpenELM and return the path of its final weights.

    Events reach `on_event` in the first process only, and `metrics.jsonl` as well.

    Args:
        resume: True resumes the run of the recipe's `output`; "auto" also starts it;
            the path of a training state, of ours or of CoreNet, resumes from that.

    Raises:
        OpenELMError: the data or the recipe is invalid, the output exists and `resume`
            is off, there is nothing to resume, or the loss is not finite.
        KeyboardInterrupt: on SIGINT, after a checkpoint.
        SystemExit: with 143 on SIGTERM, after a checkpoint.
    """
    with join_processes(recipe.join_timeout) as processes, stop_signals() as stop:
        return _train(recipe, processes, resume, on_event, stop)


def _train(
    recipe: PretrainRecipe,
    processes: Processes,
    resume: Resume,
    on_event: Callable[[Event], None],
    stop: list[int],
) -> Path:
    """Train, and free the run before the process group ends."""
    try:
        with (
            claim_folder(recipe, processes, resume),
            contextlib.closing(_Run(recipe, processes, resume, on_event)) as run,
            run.report or contextlib.nullcontext(),
        ):
            return run.train(stop)
    except torch.OutOfMemoryError as error:
        raise OpenELMError(
            f"Process {processes.rank} is out of memory on {processes.device}; lower "
            "micro_batch_size, or set activation_checkpointing: true or parallel: fsdp."
        ) from error


class _Run:
    """The state of a run: data, model, optimizers and the number of steps done."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        processes: Processes,
        resume: Resume,
        on_event: Callable[[Event], None],
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.output = Path(recipe.output)
        setup = set_up(recipe, processes, resume)
        self.config, self.tokenizer = setup.config, setup.tokenizer
        self.loader, self.heldout = setup.loader, setup.heldout
        self.step, self.origin = setup.progress.step, setup.progress.origin
        self.log: RunLog | None = None
        self.report: RunReport | None = None
        with processes.shared_errors():
            if processes.first:
                self.report = RunReport(
                    recipe, self.config, lambda text: on_event(Noted(text))
                )
                self.log = RunLog(
                    self.output,
                    on_event,
                    step=self.step,
                    report_to=recipe.trackers,
                    config=dataclasses.asdict(recipe),
                )
        torch.manual_seed(recipe.seed)
        torch.set_float32_matmul_precision("high")  # TF32 where the device has it
        self.model = ReferenceOpenELM(self.config)
        if setup.initial is not None:
            self.model.load_state_dict(setup.initial)
        self.loss = parallelize(self.model, recipe, processes)
        self.optimizers = build_optimizers(self.model, recipe.optimizer)
        self.meter = Meter(
            count_flops_per_token(self.config, self.config.max_context_length),
            _peak_flops(processes),
        )
        if setup.saved is not None:
            restore_state(self.model, self.optimizers, setup.saved)
        if setup.progress.meter:
            self.meter.restore(setup.progress.meter)
        for note in setup.notes:
            self._log_event(Noted(note))
        self._log_event(
            Started(
                num_parameters=self.config.num_parameters,
                num_documents=self.loader.num_documents,
                num_sequences=self.loader.num_sequences,
                num_tokens=self.loader.num_tokens,
                dropped=dict(self.loader.dropped),
                steps=recipe.steps,
                first_step=self.step,
                processes=processes.count,
            )
        )

    def train(self, stop: list[int]) -> Path:
        recipe = self.recipe
        while self.step < recipe.steps:
            self._update()
            last = self.step == recipe.steps
            if self.step % recipe.report_every == 0 or last:
                rate = learning_rate(recipe.optimizer, self.step - 1, recipe.steps)
                self._log_event(self.meter.report(self.step, recipe.steps, rate))
            with self.meter.paused():
                if self.heldout and (self.step % recipe.eval_every == 0 or last):
                    self._log_event(self.heldout.score(self.model, self.step))
                if recipe.sample_every and self.step % recipe.sample_every == 0:
                    self._sample()
                if self.step % recipe.save_every == 0 or last:
                    self._save(scheduled=True)
            if self.processes.agree_to_stop(stop):
                self._save(scheduled=False)
                if stop[0] == signal.SIGINT:
                    raise KeyboardInterrupt
                raise SystemExit(128 + stop[0])
        return self._average()

    def close(self) -> None:
        self.loader.close()
        if self.log is not None:
            self.log.close()

    # A step ----------------------------------------------------------------------

    def _update(self) -> None:
        """Take one optimizer step on the whole batch of all processes."""
        recipe, processes = self.recipe, self.processes
        batch = self._next_batch()
        inputs, targets = (
            torch.from_numpy(part).to(processes.device)
            for part in (batch.inputs, batch.targets)
        )
        (total,) = processes.sum(int((batch.targets != IGNORED).sum()))
        micro = recipe.micro_batch_size or len(inputs)
        parts = list(zip(inputs.split(micro), targets.split(micro), strict=True))
        sums = torch.zeros(2, dtype=torch.float64, device=processes.device)
        for i, (x, y) in enumerate(parts):
            with self._synchronised(i == len(parts) - 1):
                loss_sum, objective_sum = self.loss(x, y)
                # DDP averages over processes; the loss is a mean over all tokens.
                (objective_sum * (processes.count / total)).backward()
            sums += torch.stack([loss_sum, objective_sum]).detach().double()
        loss, objective = processes.sum(*sums.tolist())
        norm = nn.utils.clip_grad_norm_(
            self.model.parameters(), recipe.optimizer.clip_norm
        )
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not math.isfinite(loss) or not math.isfinite(norm):
            processes.share_error(
                OpenELMError(
                    f"The loss is {loss / total:.4g} and the gradient norm "
                    f"{float(norm):.4g} at step {self.step + 1}; lower "
                    "optimizer.learning_rate. The last checkpoint is unaffected."
                )
            )
        take_step(
            self.optimizers, learning_rate(recipe.optimizer, self.step, recipe.steps)
        )
        self.step += 1
        spiked = self.meter.add(
            self.step,
            loss=loss / total,
            z_loss=(objective - loss) / total,
            norm=float(norm),
            tokens=int(total),
            positions=recipe.batch_size * inputs.shape[1],
        )
        if spiked is not None:
            self._log_event(spiked)

    def _next_batch(self) -> TokenBatch:
        """Return this process's share of the batch; an error is raised in all."""
        failed: OpenELMError | None = None
        try:
            batch = self.loader.next_batch()
        except OpenELMError as error:
            failed = error
        if any(self.processes.sum(failed is not None)):
            self.processes.share_error(failed)
        return batch

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Synchronise DDP's gradients after the last part only; FSDP: after each."""
        if isinstance(self.loss, DistributedDataParallel) and not last:
            return self.loss.no_sync()
        return contextlib.nullcontext()

    def _sample(self) -> None:
        for prompt in self.recipe.sample_prompts:
            text = continue_greedily(self.model, self.tokenizer, prompt)
            self._log_event(Sampled(self.step, prompt, text))

    def _log_event(self, event: Event) -> None:
        if self.log is not None:
            self.log.write(event)
        if self.report is not None:
            self.report(event)

    # Disk ------------------------------------------------------------------------

    def _save(self, *, scheduled: bool) -> None:
        """Write the training state and, if `scheduled`, a file of the weights."""
        own = (self.loader.state(), dict(self.loader.dropped))
        states, dropped = zip(*self.processes.gather(own), strict=True)
        data = join_states(states)
        progress = ResumePoint(self.step, data, self.meter.state(), self.origin)
        with self.processes.shared_errors():
            save_training(
                self.output,
                progress,
                self.model,
                self.optimizers,
                scheduled=scheduled,
                first=self.processes.first,
            )
            if scheduled and self.processes.first:
                remove_old_files(self.output, self.recipe)
        counted = sum((Counter(part) for part in dropped), Counter())
        self._log_event(Saved(self.step, self.output / LAST, dict(counted)))

    def _average(self) -> Path:
        """Write the mean of the last checkpoints, and evaluate it."""
        path = self.output / AVERAGE
        with self.processes.shared_errors():
            available = list(files_on_disk(self.output, WEIGHTS).values())
            chosen = available[-self.recipe.average_last :]
            if self.processes.first:
                write_checked(path, average_checkpoints(chosen))
        if self.heldout and len(chosen) > 1:
            load_weights(self.model, read_file(path))
            self._log_event(self.heldout.score(self.model, self.step, averaged=True))
        return path


def _peak_flops(processes: Processes) -> float | None:
    if processes.device.type != "cuda":
        return None
    peak = find_peak_flops(torch.cuda.get_device_name(processes.device))
    return peak * processes.count if peak else None
