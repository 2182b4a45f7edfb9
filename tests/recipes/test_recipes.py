import dataclasses
from pathlib import Path

import jax
import pytest

from pspinal_jax.errors import UsageError
from pspinal_jax.files import shipped
from pspinal_jax.models import build_model, count_parameters
from pspinal_jax.recipes import Recipe, list_recipes, load_recipe
from pspinal_jax.recipes.registry import describe_head_training, on_cached_features
from pspinal_jax.recipes.rules import check_settings


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


def test_unknown_names_are_answered_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"unknown recipe 'mnist_papr'; there are: .*mnist-paper"):
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


def frozen(**changes):
    return lambda recipe: dataclasses.replace(recipe, freeze="backbone", cache_features=True, **changes)


def test_a_shipped_recipes_head_on_cached_features_is_linear():
    folder, linear = load_recipe("folder"), load_recipe("linear")
    asked = on_cached_features(folder, frozen())
    assert asked.model == dataclasses.replace(folder.model, head="dense", dropout_rate=0.0)
    assert asked.optimizer == linear.optimizer and asked.label_smoothing == 0.0
    assert (asked.epochs, asked.batch_size) == (linear.epochs, linear.batch_size)
    assert asked.data == dataclasses.replace(folder.data, validation_fraction=0.0)
    assert asked.eval_batch_size == folder.eval_batch_size
    check_settings(asked)
    assert describe_head_training(asked) == "cached features: the head trains as in the recipe linear"
    check_settings(frozen(optimizer=dataclasses.replace(asked.optimizer, name="sgd"))(folder))


def test_what_is_given_goes_before_the_training_on_cached_features():
    asked = on_cached_features(load_recipe("folder"), frozen(epochs=12))
    assert asked.epochs == 12 and asked.optimizer == load_recipe("linear").optimizer
    for setting in ({"patience": 3}, {"retrain": True}):  # which need a part to look at
        assert on_cached_features(load_recipe("folder"), frozen(**setting)).data == load_recipe("folder").data
    assert describe_head_training(asked).endswith("as in the recipe linear, but for epochs 12")


@pytest.mark.parametrize("setting", [{"head": "mlp"}, {"head": "progressive"}, {"layer_width": 64}, {"norm": "batch"}])
def test_hidden_layers_on_cached_features_train_as_on_features(setting):
    """Asking for the head that the recipe has counts too."""

    def change(recipe):
        return frozen(model=dataclasses.replace(recipe.model, **setting))(recipe)

    asked, features = on_cached_features(load_recipe("folder"), change), load_recipe("features")
    assert asked.model == dataclasses.replace(load_recipe("folder").model, **setting)
    assert asked.optimizer == features.optimizer and asked.epochs == features.epochs
    assert describe_head_training(asked) == "cached features: the head trains as in the recipe features"


def test_cached_features_leave_what_is_not_shipped_alone():
    """The paper's protocol, a recipe that has them on already, and one of the user's own."""
    folder = load_recipe("folder")
    own = dataclasses.replace(folder, card=dataclasses.replace(folder.card, name="mine"))
    for recipe, change in (
        (load_recipe("caltech101-paper"), frozen()),
        (frozen()(folder), lambda recipe: dataclasses.replace(recipe, seed=3)),
        (own, frozen()),
        (folder, lambda recipe: recipe),
    ):
        assert on_cached_features(recipe, change) == change(recipe)
    changed = dataclasses.replace(folder, epochs=20)
    assert on_cached_features(changed, frozen()).epochs == 20
