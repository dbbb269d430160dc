"""What a model makes of text that it is not trained on: a score, and continuations."""

import math

import torch

from converters.pretraining.loader import read_recipe_documents
from converters.pretraining.log import Evaluated
from converters.pretraining.packing import PackedSequences
from converters.pretraining.recipe import PretrainRecipe
from converters.reference import ReferenceOpenELM, summed_loss
from mlx_openelm.text.tokenizer import Tokenizer

SAMPLE_TOKENS = 64


class HeldOut:
    """Windows of held-out text, spread evenly, each begun with BOS."""

    def __init__(self, recipe: PretrainRecipe, tokenizer: Tokenizer) -> None:
        """Read the recipe's `data.heldout`.

        Raises:
            OpenELMError: a file is not there or not text, or all are too short.
        """
        documents = tuple(read_recipe_documents(recipe.data, heldout=True))
        windows = PackedSequences(documents, tokenizer, recipe.eval_window)
        every = max(1, len(windows) // recipe.eval_sequences)
        chosen = range(0, len(windows), every)[: recipe.eval_sequences]
        # The order of places does not matter; epoch 0 starts at offset 0.
        self.batch = windows.batch(chosen, recipe.seed, 0)
        num_bytes = sum(len(text.encode()) for text in documents)
        self.bytes_per_token = num_bytes / windows.num_tokens

    @torch.no_grad()
    def score(
        self, model: ReferenceOpenELM, step: int, *, averaged: bool = False
    ) -> Evaluated:
        device = next(model.parameters()).device
        total = 0.0
        for start in range(0, len(self.batch.inputs), 16):
            rows = slice(start, start + 16)
            inputs = torch.from_numpy(self.batch.inputs[rows]).to(device)
            targets = torch.from_numpy(self.batch.targets[rows]).to(device)
            total += float(summed_loss(model(inputs), targets)[0])
        nats = total / self.batch.targets.size
        return Evaluated(
            step, nats, nats / math.log(2) / self.bytes_per_token, averaged
        )


@torch.no_grad()
def continue_greedily(
    model: ReferenceOpenELM,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int = SAMPLE_TOKENS,
) -> str:
    """Return what the model writes behind the prompt, up to EOS or a full context."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt)
    most = min(max_tokens, model.config.max_context_length - len(ids))
    cache = model.empty_cache()
    written: list[int] = []
    unread = ids
    while len(written) < most:
        logits = model(torch.tensor([unread], device=device), cache)[0, -1]
        chosen = int(logits[: tokenizer.vocab_size].argmax())  # no row for padding
        if chosen == tokenizer.eos_id:
            break
        written.append(chosen)
        unread = [chosen]
    return tokenizer.decode([*ids, *written])[len(tokenizer.decode(ids)) :]
