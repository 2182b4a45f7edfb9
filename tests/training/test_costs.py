"""What a training costs, counted and reported; its traces and compiled programs."""

import gzip
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.training import costs

X = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
Y = X[:, :3].argmax(1)


@pytest.fixture
def peak(monkeypatch, tmp_path):
    """A device on which products of float32 were measured to take 1e9 operations a second."""
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "cache"))
    costs.save_peak("float32", 1e9)


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (lambda x, w: x @ w, [(5, 6), (6, 7)], {"float32": 2 * 5 * 6 * 7}),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x, w), [(2, 5, 6), (2, 6, 7)], {"float32": 2 * 2 * 5 * 6 * 7}),
        (lambda x, w: jax.lax.fori_loop(0, 4, lambda _, x: x @ w, x), [(5, 6), (6, 6)], {"float32": 4 * 2 * 5 * 6 * 6}),
        (lambda x, n: jax.lax.fori_loop(0, n[0, 0].astype(int), lambda _, x: x @ x, x), [(3, 3)] * 2, {"float32": 54}),
        (lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x), [(3, 3)] * 2, {"float32": 54}),
        (lambda x, w: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), [(3, 3)] * 2, {"bfloat16": 54}),
        (lambda x, w: jax.jit(jnp.exp)(x) + w, [(3, 3)] * 2, {}),
    ],
)
def test_flops_are_those_of_products_in_loops_and_branches(function, shapes, flops):
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    assert costs.count_flops(function, *arguments) == flops
    assert costs.count_flops(jax.jit(function), *arguments) == flops


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_a_convolution_leave_out_the_zeros_that_its_gradient_spreads(stride):
    def loss(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        ).sum()

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 8, 8, 4), (3, 3, 2, 6))]
    forward = 2 * 2 * (8 // stride) ** 2 * 6 * 9 * 2
    assert costs.count_flops(loss, *shapes) == {"float32": forward}
    assert costs.count_flops(jax.grad(loss, (0, 1)), *shapes)["float32"] == 3 * forward


def test_a_peak_is_of_a_kind_of_device_and_a_damaged_file_is_none(peak, tmp_path, monkeypatch):
    assert costs.measured_peak("float32") == 1e9 and costs.measured_peak("bfloat16") is None
    costs.save_peak("bfloat16", 2e9)
    costs.save_peak("bfloat16", 1e9)
    assert costs.measured_peak("float32") == 1e9 and costs.measured_peak("bfloat16") == 2e9
    monkeypatch.setattr(costs, "device", lambda: {"kind": "another"})
    assert costs.measured_peak("float32") is None
    for text in ("", "[]", '{"another": 1}', '{"another": {"float32": "x"}}', '{"another": {"float32": -1}}'):
        (tmp_path / "cache" / "peaks.json").write_text(text)
        assert costs.measured_peak("float32") is None
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    costs.save_peak("float32", 1e9)
    assert costs.measured_peak("float32") is None


def test_float32_on_accelerators_is_compared_with_the_arithmetic_that_it_has_there(peak, monkeypatch):
    costs.save_peak("tf32", 4e9)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with jax.default_matmul_precision("default"):  # whatever an earlier test has left
        assert costs.measured_peak("float32") == 4e9
    with jax.default_matmul_precision("highest"):
        assert costs.measured_peak("float32") == 1e9


def test_totals_weigh_rates_by_time_and_leave_out_what_an_epoch_lacks():
    lines = [
        {"seconds": 1.0, "examples_per_second": 10.0, "flops_per_second": 4e9, "compile_seconds": 2.0},
        {"seconds": 3.0, "examples_per_second": 30.0, "flops_per_second": 8e9, "share_of_peak": 0.5},
    ]
    total = costs.total_costs(lines)
    assert total == {
        **{"seconds": 4.0, "compile_seconds": 2.0, "input_seconds": 0.0},
        **{"examples_per_second": 25.0, "flops_per_second": 7e9},
    }
    words = costs.describe_costs(total)
    assert "25 examples/s" in words["training"] and words["products and convolutions"] == "7 GFLOP/s"
    assert "not known" in words["share of the device's measured peak"]
    hostile = [{"seconds": [1.0], "examples_per_second": None, "flops_per_second": 10**400}]
    assert costs.describe_costs(costs.total_costs(hostile)) == costs.describe_costs(costs.total_costs([])) == {}


@pytest.mark.parametrize("as_batches", [False, True])
def test_fit_reports_its_costs_and_writes_a_trace_and_its_programs(peak, tmp_path, capsys, as_batches):
    data = [(X[start : start + 4], Y[start : start + 4]) for start in range(0, 64, 4)] if as_batches else (X, Y)
    folders = {"profile": tmp_path / "trace", "dump_hlo": tmp_path / "hlo"}
    fitted = pspinal_jax.fit(nn.Dense(3), data, validation=(X, Y), epochs=2, batch_size=4, **folders)
    line = fitted.history[-1]
    products = 2 * 2 * 8 * 3  # of an example, forward and for the kernel's gradient; that of the inputs nobody needs
    assert line["flops_per_second"] == pytest.approx(products * line["examples_per_second"], rel=1e-3)
    assert line["share_of_peak"] == pytest.approx(line["flops_per_second"] / 1e9, abs=1e-4)
    (trace,) = (tmp_path / "trace").rglob("perfetto_trace.json.gz")
    with gzip.open(trace, "rt") as file:
        assert "train_steps" in {event.get("name") for event in json.load(file)["traceEvents"]}
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    programs = {path.name: path.read_text() for path in (tmp_path / "hlo").iterdir()}
    assert set(programs) == {"train-step.hlo.txt" if as_batches else "train-steps.hlo.txt", "train-evaluate.hlo.txt"}
    assert all("HloModule jit_" in text for text in programs.values())
    said = capsys.readouterr().err
    assert "costs: training " in said and "examples/s" in said and "a trace of steps is in" in said


def test_seeds_cost_what_they_cost_together(peak):
    lines = [
        pspinal_jax.fit(nn.Dense(3), (X, Y), epochs=1, batch_size=16, num_seeds=2, seed_mode=mode).history[-1]
        for mode in ("loop", "vmap")
    ]
    for line in lines:
        assert line["flops_per_second"] == pytest.approx(96 * line["examples_per_second"], rel=1e-3)


def test_blocks_of_steps_are_counted_by_the_step(peak):
    from pspinal_jax.training.fit import CompiledTraining
    from pspinal_jax.training.programs import Chunk, SeedStates
    from pspinal_jax.training.step import EpochPlan

    example = jax.ShapeDtypeStruct((8,), np.float32), jax.ShapeDtypeStruct((), np.int32)
    programs = CompiledTraining(nn.Dense(3), example, 16).programs
    programs.block = 32
    states = SeedStates(programs, [0])
    states.plan_epoch(lambda seed, epoch: np.arange(64, dtype=np.int32), 0, np.ones((1, 4), np.float32))
    states.run(Chunk(0, 0, programs.replicate((X, Y.astype(np.int32)))))
    assert isinstance(states._groups[0].plan, EpochPlan) and states.step_flops() == {"float32": 16 * 96}


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("profile", "dump_hlo"):
        with pytest.raises((UsageError, RunError), match=name):
            pspinal_jax.fit(nn.Dense(3), (X, Y), epochs=1, **{name: tmp_path / "file" / "inside"})


@pytest.mark.slow
def test_a_run_holds_its_costs_and_its_report_shows_them(peak, npz_path, tmp_path, capsys):
    flags = "--epochs 2 --batch-size 8 --eval-batch-size 16 --data.num-classes 3 --data.num-validation 24 --no-retrain"
    model = "--model.layer-width 6 --model.num-layers 2"
    words = ["train", "digits", "--data.path", str(npz_path), *flags.split(), *model.split()]
    run = tmp_path / "run"
    assert main([*words, "--workdir", str(run), "--profile", str(tmp_path / "trace")]) == 0
    assert "costs: training " in capsys.readouterr().err
    assert list((tmp_path / "trace").rglob("perfetto_trace.json.gz"))
    result = json.loads((run / "result.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert result["costs"] == costs.total_costs(lines) and result["costs"]["share_of_peak"] > 0
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    for words in costs.describe_costs(result["costs"]).values():
        assert words.split(",")[0] in page
