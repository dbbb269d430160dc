"""The published recipes on made corpora in their 13 layouts."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import call
from models import TEXT, small_tokenizer

torch = pytest.importorskip("torch", reason="needs PyTorch")
pyarrow = pytest.importorskip("pyarrow", reason="needs the torch extra")

from pretrainings import read_losses, small_recipe  # noqa: E402
from pyarrow import parquet  # noqa: E402

from converters.pretraining.corpus_files import expand_ranges  # noqa: E402
from converters.pretraining.data_check import check_data  # noqa: E402
from converters.pretraining.loader import open_loader  # noqa: E402
from converters.pretraining.recipe import (  # noqa: E402
    CorpusRecipe,
    DataRecipe,
    PretrainRecipe,
)
from mlx_openelm.recipe_loader import bundled_recipes, load_recipe  # noqa: E402

SIZES = ("270m", "450m", "1_1b", "3b")
FILES = 3  # of each range


def write_corpus(path: Path, text_key: str, seed: int) -> None:
    """Write documents with the other keys that the corpora have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [
        {
            text_key: f"{seed}.{i} {TEXT[i : i + 400 + 50 * i]}",
            "id": i,
            "meta": {"a": 1},
        }
        for i in range(6)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def make_recipe(size: str) -> Path:
    """Copy a recipe into the working directory, with short ranges, and its corpora."""
    text = bundled_recipes()[f"pretrain/openelm-{size}"].read_text()

    def shorten(match):
        first, last = match.groups()
        end = min(int(first) + FILES - 1, int(last))
        return f"{{{first}..{end:0{len(last)}}}}"

    path = Path(f"{size}.yaml")
    path.write_text(re.sub(r"\{(\d+)\.\.(\d+)\}", shorten, text))
    recipe = load_recipe(PretrainRecipe, str(path), {})
    for number, corpus in enumerate(recipe.data.corpora):
        for name in expand_ranges(corpus.files[0]):
            write_corpus(Path(name), corpus.text_key, number)
    Path("tokenizer.model").write_bytes(small_tokenizer().model_proto)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_a_published_recipe_runs_on_corpora_of_its_layouts(tmp_path, monkeypatch, size):
    """All its settings but the sizes of model, batch and run."""
    monkeypatch.chdir(tmp_path)
    path = make_recipe(size)
    values = yaml.safe_load(path.read_text())
    small = small_recipe(tmp_path).model
    values["model"] = {
        "num_layers": small.num_layers,
        "model_dim": small.model_dim,
        "head_dim": small.head_dim,
        "num_gqa_groups": small.num_gqa_groups,
        "ffn_dim_divisor": small.ffn_dim_divisor,
        "max_context_length": 64,
        "spare_rows": True,
    }
    values |= {"batch_size": 32, "micro_batch_size": 16, "steps": 3, "report_every": 1}
    values["data"] |= {"readers": 16, "workers": 2 if size == "270m" else 0}
    values["data"]["min_tokens"] = 64
    values["output"] = "run"
    path.write_text(yaml.safe_dump(values))
    check = call("pretrain", "-c", path, "--check-data")
    assert check.exit_code == 0, check.stderr
    assert "Missing" not in check.stdout
    dry = call("pretrain", "-c", path, "--dry-run", "--devices", 16)
    assert dry.exit_code == 0, dry.stderr
    assert "Missing" not in dry.stderr
    result = call("pretrain", "-c", path, "--quiet")
    assert result.exit_code == 0, result.stderr
    assert len(read_losses("run")) == 3
    assert Path("run/checkpoint_average.pt").is_file()


def test_an_epoch_of_the_layouts_has_every_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(PretrainRecipe, str(make_recipe("270m")), {})
    data = replace(recipe.data, readers=8, workers=0, min_tokens=0, min_characters=0)
    tokenizer = small_tokenizer()
    loader = open_loader(replace(recipe, batch_size=8, data=data), tokenizer, 12)
    seen, epochs = set(), [0]
    while min(epochs) == 0:
        batch = loader.next_batch()
        epochs = [s["positions"][0][0] for s in loader.state()["streams"]]
        seen |= {
            tokenizer.decode(row.tolist()).split()[0]
            for row, epoch in zip(batch.targets, epochs, strict=True)
            if epoch == 0
        }
    assert seen == {f"{corpus}.{i}" for corpus in range(13) for i in range(6)}


# What is missing ---------------------------------------------------------------------


def test_what_is_missing_is_listed_by_corpus_without_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_recipe("450m")
    gone = [
        Path("corpora/refinedweb/refinedweb-00001-of-05534.parquet"),
        *Path("corpora/dolma").glob("pes2o*"),
    ]
    for each in gone:
        each.unlink()
    before = {*tmp_path.rglob("*")}
    result = call("pretrain", "-c", path, "--check-data")
    assert result.exit_code == 1
    assert f"Missing of RefinedWeb: {gone[0]}; get it from Hub data set tii" in (
        result.stdout
    )
    assert "Dolma peS2o: corpora/dolma/pes2o_v2-{0000..0002}.json.gz" in result.stdout
    assert "Not complete: 2 of 13 corpora (RefinedWeb, Dolma peS2o)" in result.stderr
    assert result.stdout.count("Missing of") == 2
    document = json.loads(call("pretrain", "-c", path, "--check-data", "--json").stdout)
    first, *_ = document["corpora"]
    assert (first["num_files"], first["missing"]) == (2, [str(gone[0])])
    assert first["source"].startswith("Hub data set")
    assert {*tmp_path.rglob("*")} == before
    dry = call("pretrain", "-c", path, "--dry-run")
    assert "Missing: RefinedWeb: 1 file" in dry.stderr


DAMAGES = {
    "empty.jsonl": lambda path: path.write_bytes(b""),
    "cut.jsonl": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "cut.parquet": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "page.json.gz": lambda path: path.write_bytes(b"<!doctype html>\n<html>\n"),
    "pointer.parquet": lambda path: path.write_bytes(b"version https://git-lfs.git"),
    "key.jsonl": lambda path: path.write_text('{"content": "a"}\n'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_files_that_were_not_downloaded_whole_are_listed(tmp_path, name):
    for each in ("good.jsonl", "good.json.gz", "good.parquet", name):
        write_corpus(tmp_path / each, "text", 0)
    files = (str(tmp_path / "*"),)
    data = DataRecipe(corpora=(CorpusRecipe(files, name="made"),))
    (corpus,) = check_data(data).corpora
    assert corpus.is_complete
    DAMAGES[name](tmp_path / name)
    (corpus,) = check_data(data).corpora
    (damaged,) = corpus.damaged
    assert str(tmp_path / name) in damaged
    assert damaged.endswith(".")
    assert not corpus.is_complete
