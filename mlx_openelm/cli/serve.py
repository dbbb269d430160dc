"""The command that serves a model over HTTP: `serve`."""

import logging
import re
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.decoding_options import check_sampling
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import (
    Adapter,
    Model,
    Offline,
    Quiet,
    open_model,
)
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.options import Sampling

_SAMPLING = (
    *("max_tokens", "temp", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "seed"),
)


@derive_options
def serve_command(
    *,
    model: Model = None,
    adapter_path: Adapter = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; other than loopback needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Clients show it as Authorization: Bearer.",
            envvar="MLX_OPENELM_API_KEY",
        ),
    ] = None,
    allowed_origins: Annotated[
        str, typer.Option(help="Other sites whose pages may ask: https://a.b,... or *.")
    ] = "",
    template: Annotated[
        str, typer.Option(help="Of chats: auto, raw, instruct, alpaca, openelm-peft.")
    ] = "auto",
    sampling: Annotated[GivenOptions, OptionsOf(Sampling, only=_SAMPLING)],
    decode_concurrency: Annotated[
        int, typer.Option(min=1, help="Answers written at a time, in one batch.")
    ] = 32,
    prompt_concurrency: Annotated[
        int, typer.Option(min=1, help="Prompts read at a time.")
    ] = 4,
    prompt_cache_size: Annotated[
        int, typer.Option(min=1, help="Prompts kept, for requests that go on.")
    ] = 10,
    log_level: Annotated[
        str, typer.Option(help="DEBUG, INFO (each request), WARNING or ERROR.")
    ] = "WARNING",
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Serve a model as OpenAI's API does, with a page at /. Prints the URL.

    What a request does not say comes from these options, then from the model.
    """
    console = Console(quiet=quiet)
    from mlx_openelm.text.templates import TEMPLATE_NAMES

    check_sampling(sampling)
    if template not in TEMPLATE_NAMES:
        raise OpenELMError(
            f"No template is called {template!r}; there are "
            f"{', '.join(TEMPLATE_NAMES)}."
        )
    if api_key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", api_key):
        raise OpenELMError(
            "--api-key is empty, begins or ends with a space, or is not all ASCII; say "
            "another key, or leave it out."
        )
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if log_level.upper() not in levels:
        raise OpenELMError(f"--log-level is {log_level}; say {', '.join(levels)}.")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(message)s")
    from mlx_openelm.serving.access import Access
    from mlx_openelm.serving.engine import Load
    from mlx_openelm.serving.requests import Served
    from mlx_openelm.serving.server import Server
    from mlx_openelm.text.templates import RAW

    origins = tuple(o.strip().rstrip("/") for o in allowed_origins.split(",") if o)
    with Server(Access(host, port, api_key, origins)) as server:  # the port is ours
        folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
        chosen = (tokenizer.template or RAW) if template == "auto" else template
        served = Served(
            name=_name(folder.path),
            tokenizer=tokenizer,
            defaults=Sampling.from_defaults(folder.generation_defaults, sampling),
            template=chosen,
            context_length=folder.config.max_context_length,
            rows=folder.config.vocab_size,
        )

        def announce(url: str) -> None:
            console.note(
                f"[{served.name}, chats in the template {chosen}; Ctrl-C ends]"
            )
            console.answer(url)

        load = Load(decode_concurrency, prompt_concurrency, prompt_cache_size)
        server.run(served, loaded, load, on_ready=announce)


def _name(path: Path) -> str:
    """Return a model's name for clients, which does not reveal its path."""
    from mlx_openelm.storage.hub import DEMO, is_demo, snapshot_of

    snapshot = snapshot_of(path)
    if snapshot is not None:
        return snapshot[0]
    return DEMO if is_demo(path) else path.resolve().name
