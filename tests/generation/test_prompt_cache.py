import contextlib
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from models import SCALED, UNEVEN, build
from places import SUPPORT

from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.compact_caches import cache_maker
from mlx_openelm.generation.decoding import draw_tokens
from mlx_openelm.generation.options import CacheOptions, Sampling
from mlx_openelm.generation.prompt_cache import open_prompt_cache
from mlx_openelm.model.fingerprint import fingerprint_arrays, fingerprint_model
from mlx_openelm.model.lora import LoRALinear

model, scaled = build(UNEVEN), build(SCALED)
PROMPT = [1, *range(20, 60)]
WEIGHT = "transformer.layers.1.ffn.proj_2.weight"


def answer(prompt, file=None, *, of=model, template="raw", count=6, **kind):
    """Return the greedy answer, the number of reused tokens, and the notes."""
    if file is None:
        drawn = draw_tokens(of, prompt, Sampling(), count)
        return [token.id for token in drawn], 0, []
    notes, maker = [], cache_maker(of.config, CacheOptions(**kind))
    with open_prompt_cache(file, of, template, notes.append, maker) as cache:
        reused = cache.context.reuse(prompt)
        tokens = []
        for token in draw_tokens(of, prompt, Sampling(), count, context=cache.context):
            if not tokens:
                cache.store(prompt)
            tokens.append(token.id)
    return tokens, reused, notes


def changed(of, name, change):
    """Return a copy of the model with one tensor changed."""
    other = build(of.config)
    array = np.array(dict(tree_flatten(other.parameters()))[name])
    other.update(tree_unflatten([(name, mx.array(change(array)))]))
    return other


def flip_one_bit(array):
    array.view(np.uint32).reshape(-1)[array.size // 2] ^= 1
    return array


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompt.cache"


@pytest.fixture
def stored(file):
    assert answer(PROMPT, file) == (answer(PROMPT)[0], 0, [])
    return file


# Answers -------------------------------------------------------------------------

ids = st.lists(st.integers(3, UNEVEN.vocab_size - 1), min_size=1, max_size=24)


@settings(max_examples=80, deadline=None)
@given(ids, ids, st.integers(0, 24))
def test_a_stored_prompt_changes_no_answer(tmp_path_factory, first, rest, shared):
    file = tmp_path_factory.getbasetemp() / "any.cache"
    file.unlink(missing_ok=True)
    second = first[:shared] + rest
    assert answer(first, file, count=1)[1:] == (0, [])
    same = 0
    while same < min(len(first), len(second) - 1) and first[same] == second[same]:
        same += 1
    expected, _, _ = answer(second, count=4)
    assert answer(second, file, count=4) == (expected, same, [])


@settings(max_examples=20, deadline=None)
@given(ids, ids, st.sampled_from([4, 8]))
def test_a_quantized_cache_is_stored_unchanged(tmp_path_factory, first, rest, bits):
    file = tmp_path_factory.getbasetemp() / "packed.cache"
    file.unlink(missing_ok=True)
    kind = {"of": scaled, "kv_bits": bits, "kv_group_size": 32}
    expected, reused, notes = answer(first + rest, file, **kind)
    assert (reused, notes) == (0, [])
    again = answer(first + rest, file, **kind)
    assert again == (expected, len(first + rest) - 1, [])


def test_the_file_holds_the_prompt_and_not_the_answer(file, tmp_path):
    answer(PROMPT, file, count=1)
    answer(PROMPT, tmp_path / "long", count=20)
    assert file.stat().st_size == (tmp_path / "long").stat().st_size
    arrays = mx.load(str(file), format="safetensors")
    assert arrays.pop("tokens").tolist() == PROMPT
    assert {a.shape[2] for a in arrays.values()} == {len(PROMPT)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_it_is_written_only_for_new_tokens(stored):
    before = stored.stat()
    for prompt in (PROMPT, PROMPT[:7]):
        answer(prompt, stored)
        assert stored.stat().st_ino == before.st_ino
    answer([*PROMPT, 9], stored)
    assert stored.stat().st_ino != before.st_ino


def test_a_prompt_that_was_not_processed_is_not_stored(file):
    with open_prompt_cache(file, model, "raw") as cache:
        cache.context.read(model, PROMPT)
        with pytest.raises(ValueError, match="does not begin with"):
            cache.store([*PROMPT[:-1], 9])
    assert not file.exists()


def test_only_the_owner_may_read_the_file(stored):
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600
    stored.chmod(0o644)
    answer([*PROMPT, 9], stored)
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600


def test_a_link_stays_a_link(stored, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(stored)
    answer([*PROMPT, 9], link)
    assert link.is_symlink()
    assert answer([*PROMPT, 9], stored)[1] == len(PROMPT)


# Outdated files ------------------------------------------------------------------


def with_adapter(scale=2.0):
    adapted, rng = build(UNEVEN), np.random.default_rng(1)
    linear = adapted.layers[0].ffn.proj_2
    rows, width = linear.weight.shape
    a, b = (mx.array(rng.standard_normal(s)) for s in ((width, 4), (4, rows)))
    adapted.layers[0].ffn.proj_2 = LoRALinear(linear, a, b, scale)
    return adapted


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"of": build(UNEVEN, seed=1)}, "another model or adapter"),
        ({"of": changed(model, WEIGHT, flip_one_bit)}, "another model or adapter"),
        ({"of": with_adapter()}, "another model or adapter"),
        ({"template": "instruct"}, "the template 'raw', not 'instruct'"),
    ],
)
def test_an_outdated_file_is_detected_and_replaced(stored, options, reason):
    expected, _, _ = answer(PROMPT, of=options.get("of", model))
    actual, reused, (note,) = answer(PROMPT, stored, **options)
    assert (actual, reused) == (expected, 0)
    assert note.startswith(f"{stored} was written for ")
    assert reason in note
    assert answer(PROMPT, stored, **options) == (expected, len(PROMPT) - 1, [])


def test_another_kind_of_cache_is_detected(file):
    kinds = [{}, *({"kv_bits": b, "kv_group_size": 32} for b in (4, 8))]
    for kind in kinds:
        _, reused, notes = answer(PROMPT, file, of=scaled, **kind)
        assert reused == 0
        assert all("for the cache" in note for note in notes)
        assert len(notes) == (kind != {})


def test_another_version_is_detected(stored, monkeypatch):
    monkeypatch.setattr("mlx_openelm.generation.prompt_cache._FORMAT", 2)
    _, reused, (note,) = answer(PROMPT, stored)
    assert reused == 0
    assert "another version" in note


def test_a_sliding_cache_is_refused(file):
    with pytest.raises(OpenELMError, match="`max_kv_size`"):
        answer(PROMPT, file, max_kv_size=30)


# Damaged -------------------------------------------------------------------------


def test_a_truncated_file_is_detected_and_replaced(stored):
    whole, expected = stored.read_bytes(), answer(PROMPT)[0]
    for length in (1024, 1100, 2000, len(whole) // 2, len(whole) - 1):
        stored.write_bytes(whole[:length])
        actual, reused, (note,) = answer(PROMPT, stored)
        assert (actual, reused) == (expected, 0)
        assert note == f"{stored} is damaged; the prompt is processed again."
        assert answer(PROMPT, stored)[1] == len(PROMPT) - 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    file = tmp_path_factory.mktemp("whole") / "prompt.cache"
    return answer(PROMPT, file)[0], file.read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**30), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_never_changes_the_answer(
    tmp_path_factory, whole, position, bit, in_header
):
    expected, content = whole
    file = tmp_path_factory.getbasetemp() / "flipped.cache"
    damaged = bytearray(content)
    damaged[position % (2000 if in_header else len(damaged))] ^= 1 << bit
    file.write_bytes(damaged)
    with contextlib.suppress(OpenELMError):  # not recognised as a prompt cache
        actual, reused, notes = answer(PROMPT, file)
        assert actual == expected
        assert (reused == 0) == bool(notes)


def forge(file, change):
    """Change the contents of a file, and its metadata to match."""
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    change(arrays)
    fields = json.loads(metadata["mlx_openelm_prompt"])
    fit = {n: a for n, a in arrays.items() if a.dtype.size <= 4 and a.dtype != mx.bool_}
    fields["content"] = fingerprint_arrays(fit)
    metadata["mlx_openelm_prompt"] = json.dumps(fields)
    mx.eval(arrays)
    with file.open("wb") as opened:
        mx.save_safetensors(opened, arrays, metadata=metadata)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("tokens"),
        lambda arrays: arrays.pop("layers.1.0"),
        lambda arrays: arrays.update(more=mx.zeros(3)),
        lambda arrays: arrays.update({"layers.1.0": mx.zeros((1, 4, 3, 16))}),
        lambda arrays: arrays.update({"layers.1.0": mx.zeros(3)}),
        lambda arrays: arrays.update({"layers.1.0": mx.array(1.0)}),
        lambda arrays: arrays.update(
            {"layers.1.0": arrays["layers.1.0"].astype(mx.int64)}
        ),
        lambda arrays: arrays.update(tokens=arrays["tokens"] + 250),
        lambda arrays: arrays.update(tokens=arrays["tokens"][:0]),
        lambda arrays: arrays.update(tokens=arrays["tokens"][None]),
        lambda arrays: arrays.update(tokens=arrays["tokens"].astype(mx.int32)),
        lambda arrays: arrays.update(tokens=arrays["tokens"][:-1]),
    ],
)
def test_contents_that_do_not_fit_are_damage(stored, change):
    forge(stored, change)
    actual, reused, (note,) = answer(PROMPT, stored)
    assert (actual, reused) == (answer(PROMPT)[0], 0)
    assert "is damaged" in note


@pytest.mark.parametrize("shape", [[10**12], [2**40, 2**40], [-1], [42]])
def test_a_header_with_a_wrong_shape_is_damage(stored, shape):
    content = stored.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["tokens"]["shape"] = shape
    written = json.dumps(header, separators=(",", ":")).encode()
    stored.write_bytes(len(written).to_bytes(8, "little") + written + content[end:])
    assert "is damaged" in answer(PROMPT, stored)[2][0]


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '"x"', "{}", '{"format": []}'])
def test_invalid_metadata_are_damage(stored, text):
    arrays = mx.load(str(stored), format="safetensors")
    mx.eval(arrays)
    with stored.open("wb") as opened:
        mx.save_safetensors(opened, arrays, metadata={"mlx_openelm_prompt": text})
    assert "is damaged" in answer(PROMPT, stored)[2][0]


# Other files, and invalid paths --------------------------------------------------


def a_model(file):
    mx.save_safetensors(f"{file}.safetensors", {"a": mx.zeros(3)}, {"format": "mlx"})
    os.rename(f"{file}.safetensors", file)


@pytest.mark.parametrize(
    "make",
    [
        lambda file: file.write_text("my diary, and mlx_openelm_prompt in it\n" * 100),
        lambda file: file.write_bytes(b"\x00"),
        lambda file: file.write_bytes(bytes(5000)),
        a_model,
    ],
)
def test_another_kind_of_file_is_never_replaced(file, make):
    make(file)
    before = file.read_bytes()
    with pytest.raises(OpenELMError, match="is not a prompt cache"):
        answer(PROMPT, file)
    assert file.read_bytes() == before


def test_an_empty_file_is_replaced(file):
    file.touch()
    assert answer(PROMPT, file)[2] == []
    assert answer(PROMPT, file)[1] == len(PROMPT) - 1


def test_an_invalid_path_is_reported_before_the_model_runs(tmp_path, file):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "folder", "is not a regular file"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path(os.devnull), "is not a regular file|is not writable"),
        (tmp_path / "not" / "there", "is not a folder"),
        (tmp_path / "pipe" / "below", "is not a folder"),
    ):
        with pytest.raises(OpenELMError, match=message):
            answer(PROMPT, path)


def test_a_read_only_folder_is_reported(file, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OpenELMError, match="is not writable"):
        answer(PROMPT, file)


# Faults --------------------------------------------------------------------------


def test_a_full_disk_is_noted_and_the_old_file_stays(stored, tmp_path):
    before, limits = stored.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    longer = [*PROMPT, 9]
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        actual, _, (note,) = answer(longer, stored)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert actual == answer(longer)[0]
    assert note == "The prompt was not stored: File too large."
    assert stored.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [stored.name]


def test_the_prompt_of_an_interrupted_answer_is_stored(file):
    def stop():
        with open_prompt_cache(file, model, "raw") as cache:
            next(draw_tokens(model, PROMPT, Sampling(), 6, context=cache.context))
            cache.store(PROMPT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert answer(PROMPT, file)[1] == len(PROMPT) - 1


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_prompt_cache import PROMPT, answer
print("ready", flush=True)
turn = 0
while True:
    turn += 1
    prompt = [*PROMPT[: 10 + turn % 30], 7 + turn % 200]
    _, _, notes = answer(prompt, Path(sys.argv[1]), count=1)
    assert not [note for note in notes if "in use" not in note], notes
"""


def test_concurrent_processes_never_read_a_partial_file(stored):
    command = [sys.executable, "-c", WRITER, str(stored)]
    command += [str(SUPPORT), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        try:
            assert writer.stdout.readline() == b"ready\n"
            for turn in range(60):
                prompt = [*PROMPT[:turn], 100 + turn]
                actual, _, notes = answer(prompt, stored, count=3)
                assert actual == answer(prompt, count=3)[0]
                assert not [note for note in notes if "in use" not in note], notes
            assert writer.poll() is None
        finally:
            writer.kill()  # at any point
    answer(PROMPT, stored)
    assert answer(PROMPT, stored)[1:] == (len(PROMPT) - 1, [])


# Fingerprints --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, _ in tree_flatten(model.parameters())][::3])
def test_every_bit_of_a_model_changes_the_fingerprint(name):
    of = fingerprint_model(model)
    assert of == fingerprint_model(build(UNEVEN))
    assert of != fingerprint_model(changed(model, name, flip_one_bit))


def test_dtype_and_adapter_scale_change_the_fingerprint():
    prints = {fingerprint_model(m) for m in (model, with_adapter(2.0), with_adapter(3))}
    half = build(UNEVEN)
    half.set_dtype(mx.float16)
    prints.add(fingerprint_model(half))
    assert len(prints) == 4


def test_names_dtypes_and_shapes_change_the_fingerprint():
    a = mx.zeros((4, 6))
    variants = (
        *({"a": a}, {"b": a}, {"a": a.astype(mx.float16)}, {"a": a.T}, {"a": a + 1}),
        *({"a": a.astype(mx.uint8)}, {"a": a[0]}, {"a": a[:, :3]}, {"a": a[0, 0]}),
    )
    assert len({fingerprint_arrays(v) for v in variants}) == len(variants)
    odd = mx.array(np.arange(15).reshape(5, 3)).astype(mx.bfloat16)
    assert fingerprint_arrays({"a": odd}) == fingerprint_arrays({"a": odd + 0})


def test_swapped_rows_change_the_fingerprint():
    a = mx.random.normal((4, 6))
    assert fingerprint_arrays({"a": a}) != fingerprint_arrays(
        {"a": a[mx.array([1, 0, 2, 3])]}
    )
