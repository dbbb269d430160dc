"""Generated JSON schemas: every finished answer of the demo is valid."""

import json
import random
import string
from concurrent.futures import ThreadPoolExecutor

import pytest
from servers import post, serving

from mlx_openelm.storage.loading import load

jsonschema = pytest.importorskip("jsonschema")

PROMPTS = (
    "Once upon a time",
    "The king's daughter, in JSON:",
    "Name, age and children of the miller:",
    "{",
    "日本語",
)
_MOST_TOKENS = 400


def make_schema(chance, depth=0):
    """Return a bounded schema: the length of its values has a limit."""
    kinds = [make_string, make_integer, make_enum, make_simple]
    if depth < 3:
        kinds += [make_object, make_array, make_choice] * (2 if depth else 4)
    return chance.choice(kinds)(chance, depth)


def make_string(chance, depth):
    least = chance.randint(0, 3)
    if chance.random() < 0.3:
        patterns = ("^[a-z]{2,6}$", "^[0-9]{4}-[0-9]{2}$", "^(yes|no)( or (yes|no))?$")
        return {"type": "string", "pattern": chance.choice(patterns)}
    return {
        "type": "string",
        "minLength": least,
        "maxLength": least + chance.randint(0, 8),
    }


def make_integer(chance, depth):
    least = chance.randint(-1000, 1000)
    return {
        "type": "integer",
        "minimum": least,
        "maximum": least + chance.randint(0, 5000),
    }


def make_enum(chance, depth):
    values = ["", "a b", "é", '"', "\\", "\n", 5, -2.5, None, True, [1], {"a": []}]
    return {"enum": chance.sample(values, chance.randint(1, 4))}


def make_simple(chance, depth):
    value = chance.choice(["x", 7, None])
    simple = [{"type": "boolean"}, {"type": "null"}, {"const": value}]
    simple.append({"type": ["boolean", "null"]})
    return chance.choice(simple)


def make_object(chance, depth):
    letters = string.ascii_letters + " é_"
    names = {
        "".join(chance.choices(letters, k=chance.randint(1, 6)))
        for _ in range(chance.randint(0, 4))
    }
    names = sorted(names)
    return {
        "type": "object",
        "properties": {name: make_schema(chance, depth + 1) for name in names},
        "required": [name for name in names if chance.random() < 0.7],
        "additionalProperties": False,
    }


def make_array(chance, depth):
    least = chance.randint(0, 2)
    return {
        "type": "array",
        "items": make_schema(chance, depth + 1),
        "minItems": least,
        "maxItems": least + chance.randint(0, 2),
    }


def make_choice(chance, depth):
    return {"anyOf": [make_schema(chance, depth + 1) for _ in range(2)]}


def check(server, schemas, prompts_each):
    """Check the answers under schemas; return how many ended, and how many not."""

    def ask(numbered):
        number, schema = numbered
        ended, open_ones = 0, 0
        for n in range(prompts_each):
            form = {"name": "x", "schema": schema}
            body = {
                "prompt": PROMPTS[(number + n) % len(PROMPTS)],
                "max_tokens": _MOST_TOKENS,
                "temperature": n % 2,
                "seed": number,
                "response_format": {"type": "json_schema", "json_schema": form},
            }
            status, answer = post(server.url, body)
            assert status == 200, (schema, answer)
            (choice,) = answer["choices"]
            if choice["finish_reason"] == "stop":
                ended += 1
                value = json.loads(choice["text"])
                jsonschema.validate(value, schema)
            else:
                open_ones += 1
        return ended, open_ones

    with ThreadPoolExecutor(16) as pool:
        counts = list(pool.map(ask, enumerate(schemas)))
    return [sum(column) for column in zip(*counts, strict=True)]


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(20, marks=pytest.mark.proof),
        pytest.param(1000, marks=pytest.mark.soak),
    ],
)
def test_answers_are_valid_under_generated_schemas(count):
    chance = random.Random(count)
    schemas = [make_schema(chance) for _ in range(count)]
    with serving(*load("demo"), queue=100) as server:
        ended, open_ones = check(server, schemas, len(PROMPTS))
    assert ended >= 0.95 * (ended + open_ones)
