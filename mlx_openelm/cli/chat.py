"""The command that holds a conversation: `chat`."""

from mlx_openelm.cli.console import Console
from mlx_openelm.cli.decoding_options import (
    Bias,
    DraftModel,
    KvBits,
    KvGroupSize,
    Lookup,
    MaxTokens,
    MinP,
    MinTokens,
    NoRepeat,
    Penalty,
    PenaltyContext,
    StopLoops,
    StopText,
    System,
    Temp,
    Template,
    TopK,
    TopP,
    check_utf8,
    make_drafter,
    read_sampling_options,
)
from mlx_openelm.cli.options import (
    Adapter,
    Json,
    Model,
    Offline,
    Quiet,
    Seed,
    expand_path,
    open_model,
)


def chat_command(
    model: Model = None,
    adapter_path: Adapter = None,
    max_tokens: MaxTokens = None,
    min_tokens: MinTokens = None,
    temp: Temp = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = None,
    repetition_context: PenaltyContext = None,
    no_repeat_ngram: NoRepeat = None,
    logit_bias: Bias = None,
    stop: StopText = None,
    stop_loops: StopLoops = None,
    template: Template = "auto",
    system: System = "",
    lookup: Lookup = None,
    draft_model: DraftModel = None,
    kv_bits: KvBits = None,
    kv_group_size: KvGroupSize = 64,
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    offline: Offline = False,
) -> None:
    """Hold a conversation. Piped lines are messages; stdout has the answers only."""
    console = Console(quiet=quiet)
    said = read_sampling_options(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context=repetition_context,
        no_repeat_ngram=no_repeat_ngram,
        logit_bias=logit_bias,
        stop=stop,
        stop_loops=stop_loops,
        seed=seed,
    )
    check_utf8(system, *(stop or ()))
    from mlx_openelm.cli.chat_session import run_chat
    from mlx_openelm.generation.compact_caches import cache_maker
    from mlx_openelm.generation.sampling import Sampling

    folder, loaded, tokenizer = open_model(console, model, adapter_path, offline)
    drafter = make_drafter(lookup, draft_model, loaded, tokenizer, offline)
    run_chat(
        console,
        folder,
        loaded,
        tokenizer,
        Sampling.from_defaults(folder.generation_defaults, said),
        template=template,
        system=system,
        adapter=expand_path(adapter_path),
        drafter=drafter,
        make_cache=cache_maker(
            folder.config, kv_bits=kv_bits, kv_group_size=kv_group_size
        ),
        as_json=as_json,
    )
