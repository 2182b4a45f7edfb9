"""The temperature of probabilities, and the score for what belongs to no class: found in training, used afterwards."""

import csv
import json
import shutil

import jax
import numpy as np
import onnxruntime
import pytest
from scipy.special import log_softmax, softmax
from small_runs import options, small_recipe

import pspinal_jax
from pspinal_jax.__main__ import main
from pspinal_jax.errors import RunError, UsageError
from pspinal_jax.runs import calibration as module
from pspinal_jax.runs.calibration import Unknown, fit_temperature, read_calibration
from pspinal_jax.runs.directory import RunDirectory
from pspinal_jax.runs.export import export_run, read_score
from pspinal_jax.runs.predict import load_predictor, predict
from pspinal_jax.runs.scores import Scored, rejections
from pspinal_jax.runs.train import train
from pspinal_jax.weights import read_variables, save_variables


def examples(count, seed):
    """Features of three classes, each about a direction of its own, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (4 * np.eye(8)[labels] + rng.normal(size=(count, 8))).astype(np.float32), labels


def strangers(count):
    rng = np.random.default_rng(9)
    return (4 * np.eye(8)[3 + np.arange(count) % 3] + rng.normal(size=(count, 8))).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A linear layer on features, trained on smoothed labels, so that its probabilities are not sure enough."""
    place = tmp_path_factory.mktemp("calibrated")
    (train_inputs, train_labels), (test_inputs, test_labels) = examples(300, 0), examples(90, 1)
    arrays = {"train_images": train_inputs, "train_labels": train_labels}
    np.savez(place / "data.npz", **arrays, test_images=test_inputs, test_labels=test_labels)
    changes = {"data.path": place / "data.npz", "data.num_validation": 100, "label_smoothing": 0.3, "epochs": 15}
    return pspinal_jax.train("linear", **changes, workdir=place / "run")


def logits(run, inputs):
    return np.asarray(run.model.apply(run.variables, inputs, train=False), np.float64)


def test_temperature_undoes_a_scale():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4000, 5))
    labels = (log_softmax(rows, axis=1) + rng.gumbel(size=rows.shape)).argmax(1)
    assert fit_temperature(3 * rows, labels) == pytest.approx(3, rel=0.1)
    # Where all is right, the likeliest temperature would be 0.
    assert fit_temperature(np.eye(5)[[0, 1, 2] * 20], np.array([0, 1, 2] * 20)) > 0.05


def test_threshold_is_the_score_that_the_share_reaches():
    unknown = Unknown(np.zeros((2, 2), np.float32), np.arange(99, dtype=np.float32))
    assert unknown.threshold() == 4 and unknown.threshold(0.9) == 9 and unknown.threshold(0.99) == 0
    assert unknown.thresholds([0.999, 0.9]) == {0.9: 9}
    with pytest.raises(UsageError, match=r"accept is 0.995, expected at most 0.9900 with 99 held-out scores"):
        unknown.threshold(0.995)
    with pytest.raises(UsageError, match="accept is 1, expected 0 < accept < 1"):
        unknown.threshold(1)


def test_threshold_keeps_the_share_of_new_scores():
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(500):
        held_out = np.sort(rng.normal(size=60).astype(np.float32))
        kept.append((rng.normal(size=200) >= Unknown(np.zeros((1, 1)), held_out).threshold()).mean())
    assert np.mean(kept) == pytest.approx(1 - 3 / 61, abs=0.006)


def test_score_is_the_cosine_to_the_nearest_class_mean():
    inputs, labels = examples(30, 2)
    unknown = module.fit_unknown(inputs, labels, 3, inputs)
    means = np.stack([inputs[labels == label].mean(0) for label in range(3)])
    cosines = inputs @ means.T / np.linalg.norm(means, axis=1) / np.linalg.norm(inputs, axis=1, keepdims=True)
    np.testing.assert_allclose(unknown.scores(inputs), cosines.max(1), rtol=1e-5)
    np.testing.assert_allclose(unknown.held_out, np.sort(cosines.max(1)), rtol=1e-5)
    assert np.isfinite(unknown.scores(np.zeros((1, 8), np.float32))).all()


def test_rejections_count_what_passes():
    scored = Scored.of(np.array([0, 1, 1]), np.log([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]]), np.array([0.2, 0.1, 0.9]))
    low, none = rejections(scored, {0.9: 0.15, 0.5: 2.0})
    assert low == {"accept": 0.9, "threshold": 0.15, "accepted": pytest.approx(2 / 3), "accuracy": 1.0}
    assert none["accepted"] == 0 and none["accuracy"] is None


def test_temperature_applies_to_predictions_and_changes_no_class(run):
    found = run.result["calibration"]
    (temperature,) = found["temperature"]
    assert found["examples"] == 100 and temperature < 0.9
    assert found["loss"]["after"] < found["loss"]["before"]
    inputs = examples(50, 3)[0]
    rows = logits(run, inputs)
    np.testing.assert_allclose(run.predict_proba(inputs), softmax(rows / temperature, axis=1), rtol=1e-4)
    assert (run.predict_proba(inputs).argmax(1) == rows.argmax(1)).all()
    report = run.evaluate()
    assert report["temperature"] == pytest.approx(temperature) and report["loss"] < report["untempered"]["loss"]
    assert report["untempered"]["loss"] == pytest.approx(run.result["test_loss"]["mean"], rel=1e-4)
    assert report["accuracy"] == run.result["test_accuracy"]["mean"]


def test_strangers_are_unknown(run):
    known, unknown = run.predict(examples(100, 4)[0]), run.predict(strangers(60))
    assert np.mean([each.known for each in known]) > 0.85 and not any(each.known for each in unknown)
    assert unknown[0].label == "unknown" and known[0].label == known[0].classes[0][0]
    fewer = run.predict(examples(100, 4)[0], accept=0.5)
    assert 30 < sum(each.known for each in fewer) < 70
    with pytest.raises(UsageError, match=r"accept is 0.999, expected at most 0.9901"):
        run.predict(strangers(1), accept=0.999)
    passed = run.evaluate()["rejection"]
    assert [each["accept"] for each in passed] == [0.99, 0.95, 0.9, 0.8, 0.7, 0.5]
    assert passed[0]["accepted"] >= passed[-1]["accepted"]


def test_predict_prints_and_writes_what_is_unknown(run, tmp_path, capsys):
    rows = np.concatenate([examples(3, 5)[0], strangers(2)])
    table = tmp_path / "rows.csv"
    table.write_text("\n".join([",".join("abcdefgh"), *(",".join(map(str, row)) for row in rows)]) + "\n")
    assert main(["predict", str(run.path), str(table)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("unknown (nearest: ") == 2 and "5 of 5 rows classified, 2 of them unknown" in printed.err
    out = tmp_path / "out.csv"
    assert main(["predict", str(run.path), str(table), "--csv", str(out)]) == 0
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert list(lines[0]) == ["image", "class", "probability", "error", "label", "known", "score"]
    assert [line["known"] for line in lines] == ["1", "1", "1", "0", "0"] and lines[4]["label"] == "unknown"
    assert lines[0]["label"] == lines[0]["class"] and float(lines[0]["score"]) > float(lines[4]["score"])
    capsys.readouterr()
    assert main(["predict", str(run.path), str(table), "--json"]) == 0
    assert [each["known"] for each in json.loads(capsys.readouterr().out)] == [True, True, True, False, False]
    assert main(["predict", str(run.path), str(table), "--no-unknown", "--csv", str(out)]) == 0
    assert list(next(csv.DictReader(out.read_text().splitlines()))) == ["image", "class", "probability", "error"]
    assert main(["predict", str(run.path), str(table), "--no-unknown", "--accept", "0.9"]) == 2


def test_export_has_temperature_and_score(run, tmp_path):
    run.export(tmp_path / "export")
    inputs = np.concatenate([examples(20, 6)[0], strangers(20)])
    ours, theirs = load_predictor(run.path).answers(inputs), load_predictor(tmp_path / "export").answers(inputs)
    np.testing.assert_allclose(np.exp(theirs.log_probabilities), np.exp(ours.log_probabilities), atol=1e-6)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-6)
    description = json.loads((tmp_path / "export" / "export.json").read_text())
    assert description["temperature"] == pytest.approx(run.result["calibration"]["temperature"][0])
    assert description["unknown"] == {"accept": 0.95, "threshold": run.result["calibration"]["threshold"][0]}
    assert [each.known for each in predict(tmp_path / "export", inputs)] == [each.known for each in run.predict(inputs)]
    score = read_score(tmp_path / "export", description)
    probabilities, scores = score.exported.call(score.arrays, inputs)
    assert probabilities.shape == (40, 3) and scores.shape == (40,)
    path = tmp_path / "export" / "unknown.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(RunError, match=r"unknown.safetensors is damaged"):
        predict(tmp_path / "export", inputs)


def test_onnx_model_and_an_export_of_an_export_have_temperature_and_score(run, tmp_path):
    run.export(tmp_path / "export")
    export_run(tmp_path / "export", tmp_path / "again", format="onnx")
    inputs = np.concatenate([examples(20, 6)[0], strangers(20)])
    ours, theirs = load_predictor(run.path).answers(inputs), load_predictor(tmp_path / "again").answers(inputs)
    np.testing.assert_allclose(theirs.scores, ours.scores, atol=1e-6)
    session = onnxruntime.InferenceSession(tmp_path / "again" / "model.onnx")
    probabilities, scores = session.run(["probabilities", "scores"], {"features": inputs})
    np.testing.assert_allclose(probabilities, np.exp(ours.log_probabilities), atol=1e-6)
    np.testing.assert_allclose(scores, ours.scores, atol=1e-6)
    unknown = json.loads((tmp_path / "export" / "export.json").read_text())["unknown"]
    assert json.loads(session.get_modelmeta().custom_metadata_map["unknown"]) == unknown
    assert [score >= unknown["threshold"] for score in scores] == [each.known for each in run.predict(inputs)]


def test_run_without_calibration_predicts_as_before(run, tmp_path):
    """As runs of earlier versions."""
    older = RunDirectory(tmp_path / "older")
    shutil.copytree(run.path, older.path)
    (older.path / module.CALIBRATION).unlink()
    manifest = json.loads(older.manifest_path.read_text())
    kept = {name: value for name, value in manifest["sha256"].items() if name != module.CALIBRATION}
    older.manifest_path.write_text(json.dumps({"sha256": kept}))
    inputs = examples(20, 7)[0]
    predictor = load_predictor(older.path)
    rows, scores = predictor.answers(inputs)
    expected = np.asarray(jax.jit(lambda x: run.model.apply(run.variables, x, train=False))(inputs), np.float64)
    assert scores is None and predictor.calibration is None
    np.testing.assert_allclose(rows, log_softmax(expected, axis=1), rtol=1e-6)
    assert predict(predictor, inputs)[0].known is None and predict(predictor, inputs)[0].label
    with pytest.raises(UsageError, match=r"accept is 0.9, but .* has no score for the unknown"):
        predict(predictor, inputs, accept=0.9)


def test_damaged_calibration_is_refused(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    held = read_variables(tmp_path / "run" / module.CALIBRATION)
    held["0"]["temperature"] = np.float32(7)
    save_variables(tmp_path / "run" / module.CALIBRATION, held)
    with pytest.raises(RunError, match=r"calibration.safetensors is damaged"):
        load_predictor(tmp_path / "run")


def test_too_few_held_out_reject_nothing_and_say_so(npz_path, tmp_path):
    result = train(small_recipe(npz_path, epochs=1), options(tmp_path / "run"))
    assert result["calibration"]["reason"] == "24 examples were held out, and 40 are needed"
    assert read_calibration(RunDirectory(tmp_path / "run"), 0) is None


@pytest.mark.slow
def test_head_on_cached_features_is_calibrated_by_another_training(pictures, tiny_flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "MIN_EXAMPLES", 6)
    monkeypatch.setattr(module, "ACCEPT", 0.8)
    workdir = tmp_path / "run"
    flags = ["--freeze", "backbone", "--cache-features", "--epochs", "2", "--num-seeds", "2"]
    assert main(["train", "folder", "--data.path", str(pictures), "--workdir", str(workdir), *tiny_flags, *flags]) == 0
    found = RunDirectory(workdir).result()["calibration"]
    assert found["examples"] == 6 and "left out of another training" in found["of"] and len(found["temperature"]) == 2
    assert "on 6 held-out examples; predict answers unknown below a score of" in capsys.readouterr().out
    held = read_variables(workdir / module.CALIBRATION)
    assert held["0"]["means"].shape == (8, 3) and len(held["1"]["held_out"]) == 6
