"""The description of the API at /openapi.json."""

from functools import cache
from typing import Any

from pydantic.json_schema import models_json_schema

from mlx_openelm.serving.api import ChatRequest, CompletionRequest
from mlx_openelm.version import __version__

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
_STATUSES = {
    "400": "A field is wrong.",
    "401": "The API key is missing or wrong.",
    "403": "The page's origin or the host name is not allowed.",
    "404": "No such model.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "503": "The queue is full, or the server is shutting down.",
    "504": "The answer was not complete in time.",
}


@cache
def describe_api() -> dict[str, Any]:
    """Return the OpenAPI document."""
    kinds = (CompletionRequest, ChatRequest)
    _, schemas = models_json_schema(
        [(kind, "validation") for kind in kinds],
        ref_template="#/components/schemas/{model}",
    )
    definitions = {**schemas["$defs"], "Error": _ERROR}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mlx-openelm",
            "version": __version__,
            "description": "OpenELM behind OpenAI's API.",
        },
        "paths": {
            "/v1/completions": _post("Continue prompts.", CompletionRequest.__name__),
            "/v1/chat/completions": _post("Answer a chat.", ChatRequest.__name__),
            "/v1/models": {"get": _get("List the models.")},
            "/v1/models/{name}": {
                "get": {
                    **_get("Describe a model.", "404"),
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string"},
                        }
                    ],
                }
            },
            "/health": {"get": _get("Whether the server answers.")},
            "/metrics": {"get": _get("Measurements.", kind="text/plain")},
        },
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(summary: str, schema: str) -> dict[str, Any]:
    body = {"schema": {"$ref": f"#/components/schemas/{schema}"}}
    content = {
        "application/json": {"schema": {"type": "object"}},
        "text/event-stream": {"schema": {}},
    }
    described = {"200": {"description": "The answer.", "content": content}}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": body}},
            "responses": described | _errors(*_STATUSES),
        }
    }


def _get(
    summary: str, *statuses: str, kind: str = "application/json"
) -> dict[str, Any]:
    schema = {"type": "string"} if kind == "text/plain" else {"type": "object"}
    described = {"description": "The answer.", "content": {kind: {"schema": schema}}}
    return {
        "summary": summary,
        "responses": {"200": described} | _errors("401", "403", *statuses),
    }


def _errors(*statuses: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {
        status: {"description": _STATUSES[status], "content": content}
        for status in statuses
    }
