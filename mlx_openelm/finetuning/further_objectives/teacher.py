"""The teacher of a distillation: checked, and loaded into memory."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.finetuning.batches import Batch
from mlx_openelm.finetuning.losses import target_rows
from mlx_openelm.finetuning.samples import Sample
from mlx_openelm.model.divergence import DenseTargets, TeacherTargets
from mlx_openelm.model.fingerprint import fingerprint_arrays
from mlx_openelm.model.lora import adapted_weight
from mlx_openelm.storage.hub import find_model
from mlx_openelm.storage.loading import load_model, load_tokenizer
from mlx_openelm.storage.model_folder import ModelFolder, open_folder
from mlx_openelm.text.tokenizer import Tokenizer
from mlx_openelm.training.arrays import flatten


class Teacher(Protocol):
    """Gives the distributions at the targets of a batch."""

    def targets(self, batch: Batch, samples: Sequence[Sample]) -> TeacherTargets:
        """Return them for a batch, collated from the samples."""


@dataclass(frozen=True, slots=True)
class TeacherFolder:
    """A teacher that fits the student.

    Attributes:
        num_ids: tokens that both models have; further rows of a head are padding.
        notes: for the user.
    """

    name: str
    folder: ModelFolder
    num_ids: int
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Return a fingerprint of the weights; one tensor is read at a time."""
        arrays = self.folder.read()
        parts = [repr(self.folder.config)]
        for name in sorted(arrays):
            parts.append(fingerprint_arrays({name: arrays.pop(name)}))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_teacher(
    name: str,
    student: ModelFolder,
    tokenizer: Tokenizer,
    longest: int,
    *,
    offline: bool = False,
) -> TeacherFolder:
    """Open a teacher's folder, without its weights.

    Args:
        tokenizer: the student's.
        longest: tokens of the longest sequence.

    Raises:
        OpenELMError: there is no such model, its vocabulary is another one, or its
            context is shorter.
    """
    try:
        folder = open_folder(find_model(name, offline=offline))
        own = load_tokenizer(folder)
    except OpenELMError as error:
        raise OpenELMError(f"`teacher`: {error}") from error
    if _list_pieces(own) != _list_pieces(tokenizer):
        raise OpenELMError(
            f"The teacher {name} has another vocabulary than the model "
            f"({own.num_ids} and {tokenizer.num_ids} tokens), so their distributions "
            "cannot be compared; use a `teacher` with the same tokenizer."
        )
    context = folder.config.max_context_length
    if longest > context:
        raise OpenELMError(
            f"The context of the teacher {name} is {context} tokens, less than "
            f"`max_seq_length` {longest}; pass {context} or less."
        )
    notes = folder.notes
    size, ours = folder.config.num_parameters, student.config.num_parameters
    if size < ours:
        notes += (
            f"The teacher {name} has fewer parameters than the model ({size:,} and "
            f"{ours:,}).",
        )
    return TeacherFolder(name, folder, tokenizer.num_ids, notes)


def _list_pieces(tokenizer: Tokenizer) -> list[str]:
    ids = range(tokenizer.num_ids)
    return [tokenizer.piece(i) if tokenizer.has(i) else "" for i in ids]


class TeacherModel:
    """A teacher in memory, which gives whole distributions.

    Raises:
        OpenELMError: some of its weights are not finite.
    """

    def __init__(self, teacher: TeacherFolder, temperature: float) -> None:
        self._model = load_model(teacher.folder)
        self._model.freeze()
        for name, array in flatten(self._model.parameters()).items():
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all():
                raise OpenELMError(
                    f"The weights of the teacher {teacher.name} are damaged: {name} "
                    "has values that are not finite; use another `teacher`."
                )
        self._num_ids, self._temperature = teacher.num_ids, temperature

    def targets(self, batch: Batch, samples: Sequence[Sample]) -> DenseTargets:
        return DenseTargets(
            target_rows(self._model, batch),
            adapted_weight(self._model.head_module)[: self._num_ids],
            self._temperature,
        )
