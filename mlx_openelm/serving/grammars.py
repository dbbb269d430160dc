"""The grammars of requests."""

import json
from collections.abc import Callable
from typing import Any

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
    for kind, grammar in wanted.items():
        return _compile(kind, grammar, compiler)
    return None


def _compile(kind: str, grammar: Any, compiler: GrammarCompiler) -> Constraint:
    compilers: dict[str, Callable[[Any], Constraint]] = {
        "json_object": lambda _: compiler.json_object(),
        "json_schema": compiler.json_schema,
        "regex": compiler.regex,
        "grammar": compiler.grammar,
    }
    text = grammar if isinstance(grammar, str) else json.dumps(grammar)
    if len(text) > MOST_GRAMMAR_CHARACTERS:
        raise RequestError(
            f"{kind} has {len(text)} characters; at most "
            f"{MOST_GRAMMAR_CHARACTERS} are compiled.",
            param="response_format",
        )
    try:
        return compilers[kind](grammar)
    except OpenELMError as error:
        raise RequestError(str(error), param="response_format") from None


def _find_grammars(request: GenerationRequest) -> dict[str, Any]:
    """Return the grammars in a request by kind: schemas, patterns and texts."""
    wanted: dict[str, Any] = {}
    form = request.response_format
    match form.type if form else "text":
        case "json_object":
            wanted["json_object"] = ""
        case "json_schema":
            assert form is not None
            assert form.json_schema is not None
            wanted["json_schema"] = form.json_schema.schema_
        case "regex" | "grammar" as kind:
            wanted[kind] = getattr(form, kind)
    for kind in ("regex", "grammar"):
        text = getattr(request, kind)
        if text is not None:
            wanted[kind] = text
    return wanted
