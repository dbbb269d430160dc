"""Which training state a run resumes from: the last, an older one, or none."""

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from commands import call, expect_error
from pretrainings import read_losses, read_metrics, small_recipe

torch = pytest.importorskip("torch", reason="needs PyTorch")

from converters.pretraining.checkpoints import (  # noqa: E402
    AVERAGE,
    LAST,
    STATE,
    as_json,
    files_on_disk,
)
from converters.pretraining.log import Saved  # noqa: E402
from converters.pretraining.run import pretrain  # noqa: E402
from converters.pretraining.training_states import check_file  # noqa: E402
from mlx_openelm.errors import OpenELMError  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    recipe = small_recipe(tmp_path)
    return replace(recipe, data=replace(recipe.data, heldout=()))


class Cut(Exception):
    pass


def cut_at(step: int):
    def cut(event):
        if isinstance(event, Saved) and event.step == step:
            raise Cut

    return cut


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_recipe(recipe, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(as_json(recipe)))
    return str(path)


def test_a_flipped_bit_is_noticed_and_the_state_before_is_offered(recipe, tmp_path):
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)
    with pytest.raises(Cut):
        pretrain(recipe, on_event=cut_at(8))
    run = Path(recipe.output)
    assert list(files_on_disk(run, STATE)) == [4, 8]
    flip_a_bit(run / LAST)
    older = run / f"{STATE}4.pt"
    for resume in (True, "auto"):
        with pytest.raises(OpenELMError, match="SHA-256") as refused:
            pretrain(recipe, resume=resume)
        assert f"`resume` {older} continues from step 4" in str(refused.value)
    command = ("pretrain", "-c", write_recipe(recipe, tmp_path), "--resume")
    expect_error(tmp_path, *command, message=f"--resume {older} continues")
    result = call(*command, str(older), "--quiet")
    assert result.exit_code == 0, result.stderr
    assert read_metrics(run, "started")[-1]["first_step"] == 4
    assert read_losses(run) == read_losses(whole.output)
    final = [torch.load(Path(r.output) / AVERAGE) for r in (recipe, whole)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_without_an_intact_state_none_is_offered(recipe):
    with pytest.raises(Cut):
        pretrain(recipe, on_event=cut_at(8))
    for path in files_on_disk(Path(recipe.output), STATE).values():
        flip_a_bit(path)
    with pytest.raises(OpenELMError, match="SHA-256") as refused:
        pretrain(recipe, resume=True)
    assert "`resume`" not in str(refused.value)


def test_damaged_weights_are_not_averaged(recipe):
    with pytest.raises(Cut):
        pretrain(recipe, on_event=cut_at(8))
    flip_a_bit(Path(recipe.output) / "checkpoint_epoch_0_iter_8.pt")
    with pytest.raises(OpenELMError, match=r"iter_8\.pt is damaged"):
        pretrain(recipe, resume=True)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs sha256sum")
def test_sha256sum_reads_the_checksums(recipe):
    pretrain(recipe)
    run = Path(recipe.output)
    files = sorted(path.name for path in run.glob("*.sha256"))
    assert {name.removesuffix(".sha256") for name in files} == {
        path.name for path in run.glob("*.pt")
    }
    command = ["sha256sum", "--check", "--strict", *files]
    checked = subprocess.run(command, cwd=run, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count(": OK") == len(files)


def test_a_state_without_a_checksum_is_accepted(recipe):
    """As after a kill between the two files, and in runs of earlier versions."""
    with pytest.raises(Cut):
        pretrain(recipe, on_event=cut_at(8))
    (Path(recipe.output) / f"{LAST}.sha256").unlink()
    check_file(Path(recipe.output) / LAST)
    pretrain(recipe, resume=True)


def test_auto_starts_a_run_resumes_it_and_accepts_a_complete_one(recipe, tmp_path):
    whole = replace(recipe, output=str(tmp_path / "whole"))
    pretrain(whole)
    with pytest.raises(Cut):
        pretrain(recipe, resume="auto", on_event=cut_at(8))
    for _ in range(2):
        pretrain(recipe, resume="auto")
    starts = [r["first_step"] for r in read_metrics(recipe.output, "started")]
    assert starts == [0, 8, 12]
    assert read_losses(recipe.output) == read_losses(whole.output)
    other = replace(recipe, steps=20)
    with pytest.raises(OpenELMError, match="steps: 12 -> 20"):
        pretrain(other, resume="auto")


def test_auto_does_not_replace_other_results(recipe):
    Path(recipe.output).mkdir()
    (Path(recipe.output) / "mine.pt").write_text("mine")
    with pytest.raises(OpenELMError, match=r"already holds mine\.pt"):
        pretrain(recipe, resume="auto")


def test_a_state_of_another_folder_continues_with_its_data(recipe, tmp_path):
    pretrain(recipe)
    other = replace(recipe, output=str(tmp_path / "other"))
    older = Path(recipe.output) / f"{STATE}8.pt"
    with pytest.raises(Cut):
        pretrain(other, resume=str(older), on_event=cut_at(12))
    pretrain(other, resume=str(older))  # the same command, again
    assert [r["first_step"] for r in read_metrics(other.output, "started")] == [8, 12]
    assert read_losses(other.output) == read_losses(recipe.output)[8:]
    assert not read_metrics(other.output, "noted")
    done = Path(recipe.output) / f"{STATE}12.pt"
    with pytest.raises(OpenELMError, match=r"after 12 iterations.*`steps`"):
        pretrain(replace(recipe, output=str(tmp_path / "third")), resume=str(done))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), False),
        (("--resume",), True),
        (("--resume", "--quiet"), True),
        (("--resume", "auto"), "auto"),
        (("--resume=auto", "--seed", "3"), "auto"),
        (("--resume", "a/b.pt"), "a/b.pt"),
    ],
)
def test_the_value_of_resume_may_be_left_out(
    recipe, tmp_path, monkeypatch, options, expected
):
    given = []

    def take(recipe, *, resume, on_event):
        given.append(resume)
        return Path("x")

    monkeypatch.setattr("converters.pretraining.run.pretrain", take)
    result = call("pretrain", *options, "-c", write_recipe(recipe, tmp_path))
    assert result.exit_code == 0, result.stderr
    assert given == [expected]
