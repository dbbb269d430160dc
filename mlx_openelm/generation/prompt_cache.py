"""A file that keeps a prompt as the model has read it, for the next time.

A safetensors file of the prompt's token ids and of every layer's keys and values, with
what it is good for in its metadata: the model with its adapter, the template, the form
of the cache. What the next prompt has in common with it, from the first token on, is
not read again.
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
from mlx_openelm.model.fingerprint import fingerprint_arrays, fingerprint_model
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.storage.model_folder import FLOATS
from mlx_openelm.storage.staging import lock_target, replaced_file

_FORMAT = 1  # another one where keys or values would come out otherwise
_KEY = "mlx_openelm_prompt"
_BEGINNING = b'{"__metadata__":{'  # of a safetensors header that MLX writes
_BEGINNING_BYTES = 1024  # that hold our key, too


@dataclass(frozen=True, slots=True)
class Binding:
    """What a kept prompt is good for.

    Attributes:
        model: the fingerprint of its weights, with its adapter.
        template: the name of the prompt template.
        cache: the form in which keys and values are kept.
    """

    model: str
    template: str
    cache: str
    format: int = _FORMAT


class PromptCache:
    """An open file; see `open_prompt_cache`.

    Attributes:
        context: what the file holds, or nothing; to be given to `stream`.
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

    def keep(self, prompt: Sequence[int]) -> None:
        """Begin to write a prompt that the context begins with, if the file lacks it.

        Best called when the first token is out: the disk works while others are drawn.
        """
        prompt = list(prompt)
        count = len(prompt)
        if self._stored[:count] == prompt or self._writing is not None:
            return
        if self.context.tokens[:count] != prompt:
            raise ValueError("the context has not read this prompt")
        # Copies, for the context goes on.
        tensors = {
            f"layers.{i}.{j}": mx.contiguous(part[..., :count, :])
            for i, layer in enumerate(self.context.cache)
            for j, part in enumerate(layer.state)
        }
        tensors["tokens"] = mx.array(prompt, dtype=mx.uint32)
        mx.eval(tensors)
        said = asdict(self._binding) | {"content": fingerprint_arrays(tensors)}
        self._writing = self._executor.submit(_write, self._path, tensors, said)

    def wait(self) -> None:
        """Wait until what was kept is on the disk.

        Raises:
            OpenELMError: another process is writing the file.
            OSError: the disk refuses; the file is as it was.
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
    """Open a prompt cache; it is made where there is none.

    Args:
        on_note: is told why what the file holds is not used, or why it was not written.
        make_cache: of one layer; see `cache_maker`.

    Raises:
        OpenELMError: there is something else at `path`, it cannot be written, or the
            cache slides.
    """
    path = Path(os.path.realpath(path))
    if isinstance(make_cache(), SlidingKVCache):
        raise OpenELMError(
            "`prompt_cache` keeps every token of the prompt, and `max_kv_size` throws "
            "some away; leave one of them out."
        )
    _check_place(path)
    binding = Binding(fingerprint_model(model), template, describe_cache(make_cache()))
    context = Context(model, make_cache)
    if path.exists() and path.stat().st_size > 0:  # an empty one is nobody's work
        try:
            tokens, layers = _read(path, binding, model, make_cache)
        except _Useless as useless:
            on_note(f"{path} {useless}; the prompt is read anew.")
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
                on_note(f"The prompt was not kept. {error}")
            except (OSError, RuntimeError) as error:
                on_note(f"The prompt was not kept: {_describe(error)}.")


# Reading -------------------------------------------------------------------------


class _Useless(Exception):
    """Says what is wrong with a file of ours, or with what we want of it."""


def _check_place(path: Path) -> None:
    """Raise OpenELMError where a prompt cache cannot be written, or must not."""
    if not path.parent.is_dir():
        raise OpenELMError(f"{path.parent} is no folder; make it, or say another file.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OpenELMError(f"{path.parent} cannot be written to; say another file.")
    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise OpenELMError(f"{path} is no file; say another place for `prompt_cache`.")
    try:
        with path.open("rb") as opened:
            beginning = opened.read(_BEGINNING_BYTES)
    except OSError as error:
        raise OpenELMError(f"Cannot read {path}: {_describe(error)}.") from error
    ours = beginning[8:].startswith(_BEGINNING) and _KEY.encode() in beginning
    if beginning and not ours:
        raise OpenELMError(
            f"{path} is no prompt cache, and `prompt_cache` would replace it; say "
            "another file, or remove it yourself."
        )


def _read(
    path: Path, binding: Binding, model: OpenELM, make_cache: Callable[[], ModelCache]
) -> tuple[list[int], list[list[mx.array]]]:
    """Return the tokens that the file holds, and each layer's keys and values.

    Raises:
        _Useless: it is damaged, or kept for something else.
    """
    try:
        arrays, metadata = _load(path)
        said = json.loads(metadata[_KEY])
        content, format = said["content"], said["format"]
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise _Useless("is damaged") from error
    if format != _FORMAT:
        raise _Useless("was kept by another version of mlx-openelm")
    if said.get("model") != binding.model:
        raise _Useless("was kept for another model or adapter")
    for what in ("template", "cache"):
        theirs, ours = said.get(what), getattr(binding, what)
        if theirs != ours:
            raise _Useless(f"was kept with the {what} {theirs!a:.80}, not {ours!a}")
    tokens = _take_tokens(arrays, model)
    layers = _take_layers(arrays, len(tokens), model, make_cache)
    if not tokens or not layers or fingerprint_arrays(arrays) != content:
        raise _Useless("is damaged")
    return tokens, layers


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    # Both from one opening, for another process may replace the file.
    return mx.load(  # type: ignore[return-value] # not of this format
        str(path), format="safetensors", return_metadata=True
    )


def _take_tokens(arrays: Mapping[str, mx.array], model: OpenELM) -> list[int]:
    """Return the token ids, or none if some are no ids of the model."""
    tokens = arrays.get("tokens")
    if tokens is None or tokens.dtype != mx.uint32 or tokens.ndim != 1:
        return []
    ids: list[int] = tokens.tolist()  # type: ignore[assignment] # it has an axis
    return ids if max(ids, default=0) < model.config.vocab_size else []


def _take_layers(
    arrays: Mapping[str, mx.array],
    num_tokens: int,
    model: OpenELM,
    make_cache: Callable[[], ModelCache],
) -> list[list[mx.array]]:
    """Return each layer's keys and values, or none if a tensor is not as it should."""
    layers, H = [], model.config.head_dim
    for i, K in enumerate(model.config.num_kv_heads):
        like = make_cache()  # with one token, which is never computed
        like.update_and_fetch(*[mx.zeros((1, K, 1, H))] * 2)
        parts = []
        for j, expected in enumerate(like.state):
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
    path: Path, tensors: dict[str, mx.array], said: Mapping[str, str | int]
) -> None:
    """Replace the file, in one step; only its owner may read what a person wrote."""
    metadata = {"format": "mlx", _KEY: json.dumps(said)}
    with lock_target(path), replaced_file(path) as part:
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            mx.save_safetensors(opened, tensors, metadata=metadata)


def _describe(error: OSError | RuntimeError) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    said = error.strerror if isinstance(error, OSError) else None
    return said or str(error).rstrip(".")
