import dataclasses
from pathlib import Path

import jax
import pytest

from pspinal_jax.errors import UsageError
from pspinal_jax.files import shipped
from pspinal_jax.models.build import build_model, count_parameters
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_states_its_command_score_and_time(name):
    recipe = load_recipe(name)
    header = (shipped("configs") / f"{name.replace('-', '_')}.py").read_text().split("\nfrom ")[0]
    assert recipe.card.name == name
    assert f"pspinal-jax train {name}" in header
    assert "expected" in header and "time" in header and "to be filled" not in header


def test_the_mnist_rows_head_has_the_papers_parameter_count():
    for name in ("mnist", "mnist-paper"):
        assert parameters(load_recipe(name), (28, 28, 1), 10) == 514_218


def test_mnist_paper_is_the_published_recipe():
    recipe = load_recipe("mnist-paper")
    optimizer = recipe.optimizer
    published = ("sgd", 1e-3, 0.5, False, 0.0, "constant")
    fields = ("name", "learning_rate", "momentum", "nesterov", "weight_decay", "schedule")
    assert tuple(getattr(optimizer, field) for field in fields) == published
    assert (recipe.batch_size, recipe.epochs, recipe.protocol) == (64, 50, "paper")
    assert (recipe.model.dropout_rate, recipe.model.norm, recipe.model.layer_dropout_rate) == (0.2, "batch", 0.0)
    assert not recipe.data.drop_remainder and recipe.label_smoothing == 0.0


def test_the_mlp_baseline_matches_the_progressive_head_in_parameters():
    recipe = load_recipe("mnist")
    mlp = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, head="mlp"))
    assert abs(parameters(mlp, (28, 28, 1), 10) / parameters(recipe, (28, 28, 1), 10) - 1) < 0.002


def test_names_resolve_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits").card.name == "digits"


def test_a_users_own_file_is_a_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pspinal_jax.recipes import Card, DataConfig, Recipe\n"
        "recipe = Recipe(card=Card('mine', 'none', 'head'), data=DataConfig('x'), epochs=3)\n"
    )
    assert load_recipe(str(path)).epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe = 3\n", "must define"),
        ("this is no python\n", "SyntaxError"),
        ("raise RuntimeError('boom')\n", "boom"),
        (
            "from pspinal_jax.recipes import *\nrecipe = Recipe(card=None, data=DataConfig('x'), epochs=0)\n",
            "epochs is 0",
        ),
    ],
)
def test_a_bad_recipe_file_is_named(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_recipe(str(path))
    assert "bad.py" in str(caught.value)


def test_unknown_names_get_a_suggestion():
    with pytest.raises(UsageError, match="did you mean mnist-paper"):
        load_recipe("mnist_papr")
    with pytest.raises(UsageError, match="does not exist"):
        load_recipe("nowhere/mine.py")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"protocol": "paper", "retrain": True}, "retrain"),
    ],
)
def test_values_outside_their_range_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(load_recipe("digits"), **changes)


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_recipe("digits").epochs = 3


def test_configs_stand_beside_the_package_in_a_checkout():
    assert Path(shipped("configs")).name == "configs"


def parameters(recipe: Recipe, shape: tuple[int, ...], num_classes: int) -> int:
    model = build_model(recipe, shape, num_classes)
    images = jax.ShapeDtypeStruct((2, *shape), "uint8")
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)
    return count_parameters(variables["params"])
