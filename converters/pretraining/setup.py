"""Set-up of a run before its first step: folder, tokenizer, config and data."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.pretraining.checkpoints import (
    RECIPE,
    Resume,
    as_json,
    check_folder,
    find_state,
    lock_folder,
    read_training,
    state_path,
    write_atomically,
    write_json_atomically,
)
from converters.pretraining.heldout import HeldOut
from converters.pretraining.initial_weights import InitialWeights, read_initial
from converters.pretraining.loader import (
    Loader,
    join_states,
    open_loader,
    read_recipe_documents,
)
from converters.pretraining.packing import Corpus, read_corpora, train_tokenizer
from converters.pretraining.plan import share_batch
from converters.pretraining.processes import Processes
from converters.pretraining.recipe import ModelRecipe, PretrainRecipe
from converters.pretraining.training_states import (
    ResumePoint,
    TrainingState,
    Weights,
)
from mlx_openelm.config import BOS_ID, EOS_ID, OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.text.tokenizer import Tokenizer

TOKENIZER_CHARACTERS = 100_000_000  # of streamed text that a tokenizer is trained on


@dataclass(frozen=True, slots=True)
class Setup:
    """Inputs of a new or resumed run.

    Attributes:
        initial: initial weights; None: random ones.
        saved: the training state to resume from, with `progress`; None for a new run.
        notes: notes for the user on the weights and the position in the data.
    """

    config: OpenELMConfig
    tokenizer: Tokenizer
    loader: Loader
    heldout: HeldOut | None
    initial: Weights | None
    saved: TrainingState | None
    progress: ResumePoint
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def claim_folder(
    recipe: PretrainRecipe, processes: Processes, resume: Resume
) -> Iterator[None]:
    """Check the recipe, and create and lock its folder.

    Raises:
        OpenELMError: in all processes, if a check fails in one.
    """
    output = Path(recipe.output)
    with contextlib.ExitStack() as locks:
        with processes.shared_errors():
            _check(recipe, processes, resume)
            if processes.first:
                check_folder(recipe, resume)
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


def set_up(recipe: PretrainRecipe, processes: Processes, resume: Resume) -> Setup:
    """Create the tokenizer, open the data, and read the checkpoint to resume from.

    The first process writes tokenizer and configs; recipe.json comes last, as it marks
    a run as started.

    Raises:
        OpenELMError: in all processes, if something fails in one.
    """
    output = Path(recipe.output)
    source = find_state(output, resume)
    own = source is not None and source.parent == output  # else it has other sizes
    saved, progress = None, ResumePoint(0, {}, {})
    with processes.shared_errors():
        initial: InitialWeights | None = None
        initial_config = None
        if own:  # `init` may have been deleted
            initial_config = OpenELMConfig.from_file(output / "config.json")
        elif start := recipe.init if source is None else str(source):
            initial = read_initial(start)
            initial_config = initial.config
        corpus = read_corpora(recipe.data) if recipe.data.packing else None
        if processes.first and not (output / RECIPE).exists():
            tokenizer = _choose_tokenizer(recipe, corpus, initial)
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
    states = processes.gather(loader.state())
    with processes.shared_errors():
        join_states(states)  # all read the same files
        if source is not None:
            saved = read_training(source, check=processes.first)
            progress = saved.progress
            if not own:
                _check_steps(recipe, saved)
                progress = dataclasses.replace(progress, origin=str(source.resolve()))
            if progress.loader:
                loader.restore(progress.loader)
        heldout = HeldOut(recipe, tokenizer) if recipe.data.heldout else None
        if processes.first:
            for name, value in (
                ("config.json", config.to_dict()),
                ("generation_config.json", generation_config(recipe)),
                (RECIPE, as_json(recipe)),
            ):
                write_json_atomically(output / name, value)
    notes = initial.notes if initial is not None else ()
    if saved is not None and not progress.loader:
        notes += (
            f"Resumed {saved.path} after {progress.step:,} iterations. It has no "
            "position in the data: they start at the beginning of an epoch.",
        )
    weights = None if initial is None else initial.weights
    if saved is not None and weights is not None:
        saved = dataclasses.replace(saved, weights=weights)
    return Setup(config, tokenizer, loader, heldout, weights, saved, progress, notes)


def _check(recipe: PretrainRecipe, processes: Processes, resume: Resume) -> None:
    share_batch(recipe, processes.count)
    if recipe.init is not None and state_path(resume) is not None:
        raise OpenELMError(
            f"A run starts from init ({recipe.init}) or resumes from a training state "
            f"({resume}), not both; leave one out."
        )
    if not recipe.data.train and not recipe.data.corpora:
        raise OpenELMError("The recipe has no text: set data.train, or pass `data`.")
    if recipe.optimizer.name == "muon" and recipe.parallel == "fsdp":
        raise OpenELMError(
            "Muon needs unsharded matrices; set parallel: ddp, or optimizer.name: "
            "adamw."
        )


def _check_steps(recipe: PretrainRecipe, saved: TrainingState) -> None:
    step = saved.progress.step
    if step >= recipe.steps:
        raise OpenELMError(
            f"{saved.path} was saved after {step:,} iterations, but the recipe has "
            f"{recipe.steps:,} `steps`; set more."
        )


def _choose_tokenizer(
    recipe: PretrainRecipe, corpus: Corpus | None, initial: InitialWeights | None
) -> Tokenizer:
    """Read the recipe's tokenizer or the one of the initial weights, or train one."""
    if recipe.tokenizer.path:
        return Tokenizer.from_file(Path(recipe.tokenizer.path))
    if initial is not None:
        path = initial.folder / "tokenizer.model"
        if not path.is_file():
            raise OpenELMError(
                f"There is no tokenizer.model in {initial.folder}, next to the initial "
                "weights; set tokenizer.path."
            )
        return Tokenizer.from_file(path)
    if corpus is not None:
        return train_tokenizer(corpus.documents, recipe.tokenizer)
    texts = read_recipe_documents(recipe.data, characters=TOKENIZER_CHARACTERS)
    return train_tokenizer(tuple(texts), recipe.tokenizer)


def _choose_config(
    recipe: PretrainRecipe, tokenizer: Tokenizer, initial: OpenELMConfig | None
) -> OpenELMConfig:
    """Return the recipe's sizes, or those of the initial weights, if they agree.

    The rows of the embedding are those of the weights; the context length, which does
    not follow from weights, is that of the recipe's `model`.
    """
    if initial is None:
        return recipe.model.build(tokenizer.vocab_size)
    if initial.vocab_size < tokenizer.vocab_size:
        raise OpenELMError(
            f"The initial weights have an embedding of {initial.vocab_size} rows, too "
            f"few for the tokenizer's {tokenizer.vocab_size} pieces; put its own "
            "tokenizer.model next to it."
        )
    if recipe.model == ModelRecipe():
        return initial
    model = dataclasses.replace(
        recipe.model.build(tokenizer.vocab_size),
        vocab_size=initial.vocab_size,
        share_input_output_layers=initial.share_input_output_layers,
    )
    ours, theirs = model.tensor_shapes(), initial.tensor_shapes()
    different = [n for n in ours | theirs if ours.get(n) != theirs.get(n)]
    if different:
        name = different[0]
        raise OpenELMError(
            f"The recipe's model does not agree with the initial weights: {name} has "
            f"shape {ours.get(name, 'none')} in the recipe and "
            f"{theirs.get(name, 'none')} in the weights; leave out the model, as the "
            "weights have the sizes."
        )
    return dataclasses.replace(initial, max_context_length=model.max_context_length)


def generation_config(recipe: PretrainRecipe) -> dict[str, Any]:
    """Return generation_config.json; greedy unless the recipe has sampling options."""
    options = dataclasses.asdict(recipe.generation).items()
    chosen = {key: value for key, value in options if value is not None}
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
    return ids | ({"do_sample": True, **chosen} if chosen else {})
