"""Model cards: the README.md of a folder, as the Hugging Face Hub shows it."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_openelm.mapping_files import read_mapping
from mlx_openelm.storage.hub import DEMO, HUB_ID, RELEASED, demo_folder
from mlx_openelm.storage.model_folder import METADATA_KEY
from mlx_openelm.storage.weight_files import CONFIG
from mlx_openelm.version import __version__

FOLDER = "THIS_FOLDER"  # stands for the path or the Hub id in the commands of a card

CARD = "README.md"

_APPLE = (
    "The weights are Apple's, or derived from them, and have Apple's licence (the file "
    "LICENSE of https://huggingface.co/apple/OpenELM)."
)
_UNKNOWN = (
    "The licence is that of the source. Weights of Apple's OpenELM, or derived from "
    "them, have Apple's licence (the file LICENSE of "
    "https://huggingface.co/apple/OpenELM)."
)
_DEMO = "Apache License 2.0, as mlx-openelm, whose demo model this is derived from."


def model_card(
    metadata: Mapping[str, Any],
    facts: Sequence[str],
    *,
    library: str,
    template: bool,
    tools: Mapping[str, object],
) -> str:
    """Return the card of a model folder, which is `FOLDER` in it.

    Args:
        metadata: the mlx-openelm entry of its config.
        facts: sentences about the model.
        library: mlx or transformers, by the folder's layout.
        template: it has a chat template.
        tools: whether other tools open it, by name.
    """
    path, source = FOLDER, metadata.get("source", {})
    commands = [f"mlx-openelm generate --model {path} --prompt 'Once upon a time'"]
    if library == "transformers":
        use = {"mlx-openelm": commands, "transformers (5.4 or newer)": _load(path)}
    elif template:
        use = {
            "mlx-openelm": [f"mlx-openelm chat --model {path}"],
            "mlx-lm": [f"mlx_lm.chat --model {path}"],
        }
    else:
        generate = f"mlx_lm.generate --model {path} --prompt 'Once upon a time'"
        use = {"mlx-openelm": commands, "mlx-lm": [generate]}
    return _render(
        {"library_name": library, "pipeline_tag": "text-generation"},
        str(source.get("name", "OpenELM")),
        source,
        facts,
        use,
        tools,
    )


def adapter_card(raw: Mapping[str, Any], metadata: Mapping[str, Any], repo: str) -> str:
    """Return the card of an adapter folder.

    Args:
        raw: its adapter_config.json, of PEFT or of mlx-lm.
        metadata: the mlx-openelm entry of it.
        repo: its Hub id.
    """
    base = raw.get("base_model_name_or_path", raw.get("model"))
    on_hub = isinstance(base, str) and HUB_ID.fullmatch(base) is not None
    model = base if on_hub else "BASE"
    name = base if on_hub or not isinstance(base, str) else Path(base).name
    facts = [f"An adapter of {name}." if name else "An adapter; its base is unknown."]
    prompt = "--prompt 'Once upon a time'"
    if "peft_type" in raw:
        facts.append(f"{raw['peft_type']} of PEFT, rank {raw.get('r')}.")
        use = {
            "PEFT": [
                *_load(str(model)),
                "from peft import PeftModel",
                f'model = PeftModel.from_pretrained(model, "{repo}")',
            ],
            "mlx-openelm": [f"mlx-openelm convert {repo} --mlx-path adapter"],
        }
    else:
        factors = raw.get("lora_parameters") or {}
        method = raw.get("fine_tune_type", "lora")
        facts.append(
            "All weights, fine-tuned."
            if method == "full"
            else f"{method}, rank {factors.get('rank')}, scale {factors.get('scale')}."
        )
        options = f"--model {model} --adapter-path {repo} {prompt}"
        use = {
            "mlx-openelm": [f"mlx-openelm generate {options}"],
            "mlx-lm": [
                f"hf download {repo} --local-dir adapter",
                f"mlx_lm.generate --model {model} --adapter-path adapter {prompt}",
            ],
        }
    header = {"library_name": "peft" if "peft_type" in raw else "mlx"}
    source = dict(metadata.get("source") or {})
    if on_hub:
        header["base_model"] = str(base)
        header["base_model_relation"] = "adapter"
        source.setdefault("repo", base)
    if base == DEMO:
        source.setdefault("was", {"source": _demo_source()})
    source.setdefault("name", name)
    return _render(header, repo, source, facts, use)


def _load(path: str) -> list[str]:
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{path}", '
        "trust_remote_code=True)",
        f'tokenizer = AutoTokenizer.from_pretrained("{path}", trust_remote_code=True)',
    ]


def _render(
    header: Mapping[str, str],
    title: str,
    source: Mapping[str, Any],
    facts: Sequence[str],
    use: Mapping[str, Sequence[str]],
    tools: Mapping[str, object] | None = None,
) -> str:
    repo = source.get("repo")
    licence, note = _licence(source)
    front = dict(header)
    if licence:
        front["license"] = licence
    if isinstance(repo, str) and HUB_ID.fullmatch(repo):
        front.setdefault("base_model", repo)
    origin = ""
    if source.get("kind"):
        commit = (
            f", commit {source['revision']}" if repo and "revision" in source else ""
        )
        name = repo or source.get("address") or source.get("name")
        origin = (
            f"Written by mlx-openelm {__version__} from {name} "
            f"({source['kind']}{commit}). Hashes of the source files are in the config."
        )
    lines = [
        "---",
        *(f"{key}: {value}" for key, value in front.items()),
        f"tags:\n- {header['library_name']}\n- openelm",
        "---",
        "",
        f"# {title}",
        "",
        *([origin, ""] if origin else []),
        *(f"- {fact}" for fact in facts),
        "",
        "## Use",
    ]
    for tool, commands in use.items():
        lines += ["", f"With {tool}:", "", *(f"    {command}" for command in commands)]
    if tools:
        lines += ["", "Opens in:", ""]
        lines += [f"- {tool}: {opens}" for tool, opens in tools.items()]
    return "\n".join([*lines, "", "## Licence", "", note, ""])


def _licence(source: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the Hub's identifier of the licence, if it is certain, and a sentence."""
    origins = list(_origins(source))
    names = {str(o.get(key)) for o in origins for key in ("repo", "name")}
    hosts = {urlsplit(str(o.get("address", ""))).hostname for o in origins}
    released = {*RELEASED, *(name.partition("/")[2] for name in RELEASED)}
    if names & released or "docs-assets.developer.apple.com" in hosts:
        return "apple-amlr", _APPLE
    if _demo_source()["files"] in [o.get("files") for o in origins]:
        return "apache-2.0", _DEMO
    return None, _UNKNOWN


def _demo_source() -> Mapping[str, Any]:
    """Return the source of the demo model, which all that derives from it names."""
    source = read_mapping(demo_folder() / CONFIG)[METADATA_KEY]["source"]
    assert isinstance(source, dict)
    return source


def _origins(source: object) -> Iterator[Mapping[str, Any]]:
    """Return the source of a folder, the source's own source, and so on."""
    while isinstance(source, dict):
        yield source
        was = source.get("was")
        source = was.get("source") if isinstance(was, dict) else None
