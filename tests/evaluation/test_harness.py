"""Our model in lm-evaluation-harness, compared with the harness's PyTorch model."""

import contextlib
import json
import math
import resource
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from models import UNEVEN, as_torch, build, small_tokenizer, weights_of

from mlx_openelm.cli.views.evaluation import scores_json, to_csv
from mlx_openelm.errors import OpenELMError
from mlx_openelm.evaluation import harness_model
from mlx_openelm.evaluation.harness import open_tasks, run_resumable_task, run_task
from mlx_openelm.evaluation.harness_model import AnswerStore, wrap_model
from mlx_openelm.evaluation.multiple_choice import score_task
from mlx_openelm.evaluation.results import ModelCard, ModelScores, pair
from mlx_openelm.evaluation.scorer import OpenELMScorer
from mlx_openelm.evaluation.task_files import read_task

pytestmark = pytest.mark.interop
pytest.importorskip("lm_eval", reason="needs the extra `eval`")

tokenizer = small_tokenizer()
CHOICES = ["a king", "the wolf", "gold, more than you", "three daughters "]
RECORDS = [
    {
        "context": f"{'Once upon a time ' * (i % 4)}there was number {i}: who was it? ",
        "choices": CHOICES[: 2 + i % 3],
        "answer": i % 2,
        "text": "\n The eldest said: I love you" * (1 + i % 7),
    }
    for i in range(20)
]
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {test: FOLDER/records.json}
  cache_dir: FOLDER/cache
test_split: test
"""
METRIC = "- {{metric: {0}, aggregation: {1}, higher_is_better: true}}\n"
YAML = {
    "tales": """task: tales
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
"""
    + METRIC.format("acc", "mean")
    + METRIC.format("acc_norm", "mean"),
    "texts": """task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
"""
    + METRIC.format("word_perplexity", "weighted_perplexity")
    + METRIC.format("bits_per_byte", "bits_per_byte"),
    "written": """task: written
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: [".", "ai"], max_gen_toks: 12, do_sample: false}
metric_list:
"""
    + METRIC.format("exact_match", "mean"),
    "both": "group: both\ntask: [tales, again]\naggregate_metric_list:\n"
    "- {metric: acc, weight_by_size: true}\n",
    "again": """task: again
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
"""
    + METRIC.format("acc", "mean"),
    "middle": """task: middle
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
"""
    + METRIC.format("acc", "median"),
    "numberless": """task: numberless
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
process_results: !function code.score
metric_list:
"""
    + METRIC.format("numberless", "mean"),
    "late": """task: late
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices[answer + (context|length) // 50 * 9]}}"
metric_list:
"""
    + METRIC.format("acc", "mean"),
    "broken": """task: broken
output_type: multiple_choice
doc_to_text: "{{nothing}}"
doc_to_choice: "{{choices[7]}}"
doc_to_target: answer
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "records.json").write_text(json.dumps(RECORDS))
    for name, text in YAML.items():
        common = "" if text.startswith("group") else COMMON
        (folder / f"{name}.yaml").write_text(
            (text + common).replace("FOLDER", str(folder))
        )
    (folder / "code.py").write_text(
        "def score(doc, results):\n    return {'numberless': float('nan')}\n"
    )
    return folder


@pytest.fixture(scope="module")
def model():
    return build(UNEVEN)


@pytest.fixture(scope="module")
def theirs(converted):
    """lm-eval's HFLM around the PyTorch reference of the same weights."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer, PretrainedConfig

    from converters.reference import ReferenceOpenELM

    class Reference(torch.nn.Module):
        device = torch.device("cpu")
        config = PretrainedConfig()

        def __init__(self):
            super().__init__()
            self.reference = ReferenceOpenELM(UNEVEN)
            self.reference.load_state_dict(as_torch(weights_of(UNEVEN)))

        def tie_weights(self):
            pass

        def forward(self, input_ids):
            return SimpleNamespace(logits=self.reference(input_ids))

        @torch.no_grad()
        def generate(self, input_ids, max_length, stopping_criteria, **_):
            while input_ids.shape[1] < max_length:
                new = self.reference(input_ids)[:, -1:].argmax(-1)
                input_ids = torch.cat([input_ids, new], dim=1)
                stops = torch.as_tensor(stopping_criteria(input_ids, None))
                if new.item() == tokenizer.eos_id or stops.all():
                    break
            return input_ids

    def make(*, add_bos_token):
        return HFLM(
            pretrained=Reference(),
            tokenizer=AutoTokenizer.from_pretrained(converted / "model"),
            backend="causal",
            batch_size=1,
            max_length=UNEVEN.max_context_length,
            add_bos_token=add_bos_token,
        )

    return make


def answer(lm, kind, arguments):
    return getattr(lm, kind)([SimpleNamespace(args=args) for args in arguments])


def simple_evaluate(lm, folder, name):
    import lm_eval.evaluator

    lm_eval.evaluator.add_env_info = lambda results: None  # it takes seconds
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=[name], task_manager=manager)


# The PyTorch reference -----------------------------------------------------------


def test_log_likelihoods_equal_those_of_the_reference(model, theirs):
    pairs = [
        (record["context"].rstrip(i % 2 * " "), f" {choice}"[i % 2 :])
        for i, record in enumerate(RECORDS)
        for choice in record["choices"]
    ]
    pairs += [("", "gold"), ("wolf " * 40, "is there, said the wolf"), ("a ", " b")]
    greedy = "Once upon a time"
    for _ in range(3):  # the model's own greedy continuation
        logits = model(mx.array([tokenizer.encode(greedy)]))[0, -1]
        following = tokenizer.decode(
            [*tokenizer.encode(greedy), logits.argmax().item()]
        )
        pairs.append((greedy, following.removeprefix(greedy)))
        greedy = following
    ours = answer(wrap_model(OpenELMScorer(model, tokenizer)), "loglikelihood", pairs)
    expected = answer(theirs(add_bos_token=True), "loglikelihood", pairs)
    differences = [abs(a[0] - b[0]) for a, b in zip(ours, expected, strict=True)]
    assert max(differences) < 1e-3
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in ours)
    assert len({round(nats, 3) for nats, _ in ours}) > len(pairs) / 2


def test_scores_of_a_task_equal_those_of_the_reference(model, theirs, folder):
    ours = simple_evaluate(wrap_model(OpenELMScorer(model, tokenizer)), folder, "tales")
    expected = simple_evaluate(theirs(add_bos_token=True), folder, "tales")
    for key in ("acc,none", "acc_norm,none", "acc_stderr,none", "acc_norm_stderr,none"):
        assert ours["results"]["tales"][key] == expected["results"]["tales"][key], key
    assert 0 < ours["results"]["tales"]["acc,none"] < 1
    for a, b in zip(*(r["samples"]["tales"] for r in (ours, expected)), strict=True):
        assert a["arguments"] == b["arguments"]
        for ours, theirs_ in zip(a["filtered_resps"], b["filtered_resps"], strict=True):
            assert ours[0] == pytest.approx(theirs_[0], abs=1e-3)
            assert ours[1] == theirs_[1]


def test_rolling_log_likelihoods_equal_those_of_the_reference(model, theirs):
    texts = [(record["text"],) for record in RECORDS]
    texts += [("wolf " * n,) for n in (1, 31, 32, 33, 100)]
    ours = answer(
        wrap_model(OpenELMScorer(model, tokenizer)), "loglikelihood_rolling", texts
    )
    # With add_bos_token the harness would score BOS as well, after another BOS.
    expected = answer(theirs(add_bos_token=False), "loglikelihood_rolling", texts)
    longest = max(len(tokenizer.encode(text)) for (text,) in texts)
    assert longest > 2 * UNEVEN.max_context_length
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


def test_greedy_texts_equal_those_of_the_reference(model, theirs):
    settings = {"until": [".", "s"], "max_gen_toks": 14, "do_sample": False}
    prompts = [
        (record["context"] * (1 + i), settings) for i, record in enumerate(RECORDS)
    ]
    prompts = [*prompts[:6], ("Once", {"until": [], "max_gen_toks": 20})]
    reference = theirs(add_bos_token=True)
    # transformers decodes each byte of an invalid UTF-8 sequence to its own U+FFFD.
    decode = reference.tok_decode
    reference.tok_decode = lambda ids, **options: (
        tokenizer.decode(ids) if isinstance(ids, list) else decode(ids, **options)
    )
    ours = answer(
        wrap_model(OpenELMScorer(model, tokenizer, batch_size=4)),
        "generate_until",
        prompts,
    )
    expected = answer(reference, "generate_until", prompts)
    # The decoder drops a text's first space; a continuation keeps it.
    assert [text.lstrip() for text in ours] == [text.lstrip() for text in expected]
    assert len({*ours}) > 2
    assert not any("s" in text for text in ours[:-1])


def test_a_local_file_and_the_harness_agree(model, folder, tmp_path):
    ours = score_task(
        OpenELMScorer(model, tokenizer), read_task(folder / "records.json")
    )
    (task,) = open_tasks([("tales", None)], include_path=folder)
    (result,) = run_task(wrap_model(OpenELMScorer(model, tokenizer)), task, limit=None)
    assert result.metrics["acc"].value == ours.score.acc
    assert result.metrics["acc_norm"].value == ours.score.acc_norm
    assert result.metrics["acc"].stderr == pytest.approx(ours.score.stderr)
    assert result.metrics["acc_norm"].stderr == pytest.approx(
        ours.score.acc_norm_stderr
    )


# Results -------------------------------------------------------------------------


def test_results_equal_the_harness_s_own(model, folder):
    lm = wrap_model(OpenELMScorer(model, tokenizer))
    for task in open_tasks([("tales", 3), ("texts", None)], include_path=folder):
        (result,) = run_task(lm, task, limit=7)
        assert (result.task, result.n, result.total) == (task.name, 7, 20)
        assert result.num_fewshot == (task.num_fewshot or 0)
    whole = simple_evaluate(lm, folder, "texts")["results"]["texts"]
    (task,) = open_tasks([("texts", None)], include_path=folder)
    (result,) = run_task(lm, task, limit=None)
    value = result.metrics["word_perplexity"]
    assert value.value == pytest.approx(whole["word_perplexity,none"])
    assert value.values == ()
    (task,) = open_tasks([("middle", None)], include_path=folder)
    (result,) = run_task(lm, task, limit=None)
    assert result.metrics["acc"].value in (0, 1)
    assert result.metrics["acc"].values == ()  # it is not a mean of its questions


def test_a_nan_metric_is_null_and_not_compared(model, folder):
    (task,) = open_tasks([("numberless", None)], include_path=folder)
    results = run_task(wrap_model(OpenELMScorer(model, tokenizer)), task, limit=3)
    assert math.isnan(results[0].metrics["numberless"].value)
    assert pair(results, results) == ()
    scores = [ModelScores(ModelCard(name, "OpenELM"), None, results) for name in "ab"]
    text = json.dumps(scores_json(scores, None), allow_nan=False)
    metric = json.loads(text)["tasks"]["numberless"]["metrics"]["numberless"]
    assert metric == {"value": None, "stderr": None}
    assert to_csv(scores, None).count("numberless,numberless,0,3,nan,nan,,,,") == 2


def test_few_shot_examples_precede_a_question(model, folder):
    seen = []
    lm = wrap_model(OpenELMScorer(model, tokenizer))
    score = lm.loglikelihood
    lm.loglikelihood = lambda requests: [seen.extend(requests), score(requests)][1]
    (task,) = open_tasks([("tales", 2)], include_path=folder)
    run_task(lm, task, limit=1)
    assert all(request.args[0].count("who was it?") == 3 for request in seen)


def test_a_group_is_one_result_of_all_its_questions(model, folder):
    lm = wrap_model(OpenELMScorer(model, tokenizer))
    both, tales, again = (
        run_task(lm, task, limit=5)[0]
        for task in open_tasks(
            [("both", None), ("tales", None), ("again", None)], include_path=folder
        )
    )
    assert (both.n, both.total) == (10, 40)
    expected = (tales.metrics["acc"].value + again.metrics["acc"].value) / 2
    assert both.metrics["acc"].value == pytest.approx(expected)
    assert sorted(both.metrics["acc"].values) == sorted(
        tales.metrics["acc"].values + again.metrics["acc"].values
    )


def test_only_the_callback_may_print(model, folder, capfd):
    (task,) = open_tasks([("tales", None)], include_path=folder)
    progress = []

    def report(done, total):
        progress.append((done, total))
        if done == 3:
            sys.stderr.write("three")

    run_task(
        wrap_model(OpenELMScorer(model, tokenizer), on_progress=report),
        task,
        limit=None,
    )
    requests = sum(len(record["choices"]) for record in RECORDS)
    assert progress == [(i, requests) for i in range(requests + 1)]
    assert capfd.readouterr() == ("", "three")


# Resuming ------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", ["tales", "written"])
def test_a_stopped_task_resumes_with_its_answers(model, folder, tmp_path, name):
    (task,) = open_tasks([(name, None)], include_path=folder)
    (expected,) = run_task(
        wrap_model(OpenELMScorer(model, tokenizer)), task, limit=None
    )

    def stop(at, done):
        if done == at:
            raise Killed

    def run(**options):
        return run_resumable_task(
            OpenELMScorer(model, tokenizer), task, tmp_path, limit=None, **options
        )

    kept = tmp_path / f"{name}.answers.jsonl"
    for at in (6, 9):
        with pytest.raises(Killed):
            run(on_progress=lambda done, total, at=at: stop(at, done))
        with kept.open("ab") as file:
            file.write(kept.read_bytes()[:30])  # an incomplete line
    progress = []
    (result,) = run(on_progress=lambda *at: progress.append(at))
    assert progress[0][0] == 9
    assert result == expected
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{name}.json", f"{name}.answers.jsonl"}
    progress.clear()
    assert run(on_progress=lambda *at: progress.append(at)) == (expected,)
    assert progress == []  # it was done


def test_scores_of_another_model_are_not_reused(model, folder, tmp_path):
    (task,) = open_tasks([("tales", None)], include_path=folder)
    run_resumable_task(OpenELMScorer(model, tokenizer), task, tmp_path, limit=3)
    other = build(UNEVEN, seed=1)
    for limit in (3, 4):
        with pytest.raises(OpenELMError, match=r"other settings; .* `force`"):
            run_resumable_task(
                OpenELMScorer(other, tokenizer), task, tmp_path, limit=limit
            )
    (replaced,) = run_resumable_task(
        OpenELMScorer(other, tokenizer), task, tmp_path, limit=3, force=True
    )
    (fresh,) = run_task(wrap_model(OpenELMScorer(other, tokenizer)), task, limit=3)
    assert replaced == fresh


@pytest.mark.parametrize("name", ["tales", "written"])
def test_answers_of_another_limit_are_taken_over(model, folder, tmp_path, name):
    (task,) = open_tasks([(name, None)], include_path=folder)
    scorer = OpenELMScorer(model, tokenizer)

    def run(limit):
        seen = []
        result = run_resumable_task(
            *(scorer, task, tmp_path),
            limit=limit,
            on_progress=lambda *at: seen.append(at),
        )
        return result, seen

    run(6)
    larger, seen = run(9)
    first = len(RECORDS[0]["choices"]) if name == "tales" else 1
    assert seen[0][0] > 6 * first - 1  # the answers of six questions were kept
    assert larger == run_task(wrap_model(scorer), task, limit=9)
    smaller, seen = run(6)
    assert seen == [(seen[0][1], seen[0][1])]  # no request was answered
    assert smaller == run_task(wrap_model(scorer), task, limit=6)
    whole, _ = run(None)
    assert whole == run_task(wrap_model(scorer), task, limit=None)


def test_scores_of_other_questions_are_not_reused(model, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    common = COMMON.replace("FOLDER", str(tmp_path))
    (tmp_path / "tales.yaml").write_text(YAML["tales"] + common)

    def run(records):
        (tmp_path / "records.json").write_text(json.dumps(records))
        (task,) = open_tasks([("tales", None)], include_path=tmp_path)
        return run_resumable_task(
            OpenELMScorer(model, tokenizer), task, kept, limit=None
        )

    (first,) = run(RECORDS)
    assert run(RECORDS) == (first,)
    with pytest.raises(OpenELMError, match=r"other settings; .* `force`"):
        run([record | {"answer": 1 - record["answer"]} for record in RECORDS])
    (tmp_path / "tales.yaml").write_text(
        YAML["tales"].replace("{{context}}", "{{context}}?") + common
    )
    with pytest.raises(OpenELMError, match=r"other settings; .* `force`"):
        run(RECORDS)


def test_a_full_disk_is_reported_as_a_write_error(model, folder, tmp_path):
    (task,) = open_tasks([("tales", None)], include_path=folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OpenELMError) as caught:
            run_resumable_task(
                OpenELMScorer(model, tokenizer), task, tmp_path, limit=None
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = tmp_path / "tales.answers.jsonl"
    message = f"In the task tales: Cannot write {kept}: File too large. The answers"
    assert str(caught.value).startswith(message)
    assert kept.stat().st_size == 1000
    progress = []
    run_resumable_task(
        *(OpenELMScorer(model, tokenizer), task, tmp_path),
        limit=None,
        on_progress=lambda *at: progress.append(at),
    )
    assert progress[0][0] > 3


def test_sampled_answers_do_not_depend_on_the_batch(model, tmp_path):
    settings = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    prompts = [("Once upon", settings)] * 5
    one, five = (
        answer(
            wrap_model(OpenELMScorer(model, tokenizer, batch_size=n)),
            "generate_until",
            prompts,
        )
        for n in (1, 5)
    )
    assert one == five
    assert len(set(one)) > 1
    with contextlib.suppress(Killed), AnswerStore(tmp_path / "store", {}) as store:
        answer(
            wrap_model(OpenELMScorer(model, tokenizer), store=store),
            "generate_until",
            prompts[:3],
        )
        raise Killed
    with AnswerStore(tmp_path / "store", {}) as store:
        lm = wrap_model(OpenELMScorer(model, tokenizer), store=store)
        again = answer(lm, "generate_until", prompts)
    assert again == one


# Bad input -----------------------------------------------------------------------


def test_the_closest_names_of_an_unknown_task_are_reported(folder, monkeypatch):
    from lm_eval import tasks

    own = tasks.TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda **options: own)  # all take seconds
    with pytest.raises(
        OpenELMError, match=r"nor a task of the harness; closest are tales"
    ):
        open_tasks([("talez", None)], include_path=folder)


def test_a_task_that_needs_the_network_is_reported(tmp_path):
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: org/far-away\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_target: 0\n"
    )
    message = r"task far are not on this machine.*'org/far-away'.*choose another task\."
    with pytest.raises(OpenELMError, match=message):
        open_tasks([("far", None)], include_path=tmp_path, offline=True)


def test_a_broken_task_is_one_sentence(model, folder):
    with pytest.raises(OpenELMError, match=r"cannot load the task broken: .*\.$"):
        open_tasks([("broken", None)], include_path=folder)
    (task,) = open_tasks([("late", None)], include_path=folder)
    with pytest.raises(OpenELMError, match=r"fails in the task late: .*\.$"):
        run_task(wrap_model(OpenELMScorer(model, tokenizer)), task, limit=None)


def test_more_new_tokens_than_the_context_holds_are_refused(model):
    settings = {"until": [], "max_gen_toks": UNEVEN.max_context_length}
    with pytest.raises(OpenELMError, match="context is 64"):
        answer(
            wrap_model(OpenELMScorer(model, tokenizer)),
            "generate_until",
            [("Once", settings)],
        )


def test_invalid_settings_of_a_task_are_reported(model, folder):
    (folder / "odd.yaml").write_text(
        (YAML["written"] + COMMON)
        .replace("FOLDER", str(folder))
        .replace("task: written", "task: odd")
        .replace("do_sample: false", "do_sample: true, temperature: 1.0, top_p: 7")
    )
    (task,) = open_tasks([("odd", None)], include_path=folder)
    with pytest.raises(
        OpenELMError, match=r"task odd: .*generation_kwargs.*top_p` is 7"
    ):
        run_task(wrap_model(OpenELMScorer(model, tokenizer)), task, limit=1)


def test_a_missing_harness_is_reported(monkeypatch):
    monkeypatch.setattr(harness_model, "find_spec", lambda name: None)
    with pytest.raises(OpenELMError, match=r"pip install 'mlx-openelm\[eval\]'\.$"):
        open_tasks([("arc_easy", None)])
