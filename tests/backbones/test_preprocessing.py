"""Each backbone's image size and normalisation travel with it; a recipe names them only to differ."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.backbones.preprocessing import Preprocessing, default_preprocessing
from pspinal_jax.errors import UsageError
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.recipes import list_recipes, load_recipe
from pspinal_jax.recipes.schema import ModelConfig

BACKBONES = typing.get_args(typing.get_type_hints(ModelConfig)["backbone"])
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
PUBLISHED = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 224)
"""The published scripts' on photographs."""
OF_RECIPES = {
    **dict.fromkeys(("stl10", "caltech101", "fruits360", "birds225"), IMAGENET),
    **dict.fromkeys(("stl10-paper", "caltech101-paper", "fruits360-paper", "birds225-paper"), PUBLISHED),
    "folder": (127 / 255, 128 / 255, 224),
    **dict.fromkeys(("features", "linear"), (0.0, 1.0, None)),
}


def changed(recipe, backbone, **data):
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, **data),
        model=dataclasses.replace(recipe.model, backbone=backbone, weights=None),
    )


def test_what_each_backbone_wants():
    expected = {"none": Preprocessing(0.0, 1.0, None), "vgg5": Preprocessing(0.0, 1.0, None)}
    expected |= {f"efficientnet_lite{n}": Preprocessing(127 / 255, 128 / 255, (224, 240, 260)[n]) for n in range(3)}
    for name in BACKBONES:
        assert default_preprocessing(name) == expected.get(name, Preprocessing(*IMAGENET)), name
    levels = np.arange(256, dtype=np.float32)
    own = default_preprocessing("efficientnet_lite0")
    np.testing.assert_allclose((levels / 255 - own.mean) / own.std, (levels - 127) / 128, atol=1e-6)


@pytest.mark.parametrize("name", list_recipes())
def test_what_each_recipe_uses(name):
    """Those that name theirs keep them; pixels and VGG-5 are what they were."""
    recipe = load_recipe(name)
    data = with_default_preprocessing(recipe).data
    named = recipe.data.mean, recipe.data.std
    assert (data.mean, data.std, data.image_size) == OF_RECIPES.get(name, (*named, None))
    assert recipe.model.backbone not in ("none", "vgg5") or None not in named or (data.mean, data.std) == (0.0, 1.0)


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name not in ("none", "vgg5")])
@pytest.mark.parametrize("recipe", ["folder", "caltech101"])
def test_another_backbone_brings_its_own(recipe, backbone):
    asked = changed(load_recipe(recipe), backbone)
    used, own = with_default_preprocessing(asked), default_preprocessing(backbone)
    assert (used.data.mean, used.data.std, used.data.image_size) == own
    assert with_default_preprocessing(used) == used
    assert dataclasses.replace(used, data=asked.data) == asked  # nothing else changes
    assert used.data.train_side == round(own.image_size * 230 / 224)


def test_what_a_recipe_names_stays():
    asked = changed(load_recipe("folder"), "resnet18", mean=0.5, std=(0.1, 0.2, 0.3), image_size=64)
    assert with_default_preprocessing(asked) == asked
    data = with_default_preprocessing(changed(asked, "efficientnet_lite2", std=None)).data
    assert (data.mean, data.std, data.image_size) == (0.5, 128 / 255, 64)


def test_models_compute_with_it():
    recipe = changed(load_recipe("folder"), "efficientnet_lite0")
    model = build_model(recipe, (32, 32, 3), 4)
    assert (model.mean, model.std) == (127 / 255, 128 / 255)
    seen = build_model(changed(recipe, "none"), (2, 2, 3), 4)
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    features = seen.apply({}, jnp.asarray(pixels), False, method="features")
    np.testing.assert_allclose(features, pixels.reshape(1, 12) / 255, rtol=1e-6)


def test_no_size_of_its_own_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"data\.image_size is own, but the backbone none has no default"):
        with_default_preprocessing(changed(load_recipe("folder"), "none"))
    flags = ["--model.backbone", "none", "--model.weights", "None", "--workdir", str(tmp_path / "run")]
    assert main(["train", "folder", "--data.path", str(tmp_path / "pictures"), *flags]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: --data.image-size is own") and "\n" not in error
    with pytest.raises(ValueError, match="call with_default_preprocessing first"):
        _ = load_recipe("folder").data.side
    with pytest.raises(UsageError, match=r"data.image_size is 7, expected 8 \.\. 4096"):
        changed(load_recipe("folder"), "none", image_size=7)
    with pytest.raises(UsageError, match=r"data.resize is 225, expected image_size \.\. 8192"):
        with_default_preprocessing(changed(load_recipe("folder"), "efficientnet_lite1", resize=225))
