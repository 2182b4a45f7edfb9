"""Names are text, not markup: in plots, in tables, in files, and on terminals that lack their letters."""

import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.commands.predict import read_list
from pspinal_jax.data.folder import check_files
from pspinal_jax.errors import UsageError
from pspinal_jax.files import expanded, write_csv
from pspinal_jax.progress import progress_bar, say, warn
from pspinal_jax.runs.scores import plot_confusion, plot_curves

NAMES = [
    "$a_$",
    "50 $ ^ $",
    r"\frac{$",
    "猫",
    "犬",
    "a\nb",
    "a\tb",
    "caf\udce9",
    "\x1b[31mred",
    "\x00",
    "",
    " ",
    "x" * 500,
    "👍🏽",
]
LINES = [
    {"stage": "train", "epoch": epoch, "step": epoch, "train_loss": 1.0, "train_accuracy": 0.5} for epoch in (1, 2)
]


@pytest.mark.parametrize("count", [2, len(NAMES), 40])
def test_a_confusion_matrix_of_any_names_is_drawn_in_silence(tmp_path, capfd, recwarn, count):
    names = (NAMES * 3)[:count]
    plot_confusion(np.eye(count, dtype=int), names, tmp_path / "c.png", "$ recipe_{ : 50 % of 猫 \n")
    with Image.open(tmp_path / "c.png") as image:
        assert max(image.size) < 2500
    assert capfd.readouterr().err == "" and not recwarn.list


def test_curves_of_any_recipe_are_drawn_in_silence(tmp_path, capfd, recwarn):
    for name in NAMES:
        plot_curves(LINES, tmp_path / "curves.png", f"{name} (progressive head)")
        (tmp_path / "curves.png").unlink()
    assert capfd.readouterr().err == "" and not recwarn.list


def labels_of(names, tmp_path, monkeypatch):
    import matplotlib.figure

    drawn = []
    save = matplotlib.figure.Figure.savefig

    def saved(figure, *args, **options):
        save(figure, *args, **options)
        drawn.append([label.get_text() for label in figure.axes[0].get_yticklabels()])

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", saved)
    plot_confusion(np.eye(len(names), dtype=int), names, tmp_path / "c.png", "title")
    return drawn[0]


def test_what_the_font_lacks_is_replaced_and_names_stay_apart(tmp_path, monkeypatch):
    assert labels_of(["猫", "a\nb", "x" * 500, "ok $x$"], tmp_path, monkeypatch) == [
        "\ufffd",
        r"a\nb",
        "x" * 59 + "…",
        "ok $x$",
    ]
    assert labels_of(["猫", "犬"], tmp_path, monkeypatch) == ["0: \ufffd", "1: \ufffd"]


def test_a_users_latex_is_not_asked(tmp_path, capfd):
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        plot_confusion(np.eye(2, dtype=int), ["$a_$", "b"], tmp_path / "c.png", "title")
        assert matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["text.parse_math"]
    assert (tmp_path / "c.png").exists() and capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose recipe and class folders have such names, and its folder of images."""
    place = tmp_path_factory.mktemp("names")
    rng = np.random.default_rng(0)
    names = [b"$x_$", "café 猫".encode(), b"caf\xe9", b"a\nb \x1b[31m", b"\\frac{"]
    for number, name in enumerate(names):
        folder = os.fsencode(place / "images") + b"/" + name
        os.makedirs(folder)
        for index in range(8):
            pixels = rng.integers(40 * number, 40 * number + 40, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(os.fsdecode(folder) + f"/{index}.png")
    small = {"image_size": 8, "augment": "none"}
    pspinal_jax.train(
        "folder",
        **{f"data.{key}": value for key, value in small.items()},
        data__path=place / "images",
        model__backbone="none",
        model__weights=None,
        model__layer_width=8,
        epochs=1,
        batch_size=4,
        eval_batch_size=4,
        workdir=place / "run",
    )
    return place


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize("command", ["evaluate", "predict", "predict --json"])
def test_names_are_printed_on_every_terminal(run, monkeypatch, capsys, encoding, command):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    name, *flags = command.split()
    image = str(shutil.copy(run / "images" / "$x_$" / "0.png", run / "one.png"))
    assert main([name, str(run / "run"), *([image, "--top", "5", *flags] if name == "predict" else [])]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("warning", "error"))]
    assert not said
    text = printed.getvalue().decode(encoding)
    assert "$x_$" in text and "caf" in text and "\x1b" not in text
    if flags:
        given = [each["class"] for each in json.loads(text)[0]["classes"]]
        assert sorted(given) == sorted(path.name for path in (run / "images").iterdir())
    elif name == "evaluate":
        lines = [line for line in text.splitlines() if line.startswith("  ")]
        assert len(lines) == 6 and (run / "run" / "confusion.png").exists()
        assert encoding != "utf-8" or any(line.startswith("  café 猫  ") for line in lines)


def test_a_plot_that_fails_says_so_on_one_line(tmp_path, monkeypatch, capsys):
    def failing(text):
        raise ValueError("no such\nfont \x1b[31m")

    monkeypatch.setattr("pspinal_jax.runs.scores.drawable", failing)
    plot_curves(LINES, tmp_path / "curves.png", "title")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {tmp_path / 'curves.png'} was not drawn: no such font") and "\x1b" not in said


def test_what_is_said_on_standard_error_holds_no_escape_sequences(capfd):
    say("a \x1b[31mred\nname")
    warn("caf\udce9 \x9b")
    with progress_bar(1, "check \x1b]0;x\x07", "image", True) as bar:
        bar.update()
    said = capfd.readouterr().err
    assert said.startswith("a \\x1b[31mred\\nname\nwarning: caf\\udce9 \\x9b\n") and r"check \x1b]0;x\x07" in said
    assert not {"\x1b", "\x07", "\x9b"} & set(said)


LISTED = ["a.png", "b c/é猫.png", "d.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("between", ["\n", "\r\n", "\0"], ids=["lines", "lines of Windows", "NUL"])
def test_lists_of_pictures_are_read_in_every_encoding(encoding, between):
    for end in ("", between):
        text = between.join(LISTED) + end
        assert list(map(str, read_list(text.encode(encoding)))) == LISTED


def test_lists_with_nul_may_hold_newlines_and_any_bytes():
    assert list(map(str, read_list(b"a\nb.png\0caf\xe9\0"))) == ["a\nb.png", "caf\udce9"]
    assert list(map(str, read_list(b"0\0001\0002\0"))) == ["0", "1", "2"]
    assert list(map(str, read_list(b".\0./a.png\0"))) == [".", "a.png"]
    assert read_list(b"") == read_list(b"\n \n\0") == []
    with pytest.raises(UsageError, match="damaged list in UTF-16"):
        read_list(b"\xff\xfea")


def test_a_path_with_nul_is_refused():
    with pytest.raises(UsageError, match="NUL"):
        expanded("a\0b")


def test_no_cell_of_a_table_is_a_formula_or_an_escape_sequence(tmp_path):
    cells = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", " =1", "\uff1d1", Path("=cmd\x1b[31m"), "\x9b", 'a,"b']
    write_csv(tmp_path / ("x" * 250), ["a", "b"], [[cell, number] for number, cell in enumerate(cells)])
    (place,) = tmp_path.iterdir()
    with place.open(newline="", encoding="utf-8") as file:
        _, *rows = csv.reader(file)
    assert [row[0] for row in rows] == [
        *("'=1+1", "'+1", "'-1", "'@SUM(1)", r"\t=1", r"\r=1", "' =1", "'\uff1d1", r"./=cmd\x1b[31m", r"\x9b", 'a,"b'),
    ]
    assert [row[1] for row in rows] == [str(number) for number in range(len(cells))]


def test_bytes_that_are_no_text_stay_in_a_table(tmp_path):
    write_csv(tmp_path / "t.csv", ["a"], [[Path("caf\udce9")], [None], [0.5], [-0.5]])
    assert (tmp_path / "t.csv").read_bytes() == b'a\r\ncaf\xe9\r\n""\r\n0.5\r\n-0.5\r\n'


def test_images_of_any_folder_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "caf\udce9\n"
    root.mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / "0\udcff.png")
    checks = check_files(root, ["0\udcff.png"], show_progress=False)
    (stored,) = (tmp_path / "cache" / "pictures").iterdir()
    monkeypatch.setattr("pspinal_jax.data.folder._check", None)  # nothing is decoded again
    assert check_files(root, ["0\udcff.png"], show_progress=False) == checks and stored.exists()
