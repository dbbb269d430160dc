"""Evaluation during pre-training: loss on held-out text, and sample continuations."""

import math

import torch

from converters.pretraining.loader import read_recipe_documents
from converters.pretraining.log import Evaluated
from converters.pretraining.packing import PackedSequences
from converters.pretraining.recipe import PretrainRecipe
from converters.reference import GrowingCache, ReferenceOpenELM, summed_loss
from mlx_openelm.text.tokenizer import Tokenizer

SAMPLE_TOKENS = 64


class HeldOut:
    """Evenly spaced windows of held-out text, each starting with BOS."""

    def __init__(self, recipe: PretrainRecipe, tokenizer: Tokenizer) -> None:
        """Read the recipe's `data.heldout`.

        Raises:
            OpenELMError: a file is missing or not text, or the text is too short.
        """
        documents = tuple(read_recipe_documents(recipe.data, heldout=True))
        windows = PackedSequences(documents, tokenizer, recipe.eval_window)
        every = max(1, len(windows) // recipe.eval_sequences)
        chosen = range(0, len(windows), every)[: recipe.eval_sequences]
        # Epoch 0 starts at offset 0; the order of the windows does not matter.
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
    """Return the model's greedy continuation, up to EOS or a full context."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(prompt)
    most = min(max_tokens, model.config.max_context_length - len(ids))
    cache = GrowingCache()
    written: list[int] = []
    inputs = ids
    while len(written) < most:
        logits = model(torch.tensor([inputs], device=device), cache)[0, -1]
        chosen = int(logits[: tokenizer.vocab_size].argmax())  # no padding rows
        if chosen == tokenizer.eos_id:
            break
        written.append(chosen)
        inputs = [chosen]
    return tokenizer.decode([*ids, *written])[len(tokenizer.decode(ids)) :]
