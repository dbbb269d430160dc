"""`bench`: byte counts, output and errors; measured times are not tested."""

import dataclasses
import json
import math
import os
import re
import signal
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from browser import find_browser, started
from commands import call, expect_error, make_source
from models import SCALED, UNEVEN, build

import mlx_openelm
from mlx_openelm.bench import machine, measure, models, plan
from mlx_openelm.bench.machine import Bandwidth, measure_bandwidth
from mlx_openelm.bench.measure import measure_cases, time_shell
from mlx_openelm.bench.models import (
    Form,
    choose_form,
    count_step_bytes,
    estimate_memory,
    load_subject,
    make_model,
)
from mlx_openelm.bench.plan import (
    Case,
    Subject,
    Workload,
    make_subject,
    open_subject,
    plan_cases,
)
from mlx_openelm.bench.published_speeds import PUBLISHED, find_published
from mlx_openelm.bench.report import BenchReport, Cell, Figure
from mlx_openelm.cli.views.bench import draw_bench
from mlx_openelm.config import OpenELMConfig
from mlx_openelm.device import Machine, compute_dtype, describe_machine
from mlx_openelm.errors import OpenELMError
from mlx_openelm.generation.decoding import draw_tokens
from mlx_openelm.generation.options import Sampling
from mlx_openelm.model.lora import LoRALinear
from mlx_openelm.model.quantization import Quantization
from mlx_openelm.storage.hub import demo_folder

SMALL = Bandwidth(1e9, "a sum", {"a sum": 1e9, "a copy": 5e8}, 1000, 5)
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch):
    monkeypatch.setattr(machine, "measure_bandwidth", lambda: SMALL)
    monkeypatch.delenv("MLX_OPENELM_MODEL", raising=False)


# Bytes read per step -------------------------------------------------------------


def linears_of(config):
    """Yield (out, in) of every linear layer, by the formulas of the paper."""
    D, H = config.model_dim, config.head_dim
    for q, k, F in zip(
        config.num_query_heads, config.num_kv_heads, config.ffn_dims, strict=True
    ):
        yield from (((q + 2 * k) * H, D), (D, q * H), (2 * F, D), (D, F))


def norm_weights(config):
    D, H, L = config.model_dim, config.head_dim, len(config.ffn_dims)
    return L * (2 * D + 2 * H) + D


def cache_numbers(config):
    """Return the numbers that one token adds to the caches of all layers."""
    return sum(2 * k * config.head_dim for k in config.num_kv_heads)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_reads_all_weights_and_each_sequences_cache(batch):
    weights = sum(map(math.prod, linears_of(UNEVEN)))
    weights += norm_weights(UNEVEN) + UNEVEN.vocab_size * UNEVEN.model_dim
    expected = 4 * (weights + batch * 10 * cache_numbers(UNEVEN))
    assert count_step_bytes(build(UNEVEN), batch, 10) == expected


def test_only_the_tokens_rows_of_an_untied_embedding_are_read():
    untied = replace(UNEVEN, share_input_output_layers=False)
    table = 4 * UNEVEN.vocab_size * UNEVEN.model_dim
    for batch in (1, 2):
        tied = count_step_bytes(build(UNEVEN), batch, 10)
        rows = batch * 4 * UNEVEN.model_dim
        read = count_step_bytes(build(untied), batch, 10)
        assert read == pytest.approx(tied + rows, abs=1e-3)
    assert count_step_bytes(build(untied), 10_000, 0) == pytest.approx(
        count_step_bytes(build(UNEVEN), 1, 0) + table  # at most all rows
    )


def test_quantized_weights_count_with_scales_and_biases():
    """Groups of 64 have a scale and a bias in 16 bits; the embedding has 8 bits."""
    form = Form(mx.bfloat16, Quantization(bits=4).packings(SCALED))
    model = make_model(SCALED, form)
    packed = sum(math.prod(s) * (4 / 8 + 2 * 2 / 64) for s in linears_of(SCALED))
    packed += SCALED.vocab_size * SCALED.model_dim * (8 / 8 + 2 * 2 / 64)
    expected = packed + 2 * norm_weights(SCALED) + 2 * 7 * cache_numbers(SCALED)
    assert count_step_bytes(model, 1, 7) == expected
    assert estimate(SCALED, form) >= expected


def estimate(config, form, prompt_tokens=8):
    case = Case(Subject("made", config), 4, 1, prompt_tokens, 8)
    return estimate_memory(case, form)


def test_the_weights_of_an_adapter_count():
    model = build(SCALED)
    before = count_step_bytes(model, 1, 0)
    layer = model.layers[0].ffn
    a, b = mx.zeros((64, 4)), mx.zeros((128, 4)).T
    layer.proj_1 = LoRALinear(layer.proj_1, a, b, 1.0)
    assert count_step_bytes(model, 1, 0) == before + 4 * (64 * 4 + 4 * 128)


@pytest.mark.parametrize("size", ["270M", "450M", "1.1B", "3B"])
def test_the_caches_of_released_sizes_have_the_documented_bytes(size):
    config = OpenELMConfig.preset(size)
    facts = {"270M": 16_128, "450M": 23_296, "1.1B": 43_264, "3B": 83_968}
    assert config.kv_bytes_per_token(mx.bfloat16.size) == facts[size]
    form = Form(mx.bfloat16, {})
    weights = 2 * config.num_parameters
    assert weights < estimate(config, form, 512) < 1.4 * weights


# Synthetic weights ---------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_synthetic_weights_are_quantized_and_give_finite_logits(bits):
    packings = Quantization(bits=bits).packings(SCALED)
    model = make_model(SCALED, Form(mx.float32, packings))
    linear = model.layers[1].attn.qkv_proj
    assert isinstance(linear, nn.QuantizedLinear)
    assert linear.bits == bits
    assert model.transformer.token_embeddings.bits == 8
    logits = model(mx.array([[1, 5, 7]]))
    assert mx.isfinite(logits).all()
    assert logits.std() > 0.1


def test_synthetic_weights_have_the_requested_dtype():
    model = make_model(UNEVEN, Form(mx.bfloat16, {}))
    assert model.layers[2].ffn.proj_2.weight.shape == (64, 64)
    assert model.layers[2].ffn.proj_2.weight.dtype == mx.bfloat16
    assert 0.1 < model.layers[2].ffn.proj_2.weight.std().item() < 0.15  # 64 ** -0.5


# Cells ---------------------------------------------------------------------------


def test_every_combination_is_a_cell():
    workload = Workload(
        bits=(16, 8), batches=(1, 2), contexts=(20, 30), new_tokens=4, rounds=1
    )
    subjects = [Subject("a", UNEVEN), Subject("b", SCALED)]
    cases = plan_cases(subjects, workload)
    assert len({(c.subject, c.bits, c.batch, c.context) for c in cases}) == 16
    assert {c.prompt_tokens for c in cases} == {16, 26}
    (usual,) = plan_cases([make_subject("270M")], Workload())
    assert (usual.bits, usual.prompt_tokens, usual.new_tokens) == (16, 512, 64)
    (small,) = plan_cases(subjects[:1], Workload())
    assert (small.prompt_tokens, small.new_tokens) == (32, 32)  # its context is 64


def test_a_folder_is_measured_in_its_stored_format(here):
    subject = open_subject(str(here / "model"))
    cases = plan_cases([subject], Workload(new_tokens=8, rounds=2, prompt_tokens=16))
    *_, (number, cell) = measure_cases(cases, SMALL, 2)
    assert (number, cell.rounds, cell.made, cell.context) == (0, 2, False, 24)
    dtype = compute_dtype(mx.bfloat16)
    weights = UNEVEN.num_parameters * dtype.size
    cache = (16 + 8 / 2) * cache_numbers(UNEVEN) * dtype.size
    assert cell.bytes_per_token == weights + cache
    rate = cell.generation_tps
    share = rate.median * cell.bytes_per_token / 1e9
    assert cell.bandwidth_share.median == pytest.approx(share)
    assert rate.low <= rate.median <= rate.high
    assert cell.prompt_tps.high == pytest.approx(16 / cell.first_token_s.low)
    assert cell.shell_first_token_s.low > cell.first_token_s.low
    assert cell.peak_memory_bytes > weights
    assert cell.published is None


def test_a_batch_shares_the_weights_and_draws_the_tokens_of_one_sequence():
    case = Case(Subject("made", UNEVEN), 16, 3, 9, 5)
    model = build(UNEVEN)
    prompts = mx.array([[1, 9, 17, 30, 4]] * 3)
    steps = list(measure._draw_batch(model, prompts, 6))
    alone = draw_tokens(model, [1, 9, 17, 30, 4], Sampling(), 6)
    assert steps == [[token.id] * 3 for token in alone]
    cell = measure._describe(case, Form(mx.float32, {}), None)
    *_, result = measure._measure_case(model, case, cell, SMALL, 1)
    single = count_step_bytes(model, 1, 11.5)
    cache = 4 * 11.5 * cache_numbers(UNEVEN)
    assert result.bytes_per_token == pytest.approx((single + 2 * cache) / 3)
    assert result.prompt_tps.median == pytest.approx(27 / result.first_token_s.median)


def test_rates_count_all_sequences_and_exclude_the_prompt(monkeypatch):
    seconds = iter(range(100))
    clock = SimpleNamespace(perf_counter=lambda: next(seconds))
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_draw", lambda model, case: range(case.new_tokens))
    case = Case(Subject("made", UNEVEN), 16, 3, 9, 5)
    cell = measure._describe(case, Form(mx.float32, {}), None)
    *_, result = measure._measure_case(build(UNEVEN), case, cell, SMALL, 2)
    assert result.generation_tps == Figure(3, 3, 3)  # a step each second
    assert result.prompt_tps == Figure(27, 27, 27)
    assert result.first_token_s == Figure(1, 1, 1)


def test_a_case_that_does_not_fit_is_skipped_with_its_reason(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 10**6)
    sizes = [make_subject("gpt-test"), make_subject("3B")]
    monkeypatch.setattr(measure, "load_subject", lambda *_: pytest.fail("was loaded"))
    cells = dict(measure_cases(plan_cases(sizes, Workload()), SMALL))
    assert [bool(cell.skipped) for cell in cells.values()] == [True, True]
    assert cells[1].skipped.endswith("GB, but 0.0 GB are free")
    assert "takes about" in cells[1].skipped


def test_a_bench_without_a_measured_case_shows_why_and_fails(monkeypatch):
    monkeypatch.setattr(measure, "available_memory", lambda: 10**6)
    result = call("bench", "--size", "3B", *QUICK)
    assert "are free" in result.stdout
    assert result.exit_code == 1
    assert result.stderr.endswith("Nothing was measured; the table has the reasons.\n")


def test_bits_that_no_group_divides_are_skipped():
    odd = Subject("odd", replace(UNEVEN, ffn_dims=(90, 160, 64)))
    cells = dict(measure_cases(plan_cases([odd], Workload(bits=(4,))), SMALL))
    assert cells[0].skipped == "no group of 32, 64, 128 weights divides its rows"


@pytest.mark.skipif(compute_dtype(mx.bfloat16) != mx.float32, reason="widened no bits")
def test_cases_with_the_same_computation_are_measured_once():
    workload = Workload(bits=(16, 4), new_tokens=2, rounds=1, prompt_tokens=4)
    cases = plan_cases([Subject("made", SCALED)], workload)
    cells = dict(measure_cases(cases, SMALL, 1))
    assert cells[0].computed_with == "float32"
    assert cells[1].skipped == "computed in float32 here, like 16 bits"


def test_a_folder_can_be_measured_in_other_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "compute_dtype", lambda stored: stored)
    make_source(tmp_path / "source", config=SCALED)
    mlx_openelm.convert(tmp_path / "source", tmp_path / "model", bits=4)
    subject = open_subject(str(tmp_path / "model"))
    assert subject.bits == 4
    assert choose_form(subject, 4).packings == subject.folder.packings
    for bits, kind in ((8, nn.QuantizedLinear), (16, nn.Linear)):
        form = choose_form(subject, bits)
        linear = load_subject(subject, bits, form).layers[0].ffn.proj_1
        assert type(linear) is kind
        assert getattr(linear, "bits", 16) == bits
    assert str(choose_form(subject, 8)) == "packed, bfloat16"


def test_running_out_of_memory_skips_one_case(monkeypatch):
    def fail(*_):
        raise RuntimeError("[malloc] Unable to allocate 12 bytes.")
        yield

    monkeypatch.setattr(measure, "_draw", fail)
    cases = plan_cases([Subject("made", UNEVEN)], Workload(new_tokens=4))
    assert "Unable to allocate" in dict(measure_cases(cases, SMALL))[0].skipped


def test_the_bandwidth_is_that_of_the_fastest_operation(monkeypatch):
    monkeypatch.undo()
    result = measure_bandwidth(2**22, rounds=2)
    assert (
        result.bytes_per_second == max(result.ways.values()) == result.ways[result.way]
    )
    assert len(result.ways) == 4
    assert 1e7 < result.bytes_per_second < 1e14


# Published speeds ----------------------------------------------------------------


def test_published_speeds_equal_the_sheet_and_are_unverified(shared):
    text = (shared / "facts" / "openelm.md").read_text()
    table = text.split("**Apple silicon, MLX**")[1].split("**CUDA")[0]
    rows = [
        line for line in table.splitlines() if line.startswith(("| 0.", "| 1.", "| 3."))
    ]
    spelled = {"0.27B": "270M", "0.45B": "450M", "1.08B": "1.1B", "3.04B": "3B"}
    facts = set()
    for row in rows:
        what, *rates = (part.strip() for part in row.strip("|").split("|"))
        bits = 4 if what.endswith("4-bit") else 16
        facts.add((spelled[what.split()[0]], bits, *map(float, rates[:3])))
    assert len(facts) == 8
    assert {
        (p.size, p.bits, p.prompt_tps, p.generation_tps, p.total_tps) for p in PUBLISHED
    } == facts
    assert not any(published.verified for published in PUBLISHED)


def test_only_the_four_sizes_have_published_speeds():
    assert find_published("OpenELM-1_1B", 4).generation_tps == 117.90
    assert find_published("OpenELM-1_1B", 8) is None
    assert find_published("OpenELM", 16) is None


# The command ---------------------------------------------------------------------

BATCHES = ("--batch", 1, "--batch", 2)
QUICK = ("--prompt-tokens", 8, "--max-tokens", 4, "--rounds", 2)


def test_json_is_one_document(here):
    result = call(
        "bench", "--model", "model", *QUICK, "--batch", 1, "--batch", 2, "--json"
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["finished"]
    assert [cell["batch"] for cell in report["cells"]] == [1, 2]
    assert report["cells"][0]["model"] == "model"
    assert report["cells"][0]["shell_first_token_s"]["median"] > 0
    assert report["cells"][1]["shell_first_token_s"] is None
    assert report["bandwidth"]["way"] == "a sum"
    assert report["machine"]["blas"]


def test_the_table_shows_all_measurements(monkeypatch):
    monkeypatch.setattr(measure, "time_shell", lambda *_: [0.5, 0.76])
    result = call("bench", *QUICK)
    assert result.exit_code == 0, result.stderr
    for words in ("demo", "1.00 GB/s: 0 MB by a sum", "0.63", "0.50-0.76", "share of"):
        assert words in result.stdout
    for value in dataclasses.asdict(describe_machine()).values():
        assert str(value) in result.stdout or isinstance(value, int)
    assert "built-in demo" in result.stderr
    assert call("bench", *QUICK, "--quiet").stderr == ""


def test_sizes_have_synthetic_weights_and_no_published_speeds(monkeypatch):
    """Apple's figures are of another workload: only `--protocol apple` shows them."""
    small = replace(OpenELMConfig.preset("gpt-test"), vocab_size=300)
    monkeypatch.setattr(
        plan, "make_subject", lambda size: Subject("OpenELM-270M", small)
    )
    result = call("bench", "--size", "270M", *QUICK, "--json")
    (cell,) = json.loads(result.stdout)["cells"]
    assert (cell["made"], cell["published"]) == (True, None)
    shown = call("bench", "--size", "270M", *QUICK).stdout
    assert "random weights" in shown
    assert "ublished" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "2B"], ["'2B' is not a released OpenELM", "270M, 450M, 1.1B, 3B"]),
        (["--bits", "7"], ["--bits is 7", "16, 8, 6, 5, 4, 3, 2"]),
        (["--bits", "four"], ["--bits is four"]),
        (["--bits", "16,"], ["--bits is 16,"]),
        (["--batch", "0"], ["--batch is 0"]),
        (["--rounds", "0"], ["--rounds is 0"]),
        (["--max-tokens", "1"], ["--max-tokens is 1"]),
        (["--prompt-tokens", "-3"], ["--prompt-tokens is -3"]),
        (["--context", "600"], ["context of demo", "512"]),
        (["--prompt-tokens", "500"], ["500 prompt tokens and 64 new", "512"]),
        (["--context", "9", "-m", "9"], ["--context is 9", "9 new"]),
        (
            ["--context", "99", "--prompt-tokens", "9"],
            ["--prompt-tokens", "leave out one"],
        ),
        (["--model", "nowhere"], ["no folder nowhere"]),
        (["--adapter-path", "none", "--size", "3B"], ["adapter belongs to one model"]),
        (["--adapter-path", "model"], ["model"]),
        (["--chart", "a.png"], ["a.png", ".svg"]),
        (["--chart", "there.svg"], ["there.svg exists"]),
        (["--chart", "missing/a.svg"], ["missing/a.svg", "No such file"]),
        (["--chart", "model/config.json/a.svg"], ["Cannot write"]),
    ],
)
def test_invalid_input_is_refused_before_measuring(here, monkeypatch, options, message):
    monkeypatch.setattr(machine, "measure_bandwidth", lambda: pytest.fail("measured"))
    (here / "there.svg").write_text("mine")
    expect_error(here, "bench", *options, message=message)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(here):
    here.chmod(0o500)
    try:
        expect_error(here, "bench", "--chart", "a.svg", message="Permission denied")
    finally:
        here.chmod(0o700)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OpenELMError("It broke.")])
def test_measurements_before_a_stop_are_shown(monkeypatch, tmp_path, error):
    original, count = measure._draw, 0

    def stop_later(model, case):
        nonlocal count
        count += 1
        if count == 5:  # warm-up, two rounds, warm-up, and in a round
            raise error
        return original(model, case)

    monkeypatch.setattr(measure, "_draw", stop_later)
    monkeypatch.setattr(measure, "time_shell", lambda *_: [])
    chart = tmp_path / "a.svg"
    result = call("bench", *QUICK, *BATCHES, "--json", "--chart", chart)
    report = json.loads(result.stdout)
    assert (len(report["cells"]), report["planned"]) == (1, 2)
    assert not report["finished"]
    assert report["cells"][0]["rounds"] == 2
    assert chart.is_file()
    if error is KeyboardInterrupt:
        assert (result.exit_code, "Interrupted." in result.stderr) == (130, True)
    else:
        assert (result.exit_code, "error: It broke." in result.stderr) == (1, True)


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """Return a function that replaces Python by a shell script."""

    def install(program):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{program}\n")
        path.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(path))

    return install


def test_the_shell_time_is_that_of_the_first_byte(tmp_path, fake_python):
    fake_python(f'echo "$*" > {tmp_path}/arguments; sleep 0.3; echo king; sleep 1')
    result = time_shell(demo_folder(), tmp_path / "adapter", 1)
    assert len(result) == 1
    assert 0.3 <= result[0] < 1.3
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-m mlx_openelm generate")
    assert f"--model {demo_folder()}" in arguments
    assert f"--adapter-path {tmp_path}/adapter" in arguments


def test_a_folder_that_cannot_answer_has_no_shell_time(tmp_path, fake_python):
    fake_python("exit 1")
    assert time_shell(tmp_path, None, 3) == []


def test_an_interrupt_ends_the_timed_process(tmp_path, fake_python):
    fake_python(f"echo $$ > {tmp_path}/number; exec sleep 60")

    def stop(number, frame):
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            time_shell(tmp_path, None, 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)


# The chart -----------------------------------------------------------------------


def figure(value, spread=0.05):
    return Figure(value, value * (1 - spread), value * (1 + 2 * spread))


def synthetic_report():
    """Return a synthetic report with every kind of row."""
    name = "a-folder-with-a-name-that-goes-on-and-on-and-on"
    machine = Machine("Linux 6 <x86>", "3.11", "0.32.4", "CPU (A & B)", "BLAS", 10**10)
    rows = []
    for size, bits, batch, rate, share in (
        *(("OpenELM-270M", 16, 1, 190.0, 0.42), ("OpenELM-270M", 4, 1, 310.0, 0.2)),
        *(("OpenELM-270M", 4, 16, 900.0, 0.1), ("OpenELM-1_1B", 16, 1, 71.0, 0.77)),
        *(("OpenELM-1_1B", 4, 1, 113.0, 0.55), ("OpenELM-3B", 16, 1, None, None)),
        (name, 16, 1, 500.0, 1.3),
    ):
        skipped = "takes about 6.3 GB, but 5.1 GB are free" if rate is None else None
        rows.append(
            Cell(
                model=size,
                made=size != name,
                adapter=None,
                bits=bits,
                batch=batch,
                context=576,
                prompt_tokens=512,
                new_tokens=64,
                computed_with="bfloat16" if bits == 16 else "packed, bfloat16",
                rounds=3 if rate else 0,
                bytes_per_token=5e8 if rate else None,
                prompt_tps=figure(8 * rate) if rate else None,
                generation_tps=figure(rate) if rate else None,
                first_token_s=figure(0.2) if rate else None,
                peak_memory_bytes=10**9 if rate else None,
                bandwidth_share=figure(share) if share else None,
                published=find_published(size, bits) if batch == 1 else None,
                skipped=skipped,
            )
        )
    bandwidth = Bandwidth(4e11, "a copy", {"a copy": 4e11, "a sum": 3e11}, 2**30, 5)
    return BenchReport("1", machine, True, bandwidth, tuple(rows), 7, True)


def bar_width(group):
    """The width of the rectangle that an SVG group draws."""
    corners = re.findall(r"[ML] ([0-9.]+) ", group.find(f"{SVG}path").get("d"))
    return max(map(float, corners)) - min(map(float, corners))


def test_the_chart_is_drawn_to_scale_and_needs_no_other_files():
    report = synthetic_report()
    drawn = draw_bench(report)
    root = ElementTree.fromstring(drawn)
    measured = [cell for cell in report.cells if cell.rounds]
    for color, name in (("blue", "generation_tps"), ("orange", "bandwidth_share")):
        bars = [
            bar_width(group)
            for group in root.iter(f"{SVG}g")
            if group.get("class") == f"bar {color}"
        ]
        values = [getattr(cell, name).median for cell in measured]
        ratios = [b / v for b, v in zip(bars, values, strict=True)]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=0.01)
    texts = " ".join(text.text for text in root.iter(f"{SVG}text"))
    assert "takes about 6.3 GB" in texts
    assert "quoted from memory, UNVERIFIED" in texts
    assert "CPU (A & B), Linux 6 <x86>" in texts
    dashed = [e for e in root.iter(f"{SVG}g") if e.get("class") == "published"]
    assert len(dashed) == 5  # also of the model that was not measured
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
    assert "130 % of the memory bandwidth" in root.find(f"{SVG}title").text


def test_an_empty_report_gives_a_chart():
    empty = replace(synthetic_report(), cells=())
    assert "Nothing was measured" in draw_bench(empty)


@pytest.mark.skipif(find_browser() is None, reason="needs a browser")
def test_a_browser_shows_all_text_inside_the_chart(tmp_path):
    (tmp_path / "a.svg").write_text(draw_bench(synthetic_report()))
    with started(find_browser(), tmp_path / "profile") as browser:
        page = browser.new_page()
        for scheme in ("light", "dark"):
            page.open(tmp_path / "a.svg", scheme=scheme)
            outside = page.evaluate(
                "[...document.querySelectorAll('text')].filter(t => { const b = "
                "t.getBoundingClientRect(); const s = "
                "document.documentElement.getBoundingClientRect(); return b.right > "
                "s.right || b.left < s.left || b.bottom > s.bottom }).length"
            )
            assert outside == 0
            labels = page.evaluate(
                "[...document.querySelectorAll('text')].map(t => "
                "t.getBoundingClientRect()).filter(b => Math.abs(b.left - 20) < 1 && "
                "b.top > 92 && b.bottom < 92 + 7 * 40).map(b => b.right)"
            )
            assert len(labels) == 14
            assert max(labels) < 296  # the bars begin at 300
            assert not page.errors
            page.picture(tmp_path / f"{scheme}.png")
            assert (tmp_path / f"{scheme}.png").stat().st_size > 10_000
