"""An epoch's line, means over seeds, and what is drawn: by the figure itself, before it becomes pixels."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from pspinal_jax import pictures
from pspinal_jax.runs import scores
from pspinal_jax.training import stages


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that makes a plot and gives its axes."""
    figures = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, part, **options: figures.append(figure) or Path(part).write_bytes(b"")
    )

    def draw(plot, *arguments):
        plot(*arguments, tmp_path / "plot.png", "a title")
        return figures[-1].axes

    return draw


@pytest.mark.parametrize("seeds", [1, 2])
def test_an_epochs_line_has_means_over_its_examples_and_rounded_times(seeds):
    stage = SimpleNamespace(name="train", steps_per_epoch=7, evaluates="validation")
    progress = SimpleNamespace(epoch=3, seconds=2.123456)
    totals = {"count": [8, 4], "loss": [4.0, 6.0], "correct": [6, 1]}
    totals = {name: values[:seeds] for name, values in totals.items()}
    found = stages.epoch_line(
        stage,
        progress,
        totals,
        {"loss": [0.5, 0.6][:seeds]},
        learning_rates=[0.1, 0.2][:seeds],
        compile_seconds=1.23456,
    )
    each = {"learning_rate": [0.1, 0.2], "train_loss": [0.5, 1.5], "train_accuracy": [0.75, 0.25]}
    each["validation_loss"] = [0.5, 0.6]
    assert found == {
        **{"stage": "train", "epoch": 3, "step": 21, "seconds": 2.1235, "compile_seconds": 1.235},
        **{name: values if seeds == 2 else values[0] for name, values in each.items()},
        "examples_per_second": {1: 3.8, 2: 5.7}[seeds],
    }


def test_an_epoch_of_which_every_step_was_left_out_divides_by_nothing():
    stage = SimpleNamespace(name="train", steps_per_epoch=7, evaluates=None)
    totals = {"count": [0], "loss": [0.0], "correct": [0]}
    progress = SimpleNamespace(epoch=1, seconds=1.0)
    found = stages.epoch_line(stage, progress, totals, {}, learning_rates=[0.1], compile_seconds=0.0)
    assert (found["train_loss"], found["train_accuracy"]) == (0.0, 0.0)


def test_scores_of_seeds():
    predictions = np.array([[0, 0, 1, 2], [1, 1, 1, 1]])
    labels = np.array([0, 0, 1, 1])  # and none of class 2
    assert stages.balanced_accuracy(predictions, labels) == [0.75, 0.5]
    assert scores.summary([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(np.sqrt(2)), "each": [1.0, 3.0]}
    assert scores.summary([1.0]) == {"mean": 1.0, "std": None, "each": [1.0]}


def test_curves_go_on_from_stage_to_stage_and_show_the_range_of_the_seeds(drawn):
    lines = [
        {"stage": stage, "epoch": epoch, "train_loss": [epoch, epoch + 2.0], "train_accuracy": [0.5, 0.7]}
        for stage, epochs in (("train", (1, 2, 3)), ("retrain", (1, 2)))
        for epoch in epochs
    ]
    lines[1] |= {"validation_loss": [0.0, 1.0], "validation_accuracy": [0.2, 0.4]}
    left, right = drawn(scores.plot_curves, lines)
    train, validation = left.get_lines()
    assert (train.get_xdata().tolist(), train.get_ydata().tolist()) == ([1, 2, 3, 4, 5], [2, 3, 4, 2, 3])
    assert (validation.get_xdata().tolist(), validation.get_ydata().tolist()) == ([2], [0.5])
    band = left.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 5)
    np.testing.assert_allclose(right.get_lines()[1].get_ydata(), [30])
    alone = drawn(scores.plot_curves, [line | {"train_loss": 1.0, "train_accuracy": 0.5} for line in lines[:1]])
    assert not alone[0].collections


def test_the_matrix_has_its_counts_where_there_are_any_and_names_that_can_be_told_apart(drawn):
    matrix = np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]])
    names = ["a" * 70 + "1", "a" * 70 + "2", "c"]
    axis, _ = drawn(scores.plot_confusion, matrix, names)
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axis.texts}
    assert texts == {(0, 0): ("8", "white"), (1, 0): ("2", "black"), (0, 1): ("5", "black"), (1, 1): ("5", "black")}
    np.testing.assert_allclose(axis.images[0].get_array(), [[0.8, 0.2, 0], [0.5, 0.5, 0], [0, 0, 0]])
    labels = [label.get_text() for label in axis.get_xticklabels()]
    cut = "a" * 59 + "…"
    assert labels == [f"0: {cut}", f"1: {cut}", "2: c"] == [label.get_text() for label in axis.get_yticklabels()]
    assert drawn(scores.plot_confusion, np.eye(30, dtype=int), [f"c{i}" for i in range(30)])[0].texts
    assert not drawn(scores.plot_confusion, np.eye(31, dtype=int), [f"c{i}" for i in range(31)])[0].texts
    for count, side in ((500, 500), (501, 251)):  # of more classes neighbours are drawn together
        axis, _ = drawn(scores.plot_confusion, np.eye(count, dtype=int), [f"c{i}" for i in range(count)])
        assert axis.images[0].get_array().shape == (side, side)


def test_mistakes_stand_six_in_a_row_with_captions_that_fit(drawn):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (5, 4, 1 if index else 3)).astype(np.uint8) for index in range(7)]
    mistakes = [("a", "b" * 40, 0.5, pictures[0]), *((str(index), "c", 1.0, pictures[index]) for index in range(1, 7))]
    axes = drawn(scores.plot_mistakes, mistakes)
    assert len(axes) == 12 and [len(axis.images) for axis in axes] == [1] * 7 + [0] * 5
    assert axes[0].get_title() == "a\nas " + "b" * 22 + "…" and axes[6].get_title() == "6\nas c 100 %"
    np.testing.assert_array_equal(axes[0].images[0].get_array(), pictures[0])
    np.testing.assert_array_equal(axes[6].images[0].get_array(), pictures[6][..., 0])
    assert len(drawn(scores.plot_mistakes, mistakes[:2])) == 2


def test_what_the_font_lacks_is_a_replacement_character():
    assert pictures.drawable("héllo\n\U0001f426") == "héllo\\n\ufffd"
    assert pictures.drawable("x" * 60) == "x" * 60 and pictures.drawable("x" * 61) == "x" * 59 + "…"
