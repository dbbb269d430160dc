"""Models other than OpenELM: what stock mlx-lm opens, and hf:NAME, beside ours."""

import json
import sys

import numpy as np
import pytest
from commands import call, expect_error
from models import TEXT, UNEVEN, small_tokenizer, weights_of, write_hugging_face

from mlx_openelm.config import OpenELMConfig
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation import other_models
from mlx_openelm.evaluation.harness_model import wrap_model
from mlx_openelm.evaluation.other_models import is_other_model, open_scorer
from mlx_openelm.evaluation.scorer import OpenELMScorer
from mlx_openelm.storage.loading import load
from mlx_openelm.storage.tokenizer_finder import write_tokenizer

pytestmark = pytest.mark.interop
torch = pytest.importorskip("torch", reason="needs PyTorch")
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

PAIRS = [
    ("Once upon a time there was a king", " who had gold"),
    ("Once upon a time there was a king", " who wept"),
    ("Once upon a time there was a king ", "and a wolf"),
    ("", "the wolf is there"),
    ("said the old woman; " * 30, "the wolf"),  # longer than the context
    ("Once", " upon a time there was"),
]
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = list(dict.fromkeys(TEXT.split()))[:30]
RECORDS = [
    {
        "question": f"Who said {word}?",
        "choices": [WORDS[(i + step) % len(WORDS)] for step in (1, 5, 8)],
        "answer": i % 3,
    }
    for i, word in enumerate(WORDS)
]


def write_model(folder, kind, seed=3):
    """Write a small random model of transformers, with our small tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

    configs = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "olmo": (OlmoConfig, OlmoForCausalLM),
    }
    config, model = configs[kind]
    torch.manual_seed(seed)
    made = model(config(**SIZES, initializer_range=0.3))
    made.save_pretrained(folder)
    write_tokenizer(small_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama", "llama")
    write_model(folder / "OLMo-1B-hf", "olmo")
    write_hugging_face(folder / "OpenELM-1_1B", UNEVEN, weights_of(UNEVEN))
    write_tokenizer(small_tokenizer(), folder / "OpenELM-1_1B")
    (folder / "tales.json").write_text(json.dumps(RECORDS))
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def work(folders, monkeypatch):
    monkeypatch.chdir(folders)
    return folders


def harness_answers(folder, kind, requests):
    """The answers of the harness's own model, in float32."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(
        pretrained=str(folder),
        device="cpu",
        dtype="float32",
        add_bos_token=kind != "loglikelihood_rolling",  # it would score BOS too
    )
    instances = [
        Instance(request_type=kind, doc={}, arguments=request, idx=i)
        for i, request in enumerate(requests)
    ]
    return getattr(theirs, kind)(instances, disable_tqdm=True)


# Scorers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "hf:llama", "hf:OLMo-1B-hf"])
def test_log_likelihoods_are_those_of_the_harness(work, name):
    scorer = open_scorer(name)
    answers = dict(scorer.score(dict(enumerate(PAIRS))))
    expected = harness_answers(name.removeprefix("hf:"), "loglikelihood", PAIRS)
    for i, (nats, greedy) in enumerate(expected):
        assert answers[i] == (pytest.approx(nats, abs=2e-4), greedy), PAIRS[i]
    texts = [(TEXT[:300],), ("the wolf",)]
    sums = dict(scorer.score_texts(dict(enumerate(texts))))
    rolling = harness_answers(name.removeprefix("hf:"), "loglikelihood_rolling", texts)
    np.testing.assert_allclose([sums[0], sums[1]], rolling, rtol=1e-4)
    assert scorer.count_tokens("the wolf") == len(
        small_tokenizer().encode("the wolf", bos=False)
    )


@pytest.mark.parametrize("name", ["llama", "hf:llama"])
def test_greedy_texts_are_those_of_the_harness(work, name):
    settings = {"until": ["a"], "max_gen_toks": 8, "do_sample": False}
    prompts = [("Once upon a time", settings), ("The eldest said:", settings)]
    generated = dict(open_scorer(name).generate(dict(enumerate(prompts))))
    expected = harness_answers("llama", "generate_until", prompts)
    assert [generated[0], generated[1]] == expected


def test_our_model_and_a_llama_get_the_same_requests(work, monkeypatch):
    from lm_eval.api.instance import Instance

    instances = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(PAIRS)
    ]
    for scorer in (OpenELMScorer(*load("OpenELM-1_1B")), open_scorer("llama")):
        seen = []
        real = scorer.score
        monkeypatch.setattr(
            scorer,
            "score",
            lambda pairs, r=real, s=seen: [s.append(pairs), r(pairs)][1],
        )
        wrap_model(scorer).loglikelihood(instances)
        assert seen == [dict(enumerate(PAIRS))]


def test_the_key_changes_with_the_weights(work, tmp_path):
    assert open_scorer("llama").key == open_scorer("llama").key
    other = write_model(tmp_path / "other", "llama", seed=4)
    for kind in ("", "hf:"):
        assert open_scorer(f"{kind}{other}").key != open_scorer(f"{kind}llama").key


def test_models_are_told_apart(work):
    assert not is_other_model("OpenELM-1_1B")
    assert not is_other_model("demo")
    assert is_other_model("llama")
    assert is_other_model("hf:anything/at-all")


# The command ---------------------------------------------------------------------


def scores_of(*args):
    result = call("evaluate", *args, "--json")
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def test_the_comparison_of_the_paper_on_made_models(work, monkeypatch):
    """OpenELM 1.1B 45.93 with 1.5T tokens, OLMo 43.57 with 3.0T: +2.36."""
    monkeypatch.setattr(
        OpenELMConfig, "size_name", property(lambda self: "OpenELM-1_1B")
    )
    own = work / "own"
    own.mkdir(exist_ok=True)
    for name in ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande"):
        (own / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {work}/tales.json}}, "
            f"cache_dir: {work}/cache}}\n"
            "test_split: test\noutput_type: multiple_choice\n"
            'doc_to_text: "Question: {{question}}\\nAnswer:"\n'
            'doc_to_choice: "{{choices}}"\ndoc_to_target: answer\nmetric_list:\n'
            "- {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "- {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
        )
    args = (
        *("--suite", "openllm", "--include-path", own, "--limit", "4"),
        *("--model", "hf:OLMo-1B-hf", "--compare", "OpenELM-1_1B"),
    )
    shown = call("evaluate", *args)
    assert shown.exit_code == 0, (shown.stderr, shown.exception)
    assert "OpenELM-1_1B minus hf:OLMo-1B-hf" in shown.stdout
    assert "+2.36" in shown.stdout
    assert (
        "Published: OLMo 1.18B of 3.0T training tokens, average 43.57" in shown.stdout
    )
    assert "Published: OpenELM-1_1B of 1.5T training tokens, average 45.93" in (
        shown.stdout
    )
    assert "OLMo 1.18B (arXiv 2404.14619, table 4, from memory, UNVERIFIED" in (
        " ".join(shown.stdout.split())
    )
    (comparison,) = scores_of(*args)["suite"]["comparisons"]
    by_column = {one["column"]: one for one in comparison["differences"]}
    assert by_column["average"]["published"] == pytest.approx(2.36)
    assert by_column["ARC-c"]["published"] == pytest.approx(36.69 - 34.47)
    columns = [one for name, one in by_column.items() if name != "average"]
    assert by_column["average"]["value"] == pytest.approx(
        np.mean([one["value"] for one in columns])
    )
    assert by_column["average"]["stderr"] == pytest.approx(
        np.hypot.reduce([one["stderr"] for one in columns]) / 5
    )


def test_the_differences_are_paired_and_resumed(work, tmp_path, monkeypatch):
    args = (
        *("--model", "OpenELM-1_1B", "--tasks", "tales.json"),
        *("--compare", "llama", "--compare", "hf:llama", "--output", tmp_path / "kept"),
    )
    result = call("evaluate", *args, "--json", "--quiet")
    scores = json.loads(result.stdout)
    assert result.stderr == ""
    mlx, torchs = (scores["models"][i]["tasks"]["tales"] for i in (1, 2))
    assert [m["model"] for m in scores["models"]] == [
        *("OpenELM-1_1B", "llama", "hf:llama")
    ]
    assert (mlx["acc"], mlx["acc_norm"]) == (torchs["acc"], torchs["acc_norm"])
    differences = [d for d in scores["differences"] if d["metric"] == "acc"]
    for entry in differences:
        expected = mlx["acc"] - scores["tasks"]["tales"]["acc"]
        assert entry["value"] == pytest.approx(expected)
        assert entry["stderr"] > 0
    kept = {p.parent.name for p in (tmp_path / "kept").rglob("tales.jsonl")}
    assert kept == {"OpenELM-1_1B", "llama", "hf_llama"}

    def fail(*args):
        raise AssertionError("the answers were saved")

    for kind in ("_MLXScorer", "_HarnessScorer"):
        monkeypatch.setattr(getattr(other_models, kind), "score", fail)
    assert scores_of(*args) == scores


def test_texts_have_bits_per_byte_of_every_model(work):
    scores = scores_of(
        *("--model", "OpenELM-1_1B", "--text", "text.txt"),
        *("--compare", "llama", "--compare", "hf:llama"),
    )
    _, mlx, torchs = scores["models"]
    assert mlx["bits_per_byte"] == pytest.approx(torchs["bits_per_byte"], rel=1e-4)
    (total,) = harness_answers("llama", "loglikelihood_rolling", [(TEXT,)])
    expected = -total / np.log(2) / len(TEXT.encode())
    assert mlx["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


# Errors --------------------------------------------------------------------------


def test_the_exit_of_mlx_lms_olmo_is_an_error(work, tmp_path, monkeypatch):
    args = ("evaluate", "--model", "OLMo-1B-hf", "--tasks", "tales.json", "--quiet")
    monkeypatch.delitem(sys.modules, "mlx_lm.models.olmo", raising=False)
    expect_error(
        *(work, *args),
        message=[
            "mlx-lm cannot load OLMo-1B-hf: a package is missing",
            "; hf:OLMo-1B-hf loads it with PyTorch",
        ],
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:./nowhere", "There is no folder ./nowhere"),
        ("hf:", "There is no folder without a name"),
        ("hf:nobody/nothing", "The model hf:nobody/nothing cannot be loaded"),
    ],
)
def test_a_model_that_is_not_there_is_one_sentence(work, name, message):
    args = ("evaluate", "--model", name, "--tasks", "tales.json", "--limit", "2")
    result = call(*args, "--quiet")
    assert (result.exit_code, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_what_cannot_be_a_model_is_named_before_one_is_scored(work, tmp_path):
    for name, content in (("empty", None), ("bare", {}), ("torch", {})):
        (tmp_path / name).mkdir()
        if content is not None:
            config = tmp_path / name / "config.json"
            config.write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "torch" / "pytorch_model.bin").write_bytes(b"")
    args = ("evaluate", "--model", "OpenELM-1_1B", "--tasks", "tales.json")
    torchs = tmp_path / "torch"
    for name, message in (
        (f"hf:{tmp_path}/empty", f"{tmp_path}/empty is not a model folder"),
        ("hf:tales.json", "tales.json is not a model folder"),
        (tmp_path / "bare", "bare has no model*.safetensors"),
        (torchs, f"it has no model*.safetensors; hf:{torchs} loads it"),
    ):
        expect_error(work, *args, "--compare", name, "--quiet", message=message)


def test_missing_torch_is_named(work, monkeypatch):
    monkeypatch.setattr(other_models, "find_spec", lambda name: None)
    message = "pip install 'mlx-openelm[eval,torch]'"
    args = ("--tasks", "tales.json", "--compare", "hf:llama")
    expect_error(work, "evaluate", "--model", "OpenELM-1_1B", *args, message=message)


def test_a_tokenizer_of_more_tokens_than_the_model_is_an_error(work, tmp_path):
    """MLX does not check indices: the score would be of other memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 64}))
    made.save_pretrained(tmp_path)
    write_tokenizer(small_tokenizer(), tmp_path)
    with pytest.raises(OpenELMError, match="but the model only 64 rows"):
        dict(open_scorer(str(tmp_path)).score(dict(enumerate(PAIRS))))
