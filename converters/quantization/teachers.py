"""Teachers of learned scales: a model in memory, or its outputs kept on disk."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_openelm.message_parts import count_of
from mlx_openelm.model.head_divergence import Head, head_of, hidden_rows
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.adapter_folder import save_tensors
from mlx_openelm.storage.staging import replaced_file
from mlx_openelm.storage.teacher_caches import (
    check_cache,
    damaged,
    holds_tensors,
    written_cache,
)

_ROWS = "rows"  # the tensor of a file, (T, D)


class Teacher(Protocol):
    """Gives the normalised hidden states and the output head of a model."""

    @property
    def head(self) -> Head: ...

    def prepare(self, windows: mx.array) -> None:
        """Make `rows` of these windows (N, 1 + T) available."""

    def rows(self, tokens: mx.array) -> mx.array:
        """Return the hidden states (N T, D) of token ids (N, T)."""


class LoadedTeacher:
    """A teacher in memory."""

    def __init__(self, model: OpenELM) -> None:
        model.freeze()
        self._model, self.head = model, head_of(model)

    def prepare(self, windows: mx.array) -> None:
        """Do nothing."""

    def rows(self, tokens: mx.array) -> mx.array:
        return hidden_rows(self._model, tokens)


class CachedTeacher:
    """A teacher whose hidden states are kept on disk, one file a window.

    They have the dtype in which they were computed, so nothing is rounded.

    Args:
        folder: of the cache; `description` is as in `teacher_caches`.
        head: the teacher's output head, in memory.
        load: loads the teacher, for windows that are not there; it is freed then.
        on_progress: receives the windows done, and all that were missing.

    Raises:
        OpenELMError: the folder is not, or not this, cache.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        *,
        width: int,
        head: Head,
        load: Callable[[], OpenELM],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._description = {"content": "hidden states", **description}
        check_cache(folder, self._description)
        self._folder, self._width, self.head = folder, width, head
        self._load, self._on_progress = load, on_progress

    def prepare(self, windows: mx.array) -> None:
        """Compute the hidden states of windows that are not there, or are damaged.

        Raises:
            OpenELMError: the folder cannot be written.
        """
        missing = {}
        for tokens in np.array(windows[:, :-1]):
            path = self._path(tokens)
            shape = (tokens.size, self._width)
            if path not in missing and not holds_tensors(path, {_ROWS: shape}):
                missing[path] = tokens
        if not missing:
            return
        try:
            with written_cache(self._folder, self._description):
                teacher = LoadedTeacher(self._load())
                for done, (path, tokens) in enumerate(missing.items()):
                    self._on_progress(done, len(missing))
                    rows = teacher.rows(mx.array(tokens)[None])
                    with replaced_file(path) as part:
                        save_tensors(part, {_ROWS: rows}, format="mlx")
        except (KeyboardInterrupt, SystemExit) as stopped:
            kept = count_of(len(list(self._folder.glob("*.safetensors"))), "window")
            stopped.add_note(f"{self._folder} keeps {kept} that the teacher has read.")
            raise
        del teacher
        mx.clear_cache()

    def rows(self, tokens: mx.array) -> mx.array:
        return mx.concatenate([self._read(window) for window in np.array(tokens)])

    def _read(self, tokens: "np.ndarray[Any, Any]") -> mx.array:
        path = self._path(tokens)
        if not holds_tensors(path, {_ROWS: (tokens.size, self._width)}):
            raise damaged(path)
        arrays = mx.load(str(path))
        assert isinstance(arrays, dict)
        return arrays[_ROWS]

    def _path(self, tokens: "np.ndarray[Any, Any]") -> Path:
        digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
        return self._folder / f"{digest[:16]}.safetensors"
