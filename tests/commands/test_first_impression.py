"""What someone sees who has read nothing: help by what people do, with an example, and the names that people type."""

import contextlib
import io
import operator
import re
import shlex
from pathlib import Path

import pytest

from pspinal_jax.__main__ import COMMANDS, main
from pspinal_jax.commands import parse, train
from pspinal_jax.commands.parse import ALIASES, flags_of
from pspinal_jax.commands.train import COMMON_FLAGS, TrainArguments

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


def stop(*args, **more):
    raise Understood


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch, tmp_path):
    monkeypatch.setattr(parse, "quiet_absl", stop)
    monkeypatch.setattr("pspinal_jax.benchmark.run.run_all", stop)
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
    assert shown_flags(text) == [name for names in COMMON_FLAGS.values() for name in names]
    assert re.findall(r"^ (\w+) options", text, re.MULTILINE) == list(COMMON_FLAGS)
    flags = {flag.name for flag in flags_of(TrainArguments)}
    hidden = len(flags) - len(shown_flags(text))
    assert f"{hidden} more flags, and longer descriptions: pspinal-jax train folder --help-all" in text
    assert "(default: efficientnet_lite0)" in text, "the recipe's own values are the defaults"
    assert "crop: take the central square" in " ".join(text.split()), "each choice is explained"


def test_every_flag_is_in_help_all_and_is_one():
    text = help_of("train", "folder", "--help-all")
    flags = {flag.name for flag in flags_of(TrainArguments)}
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


TYPED = {
    "--lr 0.1": ("optimizer", "learning_rate", 0.1),
    "--lr=0.1": ("optimizer", "learning_rate", 0.1),
    "-lr 0.1": ("optimizer", "learning_rate", 0.1),
    "--optimizer.lr 0.1": ("optimizer", "learning_rate", 0.1),
    "--bs 8": ("batch_size", 8),
    "--dropout 0.3": ("model", "dropout_rate", 0.3),
    "--backbone resnet18": ("model", "backbone", "resnet18"),
    "--data 'my pictures'": ("data", "path", Path("my pictures")),
    "--data=~/pictures": ("data", "path", Path.home() / "pictures"),
    "--Epochs 3": ("epochs", 3),
    "--batch_size 8": ("batch_size", 8),
    "--no-shuffle": ("data", "shuffle", False),
    "--mean -0.5": ("data", "mean", -0.5),
}


@pytest.mark.parametrize(("words", "expected"), TYPED.items(), ids=TYPED)
def test_names_that_people_type_are_flags(monkeypatch, words, expected):
    *path, value = expected
    parsed = []
    monkeypatch.setattr(parse, "quiet_absl", lambda: None)
    monkeypatch.setattr(train, "joined", stop)
    monkeypatch.setattr(train, "parse", lambda *args, **more: parsed.append(parse.parse(*args, **more)) or parsed[0])
    with pytest.raises(Understood):
        main(["train", "folder", *shlex.split(words)])
    assert operator.attrgetter(".".join(path))(parsed[0].recipe) == value


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--epohcs 3", "--epochs"),
        ("--model.batch-size 8", "--batch-size"),
        ("--name mnist", "--name"),
        ("--frobnicate 3", "--frobnicate"),
        ("--cache-features true", "true"),
        ("--data.path my pictures", "pictures"),
    ],
)
def test_an_unknown_flag_is_named_with_those_like_it(capsys, words, named):
    line = refused(capsys, "train", "folder", *words.split())
    assert line.startswith("Unrecognized options") and named in line


def test_aliases_are_those_of_the_command(capsys):
    assert "--lr" in refused(capsys, "evaluate", "runs/a", "--lr", "3")
    for words in (["compare", "x.npz", "--lr", "1e-3", "1e-2"], ["evaluate", "runs/a", "-o", "x"]):
        with pytest.raises(Understood):
            main(words)


def test_data_in_the_place_of_the_recipe(capsys, tmp_path):
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "mine.npz").write_bytes(b"")
    for name in ("my pictures", "mine.npz"):
        assert f"is not a recipe; give its name first, and then the data: --data.path {shlex.quote(name)}" in refused(
            capsys, "train", name
        )
    assert "Unrecognized options: pics" in refused(capsys, "extract-features", "folder", "pics")


@pytest.mark.parametrize("value", ["none", "imagenet", "Random"])
def test_weights_that_are_none(capsys, value):
    said = refused(capsys, "train", "folder", "--model.weights", value)
    assert "expected None, written so, for random numbers, or pretrained for ImageNet weights" in said


def test_every_alias_means_a_flag_of_some_command():
    from pspinal_jax.commands.benchmark import Flags
    from pspinal_jax.commands.evaluate import EvaluateArguments
    from pspinal_jax.commands.predict import PredictArguments

    commands = (TrainArguments, EvaluateArguments, PredictArguments, Flags)
    flags = {flag.name for arguments in commands for flag in flags_of(arguments)}
    ends = flags | {name.rpartition(".")[2] for name in flags}
    assert {meant for meant in ALIASES.values() if meant not in ends} == set()


def test_a_flags_text_flows_and_its_value_is_written_as_people_write_it(monkeypatch):
    text = help_of("predict", "--help")
    assert "predict [-h] [OPTIONS] PATH [IMAGE ..]\n" in text and "{None}" not in text
    assert "labels from 0." in help_of("prepare", "--help"), "a line ends where the source breaks it"
    assert "--csv PATH" in text and "[IMAGE ..]" in text and "--no-no-unknown" not in text
    assert "--data.image-size INT|own" in help_of("train", "folder", "--help")
    assert all(f"\n  {section}  " in help_of("benchmark", "all", "--help") for section in ("machine", "resnet50"))
    with pytest.raises(Understood):
        main(["predict", "run", "a.png", "--csv", "None", "--seed-index", "2"])
