"""Prompt cache: a file that stores a processed prompt, to skip its prefill later.

It is a safetensors file of the prompt's token ids and every layer's keys and values.
Its metadata hold what it is valid for: the model with its adapter, the template and the
format of the KV cache. The common prefix with the next prompt is not processed again.
"""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.cache import KVCache, ModelCache
from mlx_openelm.generation.compact_caches import SlidingKVCache, describe_cache
from mlx_openelm.generation.decoding import Context
from mlx_openelm.input_files import parse_json
from mlx_openelm.model.fingerprint import fingerprint_arrays, fingerprint_model
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.model_folder import FLOATS
from mlx_openelm.storage.staging import lock_target, replaced_file

_FORMAT = 1  # to be raised when the computed keys or values change
_KEY = "mlx_openelm_prompt"
_BEGINNING = b'{"__metadata__":{'  # of a safetensors header that MLX writes
_BEGINNING_BYTES = 1024  # enough to contain `_KEY`


@dataclass(frozen=True, slots=True)
class Binding:
    """What a stored prompt is valid for.

    Attributes:
        model: fingerprint of the weights, including the adapter.
        template: name of the prompt template.
        cache: format of the KV cache.
    """

    model: str
    template: str
    cache: str
    format: int = _FORMAT


class PromptCache:
    """An open prompt cache; see `open_prompt_cache`.

    Attributes:
        context: the stored prompt, or empty; to be passed to `stream`.
    """

    def __init__(
        self,
        path: Path,
        context: Context,
        binding: Binding,
        executor: ThreadPoolExecutor,
    ) -> None:
        self.context = context
        self._path, self._binding, self._executor = path, binding, executor
        self._stored = list(context.tokens)
        self._writing: Future[None] | None = None

    def store(self, prompt: Sequence[int]) -> None:
        """Start to write a prompt that the context begins with, unless it is stored.

        Call it after the first token, so that writing overlaps with decoding.
        """
        prompt = list(prompt)
        count = len(prompt)
        if self._stored[:count] == prompt or self._writing is not None:
            return
        if self.context.tokens[:count] != prompt:
            raise ValueError("the context does not begin with this prompt")
        # Copies, because the context is modified while they are written.
        tensors = {
            f"layers.{i}.{j}": mx.contiguous(part[..., :count, :])
            for i, layer in enumerate(self.context.cache)
            for j, part in enumerate(layer.stored())
        }
        tensors["tokens"] = mx.array(prompt, dtype=mx.uint32)
        mx.eval(tensors)
        metadata = asdict(self._binding) | {"content": fingerprint_arrays(tensors)}
        self._writing = self._executor.submit(_write, self._path, tensors, metadata)

    def wait(self) -> None:
        """Wait until the prompt is written.

        Raises:
            OpenELMError: another process is writing the file.
            OSError: writing failed; the file is unchanged.
        """
        if self._writing is not None:
            self._writing.result()


@contextlib.contextmanager
def open_prompt_cache(
    path: Path,
    model: OpenELM,
    template: str,
    on_note: Callable[[str], None] = lambda note: None,
    make_cache: Callable[[], ModelCache] = KVCache,
) -> Iterator[PromptCache]:
    """Open a prompt cache, or create it.

    Args:
        on_note: receives the reason why the file is not used or not written.
        make_cache: constructor of a layer's cache; see `cache_maker`.

    Raises:
        OpenELMError: `path` is another kind of file or cannot be written, or the cache
            slides.
    """
    path = Path(os.path.realpath(path))
    if isinstance(make_cache(), SlidingKVCache):
        raise OpenELMError(
            "`prompt_cache` stores every token of the prompt, but `max_kv_size` drops "
            "some; leave out one of them."
        )
    _check_path(path)
    binding = Binding(fingerprint_model(model), template, describe_cache(make_cache()))
    context = Context(model, make_cache)
    if path.exists() and path.stat().st_size > 0:
        try:
            tokens, layers = _read(path, binding, model, make_cache)
        except _UnusableFile as reason:
            on_note(f"{path} {reason}; the prompt is processed again.")
        else:
            for cache, parts in zip(context.cache, layers, strict=True):
                cache.append(*parts)
            context.tokens += tokens
    with ThreadPoolExecutor(1, thread_name_prefix="prompt") as executor:
        opened = PromptCache(path, context, binding, executor)
        try:
            yield opened
        finally:
            try:
                opened.wait()
            except OpenELMError as error:
                on_note(f"The prompt was not stored. {error}")
            except (OSError, RuntimeError) as error:
                on_note(f"The prompt was not stored: {_describe(error)}.")


# Reading -------------------------------------------------------------------------


class _UnusableFile(Exception):
    """Why a prompt cache is not used: it is damaged, or not valid for this prompt."""


def _check_path(path: Path) -> None:
    """Raise OpenELMError if a prompt cache cannot or must not be written there."""
    choose = "choose another file for `prompt_cache`"
    if not path.parent.is_dir():
        raise OpenELMError(f"{path.parent} is not a folder; create it, or {choose}.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OpenELMError(f"{path.parent} is not writable; {choose}.")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise OpenELMError(f"{path} is not a regular file; {choose}.")
    try:
        with path.open("rb") as opened:
            beginning = opened.read(_BEGINNING_BYTES)
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {_describe(error)}.") from error
    ours = beginning[8:].startswith(_BEGINNING) and _KEY.encode() in beginning
    if beginning and not ours:
        raise OpenELMError(
            f"{path} is not a prompt cache, and it would be replaced; {choose}."
        )


def _read(
    path: Path, binding: Binding, model: OpenELM, make_cache: Callable[[], ModelCache]
) -> tuple[list[int], list[list[mx.array]]]:
    """Return the stored tokens and each layer's keys and values.

    Raises:
        _UnusableFile: it is damaged, or not valid for this binding.
    """
    try:
        arrays, metadata = _load(path)
        stored = parse_json(metadata[_KEY])
        content, format = stored["content"], stored["format"]
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise _UnusableFile("is damaged") from error
    if format != _FORMAT:
        raise _UnusableFile("was written by another version of mlx-openelm")
    if stored.get("model") != binding.model:
        raise _UnusableFile("was written for another model or adapter")
    for what in ("template", "cache"):
        theirs, ours = stored.get(what), getattr(binding, what)
        if theirs != ours:
            raise _UnusableFile(
                f"was written for the {what} {theirs!a:.80}, not {ours!a}"
            )
    tokens = _take_tokens(arrays, model)
    layers = _take_layers(arrays, len(tokens), model, make_cache)
    if not tokens or not layers or fingerprint_arrays(arrays) != content:
        raise _UnusableFile("is damaged")
    return tokens, layers


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    # Both in one call, because another process may replace the file.
    return mx.load(  # type: ignore[return-value] # always a pair for this format
        str(path), format="safetensors", return_metadata=True
    )


def _take_tokens(arrays: Mapping[str, mx.array], model: OpenELM) -> list[int]:
    """Return the token ids, or none if one is not an id of the model."""
    tokens = arrays.get("tokens")
    if tokens is None or tokens.dtype != mx.uint32 or tokens.ndim != 1:
        return []
    ids: list[int] = tokens.tolist()  # type: ignore[assignment] # not a scalar
    return ids if max(ids, default=0) < model.config.vocab_size else []


def _take_layers(
    arrays: Mapping[str, mx.array],
    num_tokens: int,
    model: OpenELM,
    make_cache: Callable[[], ModelCache],
) -> list[list[mx.array]]:
    """Return each layer's keys and values, or none if a tensor does not fit."""
    layers, H = [], model.config.head_dim
    for i, K in enumerate(model.config.num_kv_heads):
        like = make_cache()  # with one token, for shapes and dtypes; never evaluated
        like.update_and_fetch(*[mx.zeros((1, K, 1, H))] * 2)
        parts = []
        for j, expected in enumerate(like.stored()):
            part = arrays.get(f"layers.{i}.{j}")
            dtypes = FLOATS if expected.dtype in FLOATS else (expected.dtype,)
            shape = (1, K, num_tokens, expected.shape[3])
            if part is None or part.shape != shape or part.dtype not in dtypes:
                return []
            parts.append(part)
        layers.append(parts)
    return layers if sum(map(len, layers)) == len(arrays) - 1 else []


# Writing -------------------------------------------------------------------------


def _write(
    path: Path, tensors: dict[str, mx.array], binding: Mapping[str, str | int]
) -> None:
    """Replace the file atomically; only its owner may read it."""
    metadata = {"format": "mlx", _KEY: json.dumps(binding)}
    with lock_target(path), replaced_file(path) as part:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            mx.save_safetensors(opened, tensors, metadata=metadata)


def _describe(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or str(error).rstrip(".")
