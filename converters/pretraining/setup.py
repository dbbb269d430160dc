"""Set-up of a run before its first step: folder, tokenizer, config and data."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.pretraining.checkpoints import (
    LAST,
    RECIPE,
    ResumePoint,
    Weights,
    as_json,
    check_folder,
    lock_folder,
    read_initial,
    read_training,
    write_atomically,
    write_json_atomically,
)
from converters.pretraining.heldout import HeldOut
from converters.pretraining.loader import Loader, open_loader, read_recipe_documents
from converters.pretraining.packing import Corpus, read_corpora, train_tokenizer
from converters.pretraining.plan import share_batch
from converters.pretraining.processes import Processes
from converters.pretraining.recipe import ModelRecipe, PretrainRecipe
from mlx_openelm.config import BOS_ID, EOS_ID, OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

TOKENIZER_CHARACTERS = 100_000_000  # of streamed text that a tokenizer is trained on


@dataclass(frozen=True, slots=True)
class Setup:
    """Inputs of a new or resumed run.

    Attributes:
        initial: initial weights; None: random ones.
        saved: the last checkpoint, which includes `progress`; None for a new run.
        notes: notes for the user on the initial weights.
    """

    config: OpenELMConfig
    tokenizer: Tokenizer
    loader: Loader
    heldout: HeldOut | None
    initial: Weights | None
    saved: dict[str, Any] | None
    progress: ResumePoint
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def claim_folder(
    recipe: PretrainRecipe, processes: Processes, *, resume: bool
) -> Iterator[None]:
    """Check the recipe, and create and lock its folder.

    Raises:
        OpenELMError: in all processes, if a check fails in one.
    """
    output = Path(recipe.output)
    with contextlib.ExitStack() as locks:
        with processes.shared_errors():
            _check(recipe, processes)
            if processes.first:
                check_folder(recipe, resume=resume)
                _create_folder(output)
                locks.enter_context(lock_folder(output))
        yield


def _create_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OpenELMError(
            f"Cannot create the folder {path} ({error.strerror}); use another `output`."
        ) from error


def set_up(recipe: PretrainRecipe, processes: Processes, *, resume: bool) -> Setup:
    """Create the tokenizer, open the data, and read the checkpoint to resume from.

    The first process writes tokenizer and configs; recipe.json comes last, as it marks
    a run as started.

    Raises:
        OpenELMError: in all processes, if something fails in one.
    """
    output = Path(recipe.output)
    saved, progress = None, ResumePoint(0, {}, {})
    saved_before = resume and (output / LAST).exists()
    with processes.shared_errors():
        initial_config, initial = None, None
        notes: tuple[str, ...] = ()
        if saved_before and recipe.init is not None:  # `init` may have been deleted
            initial_config = OpenELMConfig.from_file(output / "config.json")
        elif recipe.init is not None:
            initial_config, initial, notes = read_initial(Path(recipe.init))
        corpus = read_corpora(recipe.data) if recipe.data.packing else None
        if processes.first and not (output / RECIPE).exists():
            tokenizer = _choose_tokenizer(recipe, corpus)
            proto = tokenizer.model_proto
            write_atomically(
                output / "tokenizer.model", lambda path: path.write_bytes(proto)
            )
    with processes.shared_errors():
        tokenizer = Tokenizer.from_file(output / "tokenizer.model")
        config = _choose_config(recipe, tokenizer, initial_config)
        loader = open_loader(
            recipe,
            tokenizer,
            config.max_context_length,
            rank=processes.rank,
            ranks=processes.count,
            corpus=corpus,
        )
        if saved_before:
            saved, progress = read_training(output)
            loader.restore(progress.loader)
        heldout = HeldOut(recipe, tokenizer) if recipe.data.heldout else None
        if processes.first:
            for name, value in (
                ("config.json", config.to_dict()),
                ("generation_config.json", generation_config(recipe)),
                (RECIPE, as_json(recipe)),
            ):
                write_json_atomically(output / name, value)
    return Setup(config, tokenizer, loader, heldout, initial, saved, progress, notes)


def _check(recipe: PretrainRecipe, processes: Processes) -> None:
    share_batch(recipe, processes.count)
    if not recipe.data.train and not recipe.data.corpora:
        raise OpenELMError("The recipe has no text: set data.train, or pass `data`.")
    if recipe.optimizer.name == "muon" and recipe.parallel == "fsdp":
        raise OpenELMError(
            "Muon needs unsharded matrices; set parallel: ddp, or optimizer.name: "
            "adamw."
        )


def _choose_tokenizer(recipe: PretrainRecipe, corpus: Corpus | None) -> Tokenizer:
    """Read the recipe's tokenizer or the one next to `init`, or train one."""
    if recipe.tokenizer.path:
        return Tokenizer.from_file(Path(recipe.tokenizer.path))
    if recipe.init is not None:
        path = Path(recipe.init).with_name("tokenizer.model")
        if path.is_file():
            return Tokenizer.from_file(path)
    if corpus is not None:
        return train_tokenizer(corpus.documents, recipe.tokenizer)
    texts = read_recipe_documents(recipe.data, characters=TOKENIZER_CHARACTERS)
    return train_tokenizer(tuple(texts), recipe.tokenizer)


def _choose_config(
    recipe: PretrainRecipe, tokenizer: Tokenizer, initial: OpenELMConfig | None
) -> OpenELMConfig:
    if initial is None:
        return recipe.model.build(tokenizer.vocab_size)
    if recipe.model != ModelRecipe():
        raise OpenELMError(
            "The recipe has both init and a model; leave out the model, as the "
            "config.json next to init has the sizes."
        )
    if initial.vocab_size < tokenizer.vocab_size:
        raise OpenELMError(
            f"{recipe.init} has an embedding of {initial.vocab_size} rows, too few for "
            f"the tokenizer's {tokenizer.vocab_size} pieces; put its own "
            "tokenizer.model next to it."
        )
    return initial


def generation_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return generation_config.json; greedy unless the recipe has sampling options."""
    options = dataclasses.asdict(recipe.generation).items()
    chosen = {key: value for key, value in options if value is not None}
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    return ids | ({"do_sample": True, **chosen} if chosen else {})
