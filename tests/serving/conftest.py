"""The model, the server and the client that the tests of the server share."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from models import UNEVEN, build, small_tokenizer
from servers import CONTEXT, client_of, serving


@pytest.fixture(scope="session")
def small():
    """A made model whose answers are mostly pieces of characters, and its tokenizer."""
    config = replace(UNEVEN, max_context_length=CONTEXT)
    return build(config, seed=4), small_tokenizer()


@pytest.fixture(scope="module")
def server(small) -> Iterator:
    with serving(*small, template="instruct") as started:
        yield started


@pytest.fixture(scope="session")
def openai():
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai, server):
    return client_of(openai, server)
