"""What a user sees: exit statuses, one clear line for what is wrong, no traceback."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.training.signals import Stopped

SMALL = ["--epochs", "1", "--batch-size", "16", "--eval-batch-size", "16", "--data.num-validation", "20"]


def run(capsys, *args):
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_refused(result, status, *fragments):
    got, _, error = result
    lines = [line for line in error.splitlines() if not line.startswith("train:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), error
    assert got == status, error
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.fixture(scope="module")
def trained(npz_path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("cli") / "run"
    assert (
        main(
            [
                "train",
                "digits",
                "--data.path",
                str(npz_path),
                "--data.num-classes",
                "3",
                "--workdir",
                str(workdir),
                *SMALL,
            ]
        )
        == 0
    )
    return workdir


def test_train_and_evaluate(trained, capsys):
    status, out, _ = run(capsys, "evaluate", trained)
    assert status == 0 and "test accuracy" in out and "class, worst first" in out
    assert json.loads((trained / "evaluation.json").read_text())["examples"] == 50


def test_train_again_reports_the_finished_run(trained, npz_path, capsys):
    again = run(
        capsys, "train", "digits", "--data.path", npz_path, "--data.num-classes", 3, "--workdir", trained, *SMALL
    )
    assert again[0] == 0 and "test accuracy" in again[1]
    assert f"{trained} is already finished; skipping training" in again[2]


def test_a_run_that_is_stopped_ends_with_the_status_that_its_engine_wants(monkeypatch, capsys):
    def stop(*args, **options):
        raise Stopped("SIGTERM")

    monkeypatch.setattr("pspinal_jax.runs.run.train", stop)
    assert main(["train", "digits"]) == 0
    assert main(["train", "digits", "--exit-status-when-stopped", "143"]) == 143
    assert "stopped by SIGTERM; the run is saved" in capsys.readouterr().err
    assert main(["train", "digits", "--exit-status-when-stopped", "256"]) == 2
    assert "--exit-status-when-stopped is 256, expected 0 .. 255" in capsys.readouterr().err


def test_recipes_are_listed_with_row_model_and_published_accuracy(capsys):
    status, out, _ = run(capsys, "recipes")
    (line,) = [line for line in out.splitlines() if line.startswith("mnist-paper ")]
    assert status == 0 and "MNIST" in line and "784 pixels" in line and "98.19 %" in line and "paper" in line


@pytest.mark.parametrize(
    ("args", "status", "fragments"),
    [
        (["trian", "digits"], 2, ["unknown command 'trian'", "there are: prepare, train"]),
        (["train"], 2, ["train takes a recipe", "mnist-paper"]),
        (["train", "--epochs", "3"], 2, ["recipe before its flags"]),
        (["train", "mnits"], 2, ["unknown recipe 'mnits'", "there are: ", "mnist,"]),
        (["train", "digits", "--epocs", "3"], 2, ["--epocs", "--epochs"]),
        (["train", "digits", "--model.layer-widht", "3"], 2, ["--model.layer-width"]),
        (["train", "digits", "--epochs", "many"], 2, ["--epochs", "many"]),
        (["train", "digits", "--model.head", "big"], 2, ["invalid choice 'big'", "progressive"]),
        (["train", "digits", "--epochs", "0"], 2, ["epochs is 0", "at least 1"]),
        (["train", "mnist", "--data.path", "none.npz"], 1, ["none.npz cannot be read", "No such file"]),
        (["evaluate", "nowhere"], 1, ["nowhere is not a run directory"]),
        (["evaluate"], 2, ["Missing from pspinal-jax evaluate", "Run directory"]),
        (["recipes", "all"], 2, ["Unrecognized options: all"]),
    ],
)
def test_a_wrong_command_gets_one_line(capsys, tmp_path, monkeypatch, args, status, fragments):
    monkeypatch.chdir(tmp_path)
    assert_refused(run(capsys, *args), status, *fragments)
    assert not list(tmp_path.rglob("*")), "nothing may be written"


def train_on(capsys, tmp_path, path, *flags):
    return run(capsys, "train", "digits", "--data.path", path, "--workdir", tmp_path / "run", *SMALL, *flags)


def save(path, arrays, **changes):
    np.savez(path, **{name: array for name, array in {**arrays, **changes}.items() if array is not None})
    return path


def test_bad_data_gets_one_line(capsys, tmp_path, arrays):
    features = np.full((96, 5), np.nan)
    bad = {
        "lacks test_labels": {"test_labels": None},
        "96 examples but 95 labels": {"train_labels": np.zeros(95, int)},
        "labels go from 10 to 10, expected 0 .. 9": {"train_labels": np.full(96, 10)},
        "lacks 480 of 480 values (NaN, infinity": {"train_images": features, "test_images": features[:50]},
    }
    for message, changes in bad.items():
        path = save(tmp_path / "bad.npz", arrays, **changes)
        assert_refused(train_on(capsys, tmp_path, path), 1, "bad.npz", message)
        assert not (tmp_path / "run").exists()


def test_sizes_that_do_not_fit_get_one_line(capsys, tmp_path, npz_path):
    assert_refused(train_on(capsys, tmp_path, npz_path, "--batch-size", 97), 2, "--batch-size is 97", "at most 76")
    assert_refused(train_on(capsys, tmp_path / "b", npz_path, "--data.num-validation", 96), 2, "num-validation is 96")
    assert not list(tmp_path.rglob("config.json"))


def test_a_run_directory_of_another_recipe_gets_one_line(capsys, trained, npz_path):
    flags = ["--data.path", npz_path, "--workdir", trained, *SMALL]
    assert_refused(
        run(capsys, "train", "mnist", *flags), 2, "card.name was 'digits' and is now 'mnist'", "another workdir"
    )
    other = ["--data.num-classes", 3, "--seed", 4]
    assert_refused(run(capsys, "train", "digits", *flags, *other), 2, "seed was 0 and is now 4")


def test_an_unwritable_work_directory_gets_one_line(capsys, tmp_path, npz_path):
    (tmp_path / "file").write_text("")
    flags = ["--data.path", npz_path, *SMALL]
    assert_refused(
        run(capsys, "train", "digits", "--workdir", tmp_path / "file" / "run", *flags), 1, "cannot be written"
    )
    assert_refused(run(capsys, "train", "digits", "--workdir", "/proc/run", *flags), 1, "/proc/run cannot be written")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    refused = run(capsys, "train", "digits", "--workdir", tmp_path / "mine", *flags)
    assert_refused(refused, 1, "thesis.tex", "choose another workdir")


def test_a_run_without_checkpoints_gets_one_line(capsys, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text((trained / "config.json").read_text())
    assert_refused(run(capsys, "evaluate", tmp_path / "run"), 1, "holds no checkpoint")
    (tmp_path / "run" / "config.json").write_text("{")
    assert_refused(run(capsys, "evaluate", tmp_path / "run"), 1, "config.json is damaged")


def test_seed_index_out_of_range_gets_one_line(capsys, trained):
    assert_refused(run(capsys, "evaluate", trained, "--seed-index", 1), 2, "--seed-index is 1, expected 0 .. 0")


def test_evaluating_on_data_of_another_shape_gets_one_line(capsys, trained, arrays, tmp_path):
    wide = {f"{part}_images": np.zeros((len(arrays[f"{part}_labels"]), 5, 5), np.uint8) for part in ("train", "test")}
    path = save(tmp_path / "wide.npz", arrays, **wide)
    assert_refused(run(capsys, "evaluate", trained, "--data.path", path), 2, "shape [5, 5, 1]", "[4, 4, 1]")


def python(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


def test_help_answers_without_importing_jax():
    for args in (["--help"], ["train", "--help"], ["train", "mnist", "--help"], ["evaluate", "--help"], ["recipes"]):
        code = (
            "import sys\nfrom pspinal_jax.__main__ import main\n"
            f"try:\n    status = main({args!r})\nexcept SystemExit as stop:\n    status = stop.code or 0\n"
            "heavy = {'jax', 'flax', 'optax', 'orbax', 'tensorflow_datasets', 'matplotlib', 'sklearn'}\n"
            "print('loaded:', sorted(heavy & set(sys.modules)), status)"
        )
        assert python("-c", code).stdout.splitlines()[-1] == "loaded: [] 0", args


def test_the_console_script_is_the_module(tmp_path):
    script = os.path.join(os.path.dirname(sys.executable), "pspinal-jax")
    for command in ([script], [sys.executable, "-m", "pspinal_jax"]):
        done = subprocess.run([*command, "recipes"], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert "mnist-paper" in done.stdout
        failed = subprocess.run([*command, "train", "mnits"], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert failed.returncode == 2 and "Traceback" not in failed.stderr
        assert failed.stderr.startswith("error: unknown recipe 'mnits'")


def test_importing_the_head_loads_nothing_else():
    code = (
        "import sys, pspinal_jax\npspinal_jax.ProgressiveSpinalHead\n"
        "heavy = ['tensorflow', 'tensorflow_datasets', 'torch', 'grain', 'orbax', 'sklearn', 'matplotlib']\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"
