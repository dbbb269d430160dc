"""Loads a model and its tokenizer by name, ready to run on this machine."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_openelm.device import compute_dtype
from mlx_openelm.errors import OpenELMError
from mlx_openelm.model.openelm import OpenELM
from mlx_openelm.model.packed_weights import unpack_weight
from mlx_openelm.model.quantization import Packing
from mlx_openelm.storage.adapter_folder import (
    AdapterFolder,
    attach,
    find_adapter,
    open_adapter_folder,
)
from mlx_openelm.storage.hub import DEMO, find_model, snapshot_of
from mlx_openelm.storage.model_folder import ModelFolder, open_folder
from mlx_openelm.storage.tokenizer_finder import (
    JSON_FILE,
    MODEL_FILE,
    find_tokenizer_file,
    read_tokenizer,
)
from mlx_openelm.storage.weight_files import is_adapter
from mlx_openelm.tensor_names import to_module
from mlx_openelm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The model that a command runs, and the adapter for it.

    Attributes:
        name: the given name, else the adapter's base, else "demo".
        is_base: no name was given; the model is the adapter's base.
    """

    name: str
    folder: ModelFolder
    adapter: AdapterFolder | None
    is_base: bool

    @property
    def is_demo(self) -> bool:
        """Whether this is the built-in model without an adapter."""
        return self.adapter is None and self.name == DEMO


def choose_model(
    name: str | Path | None, adapter_path: str | Path | None, *, offline: bool
) -> ModelChoice:
    """Open the named model, else the adapter's base, else the demo model.

    Raises:
        OpenELMError: the model or the adapter is missing or damaged.
    """
    adapter = None
    if adapter_path is not None:
        path = find_adapter(str(adapter_path), offline=offline)
        adapter = open_adapter_folder(path)
    if adapter is not None and name is None:
        path = adapter.find_base(offline=offline)
        return ModelChoice(adapter.base or "", open_folder(path), adapter, is_base=True)
    name = str(name or DEMO)
    path = find_model(name, offline=offline)
    if is_adapter(path):
        raise OpenELMError(
            f"{name} is an adapter, not a model; pass it as `adapter_path`."
        )
    return ModelChoice(name, open_folder(path), adapter, is_base=False)


def load(
    name: str | Path | None = None,
    adapter_path: str | Path | None = None,
    *,
    offline: bool = False,
) -> tuple[OpenELM, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name: "demo", a model folder, or a Hub id; None is the adapter's base, or the
            demo without an adapter.
        adapter_path: an adapter folder of mlx-lm or mlx-openelm for that model; its
            prompt template becomes the tokenizer's.

    Raises:
        OpenELMError: the model or its tokenizer is missing or damaged.
    """
    choice = choose_model(name, adapter_path, offline=offline)
    tokenizer = load_tokenizer(choice.folder, choice.adapter)
    model = load_model(choice.folder)
    notes = choice.folder.notes
    if choice.adapter is not None:
        notes += attach(model, choice.adapter.path)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return model, tokenizer


def add_adapter(
    model: OpenELM, adapter: str | Path, *, offline: bool = False
) -> tuple[OpenELM, str | None, Sequence[str]]:
    """Return a model with an adapter that shares the weights of the given one.

    Returns:
        The model, the prompt template stored with the adapter, and notes for the user.

    Raises:
        OpenELMError: the adapter is missing or damaged, or belongs to another model.
    """
    path = find_adapter(str(adapter), offline=offline, parameter="adapter")
    stored = open_adapter_folder(path)
    parameters = dict(tree_flatten(model.parameters()))
    shared = {id(array): array for array in parameters.values()}
    twin = copy.deepcopy(model, shared)
    notes = attach(twin, stored.path)
    return twin, stored.template, notes


def load_tokenizer(
    folder: ModelFolder, adapter: AdapterFolder | None = None
) -> Tokenizer:
    """Load the folder's tokenizer, with the prompt template of the adapter or folder.

    Raises:
        OpenELMError: there is none, or it has more pieces than the embedding has rows.
    """
    if find_tokenizer_file(folder.path) is None:
        if snapshot := snapshot_of(folder.path):
            raise OpenELMError(
                f"{snapshot[0]} has no tokenizer; `mlx-openelm convert {snapshot[0]}` "
                "makes a model folder that has one."
            )
        raise OpenELMError(
            f"{folder.path} holds no {MODEL_FILE} or {JSON_FILE}; convert the model "
            f"again with `tokenizer`, or put Llama 2's {MODEL_FILE} there "
            "(NousResearch/Llama-2-7b-hf has a public copy)."
        )
    template = (adapter.template if adapter else None) or folder.template
    rows = folder.config.vocab_size
    tokenizer = read_tokenizer(folder.path, template=template, num_rows=rows)
    if tokenizer.vocab_size > rows:
        raise OpenELMError(
            f"The tokenizer in {folder.path} has {tokenizer.vocab_size} pieces, the "
            f"model {rows} rows; they do not belong together."
        )
    return tokenizer


def load_model(folder: ModelFolder, dtype: mx.Dtype | None = None) -> OpenELM:
    """Load the weights in the dtype that is fastest on this machine.

    Quantized weights stay packed, except on the Linux CPU, where float32 is faster.

    Args:
        dtype: compute in this dtype instead, with quantized weights unpacked.
    """
    stored = stored_dtype(folder)
    chosen = dtype or compute_dtype(stored)
    arrays = folder.read()
    packings: Mapping[str, Packing] = folder.packings
    if packings and (dtype is not None or chosen != stored):
        arrays = _unpacked(arrays, packings, chosen)
        packings = {}
    model = OpenELM(folder.config)
    if packings:
        make_quantized(model, packings)
    floating = {name: _cast(array, chosen) for name, array in arrays.items()}
    model.load_weights(list(floating.items()))
    model.eval()
    try:
        mx.eval(model.parameters())
    except RuntimeError as error:  # MLX has no other type for a failed read
        if "[read]" not in str(error):
            raise
        raise OpenELMError(
            f"The weights of {folder.path} were changed or truncated while they were "
            "being read; repeat the command when they are complete."
        ) from error
    return model


def stored_dtype(folder: ModelFolder) -> mx.Dtype:
    """Return the dtype of the unquantized tensors: that of the norms."""
    return folder.dtype_of("norm.weight")


def _unpacked(
    arrays: dict[str, mx.array], packings: Mapping[str, Packing], dtype: mx.Dtype
) -> dict[str, mx.array]:
    arrays = dict(arrays)
    for name, packing in packings.items():
        module = to_module(name)
        parts = {
            suffix: arrays.pop(f"{module}.{suffix}")
            for suffix in ("weight", "scales", "biases")
            if f"{module}.{suffix}" in arrays
        }
        arrays[f"{module}.weight"] = unpack_weight(packing, parts, dtype)
    return arrays


def make_quantized(model: OpenELM, packings: Mapping[str, Packing]) -> None:
    """Replace the modules of packed tensors (CoreNet names) by quantized ones."""
    by_module = {to_module(name): packing for name, packing in packings.items()}

    def choose(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        packing = by_module.get(path)
        return False if packing is None else asdict(packing)

    nn.quantize(model, class_predicate=choose)


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
