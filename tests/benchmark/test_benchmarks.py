"""The benchmarks measure what they say, in small; their numbers are not tested."""

import builtins
import dataclasses
import json

import jax
import numpy as np
import pytest

from pspinal_jax import weights
from pspinal_jax.__main__ import main
from pspinal_jax.benchmark import head
from pspinal_jax.benchmark.compile import measure_published
from pspinal_jax.benchmark.report import Measurement, write_report
from pspinal_jax.benchmark.roofline import count_flops
from pspinal_jax.benchmark.timing import Timing, median_interval, ratio, time_interleaved
from pspinal_jax.errors import RunError

SMALL = head.Shape(6, 4, 3, 2, 5)


def test_alternatives_take_turns_and_are_timed_apart():
    calls = []
    work = {name: lambda count, name=name: calls.append((name, count)) for name in "ab"}
    timings = time_interleaved(work, rounds=3, seconds_per_round=0.0, most_repetitions=1)
    assert [name for name, _ in calls[-12:]] == list("aabb" * 3)
    assert all(len(timing.seconds) == 3 for timing in timings.values())


def test_ratios_are_taken_within_a_round():
    ours, peer = Timing(np.array([1.0, 10.0, 2.0]), 0.0), Timing(np.array([2.0, 20.0, 4.0]), 0.0)
    assert ratio(peer, ours) == {"median": 2.0, "interval_95": [2.0, 2.0]}
    low, high = median_interval(np.arange(100.0))
    assert 30 < low < 49.5 < high < 70


def test_every_alternative_computes_the_gradient(monkeypatch):
    case = head.Case(SMALL)
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
    assert not np.any(jax.tree.leaves(run(0)[1])[0])
    assert np.any(jax.tree.leaves(run(1)[1])[0])


def test_flops_count_three_products_a_kernel():
    batch, entries = 5, 6 * 4 + 10 * 4 + 14 * 4 + 18 * 2
    assert SMALL.flops == 3 * 2 * batch * entries


def test_the_report_counts_the_share_of_the_peak(tmp_path, capsys):
    timings = {"ours": Timing(np.array([1e-3, 1e-3]), 1.0), "peer": Timing(np.array([3e-3, 3e-3]), 2.0)}
    measurements = [Measurement("a", timings, "ours", 1000), Measurement("b", timings, "ours", 1000)]
    results = write_report(
        tmp_path / "new", measurements, ["x"], "command", {"flops_per_second": 4e6, "bytes_per_second": 1e9}
    )
    assert results["geometric_mean_times_faster"] == {"peer": pytest.approx(3.0)}
    ours = results["measurements"][0]["alternatives"]["ours"]
    assert ours["median"] == 1e-3 and ours["share_of_peak"] == pytest.approx(0.25)
    assert json.loads((tmp_path / "new/results.json").read_text()) == results
    assert (tmp_path / "new/results.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "3.00 x" in printed and "25 %" in printed and "left out: x" in printed


def test_without_torch_the_head_is_measured_and_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    def without_torch(name, importer=None, *rest, **kwargs):
        if name == "torch" and importer["__name__"].startswith("pspinal_jax"):
            raise ImportError(name)
        return imported(name, importer, *rest, **kwargs)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without_torch)
    monkeypatch.setattr(head, "SHAPES", (SMALL,))
    monkeypatch.setattr("pspinal_jax.benchmark.roofline.measure_roofline", lambda dtype: FAKE_CEILINGS)
    flags = ["--rounds", "1", "--seconds-per-round", "0.001", "--workdir", str(tmp_path)]
    assert main(["benchmark", "head", *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert "torch" not in results["versions"]
    assert "torch is not installed" in results["left_out"][0]
    assert "left out: PyTorch eager" in capsys.readouterr().out


FAKE_CEILINGS = {"flops_per_second": 1e11, "bytes_per_second": 1e10}


def test_depth_reports_compile_and_run_time(tmp_path, capsys):
    assert main(["benchmark", "depth", "--rounds", "1", "--depths", "1", "2", "--workdir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for by_depth in results["alternatives"].values():
        assert set(by_depth) == {"1", "2"}
        assert all(value > 0 for values in by_depth.values() for value in values.values())
    assert (tmp_path / "results.png").exists()
    assert "scan, packed parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_compile_times_a_run_without_and_with_its_cache(tmp_path, capsys):
    assert (
        main(["benchmark", "compile", "--rounds", "1", "--workdir", str(tmp_path), "--train", "digits", "epochs=1"])
        == 0
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert "train digits --epochs=1" in results["title"]
    assert results["seconds"]["cold"][0] > results["seconds"]["warm"][0] > 0
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
    first, second = measure_published(tmp_path / "data.npz", 2)
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert 0 < first["seconds"] < second["seconds"]
    assert 20 < first["test"] < second["test"]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_an_epoch_is_an_epoch_for_everyone(monkeypatch):
    pytest.importorskip("torch")
    from pspinal_jax.benchmark import epoch, step

    for module in (epoch, step):
        monkeypatch.setattr(module, "NUM_EXAMPLES", 640)
    recipe, data = step.benchmark_recipe("mnist-paper"), tuple(array[:640] for array in step.fake_data())
    work = epoch.jax_epochs(recipe, data) | epoch.torch_epochs(recipe, data)
    assert list(work) == [
        epoch.OURS,
        "jitted step, Python loop",
        "PyTorch eager",
        "torch.compile",
        epoch.PUBLISHED,
    ]
    for name in (epoch.OURS, "jitted step, Python loop", "PyTorch eager", epoch.PUBLISHED):
        work[name](1)


def test_an_unknown_benchmark_is_named(capsys):
    assert main(["benchmark", "heat"]) == 2
    assert "unknown benchmark 'heat'; there are: step, head, epoch, compile, depth, input" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_pytorch_computes_the_same_and_a_difference_is_noticed(monkeypatch):
    pytest.importorskip("torch")
    case = head.Case(SMALL)
    for work in list(head.torch_alternatives(case).values())[:1]:
        work(2)
    head.check_equal(case)
    monkeypatch.setattr(head.Case, "gradient", lambda case, *how: lambda *given: (given[0], given[1]))
    with pytest.raises(RunError, match="fused's gradient of features differs from PyTorch's"):
        head.check_equal(case)


def test_flops_are_counted_in_traced_functions():
    def function(x, kernel, matrix):
        maps = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jax.jit(lambda y: y @ matrix)(maps)

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 5, 5, 3), (3, 3, 3, 7), (7, 4))]
    assert count_flops(function, *shapes) == 2 * 2 * 25 * (27 * 7 + 7 * 4)


def small_images(monkeypatch):
    from pspinal_jax.benchmark import image_step, step

    monkeypatch.setattr(image_step, "NUM_CLASSES", 5)
    recipe = step.benchmark_recipe("caltech101-paper", batch_size=4)
    return image_step, dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, image_size=64),
        model=dataclasses.replace(recipe.model, backbone="resnet18", layer_width=8),
    )


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_step_on_photographs_is_the_same_in_pytorch(monkeypatch):
    pytest.importorskip("torch")
    image_step, recipe = small_images(monkeypatch)
    batch = image_step.fake_images(recipe)
    assert image_step.image_step_flops(recipe) > 3 * 4 * 2 * 1e6
    ours = image_step.ImageStep(recipe, batch)
    work = image_step.torch_image_steps(recipe, batch, ours)
    assert list(work) == ["PyTorch eager, channels last", "torch.compile, channels last"]
    work["PyTorch eager, channels last"](1)
    ours.run(1)
    right = weights.resnet_state_dict
    monkeypatch.setattr(weights, "resnet_state_dict", lambda *given: right(*given) | {"bn1.bias": np.ones(64, "f")})
    with pytest.raises(RunError, match="PyTorch's loss differs from ours"):
        image_step.check_equal(recipe, batch)
