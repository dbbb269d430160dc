"""The grammars of requests."""

import json
from collections.abc import Callable

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.constraints import Constraint, GrammarCompiler
from mlx_openelm.serving.api import MOST_GRAMMAR_CHARACTERS, GenerationRequest
from mlx_openelm.serving.errors import RequestError


def compile_grammar(
    request: GenerationRequest, compiler: GrammarCompiler
) -> Constraint | None:
    """Return the constraint of a request's answers, if it has one.

    It may take seconds. Constraints are not kept for later requests: the answers that
    use one share its limits.

    Raises:
        RequestError: there are two, or one that cannot be compiled.
    """
    wanted = _find_grammars(request)
    if len(wanted) > 1:
        raise RequestError(
            f"The request has {' and '.join(wanted)}; an answer follows one grammar.",
            param="response_format",
        )
    for kind, text in wanted.items():
        return _compile(kind, text, compiler)
    return None


def _compile(kind: str, text: str, compiler: GrammarCompiler) -> Constraint:
    compilers: dict[str, Callable[[], Constraint]] = {
        "json_object": compiler.json_object,
        "json_schema": lambda: compiler.json_schema(json.loads(text)),
        "regex": lambda: compiler.regex(text),
        "grammar": lambda: compiler.grammar(text),
    }
    if len(text) > MOST_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"{kind} has {len(text)} characters; at most "
            f"{MOST_GRAMMAR_CHARACTERS} are compiled.",
            param="response_format",
        )
    try:
        return compilers[kind]()
    except OpenELMError as error:
        raise RequestError(str(error), param="response_format") from None


def _find_grammars(request: GenerationRequest) -> dict[str, str]:
    """Return the kinds of grammars in a request with their texts."""
    wanted = {}
    form = request.response_format
    match form.type if form else "text":
        case "json_object":
            wanted["json_object"] = ""
        case "json_schema":
            assert form is not None
            assert form.json_schema is not None
            wanted["json_schema"] = json.dumps(form.json_schema.schema_)
        case "regex" | "grammar" as kind:
            wanted[kind] = getattr(form, kind)
    for kind in ("regex", "grammar"):
        text = getattr(request, kind)
        if text is not None:
            wanted[kind] = text
    return wanted
