"""A comparison as a whole: what chooses, what is kept, what is refused."""

import json
import shutil

import numpy as np
import pandas
import pytest
from comparison_support import SMALL, lasting, make_features, run, small_data
from sklearn.base import clone
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

import pspinal_jax
from pspinal_jax import load_run
from pspinal_jax.comparison.answers import packed, unpacked
from pspinal_jax.comparison.api import Comparison
from pspinal_jax.comparison.baselines import BASELINES
from pspinal_jax.comparison.report import write_report
from pspinal_jax.comparison.search import Comparer, make_split, rank
from pspinal_jax.comparison.settings import CompareConfig
from pspinal_jax.comparison.train import Trainer
from pspinal_jax.comparison.trial_log import Key, TrialLog, parse_record
from pspinal_jax.errors import DataError, RunError, UsageError
from pspinal_jax.files import held


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(work directory, result) of the small comparison."""
    workdir = tmp_path_factory.mktemp("comparison") / "small"
    return workdir, run(workdir)


def choices(result):
    """All that was chosen, and all that validation said."""
    rows = {
        name: (row["chosen"], row["validation_accuracy"], row["parameters"]) for name, row in result["methods"].items()
    }
    return rows, result["best_on_validation"]


def test_the_test_split_chooses_nothing(finished):
    """Neither its labels, permuted, nor its inputs, replaced by other numbers."""
    _, result = finished
    inputs, labels = make_features()["test"]
    permuted = run(data=small_data(test=(inputs, np.random.default_rng(1).permutation(labels))))
    assert choices(permuted) == choices(result)
    replaced = run(data=small_data(test=(100 * inputs[::-1], labels)))
    assert choices(replaced) == choices(result)
    for other in (permuted, replaced):
        assert {row["test_accuracy"]["mean"] for row in other["methods"].values()} != {
            row["test_accuracy"]["mean"] for row in result["methods"].values()
        }


def test_trials_get_no_test_example_and_nobody_its_label(monkeypatch):
    seen, rows = {}, {}

    def spy(self, tasks, examples):
        seen[tasks[0].key.kind] = examples
        rows.update({(task.key.kind, task.key.number): task.part.train.tolist() for task in tasks})
        return ran(self, tasks, examples)

    ran = Trainer.run
    monkeypatch.setattr(Trainer, "run", spy)
    run(heads=("dense",), floors=False, refit=True)
    assert not seen["trial"].inputs[120:].any() and seen["seed"].inputs[120:].any()
    for kind in ("trial", "seed", "refit"):
        assert not seen[kind].labels[120:].any()
        np.testing.assert_array_equal(seen[kind].inputs[:120], seen["seed"].inputs[:120])
    # All trials are cut as the first seed is, and every seed in its own way; a refit has all of both parts.
    comparer = Comparer(small_data(), CompareConfig(**SMALL), TrialLog(None), shown=False)
    cuts = [comparer.rows[0, seed][0].tolist() for seed in range(2)]
    assert rows == {("trial", 0): cuts[0], ("trial", 1): cuts[0], ("trial", 2): cuts[0]} | {
        ("seed", number): cut for number, cut in enumerate(cuts)
    } | {("refit", number): list(range(120)) for number in range(2)}
    assert cuts[0] != cuts[1]


def test_trial_log_keeps_whole_lines_and_a_cut_one_is_done_again(finished, tmp_path):
    workdir, result = finished
    lines = (workdir / "trials.jsonl").read_text().splitlines()
    for kept in (0, 1, 7, len(lines) - 1, len(lines)):
        again = shutil.copytree(workdir, tmp_path / str(kept))
        cut = lines[kept][:40] if kept < len(lines) else ""
        (again / "trials.jsonl").write_text("\n".join([*lines[:kept], cut]))
        resumed = run(again)
        assert lasting(resumed) == lasting(result)
        assert lasting(json.loads((again / "compare.json").read_text())) == lasting(result)
        written = (again / "trials.jsonl").read_text().splitlines()
        assert written[:kept] == lines[:kept] and len(written) == len(lines)
    assert not any(resumed["execution"]["compilations"].values())


@pytest.mark.parametrize("summed", [True, False], ids=["with a checksum", "as before checksums"])
def test_trial_log_notices_a_damaged_line(finished, summed):
    line = json.loads((finished[0] / "trials.jsonl").read_text().splitlines()[0])
    if not summed:
        del line["checksum"]
    assert parse_record(json.dumps(line)) is not None
    assert parse_record(json.dumps(line)[:-20]) is None
    for name in ("setting", "seconds", "validation_accuracy", "number"):
        assert parse_record(json.dumps({key: value for key, value in line.items() if key != name})) is None
    changed = line | {"validation_accuracy": 0.123}
    assert (parse_record(json.dumps(changed)) is None) == summed


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"kind": "trial"}'])
def test_trial_log_notices_what_is_not_a_record(text):
    assert parse_record(text) is None


def test_trial_log_computes_damaged_lines_again_and_keeps_older_ones(finished, tmp_path, capsys):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    (tmp_path / "compare.json.7-7.part").write_text("what a kill has left")
    lines = [json.loads(line) for line in (workdir / "trials.jsonl").read_text().splitlines()]
    seed = next(line for line in lines if line["kind"] == "seed" and line["method"] == "dense")
    for line in lines:
        if line is not seed:
            del line["checksum"]
    damaged = [line for line in lines if line["method"] in ("knn", "ridge")]
    for line, setting in zip(damaged, ({}, {"k": 0}, 0, damaged[3]["setting"] | {"k": 1.0}), strict=False):
        line["setting"] = setting
    seed["test_accuracy"] = 7.0
    (tmp_path / "trials.jsonl").write_text("\n".join(map(json.dumps, lines)))  # the last one lacks its end
    resumed = run(tmp_path)
    assert lasting(resumed) == lasting(result)
    assert resumed["execution"]["compilations"] == {"progressive": 0, "dense": 1}
    assert "trials.jsonl: damaged lines, 1 of 27" in capsys.readouterr().err
    assert lasting(run(tmp_path)) == lasting(result) and capsys.readouterr().err == ""


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(finished, tmp_path, monkeypatch, capsys):
    def failing(result, figure):
        raise ValueError("no font")

    _, result = finished
    monkeypatch.setattr("pspinal_jax.comparison.report._draw", failing)
    write_report(tmp_path, result | {"data": result["data"] | {"source": "a$\\frac$\udcff\x1b[31m|"}})
    assert {path.name for path in tmp_path.iterdir()} == {"compare.json", "compare.md"}
    assert "compare.png was not drawn: no font" in capsys.readouterr().err
    assert "\x1b" not in (tmp_path / "compare.md").read_text()


def test_a_source_of_any_name_is_drawn(finished, tmp_path, capsys):
    result = finished[1] | {"data": finished[1]["data"] | {"source": "a$\\frac$\udcff\x1b[31m_{"}}
    write_report(tmp_path, result)
    Comparison(result).plot().savefig(tmp_path / "again.png")
    assert (tmp_path / "compare.png").exists() and capsys.readouterr().err == ""


def test_more_trials_heads_and_seeds_go_on_with_what_is_there(finished, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    more = {"heads": ("progressive", "mlp", "dense"), "trials": 4, "num_seeds": 3}
    before = (workdir / "trials.jsonl").read_text().splitlines()
    extended = run(tmp_path, **more)
    assert (tmp_path / "trials.jsonl").read_text().splitlines()[: len(before)] == before
    assert lasting(extended) == lasting(run(**more))


def test_compare_refuses_the_folder_of_another_comparison(finished, tmp_path):
    workdir, _ = finished
    for changes, named in (({"seed": 1}, "seed was 0 and is now 1"), ({"layer_width": 5}, "layer_width was 4")):
        with pytest.raises(UsageError, match=named):
            run(workdir, **changes)
    with pytest.raises(UsageError, match="data_fingerprint"):
        run(workdir, data=small_data(test=make_features(seed=5)["test"]))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="something else than a comparison"):
        run(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        run(tmp_path)


def test_compare_refuses_a_folder_in_which_another_works(tmp_path):
    with held(tmp_path / ".lock") as other:
        assert other is None
        with pytest.raises(RunError, match=f"{tmp_path} is in use by"):
            run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_compare_result_matches_its_records(finished):
    workdir, result = finished
    averages, baselines = ["progressive_average", "dense_average"], ["logistic", "lda", "nearest_mean", "knn", "ridge"]
    assert list(result["methods"]) == ["progressive", "dense", *averages, *baselines]
    sizes = {name: row["parameters"] for name, row in result["methods"].items()}
    assert sizes["dense_average"] == 2 * sizes["dense"]
    assert sizes["dense"] == sizes["ridge"] == 6 * 3 + 3 and sizes["knn"] is None
    for goal, differences in result["differences"].items():
        base = result["methods"][goal.removeprefix("to_")]["test_accuracy"]["mean"]
        for name, each in differences.items():
            assert each["mean"] == pytest.approx(result["methods"][name]["test_accuracy"]["mean"] - base)
            low, high = each["interval_95"]
            assert low <= each["mean"] <= high and each["standard_error"] > 0
            assert not each["beyond_the_noise"]  # of two seeds of one split
    design = {"metric": "accuracy", "level": 0.95, "pairs_at_once": 36, "units": 2, "of": "seeds of one split"}
    assert result["intervals"] == design | {"claims": False}
    lines = [json.loads(line) for line in (workdir / "trials.jsonl").read_text().splitlines()]
    for head in SMALL["heads"]:
        trials = [line for line in lines if line["kind"] == "trial" and line["method"] == head]
        best = max(trials, key=lambda line: (line["validation_accuracy"], -line["validation_loss"]))
        (chosen,) = result["methods"][head]["chosen"]
        assert chosen["validation_accuracy"] == best["validation_accuracy"] and chosen["setting"] == best["setting"]
        assert {json.dumps(line["setting"]) for line in lines if line["kind"] == "seed" and line["method"] == head} == {
            json.dumps(chosen["setting"])
        }
    assert result["execution"]["compilations"] == {"progressive": 1, "dense": 1}
    assert result["execution"]["mode"] == "loop" and result["execution"]["workers"] >= 1
    table = (workdir / "compare.md").read_text()
    assert result["in_words"] in table and "| ridge |" in table
    assert (workdir / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_another_metric_of_a_finished_comparison_trains_nothing(finished, tmp_path):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path / "again")
    for metric, unit in (("macro_f1", "points"), ("log_likelihood", "nats"), ("calibration_error", "points")):
        found = run(tmp_path / "again", metric=metric)
        assert not any(found["execution"]["compilations"].values())
        assert found["methods"] == result["methods"] and choices(found) == choices(result)
        scores = {name: row["test_metrics"][metric]["mean"] for name, row in found["methods"].items()}
        difference = found["differences"]["to_dense"]["progressive"]
        assert difference["mean"] == pytest.approx(scores["progressive"] - scores["dense"])
        low, high = difference["interval_95"]
        assert low < difference["mean"] < high
        table = (tmp_path / "again" / "compare.md").read_text()
        name = metric.replace("_", " ").replace("f1", "F1").replace("log ", "log-")
        assert f"test {name}, {'nats' if unit == 'nats' else '%'} |" in table and f"in {unit} of test {name}" in table
        scale, digits = (1, 4) if unit == "nats" else (100, 2)
        assert f"{scale * scores['dense']:.{digits}f} ± " in table
        assert f"{scale * difference['mean']:+.{digits}f}, {scale * low:+.{digits}f} .. " in table


def test_an_average_has_the_luck_of_its_heads_seeds(finished):
    """It has one answer on a split, which a bootstrap over seeds would take for certain."""
    errors = {
        name: finished[1]["all_differences"]["to_ridge"][name]["standard_error"] for name in ("dense", "dense_average")
    }
    accuracies = finished[1]["methods"]["dense"]["test_accuracy"]["each"]
    assert np.std(accuracies) > 0 and errors["dense_average"] > np.std(accuracies, ddof=1) / np.sqrt(2)


def test_seeds_have_validation_parts_of_their_own_and_splits_tests_of_their_own():
    comparer = Comparer(small_data(), CompareConfig(**SMALL, splits=3, seed=5), TrialLog(None), shown=False)
    labels = comparer.labels
    assert comparer.rows[0, 0][1].tolist() != comparer.rows[0, 1][1].tolist()
    for (number, _), (train, validation) in comparer.rows.items():
        assert np.bincount(labels[validation]).tolist() == [8, 8, 8]
        assert sorted([*train, *validation]) == comparer.splits[number].pool.tolist()
    for pool, test in comparer.splits:
        assert np.bincount(labels[test]).tolist() == [20, 20, 20]
        assert sorted([*pool, *test]) == list(range(180))
    tests = [split.test.tolist() for split in comparer.splits]
    assert tests[0] == list(range(120, 180)) and tests[0] != tests[1] != tests[2] != tests[0]
    # Of each class as many as the data's own test has, by a generator of the class's own.
    drawn = [np.random.default_rng([5, 1, c]).permutation(np.flatnonzero(labels == c))[:20] for c in range(3)]
    assert tests[1] == sorted(np.concatenate(drawn).tolist())


def test_a_validation_split_of_the_datas_own_is_used():
    data = small_data(validation=make_features(num_train=30, seed=3)["train"])
    comparer = Comparer(data, CompareConfig(heads=("dense",), batch_size=16), TrialLog(None), shown=False)
    for seed in range(5):
        train, validation = comparer.rows[0, seed]
        assert train.tolist() == list(range(120)) and validation.tolist() == list(range(120, 150))
    np.testing.assert_array_equal(comparer.inputs[120:150], data.validation.inputs)


def test_epochs_that_are_not_given_make_600_steps_at_least():
    for batch_size, epochs in ((13, 86), (96, 600), (1, 20)):
        config = CompareConfig(heads=("dense",), batch_size=batch_size)
        assert Comparer(small_data(), config, TrialLog(None), shown=False).schedule.epochs == epochs


def test_compare_shows_every_training_when_it_is_done(monkeypatch):
    shown, advance = [], Comparer._advance
    monkeypatch.setattr(Comparer, "_advance", lambda self, key: (shown.append(key), advance(self, key)))
    run(heads=("dense",), trials=2, num_seeds=2, refit=True)
    assert len(shown) == len(set(shown)) == 2 + 2 + 2 + 5 * (1 + 2 + 1)


def test_several_splits_are_tuned_each_by_itself():
    result = run(splits=2, heads=("dense",), num_seeds=2)
    row = result["methods"]["dense"]
    assert len(row["chosen"]) == 2 and len(row["test_accuracy"]["each"]) == 4


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"trials": 0}, "trials is 0, expected at least 1"),
        ({"heads": ("mlp", "mlp")}, "heads are mlp mlp, expected some of"),
        ({"heads": ("deep",)}, "heads are deep, expected some of"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1, expected 0 < FRACTION < 1"),
        ({"learning_rate": (1e-2, 1e-3)}, r"learning_rate is 0.01 .. 0.001, expected 0 < LOW <= HIGH"),
        ({"dropout_rate": (0.1, 1.0)}, r"dropout_rate is 0.1 .. 1, expected"),
        ({"batch_size": 200}, "batch_size is 200, but only 96 examples are left to train on"),
        ({"validation_fraction": 0.001}, "no example is left to validate on"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**31}, "seed is 2147483648"),
    ],
)
def test_compare_config_refuses_in_one_line(settings, line):
    with pytest.raises(UsageError, match=line) as caught:
        run(**settings)
    assert "\n" not in str(caught.value)


def test_compare_takes_arrays(capsys):
    (inputs, labels), (test_inputs, test_labels) = make_features().values()
    small = {**SMALL, "heads": "dense", "trials": 2, "progress": False}
    comparison = pspinal_jax.compare(
        inputs, labels, test_features=test_inputs, test_labels=test_labels, floors=False, **small
    )
    assert list(comparison.result["methods"]) == ["dense", "dense_average"] and comparison.best == "dense"
    assert "dense *" in repr(comparison) and "| **dense** |" in comparison._repr_markdown_()
    cut = pspinal_jax.compare(inputs, labels, test_fraction=0.25, **small | {"progress": True})
    trainings = 2 + SMALL["num_seeds"] + len(BASELINES) * (1 + SMALL["num_seeds"])
    assert f" {trainings}/{trainings} " in capsys.readouterr().err
    assert cut.result["data"]["test"] == 30
    assert len(cut.plot().axes) == 1 + len({cut.best, "dense"})
    with pytest.raises(UsageError, match="compare has no setting 'depth'; there are: heads, floors"):
        pspinal_jax.compare(inputs, labels, depth=3)
    with pytest.raises(UsageError, match="together"):
        pspinal_jax.compare(inputs, labels, test_labels=labels)
    with pytest.raises(DataError, match="120 examples but 119 labels"):
        pspinal_jax.compare(inputs, labels[1:])
    with pytest.raises(DataError, match="NaN"):
        pspinal_jax.compare(np.full_like(inputs, np.nan), labels, **small)


def test_compare_also_takes_estimators_and_gives_the_best_model_back():
    (inputs, labels), (test_inputs, test_labels) = make_features().values()
    names, small = np.array(["ant", "bee", "cow"]), {**SMALL, "heads": ("dense",), "refit": True, "progress": False}
    also = {"tree": DecisionTreeClassifier(max_depth=3), "bayes": GaussianNB(), "svm": LinearSVC(C=1e-3)}
    comparison = pspinal_jax.compare(
        pandas.DataFrame(inputs, columns=list("abcdef")), names[labels],
        test_features=pandas.DataFrame(test_inputs, columns=list("abcdef")), test_labels=names[test_labels],
        also=also, floors=False, **small,
    )  # fmt: skip
    rows = comparison.result["methods"]
    assert [*rows] == ["dense", "dense_average", "tree", "bayes", "svm"]
    expected = clone(also["bayes"]).fit(inputs, labels).score(test_inputs, test_labels)
    assert rows["bayes"]["test_accuracy"]["each"] == [pytest.approx(expected)]
    assert len(rows["tree"]["test_accuracy"]["each"]) == SMALL["num_seeds"]  # whose random state is the seed's
    assert rows["tree"]["settings_tried"] == 1 and rows["dense"]["settings_tried"] == SMALL["trials"]
    assert {row["train_examples"] for row in rows.values()} == {120}
    table = comparison.table
    assert table.index.tolist() == [*rows] and table.loc["bayes", "test_accuracy"] == pytest.approx(expected)
    assert "<td>bayes" in comparison._repr_html_() and comparison.result["saved"] == "dense"
    model = comparison.best_model
    assert model.class_names == tuple(names)
    shuffled = pandas.DataFrame(test_inputs, columns=list("abcdef"))[list("fedcba")]
    right = names[model.predict_proba(shuffled).argmax(1)] == names[test_labels]
    assert right.mean() == rows["dense"]["test_accuracy"]["each"][0]
    for wrong in ({"knn": GaussianNB()}, {"mine": 3}):
        with pytest.raises(UsageError, match="also has"):
            pspinal_jax.compare(inputs, labels, also=wrong)


def test_tokens_are_pooled_by_their_mean(capsys):
    inputs, labels = make_features()["train"]
    tokens = np.stack([inputs - 1, inputs, inputs + 1], 1)
    small = {**SMALL, "heads": ("dense",), "floors": False, "trials": 1, "num_seeds": 1, "progress": False}
    pooled = pspinal_jax.compare(tokens, labels, **small)
    assert "features [N, T, D] = [120, 3, 6] are tokens: the mean over T is taken" in capsys.readouterr().err
    assert pooled.result["data"]["features"] == 6


def test_an_average_is_the_mean_of_its_seeds_probabilities(finished):
    workdir, _ = finished
    config = CompareConfig(**SMALL)
    comparer = Comparer(small_data(), config, log := TrialLog(workdir), shown=False)
    with log.opened(comparer.identity()):
        comparer.run()
    seeds = [log.probabilities(Key("seed", 0, "dense", number)) for number in range(2)]
    mean = np.mean(np.asarray(seeds, np.float32), 0)
    average, dense = comparer.answers("dense_average"), comparer.answers("dense")
    np.testing.assert_array_equal(average.predicted, np.broadcast_to(mean.argmax(1), (1, 2, 60)))
    np.testing.assert_allclose(average.confidence[0, 1], mean.max(1), rtol=2e-3)
    true = average.labels[0]
    np.testing.assert_allclose(np.exp(average.log_likelihood[0, 0]), mean[np.arange(60), true], rtol=5e-3)
    np.testing.assert_array_equal(dense.correct, dense.predicted == dense.labels[:, None])
    np.testing.assert_array_equal(dense.predicted[0, 1], seeds[1].argmax(1))


def test_a_refit_goes_on_from_the_same_trainings_and_lost_probabilities_are_found_again(finished, tmp_path):
    workdir, result = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "trials.jsonl").read_text()
    refitted = run(tmp_path, refit=True)
    lines = (tmp_path / "trials.jsonl").read_text().removeprefix(before).splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"refit", "average"}
    for name, row in refitted["methods"].items():
        assert row["train_examples"] == 120 and result["methods"][name]["train_examples"] == 96
        assert row["chosen"] == result["methods"][name]["chosen"]
        if "average" not in name:
            assert row["test_accuracy_before_refit"]["each"] == result["methods"][name]["test_accuracy"]["each"]
    assert refitted["methods"]["dense"]["test_accuracy"]["each"] != result["methods"]["dense"]["test_accuracy"]["each"]
    # Without their files, the trainings that an average is of are done again, and no others.
    (tmp_path / "trials.jsonl").write_text(
        "".join(line + "\n" for line in before.splitlines() if '"average"' not in line)
    )
    (tmp_path / "probabilities" / "seed-0-dense-1.npy").write_bytes(b"damaged")
    again = run(tmp_path)
    assert lasting(again) == lasting(result)
    assert again["execution"]["compilations"] == {"progressive": 0, "dense": 1}


def test_a_comparison_of_an_earlier_version_goes_on_as_it_was(finished, tmp_path, capsys):
    """As they recorded it: no format, no answers but hits, neighbours and ridge regression alone beside heads."""
    workdir, result = finished
    config = json.loads((workdir / "config.json").read_text())
    del config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    known = ("progressive", "dense", "knn", "ridge")
    lines = [json.loads(line) for line in (workdir / "trials.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["method"] in known]
    new = ("checksum", "probabilities", "temperature", "test_predictions", "test_log_likelihood", "test_confidence")
    earlier = [{name: value for name, value in line.items() if name not in new} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in earlier)
    (tmp_path / "trials.jsonl").write_text(text)
    found = run(tmp_path, refit=True, save=True)
    assert (tmp_path / "trials.jsonl").read_text() == text
    assert "was begun by an earlier version; it resumes without" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"metric is macro_f1, but .* recorded accuracy alone; choose another"):
        run(tmp_path, metric="macro_f1")
    assert [*found["methods"]] == [*known] and not found["protocol"]["refit"]
    for name in known:
        now = result["methods"][name]
        accuracy = {"test_metrics": {"accuracy": now["test_metrics"]["accuracy"]}}
        assert found["methods"][name] == now | accuracy
    (inputs, labels), held = make_features()["test"], found["methods"][found["saved"]]
    right = load_run(tmp_path / "best").predict_proba(inputs).argmax(1) == labels
    assert right.mean() == pytest.approx(held["test_accuracy"]["each"][0])
    (tmp_path / "trials.jsonl").write_text("".join(text.splitlines(keepends=True)[:-4]))
    assert lasting(run(tmp_path, save=True)) == lasting(found)


def test_the_result_of_an_earlier_version_is_shown_and_drawn(finished, tmp_path):
    result = json.loads(json.dumps(finished[1]))
    for row in result["methods"].values():
        del row["settings_tried"], row["train_examples"]
    del result["intervals"], result["protocol"]["refit"]
    comparison = Comparison(result)
    assert "| 96 |" in comparison._repr_markdown_() and "dense" in repr(comparison)
    assert comparison.table.loc["dense", "train_examples"] == 96 and "<td>96" in comparison._repr_html_()
    comparison.plot().savefig(tmp_path / "earlier.png")
    with pytest.raises(UsageError, match="no best model"):
        comparison.best_model  # noqa: B018


def test_of_tied_trials_the_one_with_the_lower_loss_is_chosen():
    """Lines from before the loss was kept come last."""
    lines = [{"validation_accuracy": 0.5, "validation_loss": loss} for loss in (0.3, 0.2, None)]
    lines += [{"validation_accuracy": 0.5}, {"validation_accuracy": 0.4, "validation_loss": 0.1}]
    assert max(lines, key=rank) is lines[1] and max(lines[2:], key=rank) is lines[2]


def test_a_trials_validation_loss_is_that_of_its_predictions(finished):
    """Lower than that of guessing, of a head that is right; a mean over validation examples alone."""
    lines = [json.loads(line) for line in (finished[0] / "trials.jsonl").read_text().splitlines()]
    for line in lines:
        if "validation_loss" in line and line["validation_accuracy"] == 1.0:
            assert 0.0 < line["validation_loss"] < np.log(3)
    assert any("validation_loss" in line for line in lines)


def test_hits_are_packed_and_unpacked():
    hits = np.random.default_rng(0).random(1001) < 0.3
    np.testing.assert_array_equal(unpacked(packed(hits), 1001), hits)


def test_copies_lie_on_one_side_of_every_cut(tmp_path):
    (inputs, labels), (test, test_labels) = make_features().values()
    doubled = small_data(train=(np.tile(inputs, (2, 1)), np.tile(labels, 2)), test=(test, test_labels))
    comparer = Comparer(doubled, CompareConfig(**SMALL, splits=3), TrialLog(None), False)
    for (number, _), (train, validation) in comparer.rows.items():
        parts = [comparer.inputs[rows] for rows in (train, validation, comparer.splits[number].test)]
        held = [set(map(bytes, part)) for part in parts]
        assert len(set.union(*held)) == sum(map(len, held))
    assert comparer.copies[0]["test_in_train_of_drawn_splits"] == 0
    # Five test rows of each class, and nothing but pairs to draw them from: of each class one pair is cut.
    pairs = doubled.train.inputs[15:], doubled.train.labels[15:]
    odd = small_data(train=pairs, test=(doubled.train.inputs[:15], doubled.train.labels[:15]))
    drawn = Comparer(odd, CompareConfig(**SMALL, splits=3), TrialLog(None), False)
    labels = np.arange(240) % 3
    assert len(make_split(odd.contents().labels, 225, 1, 0, drawn._copies).test) == 15
    counts = drawn.copies[0]
    assert (counts["test_in_train"], counts["test_in_train_of_drawn_splits"]) == (15, 6)
    older = TrialLog(None)
    older.keep_copies_together = False
    apart = Comparer(doubled, CompareConfig(**SMALL), older, False)
    assert apart.copies[0]["validation_in_train"] > 0 == comparer.copies[0]["validation_in_train"]
    assert "keep_copies_together" in comparer.identity().keys() - apart.identity().keys()


def test_test_rows_that_are_training_rows_are_counted(tmp_path, capsys):
    splits = make_features()
    result = run(data=small_data(test=splits["train"]), heads=("dense",), floors=False, trials=1)
    assert result["copies"] == {
        "test_in_train": 120,
        "validation_in_train": 0,
        "in_several_classes": 0,
        "test_in_train_of_drawn_splits": 0,
    }
    assert (
        "warning: small: 120 of 120 test examples are also in train, identical: test row 0" in capsys.readouterr().err
    )


def test_rows_of_few_distinct_values_are_compared_all_the_same(capsys):
    labels = np.arange(120) % 3
    cells = small_data(train=(np.eye(3, 6)[labels], labels), test=(np.eye(3, 6)[labels[:30]], labels[:30]))
    result = run(data=cells, heads=("dense",), floors=False, trials=1)
    assert result["copies"]["validation_in_train"] == result["data"]["validation"] == 24
    assert "24 of 24 validation examples are also in train" in capsys.readouterr().err


def test_compare_cuts_test_rows_with_copies_on_one_side(capsys):
    inputs, labels = make_features()["train"]
    small = {**SMALL, "heads": ("dense",), "floors": False, "trials": 1}
    found = pspinal_jax.compare(np.tile(inputs, (2, 1)), np.tile(labels, 2), progress=False, **small).result
    assert found["copies"]["test_in_train"] == 0 and found["data"]["test"] == 48  # 16 of 80 each
    assert "warning" not in capsys.readouterr().err


def test_a_comparison_of_before_copies_were_kept_together_goes_on_as_it_began(tmp_path):
    inputs, labels = make_features()["train"]
    data = small_data(train=(np.tile(inputs, (2, 1)), np.tile(labels, 2)))
    small = {"heads": ("dense",), "floors": False, "trials": 1}
    run(tmp_path, data, **small)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("keep_copies_together") is True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run(tmp_path, data, **small)["copies"]["validation_in_train"] > 0
