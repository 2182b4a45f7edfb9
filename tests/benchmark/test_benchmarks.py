"""The benchmarks measure what they say, in small; their numbers are not tested."""

import csv
import dataclasses
import importlib
import json
import math
import time
from importlib.util import find_spec

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.benchmark import BENCHMARKS, head, run, steps
from pspinal_jax.benchmark import step as benchmark_step
from pspinal_jax.benchmark.report import format_record, plot_entries
from pspinal_jax.benchmark.timing import (
    EAGER,
    GRAPH,
    Case,
    Settings,
    Timing,
    beyond,
    median_interval,
    ratio,
    table,
    time_interleaved,
    timed,
)
from pspinal_jax.benchmark.whole import train_published
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.models import build_model
from pspinal_jax.recipes import list_recipes
from pspinal_jax.recipes.schema import AugmentConfig

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


def test_a_further_case_is_begun_only_if_it_can_end():
    cases = [beyond(Case(name, lambda: table("t", [{"": 1}])), times) for name, times in (("a", 5), ("b", 1))]
    begun = {"section": "machine", "entries": [], "left_out": [], "further": ["a", "b"], "seconds": 7.0}
    begun["comparison_seconds"] = 100.0
    record = run.measure("machine", cases, lambda record: None, record=begun, end=time.monotonic() + 200)
    assert record["further"] == ["a"] and len(record["entries"]) == 1 and record["seconds"] >= 7.0


def test_the_comparison_is_what_further_cases_are_expected_to_take():
    """A check takes time and has no figures, so that it does not count as one."""
    cases = [Case("check", lambda: time.sleep(0.2)), *failing(ValueError())[1:]]
    record = run.measure("machine", cases, lambda record: None)
    assert 0 <= record["comparison_seconds"] < 0.2


def test_a_table_gives_way_to_one_with_more_alternatives():
    few, more = ({"title": "t", "alternatives": dict.fromkeys(names)} for names in ("a", "ab"))
    entries = []
    for entry in (few, more, few | {"title": "u"}, table("t", [{"": 1}])):
        run._add(entries, entry)
    assert [list(entry.get("alternatives", "-")) for entry in entries] == [["a", "b"], ["a"], ["-"]]


def test_no_round_but_two_begins_after_the_deadline():
    for deadline, rounds in ((0.0, 2), (math.inf, 4)):
        how = {"rounds": 4, "seconds_per_round": 0.0, "max_repetitions": 1, "deadline": deadline}
        assert len(time_interleaved({"": lambda count: None}, **how)[""].seconds) == rounds


def test_a_cases_precision_is_set_while_it_runs():
    def precisions():
        torch = importlib.import_module("torch") if find_spec("torch") else None
        theirs = torch and (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
        return jax.config.jax_default_matmul_precision, theirs

    before, seen = precisions(), []
    note = lambda: seen.append(jax.config.jax_default_matmul_precision)  # noqa: E731
    run.measure("machine", [Case(name, note, name) for name in ("tf32", "float32")], lambda record: None)
    assert seen == ["tensorfloat32", "highest"] and precisions() == before


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
        ours = [name for name in entry["alternatives"] if "PyTorch" not in name]  # with torch, eager PyTorch too
        assert ours == list(head.AT_DEPTH) and "s of the first call" in entry["bars"]
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


def test_step_flops_leave_out_the_gradient_of_the_pixels():
    recipe = steps.benchmark_recipe("mnist-paper")
    layers = [784 + 128 * number for number in range(4)]
    forward = 64 * 2 * (sum(layers) * 128 + (784 + 512) * 10)
    pixels = 64 * 2 * 784 * (4 * 128 + 10)
    data = steps.Data(np.zeros((64, 28, 28, 1), np.uint8), np.zeros(64, np.int32), 10)
    assert steps.Steps.of_recipe(recipe, data).flops() == 3 * forward - pixels


@pytest.mark.parametrize("name", list_recipes())
def test_any_recipe_has_data_to_be_measured_on(name, monkeypatch):
    monkeypatch.setattr(steps, "_NUM_EXAMPLES", 64)
    recipe = steps.benchmark_recipe(name, 16)
    data = steps.fake_data(recipe)
    build_model(recipe, data.images.shape[1:], data.num_classes)
    assert data.labels.max() < data.num_classes and len(data.images) >= 16
    assert recipe.data.augment == "none" and recipe.augment == AugmentConfig()


SIZES = "--features 12 --width 5 --layers 2 --classes 3 --batch 4 --dtype bfloat16"


@pytest.fixture
def no_machine(monkeypatch, without_torch):
    """The machine's rates are not measured, and the work is not repeated."""
    monkeypatch.setattr("pspinal_jax.benchmark.timing.machine", lambda settings: [])
    monkeypatch.setattr("pspinal_jax.benchmark.head.IMPLEMENTATIONS", ("fused",))
    monkeypatch.setattr(head.HeadGradient, "op_by_op", lambda case: lambda count: None)
    return ["--rounds", "1", "--seconds-per-round", "0.001"]


def test_the_head_is_measured_at_given_sizes_and_written_as_csv_too(no_machine, tmp_path, capsys):
    assert main(["benchmark", "head", *SIZES.split(), *no_machine, "--workdir", str(tmp_path)]) == 0
    (entry,) = json.loads((tmp_path / "results.json").read_text())["entries"]
    assert entry["title"] == "D 12, W 5, L 2, C 3, batch 4, bfloat16"
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["alternative"] for row in rows] == list(entry["alternatives"])
    assert {(row["benchmark"], row["table"]) for row in rows} == {("head", entry["title"])}
    assert float(rows[0]["median ms"]) == 1e3 * entry["alternatives"]["fused, compiled loop"]["median"]
    assert main(["benchmark", "head", "--layers", "0", "--workdir", str(tmp_path)]) == 2
    assert "--num-layers is 0, expected" in capsys.readouterr().err


def test_the_step_of_a_recipe_file_is_measured(no_machine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "_NUM_EXAMPLES", 64)
    file = tmp_path / "mine.py"
    file.write_text(
        "from pspinal_jax.recipes import *\nfrom pspinal_jax.recipes.schema import Card\n"
        "recipe = Recipe(Card('mine', 'none', 'm'), DataConfig('features'), ModelConfig(layer_width=4, num_layers=2))\n"
    )
    words = ["benchmark", "step", "--recipe", str(file), "--batch-size", "32", *no_machine, "--workdir", str(tmp_path)]
    assert main([*words, "--features", "6", "--classes", "3"]) == 0
    (entry,) = json.loads((tmp_path / "results.json").read_text())["entries"]
    assert entry["title"] == f"one training step of {file}, batch 32, float32"
    kernels = 6 * 4 + 10 * 4 + 14 * 3
    assert entry["flops"] == 32 * 2 * (3 * kernels - 6 * (4 + 4 + 3))
    assert main([*words, "--image-size", "7"]) == 2
    assert main([*words[:2], "--recipe", "mnist", "--features", "7"]) == 2
    assert "--num-features is 7, but mnist sees images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("backbone", "recipe"), [("resnet18", "caltech101-paper"), ("vgg5", "kmnist-paper"), (None, "mnist-paper")]
)
def test_a_backbone_brings_a_recipe_that_it_fits_into(backbone, recipe, monkeypatch):
    monkeypatch.setattr(steps, "_step_cases", lambda settings, recipe_in, name, data: (recipe_in("bfloat16"), data))
    made, data = steps.step(None, backbone=backbone, batch_size=2, image_size=64 if backbone == "resnet18" else None)
    assert (made.card.name, made.dtype, made.batch_size) == (recipe, "bfloat16", 2)
    assert made.model.backbone == (backbone or "none") and data.images.shape[1] == (
        64 if backbone == "resnet18" else 28
    )


def test_any_module_is_measured_beside_another_way():
    x, y = np.ones((8, 6), np.float32), np.zeros(8, np.int32)
    entry = benchmark_step(
        nn.Dense(3),
        (x, y),
        optimizer=optax.sgd(0.1),
        peers={"mine": lambda: x @ x.T},
        rounds=1,
        seconds_per_round=0.001,
    )
    assert list(entry["alternatives"]) == [steps.LOOP, steps.CALL, "mine"] and entry["flops"] == 2 * 2 * 8 * 6 * 3
    assert entry["alternatives"]["mine"]["times_faster"]["median"] > 0
    with pytest.raises(UsageError, match="the model is of type str"):
        benchmark_step("Net", (x, y), rounds=1)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", ["mnist-paper", "mnist", "linear"])
def test_a_step_recorded_as_a_graph_begins_where_the_eager_one_does(name, monkeypatch):
    """Without CUDA a recording is a function that is called; what surrounds it is tested."""
    torch = pytest.importorskip("torch")
    from pspinal_jax.benchmark import torch_reference

    recorded = []

    def record(call):
        loss = torch.zeros(())
        recorded.append(call)
        return lambda: loss.copy_(call().detach()), loss

    monkeypatch.setattr(torch_reference, "_record", record)
    monkeypatch.setattr(torch_reference, "_aside", lambda call: call())
    recipe = steps.benchmark_recipe(name, 64)
    images, labels, num_classes = steps.fake_data(recipe)
    data = steps.Data(images[:640], labels[:640], num_classes)
    steps.check_equal(recipe, data, [GRAPH])
    assert len(recorded) == 1
    clipped = dataclasses.replace(recipe, gradient_clip=1.0)
    assert torch_reference.missing_setting(recipe) is None
    assert torch_reference.missing_setting(clipped) == "gradient_clip"


@pytest.mark.torch
def test_the_recorded_head_gives_the_gradient_of_the_same_features(monkeypatch):
    pytest.importorskip("torch")
    from pspinal_jax.benchmark import torch_reference

    monkeypatch.setattr(torch_reference, "_record", lambda call: (call, call()))
    monkeypatch.setattr(torch_reference, "_aside", lambda call: call())
    head.torch_alternatives(head.HeadGradient(SMALL), [GRAPH])[GRAPH](2)


@pytest.mark.torch
def test_pytorch_moves_the_images_about():
    torch = pytest.importorskip("torch")
    from pspinal_jax.benchmark.torch_reference import passes, warped

    images = torch.zeros(64, 28, 28, 1, dtype=torch.uint8)
    images[:, 10:18, 10:18] = 200
    moved = warped(images)
    assert moved.shape == images.shape and moved.dtype == torch.uint8
    means = moved.float().mean((1, 2, 3)) / images.float().mean((1, 2, 3))
    assert 0.2 < float(means.min()) < 0.9 < float(means.max()) < 1.2
    passes(warped, images)(2)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("backbone", ["resnet18", pytest.param("efficientnet_lite0", marks=pytest.mark.slow)])
def test_a_step_on_photographs_is_the_same_in_pytorch(backbone, monkeypatch):
    pytest.importorskip("torch")
    from pspinal_jax.benchmark import torch_reference

    recipe = steps.benchmark_recipe("caltech101-paper", 4, backbone=backbone, side=64)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, layer_width=8))
    data = steps.fake_data(recipe)
    assert steps.Steps.of_recipe(recipe, data).flops() > 3 * 4 * 2 * 1e6
    ours, begun = steps.our_steps(recipe, data)
    variables = begun.variables
    assert list(ours) == [steps.BATCH]
    for run_steps in (ours | steps.torch_steps(recipe, data, variables, [EAGER])).values():
        run_steps(1)
    steps.check_equal(recipe, data, [EAGER])
    if backbone == "resnet18":
        monkeypatch.setattr(torch_reference, "load_units", lambda *given: None)
        with pytest.raises(RunError, match="PyTorch eager's loss differs from ours"):
            steps.check_equal(recipe, data, [EAGER])
