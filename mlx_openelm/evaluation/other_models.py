"""Scorers of models other than OpenELM: those that stock mlx-lm opens, and `hf:NAME`.

`hf:NAME` runs with PyTorch, in lm-evaluation-harness's own `hf` model. mlx-lm and the
harness are imported when such a model is loaded.
"""

import contextlib
import hashlib
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_openelm.device import runs_on_linux_cpu
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.harness import network
from mlx_openelm.evaluation.harness_model import quiet, require_harness
from mlx_openelm.evaluation.loglikelihood import rolling_requests
from mlx_openelm.evaluation.prefix_tree import count_common
from mlx_openelm.evaluation.scorer import Pair, Score, Scorer, group_by_settings
from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.message_parts import describe_error
from mlx_openelm.model.fingerprint import fingerprint_arrays
from mlx_openelm.paths import user_path
from mlx_openelm.storage.hub import find_model
from mlx_openelm.storage.weight_files import CONFIG

HF = "hf:"  # prefix of names of models that the harness loads

_CONTEXT = 2048  # of a model whose config has no length: OpenELM's
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions")
_MLX_LM_WEIGHTS = "model*.safetensors"  # that it reads
_CHUNK = 64  # requests to the harness's model together; at most these are lost
_WIDE_BATCH = 8  # sequences in a forward pass of the harness's model


def is_other_model(name: str, *, offline: bool = False) -> bool:
    """Return whether a name is `hf:NAME`, or a model that is not an OpenELM.

    Raises:
        OpenELMError: there is no such folder, or the download failed.
    """
    if name.startswith(HF):
        return True
    config = find_model(name, offline=offline) / CONFIG
    raw = read_mapping(config) if config.is_file() else {}
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind != "openelm"


def check_other_model(name: str) -> None:
    """Check what `open_scorer` needs, before other models are scored.

    Raises:
        OpenELMError: a package is missing, or it is not the folder of a model.
    """
    path = user_path(name.removeprefix(HF))
    if not name.startswith(HF):
        if path.is_dir() and not any(path.glob(_MLX_LM_WEIGHTS)):
            raise OpenELMError(
                _describe_failure(name, f"it has no {_MLX_LM_WEIGHTS}")
                if any(path.glob("*.bin"))
                else f"{name} has no {_MLX_LM_WEIGHTS}; pass a complete model folder."
            )
        return
    require_harness()
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise OpenELMError(
            f"{name} needs PyTorch, which is not installed; run pip install "
            "'mlx-openelm[eval,torch]'."
        )
    given = name.removeprefix(HF).strip()
    if not given or (given.startswith((".", "/", "~")) and not path.exists()):
        raise OpenELMError(
            f"There is no folder {given or 'without a name'}; give hf: and a folder or "
            "a Hub id."
        )
    if path.exists() and not (path / CONFIG).is_file():
        raise OpenELMError(
            f"{given} is not a model folder, as it has no {CONFIG}; give hf: and a "
            "folder or a Hub id."
        )


def open_scorer(name: str, *, offline: bool = False) -> Scorer:
    """Load a model that is not an OpenELM.

    Raises:
        OpenELMError: it cannot be loaded; the reason is named.
    """
    if name.startswith(HF):
        return _HarnessScorer(name, offline=offline)
    return _MLXScorer(name, find_model(name, offline=offline))


# mlx-lm --------------------------------------------------------------------------


class _MLXScorer:
    """Scores with a model and a tokenizer that stock mlx-lm has loaded.

    Texts have the special tokens that its tokenizer adds (BOS, where it has one), as
    ours have. Common prefixes of consecutive requests are computed once.
    """

    def __init__(self, name: str, path: Path) -> None:
        raw = read_mapping(path / CONFIG)
        try:
            # mlx-lm's OLMo prints which package it needs, before it exits.
            with contextlib.redirect_stdout(io.StringIO()):
                from mlx_lm import load, stream_generate
                from mlx_lm.models import cache as caches
                from mlx_lm.sample_utils import make_sampler

                model, self._tokenizer, *_ = load(str(path))
        except SystemExit as error:  # mlx-lm's OLMo exits if a package is missing
            raise OpenELMError(_describe_failure(name, "a package is missing")) from (
                error
            )
        except Exception as error:  # a model's code may raise anything
            reason = f"{type(error).__name__}, {describe_error(error)}"
            raise OpenELMError(_describe_failure(name, reason)) from error
        self._model: nn.Module = model
        self._caches, self._make_sampler = caches, make_sampler
        self._stream_generate = stream_generate
        if runs_on_linux_cpu():  # as OpenELM's weights, it has no fast 16-bit kernels
            model.set_dtype(mx.float32)
        lengths = (raw.get(key) for key in _CONTEXT_KEYS)
        self._context = next((n for n in lengths if isinstance(n, int)), _CONTEXT)
        self._description = json.dumps(raw, sort_keys=True)

    @cached_property
    def key(self) -> str:
        arrays = dict(tree_flatten(self._model.parameters()))
        return fingerprint_arrays(arrays, self._description)

    def check(self, pairs: Sequence[Pair]) -> list[Any]:
        encoded = []
        for pair in pairs:
            context, continuation = self._encode(*pair)
            if not continuation or len(continuation) > self._context:
                raise OpenELMError(
                    f"A continuation has {len(continuation)} tokens; it must have "
                    f"between 1 and the context length, {self._context}."
                )
            encoded.append([context, continuation])
        return encoded

    def score(self, pairs: Mapping[int, Pair]) -> Iterator[tuple[int, Score]]:
        encoded = {number: self._encode(*pair) for number, pair in pairs.items()}
        yield from self._score_tokens(encoded)

    def score_texts(
        self, texts: Mapping[int, tuple[str]]
    ) -> Iterator[tuple[int, float]]:
        for number, (text,) in texts.items():
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            windows = rolling_requests(ids, self._start, self._context)
            encoded = {
                i: (list(window.context), list(window.continuation))
                for i, window in enumerate(windows)
            }
            yield number, math.fsum(s for _, (s, _) in self._score_tokens(encoded))

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))

    def generate(
        self, prompts: Mapping[int, tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        for members, sampling in group_by_settings(prompts):
            sampler = self._make_sampler(
                temp=sampling.temp, top_p=sampling.top_p, top_k=sampling.top_k
            )
            for number in members:
                ids = self._tokenizer.encode(prompts[number][0])
                ids = ids[-max(1, self._context - sampling.max_tokens) :]
                _check_tokens(ids, self._rows)
                mx.random.seed(sampling.seed or 0)
                text, tokens = "", list[int]()
                for piece in self._stream_generate(
                    self._model,
                    self._tokenizer,
                    ids,
                    max_tokens=sampling.max_tokens,
                    sampler=sampler,
                ):
                    if piece.finish_reason == "stop":  # its token is EOS
                        break
                    tokens.append(piece.token)
                    text = self._tokenizer.decode(tokens)
                    if any(stop in text for stop in sampling.stop):
                        break
                ends = [text.find(stop) for stop in sampling.stop if stop in text]
                yield number, text[: min(ends, default=len(text))]

    @cached_property
    def _rows(self) -> int:
        """The rows of the vocabulary."""
        return int(self._model(mx.array([[0]])).shape[-1])  # not computed

    @property
    def _start(self) -> int:
        """The token before a text: BOS, else EOS, as in the harness."""
        tokens = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        return next((token for token in tokens if token is not None), 0)

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a pair as the harness does: spaces belong to the continuation."""
        bare = context.rstrip()
        prefix = list(self._tokenizer.encode(bare)) if bare else []
        if not prefix:
            text = context + continuation
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            return [self._start], list(ids)
        whole = list(self._tokenizer.encode(context + continuation))
        return prefix, whole[len(prefix) :]

    def _score_tokens(
        self, encoded: Mapping[int, tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, Score]]:
        """Yield the score of each continuation, truncated at the left if too long."""
        kept: list[int] = []  # tokens whose keys and values are in `cache`
        cache = self._caches.make_prompt_cache(self._model)
        whole = {n: (c + a)[-(self._context + 1) :] for n, (c, a) in encoded.items()}
        for number in sorted(whole, key=whole.__getitem__):
            inputs, targets = whole[number][:-1], encoded[number][1]
            first = len(inputs) - len(targets)  # the output here gives the first target
            common = min(count_common(kept, inputs), first)
            if kept and self._caches.can_trim_prompt_cache(cache):
                self._caches.trim_prompt_cache(cache, len(kept) - common)
            elif kept:
                common, cache = 0, self._caches.make_prompt_cache(self._model)
            logits = self._model(mx.array([inputs[common:]]), cache=cache)
            logits = logits[0, first - common :].astype(mx.float32)  # (A, V)
            _check_tokens(whole[number], self._rows)
            expected = mx.array(targets)
            nats = nn.log_softmax(logits)[mx.arange(len(targets)), expected].sum()
            greedy = (logits.argmax(axis=-1) == expected).all()
            value = float(nats.item())
            if not math.isfinite(value):
                raise OpenELMError(
                    f"The log-likelihood of an answer is {value}: the model's weights "
                    "are damaged or overflow."
                )
            kept = inputs
            yield number, (value, bool(greedy.item()))


def _check_tokens(ids: Sequence[int], rows: int) -> None:
    """Raise OpenELMError for a token that the model lacks; MLX does not check it."""
    if ids and max(ids) >= rows:
        raise OpenELMError(
            f"The tokenizer has the token {max(ids)}, but the model only {rows} rows "
            "of the vocabulary: they do not belong together."
        )


def _describe_failure(name: str, reason: str) -> str:
    return (
        f"mlx-lm cannot load {name}: {reason}; {HF}{name} loads it with PyTorch and "
        "transformers instead."
    )


# The harness's own model ---------------------------------------------------------


class _HarnessScorer:
    """Scores with the `hf` model of lm-evaluation-harness, in PyTorch.

    Texts have the special tokens that the model's tokenizer adds, as ours have BOS.
    """

    def __init__(self, name: str, *, offline: bool) -> None:
        self._name, pretrained = name, name.removeprefix(HF)
        path = user_path(pretrained)
        self._pretrained = str(path) if path.is_dir() else pretrained
        with contextlib.ExitStack() as stack:
            stack.enter_context(_explained(f"{name} cannot be loaded"))
            stack.enter_context(quiet())
            stack.enter_context(network(allowed=not offline))
            if path.is_dir():  # a download shows its progress
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            from lm_eval.models.huggingface import (  # type: ignore[import-untyped] # it has no stubs
                HFLM,
            )

            self._model = HFLM(
                pretrained=self._pretrained,
                backend="causal",
                device="mps" if sys.platform == "darwin" else "auto",  # CUDA or CPU
                dtype="float32" if runs_on_linux_cpu() else "auto",
                batch_size=_WIDE_BATCH,
                add_bos_token=True,
            )
            embedding = self._model.model.get_input_embeddings()
            self._rows: int = embedding.weight.shape[0]
            # Added to the tokenizer alone in some models; padding is masked
            if self._model.tokenizer.pad_token_id >= self._rows:
                self._model.tokenizer.pad_token_id = self._model.prefix_token_id

    @cached_property
    def key(self) -> str:
        """Of a folder, its files with sizes and times; of a Hub id, its commit."""
        path = Path(self._pretrained)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
            stats = [(file.name, file.stat()) for file in files]
            content: Any = [(name, s.st_size, s.st_mtime_ns) for name, s in stats]
        else:
            info = self._model.get_model_info()
            content = [self._pretrained, info["model_sha"], str(info["model_dtype"])]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check(self, pairs: Sequence[Pair]) -> list[Any]:
        return [list(pair) for pair in pairs]

    def score(self, pairs: Mapping[int, Pair]) -> Iterator[tuple[int, Score]]:
        for number, (nats, greedy) in self._answer("loglikelihood", pairs):
            yield number, (float(nats), bool(greedy))

    def score_texts(
        self, texts: Mapping[int, tuple[str]]
    ) -> Iterator[tuple[int, float]]:
        self._model.add_bos_token = False  # it would be scored as a part of the text
        try:
            for number, nats in self._answer("loglikelihood_rolling", texts):
                yield number, float(nats)
        finally:
            self._model.add_bos_token = True

    def count_tokens(self, text: str) -> int:
        return len(self._model.tok_encode(text, add_special_tokens=False))

    def generate(
        self, prompts: Mapping[int, tuple[str, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, str]]:
        yield from self._answer("generate_until", prompts)

    def _answer(
        self, kind: str, requests: Mapping[int, Any]
    ) -> Iterator[tuple[int, Any]]:
        """Answer requests in chunks, so that a stopped run loses few answers."""
        from lm_eval.api.instance import (  # type: ignore[import-untyped] # it has no stubs
            Instance,
        )

        numbers = list(requests)
        for start in range(0, len(numbers), _CHUNK):
            chunk = numbers[start : start + _CHUNK]
            instances = [
                Instance(
                    request_type=kind, doc={}, arguments=tuple(requests[number]), idx=i
                )
                for i, number in enumerate(chunk)
            ]
            with quiet(), _explained(f"{self._name} failed"):
                self._check_tokens(requests[number] for number in chunk)
                answers = getattr(self._model, kind)(instances, disable_tqdm=True)
            yield from zip(chunk, answers, strict=True)

    def _check_tokens(self, requests: Iterable[tuple[Any, ...]]) -> None:
        """Raise OpenELMError for a token that the model lacks; a GPU may ignore it."""
        if len(self._model.tokenizer) <= self._rows:
            return
        for request in requests:
            text = "".join(part for part in request if isinstance(part, str))
            _check_tokens(self._model.tok_encode(text), self._rows)


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn a failure of transformers into an OpenELMError that names the model."""
    try:
        yield
    except OpenELMError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise OpenELMError(
            f"The model {what}: {type(error).__name__}, "
            f"{describe_error(error).rstrip('.')}."
        ) from error
