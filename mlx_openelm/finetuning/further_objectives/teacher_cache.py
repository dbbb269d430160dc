"""A teacher's most likely tokens at all targets of the data, kept on disk.

cache.json            teacher, data, temperature and K
00000.safetensors     the tokens (M, K) and log-probabilities (M, K) of `PART` samples

A part is written atomically, so a computation that was stopped resumes after it.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import safetensors

from mlx_openelm.finetuning.batches import Batch, collate
from mlx_openelm.finetuning.further_objectives.teacher import (
    TeacherFolder,
    TeacherModel,
)
from mlx_openelm.finetuning.samples import Sample
from mlx_openelm.message_parts import count_of
from mlx_openelm.model.divergence import TopTargets, top_log_probabilities
from mlx_openelm.storage.adapter_folder import save_tensors
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.storage.teacher_caches import (
    check_cache,
    damaged,
    holds_tensors,
    written_cache,
)

PART = 256  # samples in a file


class TeacherCache:
    """The most likely tokens of a teacher, read from disk batch by batch.

    Args:
        samples: all samples, in the order of the parts.
        temperature: divides the teacher's logits.
        top_k: tokens of each position.
        batch_size: samples that the teacher reads at a time.

    Raises:
        OpenELMError: the folder is another cache, or no cache.
    """

    def __init__(
        self,
        folder: Path,
        teacher: TeacherFolder,
        samples: Sequence[Sample],
        *,
        temperature: float,
        top_k: int,
        batch_size: int,
    ) -> None:
        self._folder, self._teacher, self._samples = folder, teacher, samples
        self._temperature, self._top_k = temperature, min(top_k, teacher.num_ids)
        self._batch_size = batch_size
        self._description = {
            "content": "the most likely tokens",
            "teacher": teacher.fingerprint(),
            "data": hashlib.sha256(b"".join(map(_digest, samples))).hexdigest(),
            "temperature": temperature,
            "teacher_top_k": self._top_k,
        }
        check_cache(folder, self._description)
        self._places: dict[bytes, tuple[int, int, int]] = {}  # part, start, end
        for part, group in enumerate(_parts(samples)):
            counts = [_count_targets(sample) for sample in group]
            ends = itertools.accumulate(counts)
            for sample, count, end in zip(group, counts, ends, strict=True):
                self._places[_digest(sample)] = part, end - count, end

    def compute(self, on_progress: Callable[[int, int, str], None]) -> None:
        """Compute the parts that are not there, or damaged.

        Args:
            on_progress: receives the samples done, all samples, and the unit.

        Raises:
            OpenELMError: the folder cannot be written.
        """
        if not self._missing():
            return
        try:
            with written_cache(self._folder, self._description):
                # Again, as another process may have written some meanwhile
                missing = self._missing()
                model = TeacherModel(self._teacher, self._temperature)
                done = len(self._samples) - sum(len(samples) for _, samples in missing)
                for part, samples in missing:
                    self._compute_part(model, part, samples, done, on_progress)
                    done += len(samples)
        except (KeyboardInterrupt, SystemExit) as stopped:
            left = sum(len(samples) for _, samples in self._missing())
            kept = count_of(len(self._samples) - left, "record")
            stopped.add_note(f"{self._folder} keeps {kept} that the teacher has read.")
            raise
        del model
        mx.clear_cache()

    def targets(self, batch: Batch, samples: Sequence[Sample]) -> TopTargets:
        tokens, log_probs = zip(*map(self._read, samples), strict=True)
        return TopTargets(
            mx.array(np.concatenate(tokens).astype(np.int32)),
            mx.array(np.concatenate(log_probs)),
        )

    def _read(self, sample: Sample) -> tuple[Any, Any]:
        part, start, end = self._places[_digest(sample)]
        path = _part_path(self._folder, part)
        try:
            with safetensors.safe_open(path, framework="numpy") as opened:
                return (
                    opened.get_slice("tokens")[start:end],
                    opened.get_slice("log_probs")[start:end],
                )
        except (OSError, safetensors.SafetensorError) as error:
            raise damaged(path) from error

    def _missing(self) -> list[tuple[int, Sequence[Sample]]]:
        """Return the numbers and samples of parts that are not there, or damaged."""
        parts = enumerate(_parts(self._samples))
        return [(i, samples) for i, samples in parts if not self._has(i, samples)]

    def _has(self, part: int, samples: Sequence[Sample]) -> bool:
        shape = (sum(map(_count_targets, samples)), self._top_k)
        shapes = {"tokens": shape, "log_probs": shape}
        return holds_tensors(_part_path(self._folder, part), shapes)

    def _compute_part(
        self,
        model: TeacherModel,
        part: int,
        samples: Sequence[Sample],
        done: int,
        on_progress: Callable[[int, int, str], None],
    ) -> None:
        tokens, log_probs = [], []
        narrow = np.uint16 if self._teacher.num_ids <= 2**16 else np.uint32
        for start in range(0, len(samples), self._batch_size):
            group = samples[start : start + self._batch_size]
            dense = model.targets(collate(group), group)
            best = top_log_probabilities(
                dense.rows, dense.head, self._top_k, self._temperature
            )
            tokens.append(np.array(best[0]).astype(narrow))
            log_probs.append(np.array(best[1]))
            done += len(group)
            on_progress(done, len(self._samples), "records read by the teacher")
        arrays = {
            "tokens": mx.array(np.concatenate(tokens)),
            "log_probs": mx.array(np.concatenate(log_probs)),
        }
        with replaced_file(_part_path(self._folder, part)) as path:
            save_tensors(path, arrays, format="mlx")


def _parts(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[at : at + PART] for at in range(0, len(samples), PART)]


def _count_targets(sample: Sample) -> int:
    return int(sample.loss_mask.sum())


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"{part:05d}.safetensors"


def _digest(sample: Sample) -> bytes:
    digest = hashlib.sha256(np.ascontiguousarray(sample.tokens).tobytes())
    digest.update(np.ascontiguousarray(sample.loss_mask).tobytes())
    return digest.digest()[:12]
