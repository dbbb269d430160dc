"""The command for conversations: `chat`."""

from typing import Annotated

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.decoding_options import check_sampling, check_utf8, make_drafter
from mlx_openelm.cli.derived_options import GivenOptions, OptionsOf, derive_options
from mlx_openelm.cli.options import (
    Adapter,
    Json,
    Model,
    NoTuning,
    Offline,
    Quiet,
    open_model,
    optional_path,
    use_tuning,
)
from mlx_openelm.generation.options import (
    CacheOptions,
    DraftOptions,
    PromptOptions,
    Sampling,
)


@derive_options
def chat_command(
    *,
    model: Model = None,
    adapter_path: Adapter = None,
    sampling: Annotated[GivenOptions, OptionsOf(Sampling, without=("logprobs",))],
    prompting: Annotated[GivenOptions, OptionsOf(PromptOptions)],
    drafting: Annotated[GivenOptions, OptionsOf(DraftOptions)],
    caching: Annotated[GivenOptions, OptionsOf(CacheOptions, without=("max_kv_size",))],
    no_tuning: NoTuning = False,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Chat with a model.

    Lines from a pipe are messages; stdout gets only the answers. Omitted options come
    from the model's generation_config.json; without one, decoding is greedy.
    """
    console = Console(quiet=quiet)
    tuning = use_tuning(console, no_tuning)
    prompt_options = PromptOptions(**prompting)
    check_sampling(sampling)
    check_utf8(prompt_options.system)
    from mlx_openelm.cli.chat_session import run_chat
    from mlx_openelm.generation.compact_caches import cache_maker

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    drafter = make_drafter(DraftOptions(**drafting), loaded, tokenizer, offline, tuning)
    run_chat(
        console,
        folder,
        loaded,
        tokenizer,
        Sampling.from_defaults(folder.generation_defaults, sampling),
        template=prompt_options.template,
        system=prompt_options.system,
        adapter=optional_path(adapter_path),
        drafter=drafter,
        make_cache=cache_maker(folder.config, CacheOptions(**caching)),
        tuning=tuning,
        as_json=as_json,
    )
