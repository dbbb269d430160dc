"""The command that serves a model over HTTP: `serve`."""

import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.decoding_options import check_sampling
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import (
    Adapter,
    Model,
    NoTuning,
    Offline,
    Quiet,
    open_model,
    use_tuning,
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
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapter that requests can choose as their model, as NAME=DIR; "
            "repeatable.",
            show_default=False,
            rich_help_panel=SERVER,
        ),
    ] = None,
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
            help="Maximum number of long prompts processed in turn.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 4,
    prompt_cache_size: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of prompts whose KV cache is kept, for requests that begin "
            "with the same text.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 64,
    prompt_cache_bytes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum size of all kept prompts.",
            rich_help_panel=SPEED_AND_MEMORY,
        ),
    ] = 2**30,
    max_queue: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum number of requests that wait; more receive status 503.",
            rich_help_panel=SERVER,
        ),
    ] = 256,
    request_timeout: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Maximum time of an answer in seconds, waiting included.",
            show_default="none",
            rich_help_panel=SERVER,
        ),
    ] = None,
    log_level: Annotated[
        str,
        typer.Option(
            help="Log level: DEBUG, INFO (each request), WARNING or ERROR.",
            rich_help_panel=OUTPUT_PANEL,
        ),
    ] = "WARNING",
    no_tuning: NoTuning = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Serve a model over HTTP, with OpenAI's API and a web page at /.

    Parameters that a request omits come from these options, then from the model's
    generation_config.json. Prints the URL.
    """
    console = Console(quiet=quiet)
    tuning = use_tuning(console, no_tuning)
    from mlx_openelm.storage.loading import add_adapter
    from mlx_openelm.text.templates import RAW, TEMPLATE_NAMES

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
    from mlx_openelm.serving.access import Access, read_origins
    from mlx_openelm.serving.listener import Listener

    origins = read_origins(allowed_origins)
    adapters = _read_adapters(adapter or [])
    if adapters and adapter_path is not None:
        raise OpenELMError(
            "--adapter-path changes the model that --adapter adds to; give both as "
            "--adapter NAME=DIR."
        )
    with closing(Listener(Access(host, port, api_key, origins))) as listener:
        # The port is bound before the model is loaded, which is slow.
        with ThreadPoolExecutor(1) as executor:
            importing = executor.submit(import_module, "mlx_openelm.serving.server")
            folder, loaded, tokenizer = open_model(
                console, model, adapter_path, offline
            )
            importing.result()
        from mlx_openelm.generation.batching.engine import EngineLimits
        from mlx_openelm.generation.batching.prefix_tree import PrefixLimits
        from mlx_openelm.serving.served import Served, ServedModel
        from mlx_openelm.serving.server import Server, ServerLimits

        def choose_template(stored: str | None) -> str:
            return (stored or RAW) if template == "auto" else template

        base = ServedModel(
            _name(folder.path), loaded, choose_template(tokenizer.template)
        )
        models = {base.name: base}
        for name, path in adapters.items():
            if name in models:
                raise OpenELMError(f"--adapter {name}: two models have this name.")
            with_adapter, stored, notes = add_adapter(loaded, path, offline=offline)
            for note in notes:
                console.note(f"{name}: {note}")
            stored = stored or tokenizer.template
            models[name] = ServedModel(
                name, with_adapter, choose_template(stored), parent=base.name
            )
        served = Served(
            models, tokenizer, folder.generation_defaults, sampling, request_timeout
        )
        served.sampling({})  # fails here if generation_config.json is wrong

        def announce(url: str) -> None:
            names = ", ".join(models)
            console.note(
                f"[{names}, prompt template {base.template}; Ctrl-C stops the server]"
            )
            console.answer(url)

        kept = PrefixLimits(prompt_cache_size, prompt_cache_bytes)
        engine = EngineLimits(
            decode_concurrency, prompt_concurrency, kept=kept, tuning=tuning
        )
        server = Server(listener, served, ServerLimits(engine, max_queue))
        server.run(on_ready=announce)


def _read_adapters(given: Sequence[str]) -> dict[str, str]:
    """Parse the values NAME=DIR of --adapter."""
    adapters = {}
    for text in given:
        name, _, path = text.partition("=")
        if not name.strip() or not path.strip():
            raise OpenELMError(
                f"--adapter is {text!r}; it must be NAME=DIR, tales=adapters/tales for "
                "example."
            )
        if name in adapters:
            raise OpenELMError(f"--adapter {name} is given twice.")
        adapters[name] = path
    return adapters


def _name(path: Path) -> str:
    """Return a model's name for clients, without its path."""
    from mlx_openelm.storage.hub import DEMO, is_demo, snapshot_of

    snapshot = snapshot_of(path)
    if snapshot is not None:
        return snapshot[0]
    return DEMO if is_demo(path) else path.resolve().name
