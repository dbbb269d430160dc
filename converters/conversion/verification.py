"""Check that a model folder is complete, undamaged and equal to its source."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from converters.conversion.merging import open_sources
from converters.conversion.options import ConversionOptions, Progress
from converters.conversion.plan import ConversionPlan
from converters.conversion.provenance import hash_file
from converters.formats.sources import ModelSource, locate, shown_name
from mlx_openelm.config import pad_vocabulary
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling
from mlx_openelm.storage.file_checks import refuse_unreadable
from mlx_openelm.storage.hub import CHAT_TEMPLATE_FILE
from mlx_openelm.storage.loading import load_tokenizer, stored_dtype
from mlx_openelm.storage.model_folder import (
    BEFORE,
    ModelFolder,
    is_finite,
    open_folder,
    unpacks_to_finite,
)
from mlx_openelm.storage.tokenizer_finder import (
    JSON_FILE,
    MODEL_FILE,
    verify_file,
    verify_tokenizer,
)
from mlx_openelm.storage.weight_files import INDEX, SAFETENSORS, read_index
from mlx_openelm.tensor_names import to_folder, to_module
from mlx_openelm.text.templates import RAW

_AGAIN = "convert or download it again"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem of a model folder.

    Attributes:
        advice: what to do; empty if the text includes it.
    """

    text: str
    advice: str = _AGAIN


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check and its problems (none if it passed).

    Attributes:
        advice: on the first problem; empty if that includes it.
    """

    name: str
    passed: bool
    problems: tuple[str, ...]
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of `verify`.

    Attributes:
        notes: notes for the user on what was not checked.
    """

    path: Path
    size: str
    checks: tuple[CheckResult, ...]
    passed: bool
    notes: tuple[str, ...] = ()

    def describe_problems(self) -> str:
        """Return the first problem, how many more there are, and what to do."""
        first, *others = [p for check in self.checks for p in check.problems]
        advice = next(check.advice for check in self.checks if check.problems)
        more = f" (and {len(others)} more)" if others else ""
        return f"{first}{more}" + (f"; {advice}" if advice else "")


def verify(
    path: Path,
    *,
    against: Sequence[str] = (),
    offline: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Verification:
    """Check a model folder's files, weights and tokenizer.

    Args:
        against: its source (the sources, if averaged): every tensor is converted again
            and compared bit for bit.

    Raises:
        OpenELMError: the folder cannot be opened: no config, a damaged or missing file,
            tensors that do not match the config, or invalid generation defaults.
    """
    folder = open_folder(path)
    Sampling.from_defaults(folder.generation_defaults)  # as `generate` does
    problems: dict[str, list[Problem] | None] = {
        "index and shapes": _check_index(folder),
        "weights are numbers": _check_numbers(folder, on_progress),
        "hashes": _check_hashes(folder),
        "tokenizer": _check_tokenizer(folder),
    }
    if against:
        name = f"equal to {' '.join(map(shown_name, against))}"
        problems[name] = _compare(folder, against, offline, on_progress)
    checks = tuple(_summarize(n, p) for n, p in problems.items() if p is not None)
    passed = all(check.passed for check in checks)
    notes = list(folder.notes)
    if BEFORE in folder.metadata:
        notes.append(
            "Another tool has written these weights: the hashes, the receipt and the "
            "options in config.json describe earlier ones, and were not compared."
        )
    notes += _note_template(folder)
    return Verification(path, folder.config.size_name, checks, passed, tuple(notes))


def _note_template(folder: ModelFolder) -> list[str]:
    """Return a note if other tools chat without the template of the model, or reverse.

    A file that the converter has written is checked by its hash.
    """
    if CHAT_TEMPLATE_FILE in (folder.metadata.get("files") or {}):
        return []
    has_file = (folder.path / CHAT_TEMPLATE_FILE).is_file()
    has_template = folder.template not in (None, RAW)
    if has_file and not has_template:
        return [
            f"It has a {CHAT_TEMPLATE_FILE}, which mlx-lm applies to every prompt; its "
            "config stores no template, so mlx-openelm applies none."
        ]
    if has_template and not has_file:
        return [
            f"It has no {CHAT_TEMPLATE_FILE}, so chats of other tools do not use its "
            f"template {folder.template}; `convert` writes one, or a note why not."
        ]
    return []


def _summarize(name: str, problems: Sequence[Problem]) -> CheckResult:
    texts = tuple(problem.text for problem in problems)
    return CheckResult(
        name, not problems, texts, problems[0].advice if problems else ""
    )


def _from_error(error: OpenELMError) -> Problem:
    return Problem(str(error).rstrip("."), advice="")


def _check_index(folder: ModelFolder) -> list[Problem]:
    """Compare index and files; `open_folder` has checked that indexed files exist."""
    index = folder.path / INDEX
    has_index = index.is_file() and INDEX not in folder.unused
    problems = [
        Problem(
            f"{name} is not {'in the index' if has_index else 'used'}, but mlx-lm "
            "loads it: remove it",
            advice="",
        )
        for name in folder.unused
        if fnmatch.fnmatch(name, SAFETENSORS.pattern)
    ]
    if not has_index:
        return problems  # a single file needs none
    try:
        weight_map = read_index(index)
    except OpenELMError as error:
        return [*problems, _from_error(error)]
    for name, tensor in folder.tensors.items():
        if weight_map.get(name) != tensor.file.path.name:
            problems.append(
                Problem(
                    f"{name} is in {tensor.file.path.name}, but in the index under "
                    f"{weight_map.get(name)}"
                )
            )
    problems += [
        Problem(f"the index names {name}, which is in no file")
        for name in sorted(weight_map.keys() - folder.tensors.keys())
    ]
    return problems


def _check_numbers(
    folder: ModelFolder, on_progress: Callable[[Progress], None]
) -> list[Problem]:
    problems, dtype = [], stored_dtype(folder)
    names = folder.config.tensor_shapes()
    for done, name in enumerate(names, start=1):
        parts, packing = _read_parts(folder, name), folder.packings.get(name)
        if packing is None:
            finite = is_finite(parts["weight"])
        else:
            finite = unpacks_to_finite(packing, parts, dtype)
        if not finite:
            problems.append(Problem(f"{to_folder(name)} holds NaN or infinity"))
        on_progress(Progress(done, len(names), "tensors"))
    return problems


def _read_parts(folder: ModelFolder, name: str) -> dict[str, mx.array]:
    """Read a tensor (CoreNet name), all parts of a packed one, by suffix."""
    module, parts = to_module(name), {}
    for suffix in ("weight", "scales", "biases"):
        if stored := folder.tensors.get(f"{module}.{suffix}"):
            parts[suffix] = stored.read()
    return parts


def _check_hashes(folder: ModelFolder) -> list[Problem] | None:
    """Compare weights and tokenizer with the hashes that the converter stored.

    None: there are no hashes of these weights.
    """
    hashes = folder.metadata.get("files")
    if not isinstance(hashes, dict) or not hashes:
        return None
    problems = []
    for name, digest in hashes.items():
        file = folder.path / str(name)
        if not file.is_file():
            problems.append(Problem(f"{name} is missing"))
            continue
        try:
            refuse_unreadable(file)
        except OpenELMError as error:
            problems.append(_from_error(error))
            continue
        if hash_file(file) != digest:
            problems.append(Problem(f"{name} has changed since it was converted"))
    return problems


def _check_tokenizer(folder: ModelFolder) -> list[Problem] | None:
    """Compare the tokenizer with the model; None: it has none, as it should."""
    files = [folder.path / name for name in (MODEL_FILE, JSON_FILE)]
    if _stored_options(folder).get("tokenizer") == "none" and not any(
        file.exists() for file in files
    ):
        return None
    try:
        tokenizer = load_tokenizer(folder)
        verify_tokenizer(tokenizer, folder.config.vocab_size)
        if files[1].is_file():  # what mlx-lm reads
            verify_file(files[1], tokenizer)
    except OpenELMError as error:
        return [_from_error(error)]
    return []


def _compare(
    folder: ModelFolder,
    against: Sequence[str],
    offline: bool,
    on_progress: Callable[[Progress], None],
) -> list[Problem]:
    options = _options(folder)
    paths = [locate(name, offline=offline) for name in against]
    source, _ = open_sources(paths, options, offline=offline)
    problems = _compare_configs(source, folder)
    if problems:
        return problems
    plan = ConversionPlan(source, folder.config, stored_dtype(folder), folder.packings)
    names = folder.config.tensor_shapes()
    for done, name in enumerate(names, start=1):
        actual = _read_parts(folder, name)
        for part_name, expected in plan.parts(name).items():
            if not mx.array_equal(actual[part_name.rpartition(".")[2]], expected):
                problems.append(Problem(f"{part_name} differs"))
        on_progress(Progress(done, len(names), "tensors"))
    return problems


def _stored_options(folder: ModelFolder) -> dict[str, Any]:
    stored = folder.metadata.get("options")
    return stored if isinstance(stored, dict) else {}


def _options(folder: ModelFolder) -> ConversionOptions:
    """Return the options with which the folder was converted."""
    stored = _stored_options(folder)
    base, weights = stored.get("base"), stored.get("weights")
    return ConversionOptions(
        merge=stored.get("merge") is True,
        apart=stored.get("apart") is True,
        average=stored.get("average") is True,
        base=base if isinstance(base, str) else None,
        weights=weights if weights in ("model", "ema") else None,
    )


def _compare_configs(source: ModelSource, folder: ModelFolder) -> list[Problem]:
    expected, actual = asdict(source.config), asdict(folder.config)
    rows = actual["vocab_size"]
    if rows < expected["vocab_size"] <= pad_vocabulary(rows):
        expected["vocab_size"] = actual["vocab_size"]  # padding rows were cut
    return [
        Problem(f"{key} is {actual[key]}, in the source {expected[key]}")
        for key in expected
        if actual[key] != expected[key]
    ]
