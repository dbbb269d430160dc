"""Compare the outputs of PyTorch and MLX layer by layer, in float32."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import torch

from converters.conversion.merging import merge_adapter
from converters.formats.sources import ModelSource, open_source
from converters.reference import ReferenceOpenELM
from mlx_openelm.model.openelm import OpenELM, from_start
from mlx_openelm.tensor_names import to_folder

Array = npt.NDArray[np.float32]
LIMIT = 1e-4  # largest logit difference that counts as rounding


@dataclass(frozen=True, slots=True)
class OutputDifference:
    """Largest absolute difference and largest value of one output of the model."""

    place: str
    difference: float
    largest: float


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Result of the comparison; `equal`: logits within `limit`, same top tokens."""

    source: str
    size: str
    num_tokens: int
    places: tuple[OutputDifference, ...]
    same_top_token: float
    limit: float
    equal: bool


def compare_with_reference(
    name: str, *, num_tokens: int = 64, seed: int = 0
) -> ParityReport:
    """Run random tokens through both models and compare the outputs of each layer.

    Args:
        name: any source of `convert`.
        num_tokens: length of the sequence (one is run).

    Raises:
        OpenELMError: the source cannot be read.
    """
    source = open_source(name)
    if source.adapter is not None:
        source = merge_adapter(source, source.adapter)
    config = source.config
    rng = np.random.default_rng(seed)
    length = min(num_tokens, config.max_context_length)
    tokens = rng.integers(0, min(config.vocab_size, 32000), size=(1, length))
    theirs = _run_torch(source, tokens)
    ours = _run_mlx(source, tokens)
    places = tuple(
        OutputDifference(
            place,
            float(np.abs(ours[place] - theirs[place]).max()),
            float(np.abs(theirs[place]).max()),
        )
        for place in theirs
    )
    top = ours["logits"].argmax(-1) == theirs["logits"].argmax(-1)
    same = float(top.mean())
    return ParityReport(
        source=name,
        size=config.size_name,
        num_tokens=length,
        places=places,
        same_top_token=same,
        limit=LIMIT,
        equal=places[-1].difference <= LIMIT and same == 1.0,
    )


@torch.no_grad()
def _run_torch(source: ModelSource, tokens: npt.NDArray[np.int64]) -> dict[str, Array]:
    with torch.device("meta"):
        model = ReferenceOpenELM(source.config)
    state = {
        name: torch.from_numpy(np.array(tensor.read().astype(mx.float32)))
        for name, tensor in source.tensors.items()
    }
    model.load_state_dict(state, assign=True)
    outputs: dict[str, Array] = {}

    def keep(place: str, output: torch.Tensor) -> None:
        outputs[place] = output.numpy().copy()

    model.token_embeddings.register_forward_hook(
        lambda module, given, output: keep("embedding", output)
    )
    for i, block in enumerate(model.layers):
        block.register_forward_hook(
            lambda module, given, output, i=i: keep(f"layer {i}", output)
        )
    model.norm.register_forward_hook(
        lambda module, given, output: keep("final norm", output)
    )
    keep("logits", model(torch.from_numpy(tokens)))
    return outputs


def _run_mlx(source: ModelSource, tokens: npt.NDArray[np.int64]) -> dict[str, Array]:
    model = OpenELM(source.config)
    model.load_weights(
        [
            (to_folder(name), tensor.read().astype(mx.float32))
            for name, tensor in source.tensors.items()
        ]
    )
    x = model.transformer.token_embeddings(mx.array(tokens))
    outputs = {"embedding": x}
    rotate, layout = from_start(source.config, tokens.shape[1])
    for i, layer in enumerate(model.layers):
        x = layer(x, rotate, layout)
        outputs[f"layer {i}"] = x
    outputs["final norm"] = model.transformer.norm(x)
    outputs["logits"] = model(mx.array(tokens))
    return {place: np.array(output) for place, output in outputs.items()}
