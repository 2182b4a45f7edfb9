"""What someone sees who has read nothing: help by what people do, an example at its end, and what a slip meant."""

import contextlib
import io
import re
import shlex

import pytest

from pspinal_jax.__main__ import COMMANDS, main
from pspinal_jax.commands import parse
from pspinal_jax.commands.flags import flags_of
from pspinal_jax.commands.slips import SHORT_FORMS
from pspinal_jax.commands.train import MOST_USED, _Arguments

NARROW = "80"
HELPS = [
    *([command, "--help"] for command in COMMANDS),
    *(["train", recipe, "--help"] for recipe in ("digits", "folder", "features")),
    ["train", "--help-all"],
    ["extract-features", "folder", "--help"],
    *(["benchmark", what, "--help"] for what in ("step", "all")),
    ["--help"],
]


class Understood(Exception):
    """A command has parsed its flags and is about to start."""


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, tmp_path):
    def stop(*args):
        raise Understood

    monkeypatch.setattr(parse, "quiet_absl", stop)
    monkeypatch.setattr("pspinal_jax.benchmark.suite.run_suite", stop)
    monkeypatch.setenv("COLUMNS", NARROW)
    monkeypatch.chdir(tmp_path)


def help_of(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        assert main(list(words)) == 0
    return out.getvalue()


def refused(capsys, *words):
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def shown_flags(text):
    return re.findall(r"^ {1,2}--([a-z][\w.-]+)", text, re.MULTILINE)


@pytest.mark.parametrize("words", HELPS, ids=shlex.join)
def test_every_help_ends_with_an_example_that_is_understood(words):
    *_, last = help_of(*words).splitlines()
    program, *example = shlex.split(last.removeprefix("example: "))
    assert last.startswith("example: ") and program == "pspinal-jax"
    if words[0] != "--help":
        assert example[0] == words[0]
    with contextlib.suppress(Understood):
        assert main(example) == 0 and example[0] in ("recipes", "doctor")


def test_the_help_of_train_shows_the_most_used_by_what_people_do():
    text = help_of("train", "folder", "--help")
    assert shown_flags(text) == [name for names in MOST_USED.values() for name in names]
    assert re.findall(r"^ (\w+) options", text, re.MULTILINE) == list(MOST_USED)
    flags = {flag.name for flag in flags_of(_Arguments)}
    hidden = len(flags) - len(shown_flags(text))
    assert f"{hidden} more flags, and more about these: pspinal-jax train folder --help-all" in text
    assert "(default: efficientnet_lite0)" in text, "the recipe's own values are the defaults"
    assert "crop: the middle square" in " ".join(text.split()), "each choice is explained"


def test_every_flag_is_in_help_all_and_is_one():
    text = help_of("train", "folder", "--help-all")
    flags = {flag.name for flag in flags_of(_Arguments)}
    assert set(shown_flags(text)) == flags and len(flags) > 70
    assert not {name for name in flags if name.startswith("card")}


@pytest.mark.parametrize("place", [0, 2])
def test_help_is_printed_wherever_it_stands(place):
    words = ["--epochs", "3"]
    words.insert(place, "-h")
    assert shown_flags(help_of("train", "digits", *words))[0] == "data.path"


def test_flags_that_the_help_leaves_out_are_taken():
    with pytest.raises(Understood):
        main(["train", "digits", "--optimizer.momentum", "0.8", "--mesh.fsdp", "1", "--heartbeat-timeout", "9"])


SLIPS = {
    "--lr 0.1": "--optimizer.learning-rate 0.1",
    "--lr=0.1": "--optimizer.learning-rate 0.1",
    "-lr 0.1": "--optimizer.learning-rate 0.1",
    "--optimizer.lr 0.1": "--optimizer.learning-rate 0.1",
    "--bs 8": "--batch-size 8",
    "--batch 8": "--batch-size 8",
    "--wd 0.1": "--optimizer.weight-decay 0.1",
    "--dropout 0.3": "--model.dropout-rate 0.3",
    "--width 64": "--model.layer-width 64",
    "--backbone resnet18": "--model.backbone resnet18",
    "--head dense": "--model.head dense",
    "--data 'my pictures'": "--data.path 'my pictures'",
    "--path pictures": "--data.path pictures",
    "--num-workers 2": "--workers 2",
    "--num_workers 2": "--workers 2",
    "--output runs/a": "--workdir runs/a",
    "-o runs/a": "--workdir runs/a",
    "--Epochs 3": "--epochs 3",
    "--epohcs 3": "--epochs 3",
    "epochs=3": "--epochs 3",
    "--no-shuffle": "--data.no-shuffle",
    "--model.batch-size 8": "--batch-size 8",
    "--name mnist": "--data.name or --optimizer.name",
    "pictures": "--data.path pictures",
    "--epochs 3 pictures": "--data.path pictures",
}


@pytest.mark.parametrize(("words", "meant"), SLIPS.items(), ids=SLIPS)
def test_a_slip_is_answered_with_what_was_meant(capsys, words, meant):
    line = refused(capsys, "train", "folder", *shlex.split(words))
    assert f"did you mean {meant}? All flags: pspinal-jax train folder --help-all" in line
    assert len(line) < 160


@pytest.mark.parametrize(("words", "meant"), SLIPS.items(), ids=SLIPS)
def test_what_was_meant_is_taken(words, meant):
    if " or " not in meant:
        with pytest.raises(Understood):
            main(["train", "folder", *shlex.split(meant)])


def test_nothing_is_invented(capsys):
    assert "did you mean" not in refused(capsys, "train", "folder", "--frobnicate", "3")
    assert "there is no flag --frobnicate." in refused(capsys, "train", "folder", "--frobnicate", "3")
    assert "did you mean" not in refused(capsys, "evaluate", "runs/a", "--lr", "3")
    assert "in quotes" in refused(capsys, "train", "folder", "--data.path", "my", "pictures")
    said = refused(capsys, "train", "folder", "--freeze", "backbone", "--cache-features", "true")
    assert said.startswith("--cache-features takes no value, got true; leave it out, or write --no-cache-features.")


def test_other_commands_answer_with_flags_of_their_own(capsys):
    assert "did you mean --learning-rate 3?" in refused(capsys, "compare", "x.npz", "--lr", "3")
    assert "did you mean --output x? All flags: pspinal-jax evaluate --help" in refused(
        capsys, "evaluate", "runs/a", "--out", "x"
    )
    assert "did you mean --data.path pics?" in refused(capsys, "extract-features", "folder", "pics")


def test_data_in_the_place_of_the_recipe(capsys, tmp_path):
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "mine.npz").write_bytes(b"")
    said = refused(capsys, "train", "my pictures")
    assert "no recipe but a folder; did you mean pspinal-jax train folder --data.path 'my pictures'?" in said
    assert "pspinal-jax train RECIPE --data.path mine.npz?" in refused(capsys, "train", "mine.npz")


@pytest.mark.parametrize("value", ["none", "imagenet", "Random"])
def test_weights_that_are_none(capsys, value):
    said = refused(capsys, "train", "folder", "--model.weights", value)
    assert "expected None, written so, for random numbers, or pretrained for ImageNet weights" in said


def test_every_short_form_means_a_flag_of_some_command():
    from pspinal_jax.commands.evaluate import EvaluateArguments
    from pspinal_jax.commands.predict import PredictArguments

    flags = {
        flag.name for arguments in (_Arguments, EvaluateArguments, PredictArguments) for flag in flags_of(arguments)
    }
    ends = flags | {name.rpartition(".")[2] for name in flags}
    assert {meant for meant in SHORT_FORMS.values() if meant not in ends} == set()
