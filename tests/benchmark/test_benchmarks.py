"""The benchmarks measure what they say, in small; their numbers are not tested."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.benchmark import BENCHMARKS, head, run, steps
from pspinal_jax.benchmark.report import format_record, plot_entries
from pspinal_jax.benchmark.timing import (
    EAGER,
    Case,
    Settings,
    Timing,
    count_flops,
    median_interval,
    ratio,
    table,
    time_interleaved,
    timed,
)
from pspinal_jax.benchmark.whole import train_published
from pspinal_jax.errors import RunError, UsageError

SMALL = head.Shape(6, 4, 3, 2, 5)


def test_alternatives_take_turns_and_are_timed_apart():
    calls = []
    work = {name: lambda count, name=name: calls.append((name, count)) for name in "ab"}
    timings = time_interleaved(work, rounds=3, seconds_per_round=0.0, max_repetitions=1)
    assert [name for name, _ in calls[-12:]] == list("aabb" * 3)
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_ratios_are_taken_within_a_round():
    ours, peer = Timing(np.array([1.0, 10.0, 2.0]), 0.0), Timing(np.array([2.0, 20.0, 4.0]), 0.0)
    assert ratio(peer, ours) == {"median": 2.0, "interval_95": (2.0, 2.0)}
    low, high = median_interval(np.arange(100.0))
    assert 30 < low < 49.5 < high < 70


@pytest.mark.slow
def test_every_alternative_computes_the_gradient(monkeypatch):
    case = head.HeadGradient(SMALL)
    assert set(head.alternatives(case)) == {
        "fused, compiled loop",
        "unrolled, compiled loop",
        "scan, compiled loop",
        "fused from the documented tree",
        "fused, call by call",
        "unrolled, op by op",
    }
    for work in head.alternatives(case).values():
        work(2)
    # A pass in the loop is a gradient: after none of them there is none.
    run = case.in_loop("fused")
    assert not np.any(jax.tree.leaves(run(0)[-1])[0])
    assert np.any(jax.tree.leaves(run(1)[-1])[0])


def test_flops_count_three_products_a_kernel():
    batch, entries = 5, 6 * 4 + 10 * 4 + 14 * 4 + 18 * 2
    assert SMALL.flops == 3 * 2 * batch * entries


@pytest.fixture
def timings(monkeypatch):
    """An entry of 'ours' and a 'peer' that takes three times as long."""
    seconds = {"ours": Timing(np.array([1e-3, 1e-3]), 1.0), "peer": Timing(np.array([3e-3, 3e-3]), 2.0)}
    monkeypatch.setattr("pspinal_jax.benchmark.timing.time_interleaved", lambda *given, **how: seconds)
    settings = Settings(("float32",), peaks={"float32": 4e6})
    return lambda title: timed(title, {}, 1000, "float32", settings, examples=64)


def test_results_hold_ratios_shares_of_the_peak_and_rates(timings, tmp_path):
    cases = [Case("a", lambda: timings("a")), Case("b", lambda: timings("b"))]
    record = json.loads(json.dumps(run.measure("step", cases, lambda record: None)))
    assert record["status"] == "done" and [entry["title"] for entry in record["entries"]] == ["a", "b"]
    ours, peer = record["entries"][0]["alternatives"].values()
    assert ours["median"] == 1e-3 and ours["share_of_peak"] == pytest.approx(0.25)
    assert ours["examples_per_second"] == pytest.approx(64_000)
    assert ours["times_faster"] is None and peer["times_faster"]["median"] == pytest.approx(3.0)
    printed = format_record(record)
    assert "3.00 x" in printed and "25 %" in printed and "64,000" in printed
    assert plot_entries(tmp_path / "results.png", record["entries"], "a CPU")
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_tables_of_one_title_are_one():
    cases = [Case(str(number), lambda number=number: table("t", [{"": number, "x": 1.5}])) for number in (1, 2)]
    record = run.measure("depth", cases, lambda record: None)
    assert format_record(record).count("| --- |") == 1


def failing(error):
    def work():
        raise error

    return [Case("first", work), *(Case(name, lambda: table("t", [{"": 1}])) for name in ("second", "third"))]


def test_a_case_that_fails_costs_the_others_nothing_in_a_suite():
    saved = []
    record = run.measure(
        "machine", failing(ValueError("no\nmemory")), lambda r: saved.append(r["status"]), keep_going=True
    )
    assert "first: ValueError: no memory" in record["left_out"] and len(record["entries"]) == 2
    assert saved == ["running"] * 4 + ["done"]
    with pytest.raises(ValueError, match="memory"):
        run.measure("machine", failing(ValueError("no memory")), lambda r: None)


def test_different_work_ends_a_section():
    with pytest.raises(RunError, match="differ"):
        run.measure("machine", failing(RunError("they differ")), lambda r: None, keep_going=True)


def test_no_case_but_the_first_is_begun_after_its_time():
    """A check takes time and has no figures, so that it does not count as one."""
    cases = [Case("check", lambda: None), *failing(ValueError())[1:]]
    record = run.measure("machine", cases, lambda r: None, seconds=-1.0)
    assert record["left_out"][-1] == "third: no time left" and len(record["entries"]) == 1


def test_a_cases_precision_is_set_before_it_runs():
    seen = []
    note = lambda: seen.append(jax.config.jax_default_matmul_precision)  # noqa: E731
    run.measure("machine", [Case(name, note, name) for name in ("tf32", "float32")], lambda record: None)
    assert seen == ["tensorfloat32", "highest"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_makes_its_cases_without_torch(name, monkeypatch, without_torch):
    monkeypatch.setattr(steps, "_NUM_EXAMPLES", 64)
    settings = Settings(("float32",), image_side=32)
    if name == "compare":
        with pytest.raises(UsageError, match="torch is not installed"):
            BENCHMARKS[name].make_cases(settings)
    else:
        names = [case.name for case in BENCHMARKS[name].make_cases(settings)]
        assert names and len(set(names)) == len(names)


@pytest.mark.slow
def test_without_torch_the_head_is_measured_and_what_is_missing_is_named(without_torch, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(head, "SHAPES", (SMALL,))

    def machine(settings):
        settings.peaks["float32"] = 1e11
        return [Case("float32", lambda: table("Peak rates", [{"": 1}], flops_per_second=1e11))]

    monkeypatch.setattr("pspinal_jax.benchmark.timing.machine", machine)
    flags = ["--rounds", "1", "--seconds-per-round", "0.001", "--workdir", str(tmp_path)]
    assert main(["benchmark", "head", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    peak, measured = results["entries"]
    assert peak["flops_per_second"] == 1e11 and results["command"].startswith("pspinal-jax benchmark head --rounds 1")
    assert all(values["share_of_peak"] > 0 for values in measured["alternatives"].values())
    assert "torch is not installed" in results["left_out"][0]
    streams = capsys.readouterr()
    assert "left out: PyTorch" in streams.out and streams.err.startswith("left out: PyTorch")


@pytest.mark.slow
def test_depth_reports_compile_and_run_time(tmp_path, capsys):
    assert main(["benchmark", "depth", "--rounds", "1", "--depths", "1", "2", "--workdir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert ["L 1" in results["entries"][0]["title"], "L 2" in results["entries"][1]["title"]] == [True, True]
    for entry in results["entries"]:
        assert list(entry["alternatives"]) == list(head.AT_DEPTH) and "s of the first call" in entry["bars"]
        assert all(each["first_call"] > each["median"] > 0 for each in entry["alternatives"].values())
    assert (tmp_path / "results.png").exists()
    assert "scan, packed parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_times_a_run_without_and_with_its_cache(tmp_path, capsys):
    assert (
        main(["benchmark", "compile", "--rounds", "1", "--workdir", str(tmp_path), "--train", "digits", "epochs=1"])
        == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    (entry,) = results["entries"]
    assert "train digits --epochs=1" in entry["title"]
    assert entry["seconds"]["cold"][0] > entry["seconds"]["warm"][0] > 0
    assert (tmp_path / "results.png").exists()
    assert "| warm |" in capsys.readouterr().out


def test_compile_says_why_a_run_failed(tmp_path, capsys):
    assert main(["benchmark", "compile", "--rounds", "1", "--workdir", str(tmp_path), "--train", "digitz"]) == 1
    assert "unknown recipe 'digitz'" in capsys.readouterr().err


@pytest.mark.torch
def test_the_published_settings_are_trained_in_pytorch(tmp_path):
    pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    labels = np.arange(1280) % 10
    images = rng.integers(0, 100, (1280, 28, 28), np.uint8)
    images[np.arange(1280), labels] += 150
    arrays = {
        f"{split}_{kind}": a for split in ("train", "test") for kind, a in (("images", images), ("labels", labels))
    }
    np.savez(tmp_path / "data.npz", **arrays)
    first, second = train_published(tmp_path / "data.npz", 2)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert 0 < first["seconds"] < second["seconds"]
    assert 20 < first["test"] < second["test"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_an_epoch_is_an_epoch_for_everyone():
    pytest.importorskip("torch")
    recipe = steps.benchmark_recipe("mnist-paper")
    images, labels, num_classes = steps.fake_data(recipe)
    data = steps.Data(images[:640], labels[:640], num_classes)
    work = steps.our_epochs(recipe, data) | steps.torch_epochs(recipe, data, [EAGER])
    assert list(work) == [steps.EPOCH, steps.CALL, EAGER, steps.PUBLISHED]
    for run_epochs in work.values():
        run_epochs(1)


def test_an_unknown_benchmark_is_named(capsys):
    assert main(["benchmark", "heat"]) == 2
    assert "unknown benchmark 'heat'; there are: machine, step, head" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_pytorch_computes_the_same_and_a_difference_is_noticed(monkeypatch):
    pytest.importorskip("torch")
    case = head.HeadGradient(SMALL)
    head.torch_alternatives(case)["PyTorch eager"](2)
    head.check_equal(case)
    monkeypatch.setattr(head.HeadGradient, "gradient", lambda case, *how: lambda *given: (given[0], given[1]))
    with pytest.raises(RunError, match="fused's gradient of features differs from PyTorch's"):
        head.check_equal(case)


def test_flops_are_counted_in_traced_functions():
    def function(x, kernel, matrix):
        maps = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.jit(lambda y: y @ matrix)(maps)

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 5, 5, 3), (3, 3, 3, 7), (7, 4))]
    products = 2 * 2 * 25 * (27 * 7 + 7 * 4)  # and fewer, since what a convolution pads with zeros is not counted
    assert 0.7 * products < count_flops(function, *shapes) <= products


def test_step_flops_leave_out_the_gradient_of_the_pixels():
    recipe = steps.benchmark_recipe("mnist-paper")
    layers = [784 + 128 * number for number in range(4)]
    forward = 64 * 2 * (sum(layers) * 128 + (784 + 512) * 10)
    pixels = 64 * 2 * 784 * (4 * 128 + 10)
    counted = steps.step_flops(recipe, steps.Data(np.zeros((64, 28, 28, 1), np.uint8), None, 10))
    assert counted == pytest.approx(3 * forward - pixels, rel=0.02)  # and what is not a product


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("efficientnet_lite0", marks=pytest.mark.slow)])
def test_a_step_on_photographs_is_the_same_in_pytorch(backbone, monkeypatch):
    pytest.importorskip("torch")
    from pspinal_jax.benchmark import torch_reference

    recipe = steps.benchmark_recipe("caltech101-paper", 4, backbone=backbone, side=64)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layer_width=8))
    data = steps.fake_data(recipe)
    assert steps.step_flops(recipe, data) > 3 * 4 * 2 * 1e6
    ours, variables = steps.our_steps(recipe, data)
    assert list(ours) == [steps.BATCH]
    for run_steps in (ours | steps.torch_steps(recipe, data, variables, [EAGER])).values():
        run_steps(1)
    steps.check_equal(recipe, data, [EAGER])
    if backbone == "resnet18":
        monkeypatch.setattr(torch_reference, "load_units", lambda *given: None)
        with pytest.raises(RunError, match="PyTorch eager's loss differs from ours"):
            steps.check_equal(recipe, data, [EAGER])
