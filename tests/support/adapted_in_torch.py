"""A model with an adapter, in PyTorch."""

import numpy as np
import torch
from models import weights_of
from torch.nn.utils import parametrize

from converters.reference import ReferenceOpenELM
from mlx_openelm.training.arrays import trained_tensors


class Adapted(torch.nn.Module):
    """W + scale (A B)^T, with DoRA rescaled to the row norms m; for embeddings E + A B.

    It parametrizes the weight itself, so a tied head uses it too.
    """

    def __init__(self, parts, scale, is_embedding):
        super().__init__()
        for name, array in parts.items():
            setattr(self, name, torch.nn.Parameter(torch.tensor(np.array(array))))
        self.scale, self.is_embedding = scale, is_embedding

    def forward(self, weight):
        update = self.scale * (self.lora_a @ self.lora_b)
        adapted = weight + (update if self.is_embedding else update.T)
        if hasattr(self, "m"):
            lengths = adapted.norm(dim=1).detach()  # the paper's section 4.3
            adapted = adapted * (self.m / lengths)[:, None]
        return adapted


def in_torch(model, scale):
    """Return the model in PyTorch, and its trained parameters by our names."""
    reference = ReferenceOpenELM(model.config)
    state = {n: torch.from_numpy(w) for n, w in weights_of(model.config).items()}
    reference.load_state_dict(state)
    tensors = trained_tensors(model)
    parts = {}
    for name, array in tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("lora_a", "lora_b", "m"):
            parts.setdefault(path, {})[leaf] = array
    modules = dict(reference.named_modules())
    plain = dict(reference.named_parameters())
    trained = {}
    for path, tensors_here in parts.items():
        module = modules[path.removeprefix("transformer.")]
        adapted = Adapted(tensors_here, scale, isinstance(module, torch.nn.Embedding))
        parametrize.register_parametrization(module, "weight", adapted)
        trained |= {f"{path}.{n}": p for n, p in adapted.named_parameters()}
    for name in tensors.keys() - trained.keys():
        trained[name] = plain[name.removeprefix("transformer.")]
    for parameter in reference.parameters():
        parameter.requires_grad_(any(parameter is p for p in trained.values()))
    return reference, trained
