"""What the server serves: a base model and its adapters, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A base model, or that model with an adapter.

    Attributes:
        name: its name for clients.
        template: prompt template of chats; never "auto".
        parent: name of the base model; empty for the base itself.
    """

    name: str
    model: OpenELM
    template: str
    parent: str = ""


@dataclass(frozen=True, slots=True)
class Served:
    """The models of a server, the base first, and the options of their answers.

    Attributes:
        defaults: the model's generation_config.json.
        given: options of the command line, by attribute of `Sampling`.
        timeout_s: how long an answer may take, waiting included; None: any time.
    """

    models: Mapping[str, ServedModel]
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    given: Mapping[str, Any]
    timeout_s: float | None = None

    @property
    def base(self) -> ServedModel:
        return next(iter(self.models.values()))

    @property
    def context_length(self) -> int:
        return self.base.model.config.max_context_length

    @property
    def vocab_size(self) -> int:
        return self.base.model.config.vocab_size

    def sampling(self, requested: Mapping[str, Any]) -> Sampling:
        """Return the options of an answer, the requested ones first."""
        return Sampling.from_defaults(self.defaults, {**self.given, **requested})
