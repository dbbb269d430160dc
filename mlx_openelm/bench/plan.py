"""The plan of `bench`: the models, bits and workloads that are measured."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.quantization import AFFINE_BITS
from mlx_openelm.storage.loading import choose_model, stored_dtype
from mlx_openelm.storage.model_folder import ModelFolder
from mlx_openelm.tensor_names import EMBEDDING, HEAD

PROMPT = "Once upon a time there was a king who"  # of the self-check and `time_shell`
PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 3
BITS = (16, *reversed(AFFINE_BITS))
RANDOM_DTYPE = mx.bfloat16  # of random weights


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """A model to measure: a folder (and an adapter), or random weights."""

    name: str
    config: OpenELMConfig
    folder: ModelFolder | None = None
    adapter: Path | None = None

    @property
    def bits(self) -> int:
        """Bits of most linear layers, as stored."""
        if self.folder is None:
            return 8 * RANDOM_DTYPE.size
        linears = [
            packing.bits
            for name, packing in self.folder.packings.items()
            if name not in (EMBEDDING, HEAD)
        ]
        if linears:
            return Counter(linears).most_common(1)[0][0]
        return 8 * stored_dtype(self.folder).size


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `batch` sequences of `prompt_tokens` + `new_tokens` tokens."""

    subject: Subject
    bits: int
    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def context(self) -> int:
        """Tokens in each sequence at the end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def as_stored(self) -> bool:
        return self.bits == self.subject.bits


def open_subject(
    name: str | None, adapter_path: Path | None = None, *, offline: bool = False
) -> Subject:
    """Open a model folder, optionally with an adapter; see `choose_model`.

    Raises:
        OpenELMError: the model or the adapter is missing or damaged.
    """
    choice = choose_model(name, adapter_path, offline=offline)
    folder, adapter = choice.folder, choice.adapter
    shown = Path(name or folder.path.name).name
    return Subject(shown, folder.config, folder, adapter.path if adapter else None)


def make_subject(size: str) -> Subject:
    """Return a released size ("270M", "1.1B") with random weights.

    Raises:
        OpenELMError: the size is unknown.
    """
    config = OpenELMConfig.preset(size)
    return Subject(config.size_name, config)


@dataclass(frozen=True, slots=True)
class Workload:
    """Measurements of each model: all combinations of bits, batch and context.

    Attributes:
        bits: empty: as stored.
        contexts: tokens of a sequence at the end, prompt and new tokens.
        prompt_tokens: only without `contexts`; None: 512, or as many as fit.
        new_tokens: None: 64, or half of the model's context if that is less.
    """

    bits: tuple[int, ...] = ()
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    rounds: int = ROUNDS

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("`prompt_tokens`", self.prompt_tokens, 1),
            ("`max_tokens`", self.new_tokens, 2),  # the first one comes from the prompt
            ("`rounds`", self.rounds, 1),
            *(("`batch`", batch, 1) for batch in self.batches),
        ):
            if value is not None and value < least:
                raise OpenELMError(f"{flag} is {value}; it must be at least {least}.")
        for bits in self.bits:
            if bits not in BITS:
                allowed = ", ".join(map(str, BITS))
                raise OpenELMError(f"`bits` is {bits}; it must be one of {allowed}.")
        for context in self.contexts:
            if context <= (self.new_tokens or 2):
                raise OpenELMError(
                    f"`context` is {context}, which leaves no prompt before "
                    f"{self.new_tokens or 2} new tokens; increase it, or reduce "
                    "`max_tokens`."
                )
        if self.contexts and self.prompt_tokens is not None:
            raise OpenELMError(
                "`context` and `prompt_tokens` both set the prompt's length; leave out "
                "one of them."
            )


def plan_cases(subjects: Sequence[Subject], workload: Workload) -> list[Case]:
    """Return all combinations of subjects and workload.

    Raises:
        OpenELMError: a case has more tokens than the model's context.
    """
    cases = list[Case]()
    for subject in subjects:
        limit = subject.config.max_context_length
        for bits, batch, context in itertools.product(
            dict.fromkeys(workload.bits or (subject.bits,)),
            dict.fromkeys(workload.batches),
            dict.fromkeys(workload.contexts or (None,)),
        ):
            total = limit if context is None else context
            new_tokens = workload.new_tokens or max(2, min(NEW_TOKENS, total // 2))
            prompt_tokens = total - new_tokens
            if context is None:
                usual = max(1, min(PROMPT_TOKENS, prompt_tokens))
                prompt_tokens = workload.prompt_tokens or usual
            if prompt_tokens + new_tokens > limit:
                raise OpenELMError(
                    f"{prompt_tokens} prompt tokens and {new_tokens} new tokens exceed "
                    f"the context of {subject.name}, {limit} tokens."
                )
            cases.append(Case(subject, bits, batch, prompt_tokens, new_tokens))
    return cases
