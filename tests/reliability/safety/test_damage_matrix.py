"""Every command against every recorded fact, damaged in every way: the answer of before, or one line of error."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.__main__ import main

SMALL = ["--epochs", "2", "--batch-size", "16", "--eval-batch-size", "16", "--data.num-validation", "20"]
SMALL += ["--data.num-classes", "3", "--model.layer-width", "8", "--checkpoint-seconds", "0"]


def flip(content, rng):
    """One bit."""
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def cut(content, rng):
    return content[: rng.integers(len(content))]


def overwrite(content, rng):
    first = int(rng.integers(len(content)))
    return content[:first] + rng.bytes(min(16, len(content) - first)) + content[first + 16 :]


def other_value(content, rng):
    """Another digit in place of the first one: well-formed as before."""
    index = next((index for index, byte in enumerate(content) if chr(byte).isdigit()), 0)
    return content[:index] + b"7" * (content[index : index + 1] != b"7") + content[index + 1 :]


def remove(content, rng):
    return None


DAMAGES = [flip, cut, overwrite, other_value, remove]
RUN_FACTS = ["config.json", "result.json", "metrics.jsonl", "record", "best", "params"]
EXPORT_FACTS = ["export.json", "model.jaxexport", "params.safetensors"]


@pytest.fixture(scope="module")
def train_words(npz_path):
    return ["train", "digits", "--data.path", str(npz_path), *SMALL]


@pytest.fixture(scope="module")
def run(train_words, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("matrix") / "run"
    assert main([*train_words, "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture(scope="module")
def export(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("matrix") / "export"
    assert main(["export", str(run), "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("matrix_images")
    paths = [folder / f"{index}.png" for index in range(3)]
    for index, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (4, 4), np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def answer(train_words, images, capsys, tmp_path):
    """(status, what the command said of the run or export) with the errors checked to be one line."""

    def ask(command, folder):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        words = {
            "train": [*train_words, "--workdir", str(folder)],
            "evaluate": ["evaluate", str(folder)],
            "predict": ["predict", str(folder), *images, "--json", "--top", "3"],
            "export": ["export", str(folder), "--output", str(tmp_path / "out")],
        }[command]
        capsys.readouterr()
        status = main(words)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith(("error", "Traceback"))]
        assert len(lines) == (status != 0) and status in (0, 1, 2), printed.err
        assert "Traceback" not in printed.err
        said = printed.out.replace(str(folder), "RUN")
        if command == "export" and status == 0:
            description = json.loads((tmp_path / "out" / "export.json").read_text())
            kept = {name: description[name] for name in ("class_names", "recipe", "seed", "test_accuracy")}
            assert main(["predict", str(tmp_path / "out"), *images, "--json", "--top", "3"]) == 0
            said = json.dumps(kept) + capsys.readouterr().out
        return status, said

    return ask


@pytest.fixture(scope="module")
def before():
    """The answer for the folder as it was, by command and folder."""
    return {}


def spoil(folder, fact, damage, seed):
    """Damage the file that holds `fact`: of a checkpoint's item, its largest."""
    rng = np.random.default_rng(seed)
    path = folder / fact
    if not path.is_file():
        newest = max((folder / "checkpoints").iterdir(), key=lambda step: int(step.name))
        path = max(
            (file for file in (newest / fact).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
        )
    content = path.read_bytes()
    changed = damage(content, rng)
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return path


def check(answer, before, command, folder, fact, damage, seed, tmp_path):
    if (command, folder) not in before:
        before[command, folder] = answer(command, folder)
        assert before[command, folder][0] == 0
    copied = shutil.copytree(folder, tmp_path / "copied")
    path = spoil(copied, fact, damage, seed)
    status, said = answer(command, copied)
    if status == 0:
        said_before = before[command, folder][1]
        assert said == said_before, f"{command} gives another answer after {damage.__name__} of {path}"


COMMANDS = ["train", "evaluate", "predict", "export"]
ALL = list(product(COMMANDS, RUN_FACTS, DAMAGES))
# In `make test` every fact, and every damage, meets predict or evaluate once; the rest is in `make test-slow`.
FEW = {("predict", fact, DAMAGES[index % 5]) for index, fact in enumerate(RUN_FACTS)}
FEW |= {("evaluate", "best", other_value), ("evaluate", "result.json", cut), ("export", "result.json", other_value)}
FEW |= {("train", "result.json", flip), ("export", "best", remove)}


@pytest.mark.parametrize(
    ("command", "fact", "damage"),
    [pytest.param(*each, marks=[] if each in FEW else pytest.mark.slow) for each in ALL],
)
def test_a_damaged_run_gives_the_same_answer_or_an_error(run, answer, before, tmp_path, command, fact, damage):
    check(answer, before, command, run, fact, damage, 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_a_run_damaged_at_random_gives_the_same_answer_or_an_error(run, answer, before, tmp_path, seed):
    rng = np.random.default_rng(seed)
    pick = (COMMANDS[rng.integers(4)], RUN_FACTS[rng.integers(6)], DAMAGES[rng.integers(5)])
    check(answer, before, pick[0], run, *pick[1:], seed, tmp_path)


@pytest.mark.parametrize(
    ("fact", "damage"),
    [
        pytest.param(*each, marks=[] if each[1] in (flip, other_value) else pytest.mark.slow)
        for each in product(EXPORT_FACTS, DAMAGES)
    ],
)
def test_a_damaged_export_gives_the_same_answer_or_an_error(export, answer, before, tmp_path, fact, damage):
    for seed in range(3):
        check(answer, before, "predict", export, fact, damage, seed, tmp_path / str(seed))


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("fact", ["backbone.safetensors", "features.npz", "manifest.json"])
def test_a_damaged_run_on_cached_features(pictures, tiny_flags, capsys, tmp_path, command, fact):
    """Backbone, features and manifest: flipped, cut and removed."""
    words = ["train", "folder", "--data.path", str(pictures), *tiny_flags, "--model.layer-width", "8", "--epochs", "1"]
    words += ["--eval-batch-size", "8", "--data.validation-fraction", "0.2", "--freeze", "backbone", "--cache-features"]
    run, one = tmp_path / "run", str(sorted(pictures.glob("*/000.jpg"))[0])
    assert main([*words, "--workdir", str(run)]) == 0

    def ask(folder):
        given = {
            "train": [*words, "--workdir", str(folder)],
            "evaluate": ["evaluate", str(folder)],
            "predict": ["predict", str(folder), one],
            "export": ["export", str(folder), "--output", str(tmp_path / "out")],
        }[command]
        capsys.readouterr()
        status = main(given)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err and ("error: " in printed.err) == (status != 0)
        if command == "export" and status == 0:
            assert main(["predict", str(tmp_path / "out"), one]) == 0
            return status, capsys.readouterr().out
        return status, printed.out.replace(str(folder), "RUN")

    whole = ask(run)
    assert whole[0] == 0
    for seed, damage in enumerate([flip, cut, overwrite, remove]):
        copied = shutil.copytree(run, tmp_path / damage.__name__)
        spoil(copied, fact, damage, seed)
        found = ask(copied)
        assert found[0] != 0 or found == whole, f"{damage.__name__} of {fact}"
