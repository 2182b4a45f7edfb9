"""Small things that make people sigh: each is right, or one line that tells what to do."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pspinal_jax
from pspinal_jax import MLPHead, ProgressiveSpinalHead, SpinalHead, environment
from pspinal_jax.__main__ import main
from pspinal_jax.commands.evaluate import EvaluateArguments
from pspinal_jax.commands.parse import parse
from pspinal_jax.data.catalogue import CATALOGUE
from pspinal_jax.errors import UsageError
from pspinal_jax.files import cache_folder
from pspinal_jax.recipes import list_recipes, load_recipe
from pspinal_jax.runs.result import published_accuracy

SMALL = {"epochs": 1, "batch_size": 16, "eval_batch_size": 50, "model__layer_width": 6}


@pytest.fixture(scope="module")
def run(npz_path, tmp_path_factory):
    place = tmp_path_factory.mktemp("surprises") / "run"
    more = {"data__num_validation": 20, "data__num_classes": 3}
    return pspinal_jax.train("mnist", data__path=npz_path, workdir=place, retrain=False, **SMALL, **more)


def setup(recipe, train, test):
    examples, splits = types.SimpleNamespace(count=train), {"test": types.SimpleNamespace(count=test)}
    return types.SimpleNamespace(recipe=recipe, examples=examples, splits=splits)


@pytest.mark.parametrize("name", [name for name in list_recipes() if load_recipe(name).card.published_accuracy])
def test_every_figure_of_the_paper_is_shown_for_its_data_only(name, tmp_path):
    recipe = load_recipe(name)
    sizes = CATALOGUE[recipe.data.name].sizes
    figure = recipe.card.published_accuracy

    def shown(train, test, **data):
        changed = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **data))
        return published_accuracy(setup(changed, train, test))

    assert min(sizes) > 0
    assert shown(*sizes) == shown(*sizes, path=tmp_path) == figure
    for fewer in ((sizes[0] - 1, sizes[1]), (sizes[0], sizes[1] - 1)):
        assert shown(*fewer, path=tmp_path) is None
    other = "fashion_mnist" if recipe.data.name != "fashion_mnist" else "mnist"
    assert shown(*sizes, name=other) is None


def test_own_pictures_are_not_compared_with_the_paper(run, npz_path, capsys):
    assert run.recipe.card.name == "mnist" and run.result["published_accuracy_percent"] is None


def test_what_evaluate_writes_names_its_data_and_stays(run, arrays, tmp_path):
    place = shutil.copytree(run.path, tmp_path / "run")
    opened = pspinal_jax.load_run(place)
    others = []
    for turn in (1, 2):
        others.append(tmp_path / f"other{turn}.npz")
        np.savez(others[-1], **arrays | {"test_labels": (arrays["test_labels"] + turn) % 3})
    (place / "evaluation-damaged.json").write_text("[]")
    first = opened.evaluate(others[0])  # before there is an evaluation.json
    own, second = opened.evaluate(), opened.evaluate(others[1])
    written = {
        name: json.loads((place / name).read_text()) for each in (own, first, second) for name in each["files"][:1]
    }
    assert len(written) == 3
    for report in (own, first, second):
        held = written[report["files"][0]]
        assert (held["data"], held["accuracy"]) == (report["data"], report["accuracy"])
    listed = written["evaluation.json"]["other_data"]
    assert listed == {report["files"][0]: report["data"] for report in (first, second)}
    assert [str(path) for path in others] == list(dict(sorted(listed.items(), key=lambda item: item[1])).values())


def test_a_finished_run_whose_checkpoints_are_gone(run, tmp_path, capsys):
    place = shutil.copytree(run.path, tmp_path / "run")
    for emptied in (False, True):
        shutil.rmtree(place / "checkpoints")
        if emptied:
            (place / "checkpoints").mkdir()
        for command in (["evaluate", place], ["export", place]):
            assert main(list(map(str, command))) == 1
            said = capsys.readouterr().err
            assert "checkpoints holds no checkpoint" in said
        (place / "checkpoints").mkdir(exist_ok=True)


REFUSED = {
    "split seed": ("data.split_seed", -1, "is -1, expected at least 0"),
    "validation fraction": ("data.validation_fraction", 0.2, "expected 0.0 without"),
    "weights none": ("model.weights", "none", "is none, expected None, written so, for random numbers"),
}


@pytest.mark.parametrize(("flag", "value", "said"), REFUSED.values(), ids=REFUSED)
def test_a_flag_without_effect_is_one_line(npz_path, tmp_path, capsys, flag, value, said):
    words = ["--data.path", npz_path, "--workdir", tmp_path / "run", f"--{flag.replace('_', '-')}", value]
    assert main(["train", "features", *map(str, words)]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match=said):
        pspinal_jax.train("features", data__path=npz_path, workdir=tmp_path / "run", **{flag: value})
    assert not (tmp_path / "run").exists()


def test_home_is_understood_in_every_path(run, npz_path, tmp_path, monkeypatch, capsys):
    home = tmp_path / "home"
    shutil.copytree(run.path, home / "run")
    shutil.copy(npz_path, home / "d.npz")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "~/cache")
    assert cache_folder() == home / "cache"
    monkeypatch.setenv("PSPINAL_JAX_CACHE", "off")
    assert main(["evaluate", "~/run", "--data.path", "~/d.npz"]) == 0
    assert main(["export", "~/run", "--output", "~/exported"]) == 0 and (home / "exported").is_dir()
    places = {"data__path": "~/d.npz", "workdir": "~/next", "init_from": "~/run"}
    pspinal_jax.train("mnist", data__num_validation=20, data__num_classes=3, retrain=False, **SMALL, **places)
    assert (home / "next" / "result.json").is_file()
    parsed = parse(EvaluateArguments, ["~/a", "--data.path", "~/b"], "evaluate", "")
    assert (parsed.run_dir, parsed.data_path) == (home / "a", home / "b")


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend 'tpu': no\nlibrary")])
def test_a_platform_that_is_not_there_is_one_line(run, monkeypatch, capsys, error):
    def devices():
        raise error

    monkeypatch.setattr(environment.jax, "devices", devices)
    for command in (["evaluate", str(run.path)], ["benchmark", "step"]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: JAX cannot compute on the platform") and said.count("\n") == 1
        assert "JAX_PLATFORMS=cpu" in said


@pytest.mark.parametrize("head_class", [ProgressiveSpinalHead, SpinalHead, MLPHead])
def test_norm_none_and_activations_by_name(head_class):
    plain, named = (head_class(3, 4, norm=norm) for norm in (None, "none"))
    assert named == plain and named.norm is None and named.clone().norm is None
    variables = jax.eval_shape(lambda: named.init(jax.random.key(0), jnp.ones((2, 8)), train=False))
    assert "batch_stats" not in variables
    with pytest.raises(ValueError, match=r"activation must be a function of an array, .*, got 'relu'"):
        head_class(3, 4, activation="relu")
    with pytest.raises(ValueError, match=r"norm must be one of None, .*, got .layer."):
        head_class(3, 4, norm="layer")


def test_interop_takes_norm_none_too():
    from flax import nnx

    from pspinal_jax.interop.functional import progressive_head
    from pspinal_jax.interop.nnx import ProgressiveSpinalHead as NnxHead

    init, _ = progressive_head(num_classes=3, layer_width=4, norm="none")
    params, batch_stats = jax.eval_shape(lambda: init(jax.random.key(0), num_features=8))
    assert batch_stats == {} and params
    head = NnxHead(8, num_classes=3, layer_width=4, norm="none", rngs=nnx.Rngs(0))
    head.eval()
    assert head(jnp.ones((2, 8))).shape == (2, 3)
    with pytest.raises(ValueError, match="activation must be a function"):
        progressive_head(num_classes=3, layer_width=4, activation="relu")
