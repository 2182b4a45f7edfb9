"""What a run is worth, on the screen, as files and as a page: `evaluate`, `report`, `predict` on many, `doctor`."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.checkpoints.checksum import json_checksum
from pspinal_jax.commands import tools
from pspinal_jax.runs.evaluate import evaluate_examples

NASTY = '<script>alert("x")</script>'
CLASSES = ("dark", "light", NASTY.replace("/", ""))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of pictures in three classes, one of a nasty name and hard to tell; a run on it, and its export."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for name, low, count in zip(CLASSES, (0, 150, 140), (40, 16, 16), strict=True):
        (place / "pictures" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(low, low + 100, (16, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "pictures" / name / f"{index:02}.png")
    small = {"model__backbone": "none", "model__weights": None, "data__image_size": 8, "data__augment": "none"}
    small |= {"model__layer_width": 8, "batch_size": 8, "eval_batch_size": 8, "epochs": 3, "num_seeds": 2}
    pspinal_jax.train("folder", data__path=place / "pictures", workdir=place / "run", **small)
    assert main(["export", str(place / "run"), "--output", str(place / "export")]) == 0
    return place


def said(capsys, *words, status=0):
    capsys.readouterr()
    assert main([str(word) for word in words]) == status
    return capsys.readouterr()


def rows_of(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_evaluate_tells_every_class_and_every_prediction(place, tmp_path, capsys):
    printed = said(capsys, "evaluate", place / "run", "--predictions", tmp_path / "all.csv").out
    report = json.loads((place / "run" / "evaluation.json").read_text())
    result = json.loads((place / "run" / "result.json").read_text())
    assert f"balanced accuracy {100 * report['balanced_accuracy']:.2f} %" in printed and "worst first" in printed
    assert report["accuracy"] in result["test_accuracy"]["each"]
    assert report["balanced_accuracy"] == pytest.approx(
        result["test_balanced_accuracy"]["each"][result["test_accuracy"]["each"].index(report["accuracy"])], abs=1e-9
    )
    rows = rows_of(tmp_path / "all.csv")
    assert len(rows) == report["examples"]
    assert sum(int(row["correct"]) for row in rows) == report["correct"]
    assert -np.mean([np.log(float(row["probability_of_true"])) for row in rows]) == pytest.approx(
        report["loss"], rel=1e-3
    )
    assert all(row["true"] in CLASSES and row["example"].endswith(".png") for row in rows)
    classes = rows_of(place / "run" / "classes.csv")
    assert {row["class"]: float(row["recall"]) for row in classes} == pytest.approx(report["class_accuracy"])
    recalls = [float(row["recall"]) for row in classes]
    assert recalls == sorted(recalls) and recalls[0] < 1, "a class has to fail for this to mean anything"
    with Image.open(place / "run" / "mistakes.png") as sheet:
        assert sheet.width > 200 and len(np.unique(np.asarray(sheet.convert("L")))) > 50


def test_the_surest_mistakes_are_real_pictures_of_the_class(place):
    evaluated = evaluate_examples(place / "run")
    mistakes = evaluated.mistakes(3)
    (index, *_) = evaluated.scored.surest_mistakes(3)
    assert [each.probability for each in mistakes] == sorted((each.probability for each in mistakes), reverse=True)
    assert all(each.true != each.predicted for each in mistakes)
    path = Path(evaluated.data.test.encoded.name(int(index)))
    assert path.parent.name == mistakes[0].true
    with Image.open(path) as image:
        assert abs(np.asarray(image).mean() - mistakes[0].picture.mean()) < 5


@pytest.mark.parametrize("name", ["", "model.jaxexport"])
def test_an_export_is_evaluated_as_its_run_and_nothing_is_written_into_it(place, capsys, tmp_path, name):
    run = pspinal_jax.load_run(place / "run").evaluate()
    before = sorted((place / "export").iterdir())
    told = said(capsys, "evaluate", place / "export" / name, "--data.path", place / "pictures")
    assert f"test accuracy {100 * run['accuracy']:.2f} %" in told.out and "other data" not in told.out
    assert sorted((place / "export").iterdir()) == before
    words = ["evaluate", place / "export", "--data.path", place / "pictures", "--output", tmp_path / "out"]
    assert "written to" in said(capsys, *words).out
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["confusion"] == run["confusion"] and report["loss"] == pytest.approx(run["loss"], rel=1e-4)
    refused = said(capsys, "evaluate", place / "export", status=2).err
    assert "does not store where its data is" in refused and "--data.path" in refused


def test_an_export_of_before_says_so_and_a_damaged_description_is_one_line(place, capsys, tmp_path):
    export = shutil.copytree(place / "export", tmp_path / "export")
    description = json.loads((export / "export.json").read_text())
    del description["checksum"]  # as older exports
    settings = description.pop("data")
    (export / "export.json").write_text(json.dumps(description))
    words = ["evaluate", export, "--data.path", place / "pictures"]
    assert "does not say what it was trained on" in said(capsys, *words).out
    for damaged in ({}, {"settings": {"nothing": 1}}, {"settings": settings["settings"] | {"image_size": "8"}}, []):
        (export / "export.json").write_text(json.dumps(description | {"data": damaged}))
        refused = said(capsys, *words, status=1).err
        assert "export the run again" in refused and refused.count("\n") == 1


def test_predict_takes_folders_and_a_list_and_names_what_it_cannot_read(place, tmp_path, capsys, monkeypatch):
    pictures = shutil.copytree(place / "pictures", tmp_path / "pictures")
    (pictures / "dark" / "deeper").mkdir()
    (pictures / "dark" / "00.png").rename(pictures / "dark" / "deeper" / "00.png")
    (pictures / "light" / "bad.jpg").write_text("no picture")
    (pictures / "light" / "notes.txt").write_text("no picture either, and not named like one")
    told = said(capsys, "predict", place / "run", pictures, "--csv", tmp_path / "out.csv", "--top", "2")
    rows = rows_of(tmp_path / "out.csv")
    assert [Path(row["image"]) for row in rows] == sorted(
        path for path in pictures.rglob("*") if path.suffix in (".png", ".jpg")
    )
    (bad,) = [row for row in rows if row["error"]]
    assert bad["image"].endswith("bad.jpg") and not bad["class_1"]
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) > 0 for row in rows if not row["error"])
    assert not told.out and "72 of 73 images classified" in told.err and "images/s" in told.err
    assert "warning: " in told.err and "bad.jpg: the image cannot be decoded" in told.err
    # A list, through an export, is answered as the folder was.
    listed = [pictures / "light" / "01.png", pictures / "dark" / "deeper"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(map(str, listed)).encode())))
    answers = json.loads(said(capsys, "predict", place / "export", "-", "--json").out)
    by_name = {row["image"]: row for row in rows}
    assert [answer["image"] for answer in answers] == [str(listed[0]), str(listed[1] / "00.png")]
    for answer in answers:
        row, given = by_name[answer["image"]], answer["classes"][0]
        assert given["class"] == row["class_1"]
        assert given["probability"] == pytest.approx(float(row["probability_1"]), abs=1e-5)


def test_predict_fails_only_where_nothing_could_be_read(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.jpg").write_text("no picture")
    told = said(capsys, "predict", place / "run", tmp_path / "bad.jpg", tmp_path / "none.png", status=1)
    assert "error: none of the images could be read" in told.err and "none.png: No such file" in told.err
    (tmp_path / "empty").mkdir()
    assert (
        "holds no file that is named like an image"
        in said(capsys, "predict", place / "run", tmp_path / "empty", status=2).err
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "standard input lists no image" in said(capsys, "predict", place / "run", "-", status=2).err
    good = place / "pictures" / "dark" / "01.png"
    refused = said(capsys, "predict", place / "run", good, "--csv", tmp_path / "no" / "out.csv", status=2).err
    assert "is not a folder" in refused


def test_many_images_are_one_program_and_the_same_whatever_the_batch(place, monkeypatch):
    from pspinal_jax.runs import predict as predict_module

    images = sorted((place / "pictures").rglob("*.png"))
    shapes, load = [], predict_module.load_predictor

    def watched(*words):
        import dataclasses

        classifier = load(*words)

        def answers(batch):
            shapes.append(batch.shape)
            return classifier.answers(batch)

        return dataclasses.replace(classifier, answers=answers)

    monkeypatch.setattr(predict_module, "load_predictor", watched)
    together = predict_module.predict(place / "run", images)
    assert len(set(shapes)) == 1 and len(shapes) == 3 and [each.path for each in together] == images
    alone = predict_module.predict(place / "run", images[40:41])[0]
    assert alone.classes[0][1] == pytest.approx(together[40].classes[0][1], abs=1e-6)


class Checked(HTMLParser):
    """Tags and what they refer to."""

    def __init__(self):
        super().__init__()
        self.tags, self.sources, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_holds_all_and_loads_nothing(place, tmp_path, capsys):
    printed = said(capsys, "report", place / "run", "--output", tmp_path / "page.html").out
    assert "page.html" in printed
    page = (tmp_path / "page.html").read_text()
    checked = Checked()
    checked.feed(page)
    text = " ".join(checked.text)
    assert not {"script", "link", "iframe", "object"} & set(checked.tags), "class names are text"
    assert checked.sources and all(source.startswith("data:image/") for source in checked.sources)
    assert "default-src 'none'" in page and CLASSES[2] in text
    report = evaluate_examples(place / "run").report
    for shown in (f"{100 * report['accuracy']:.2f} %", "balanced accuracy", "95 % interval", "Wilson", "bootstrap"):
        assert shown in text
    assert "standard deviation of the seeds" in text and "optimizer.learning_rate" in text and "jax" in text
    assert checked.tags.count("figure") == min(24, report["examples"] - report["correct"])
    assert 'class="matrix"' in page and 'alt="Confusion matrix"' not in page


def test_the_reports_confusions_are_a_table_of_names_or_of_many_classes_a_picture(place, tmp_path, monkeypatch):
    from pspinal_jax.runs.report import write_report

    monkeypatch.setattr("pspinal_jax.runs.report.MAX_NUMBERED_CLASSES", 2)
    write_report([place / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert 'class="matrix"' not in page and 'alt="Confusion matrix"' in page


def test_runs_stand_side_by_side_and_one_without_its_data_is_shown_all_the_same(place, tmp_path, capsys):
    other = shutil.copytree(place / "run", tmp_path / "other")
    shutil.rmtree(other / "checkpoints")
    told = said(capsys, "report", place / "run", other, "--output", tmp_path / "two.html")
    assert f"warning: {other}: not evaluated: " in told.err
    page = (tmp_path / "two.html").read_text()
    assert "Side by side" in page and page.count("<section>") == 3 and "Learning curves" in page
    assert "report takes at least one run directory" in said(capsys, "report", status=2).err
    refused = said(capsys, "report", place / "run", "--output", tmp_path / "a" / "b.html", status=2).err
    assert "is not a folder" in refused


MARKUP = "</table></title><form action=https://example.org><input name=password></form>"
"""Where text of a run stands on the page: as a value, and as a key."""


def marked(value):
    """`value` with markup as every text in it, and as one more key of every dict of it."""
    if isinstance(value, dict):
        return {key: marked(each) for key, each in value.items()} | {MARKUP: MARKUP}
    if isinstance(value, list):
        return [marked(each) for each in value]
    return f"{value} {MARKUP}" if isinstance(value, str) else value


def test_report_of_a_stranger_shows_markup_as_text(place, tmp_path, capsys):
    """Whatever part of the run's files it stands in; the page has the same tags as that of the run itself."""
    tags = []
    for change in (lambda value: value, marked):
        runs = [shutil.copytree(place / "run", tmp_path / f"{name}{len(tags)}") for name in "ab"]
        for run in runs:
            shutil.rmtree(run / "checkpoints")
            for name, parts in (
                ("config.json", ("versions", "device", "data_source")),
                ("result.json", ("selection",)),
            ):
                held = json.loads((run / name).read_text())
                del held["checksum"]
                held |= {part: change(held[part]) for part in parts}
                if name == "config.json":
                    held["identity"]["card"] = change(held["identity"]["card"])
                    held["identity"]["jax"] = change(held["identity"]["jax"])
                (run / name).write_text(json.dumps(held | {"checksum": json_checksum(held)}))
        said(capsys, "report", *runs, "--output", tmp_path / "page.html")
        checked = Checked()
        checked.feed((tmp_path / "page.html").read_text())
        tags.append(set(checked.tags))
    assert tags[0] == tags[1] and " ".join(checked.text).count(MARKUP) > 20


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_the_report(place, tmp_path, capsys):
    said(capsys, "report", place / "run", "--output", tmp_path / "page.html")
    words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1180,2000"]
    done = subprocess.run(
        [*words, "--enable-logging=stderr", f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path}/page.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    refusals = [line for line in done.stderr.splitlines() if "Refused" in line or "CONSOLE" in line]
    assert not refusals
    with Image.open(tmp_path / "page.png") as shot:
        pixels = np.asarray(shot.convert("RGB"))
    assert pixels.shape[:2] == (2000, 1180)
    blue = (np.abs(pixels.astype(int) - (37, 99, 168)).sum(-1) < 12).mean()
    assert blue > 0.003, "the first tile is drawn in its colour"
    assert pixels[600:1900].std() > 10, "curves, classes and pictures are drawn"


def test_doctor_tells_what_is_missing_and_how_to_get_it(capsys, monkeypatch, tmp_path):
    there = tools._version
    monkeypatch.setattr(tools, "_version", lambda name: None if name in ("torch", "optax") else there(name))
    monkeypatch.setenv("PSPINAL_JAX_CACHE", str(tmp_path))
    told = said(capsys, "doctor").out
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in told.splitlines())
    assert lines["extra torch"].startswith("torch missing: pip install '.[torch]'")
    assert lines["optax"] == "missing: pip install optax"
    assert pspinal_jax.__version__ in lines["pspinal_jax"] and lines["numpy"] == np.__version__
    assert str(tmp_path) in lines["cache"] and "GB free" in lines["cache"] and "cpu" in lines["devices"]
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    assert "off" in said(capsys, "doctor").out
    assert "Unrecognized options: now" in said(capsys, "doctor", "now", status=2).err


def test_doctor_knows_every_package_and_every_extra_that_is_not_for_developers(monkeypatch):
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + [f"{each} ; extra == '{name}'" for name in extras for each in extras[name]]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: needed)
    found = list(tools.requirements())
    assert {extra for _, extra in found} - {""} == set(extras) - {"test", "docs", "notebooks", "examples"}
    assert [name for name, extra in found if not extra] == [
        re.match(r"[\w-]+", each)[0] for each in project["dependencies"]
    ]
    assert {("torch", "torch"), ("jax-cuda13-plugin", "cuda"), ("pillow-heif", "heic")} <= set(found)
