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
from mlx_openelm.generation.options import PROMPT, SPEED_AND_MEMORY, Sampling
from mlx_openelm.options import OUTPUT_PANEL

SERVER = "Server"  # a heading in --help
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
        str,
        typer.Option(
            help="Address to listen on; any but a loopback address needs --api-key.",
            rich_help_panel=SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port to listen on; 0 chooses a free one."),
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Key that clients send in the header Authorization as Bearer KEY.",
            envvar="MLX_OPENELM_API_KEY",
            rich_help_panel=SERVER,
        ),
    ] = None,
    allowed_origins: Annotated[
        str,
        typer.Option(
            help="Origins of other web pages that may send requests (CORS): "
            "https://a.example,https://b.example or *.",
            rich_help_panel=SERVER,
        ),
    ] = "",
    template: Annotated[
        str,
        typer.Option(
            help="Prompt template of chats: auto, raw, instruct, alpaca or "
            "openelm-peft.",
            rich_help_panel=PROMPT,
        ),
    ] = "auto",
    sampling: Annotated[GivenOptions, OptionsOf(Sampling, only=_SAMPLING)],
    decode_concurrency: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of answers generated at once, in one batch.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 32,
    prompt_concurrency: Annotated[
        int,
        typer.Option(
            min=1,
            help="Maximum number of prompts processed at once.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 4,
    prompt_cache_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of prompts whose KV cache is kept, for requests that extend "
            "them.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 10,
    log_level: Annotated[
        str,
        typer.Option(
            help="Log level: DEBUG, INFO (each request), WARNING or ERROR.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "WARNING",
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a web page at /.

    Parameters that a request omits come from these options, then from the model's
    generation_config.json. Prints the URL.
    """
    console = Console(quiet=quiet)
    from mlx_openelm.text.templates import TEMPLATE_NAMES

    check_sampling(sampling)
    if template not in TEMPLATE_NAMES:
        raise OpenELMError(
            f"No template is called {template!r}; choose {', '.join(TEMPLATE_NAMES)}."
        )
    if api_key is not None and not re.fullmatch(r"[!-~]([ -~]*[!-~])?", api_key):
        raise OpenELMError(
            "--api-key is empty, begins or ends with a space, or is not ASCII; give "
            "another key, or leave it out."
        )
    levels = ("DEBUG", "INFO", "WARNING", "ERROR")
    if log_level.upper() not in levels:
        raise OpenELMError(f"--log-level is {log_level}; choose {', '.join(levels)}.")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(message)s")
    from mlx_openelm.serving.access import Access
    from mlx_openelm.serving.engine import Load
    from mlx_openelm.serving.requests import Served
    from mlx_openelm.serving.server import Server
    from mlx_openelm.text.templates import RAW

    origins = tuple(o.strip().rstrip("/") for o in allowed_origins.split(",") if o)
    with Server(Access(host, port, api_key, origins)) as server:  # binds the port first
        folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
        chosen = (tokenizer.template or RAW) if template == "auto" else template
        config = folder.generation_defaults
        served = Served(
            name=_name(folder.path),
            tokenizer=tokenizer,
            defaults=Sampling.from_defaults(config, sampling),
            template=chosen,
            context_length=folder.config.max_context_length,
            rows=folder.config.vocab_size,
            greedy_defaults=Sampling.from_defaults(config, {**sampling, "temp": 0}),
        )

        def announce(url: str) -> None:
            console.note(
                f"[{served.name}, prompt template {chosen}; Ctrl-C stops the server]"
            )
            console.answer(url)

        load = Load(decode_concurrency, prompt_concurrency, prompt_cache_size)
        server.run(served, loaded, load, on_ready=announce)


def _name(path: Path) -> str:
    """Return a model's name for clients, without its path."""
    from mlx_openelm.storage.hub import DEMO, is_demo, snapshot_of

    snapshot = snapshot_of(path)
    if snapshot is not None:
        return snapshot[0]
    return DEMO if is_demo(path) else path.resolve().name
