"""Tokenizers with more tokens than the model has rows, in models of transformers."""

import json

import pytest
from commands import call
from models import TEXT, small_tokenizer

from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation.other_models import open_scorer
from mlx_openelm.storage.tokenizer_finder import write_tokenizer

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

KINDS = ("", "hf:")  # mlx-lm and PyTorch
SETTINGS = {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False}
PROMPTS = [("Once upon a time", SETTINGS), ("The old king said", SETTINGS)]
MESSAGE = r"has the token \d+, but the model only 64 rows"


def write_llama(folder, rows):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(small_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model whose tokenizer has 300 tokens and whose embedding has 64 rows."""
    return write_llama(tmp_path_factory.mktemp("models") / "small", 64)


def call_scorer(scorer, kind):
    match kind:
        case "pairs":
            pairs = {0: ("Once upon a time there was a king", " who had gold")}
            return dict(scorer.score(pairs))
        case "texts":
            return dict(scorer.score_texts({0: (TEXT[:200],)}))
    return dict(scorer.generate(dict(enumerate(PROMPTS))))


@pytest.mark.parametrize("kind", ["pairs", "texts", "prompts"])
@pytest.mark.parametrize("prefix", KINDS)
def test_a_token_that_the_model_lacks_is_an_error(small, prefix, kind):
    scorer = open_scorer(f"{prefix}{small}")
    with pytest.raises(OpenELMError, match=MESSAGE):
        call_scorer(scorer, kind)


@pytest.mark.parametrize("prefix", KINDS)
def test_the_command_names_the_model(small, tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(small.parent)
    record = {"question": "Who?", "choices": ["the king", "the wolf"], "answer": 0}
    (tmp_path / "tales.json").write_text(json.dumps([record]))
    message = [f"error: {prefix}small: ", "they do not belong together."]
    args = ("evaluate", "--tasks", tmp_path / "tales.json", "--quiet")
    result = call(*args, "--compare", f"{prefix}small")  # shows the demo's scores
    assert result.exit_code == 1
    for words in message:
        assert words in result.stderr.splitlines()[-1]


@pytest.fixture
def with_padding_token(tmp_path):
    """A model whose tokenizer has a token for padding that the embedding lacks."""
    folder = write_llama(tmp_path / "padded", 300)
    description = json.loads((folder / "tokenizer.json").read_text())
    added = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    token = {"id": 300, "content": "[PAD]", "special": True, **added}
    description["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["pad_token"] = "[PAD]"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_padding_token_that_the_model_lacks_changes_no_answer(
    with_padding_token, tmp_path
):
    expected = open_scorer(f"hf:{write_llama(tmp_path / 'plain', 300)}")
    scorer = open_scorer(f"hf:{with_padding_token}")
    for kind in ("pairs", "texts", "prompts"):
        assert call_scorer(scorer, kind) == call_scorer(expected, kind)


def test_a_failure_of_the_model_s_code_is_one_sentence(small, monkeypatch):
    scorer = open_scorer(f"hf:{small}")
    monkeypatch.setattr(type(scorer), "_check_tokens", lambda self, requests: None)
    with pytest.raises(OpenELMError, match=r"^The model hf:.* failed: IndexError, "):
        call_scorer(scorer, "pairs")
