"""State dicts to variables and back without PyTorch: names, axes, and what is refused."""

import jax
import numpy as np
import pytest

from pspinal_jax.backbones import ResNet
from pspinal_jax.backbones.resnet import VARIANTS
from pspinal_jax.errors import DataError
from pspinal_jax.weights import (
    LAYOUTS,
    PRETRAINED,
    classifier_state_dict,
    classifier_variables,
    resnet_state_dict,
    resnet_variables,
)


def resnet18_shapes():
    """torchvision's resnet18, tensor by tensor, in its own words."""
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1": (64,)}
    for stage, (fan_in, width) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, fan_in if block == 0 else width, 3, 3)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes |= {f"{name}.bn1": (width,), f"{name}.bn2": (width,)}
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (width, fan_in, 1, 1)
            shapes[f"layer{stage}.0.downsample.1"] = (width,)
    for name in [name for name in shapes if not name.endswith("weight")]:
        shape = shapes.pop(name)
        shapes |= {f"{name}.{leaf}": shape for leaf in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return {**shapes, "fc.weight": (1000, 512), "fc.bias": (1000,)}


@pytest.fixture(scope="module")
def state_dict():
    rng = np.random.default_rng(0)
    return {
        name: np.asarray(7) if name.endswith("tracked") else rng.normal(size=shape).astype(np.float32)
        for name, shape in resnet18_shapes().items()
    }


def without(state_dict, *names):
    return {name: array for name, array in state_dict.items() if name not in names}


def test_every_tensor_lands_where_our_resnet_looks_for_it(state_dict):
    variables = resnet_variables(state_dict, "resnet18")
    images = np.zeros((1, 32, 32, 3), np.float32)
    expected = jax.eval_shape(lambda: ResNet("resnet18").init(jax.random.key(0), images, train=False))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), dict(expected)
    )
    params, stats = variables["params"], variables["batch_stats"]
    # The output channel comes last, the input channel before it.
    kernel = state_dict["layer3.0.conv1.weight"]
    assert params["stage_3"]["block_1"]["conv_1"]["kernel"][2, 1, 5, 9] == kernel[9, 5, 2, 1]
    np.testing.assert_array_equal(
        params["stage_4"]["block_1"]["shortcut"]["kernel"][0, 0],
        state_dict["layer4.0.downsample.0.weight"][:, :, 0, 0].T,
    )
    block, name = ("stage_2", "block_2"), "layer2.1.bn2"
    ours = [params[block[0]][block[1]]["conv_2"]["norm"][key] for key in ("scale", "bias")]
    ours += [stats[block[0]][block[1]]["conv_2"]["norm"][key] for key in ("mean", "var")]
    for got, leaf in zip(ours, ("weight", "bias", "running_mean", "running_var"), strict=True):
        np.testing.assert_array_equal(got, state_dict[f"{name}.{leaf}"])


def test_the_way_back_is_the_way_in(state_dict):
    back = resnet_state_dict(resnet_variables(state_dict, "resnet18"), "resnet18")
    kept = {n: a for n, a in state_dict.items() if not n.startswith("fc.") and not n.endswith("num_batches_tracked")}
    assert back.keys() == kept.keys()
    for name, array in kept.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.c_contiguous and back[name].dtype == np.float32


def test_variables_share_no_memory_with_the_state_dict(state_dict):
    variables = resnet_variables(state_dict, "resnet18")
    assert not np.shares_memory(variables["params"]["stem"]["norm"]["scale"], state_dict["bn1.weight"])


def test_half_precision_becomes_float32(state_dict):
    half = {name: array.astype(np.float16) if array.ndim else array for name, array in state_dict.items()}
    variables = resnet_variables(half, "resnet18")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


def test_everything_wrong_is_listed_at_once(state_dict):
    wrong = without(state_dict, "bn1.running_mean", "layer2.0.conv1.weight")
    wrong |= {"layer5.0.conv1.weight": np.zeros((1, 1, 3, 3), np.float32), "bn1.extra": np.zeros(64, np.float32)}
    wrong["layer1.0.conv1.weight"] = np.zeros((64, 64, 1, 1), np.float32)
    wrong["layer1.0.bn1.weight"] = np.zeros(64, np.int32)
    with pytest.raises(DataError) as caught:
        resnet_variables(wrong, "resnet18")
    assert str(caught.value) == (
        "the state dict does not fit resnet18: 2 missing: bn1.running_mean, layer2.0.conv1.weight; "
        "2 extra: layer5.0.conv1.weight, bn1.extra; "
        "2 of another shape: layer1.0.conv1.weight [64, 64, 1, 1] for [64, 64, 3, 3], "
        "layer1.0.bn1.weight of int32 for floating-point"
    )


def test_a_long_list_is_cut_short_with_a_count(state_dict):
    with pytest.raises(
        DataError, match=r"100 missing: layer1\.0.* and 90 more; 122 extra: encoder\..* and 112 more$"
    ) as caught:
        resnet_variables({f"encoder.{name}": array for name, array in state_dict.items()}, "resnet18")
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_another_variant_is_refused(state_dict):
    with pytest.raises(DataError, match=r"does not fit resnet34: \d+ missing: .*layer1\.2"):
        resnet_variables(state_dict, "resnet34")
    with pytest.raises(ValueError, match="variant must be one of"):
        resnet_variables(state_dict, "resnet20")


def test_the_classifier_is_dropped_by_name_only(state_dict):
    assert resnet_variables(without(state_dict, "fc.weight", "fc.bias"), "resnet18")
    with pytest.raises(DataError, match=r"2 extra: fc\.weight, fc\.bias$"):
        resnet_variables(state_dict, "resnet18", drop=())
    with pytest.raises(DataError, match=r"1 extra: fc\.2\.weight$"):
        resnet_variables({**state_dict, "fc.2.weight": np.zeros((1, 1), np.float32)}, "resnet18")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_taken_off(state_dict, prefix):
    wrapped = {prefix + name: array for name, array in state_dict.items()}
    jax.tree.map(
        np.testing.assert_array_equal, resnet_variables(wrapped, "resnet18"), resnet_variables(state_dict, "resnet18")
    )
    with pytest.raises(DataError, match=r"extra: module.conv1.weight"):  # of some names only, it is no wrapper's
        resnet_variables(state_dict | {"module.conv1.weight": state_dict["conv1.weight"]}, "resnet18")


def test_counters_of_unknown_layers_are_not_ignored(state_dict):
    with pytest.raises(DataError, match=r"1 extra: bn9\.num_batches_tracked$"):
        resnet_variables({**state_dict, "bn9.num_batches_tracked": np.asarray(1)}, "resnet18")


def test_variables_of_something_else_are_refused(state_dict):
    variables = resnet_variables(state_dict, "resnet18")
    del variables["params"]["stem"]["norm"]["bias"]
    variables["params"]["head"] = {"kernel": np.zeros((2, 2), np.float32)}
    with pytest.raises(
        DataError, match=r"variables do not fit resnet18: 1 missing: params/stem/norm/bias; 1 extra: params/head"
    ):
        resnet_state_dict(variables, "resnet18")


def head_shapes(prefix, linear, batch_norm, sizes):
    """fc_spinal_layer1 .. 4 and fc_out as the scripts name them."""
    features, width, classes = sizes
    shapes = {}
    for index in range(1, 5):
        name = f"{prefix}fc_spinal_layer{index}"
        shapes[f"{name}.{linear}.weight"] = (width, features + (index - 1) * width)
        shapes[f"{name}.{linear}.bias"] = (width,)
        if batch_norm:
            for leaf in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{name}.{linear + 1}.{leaf}"] = (width,)
    shapes[f"{prefix}fc_out.{linear}.weight"] = (classes, features + 4 * width)
    shapes[f"{prefix}fc_out.{linear}.bias"] = (classes,)
    return shapes


@pytest.fixture(scope="module")
def mnist():
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in head_shapes("", 0, True, (784, 128, 10)).items()
    }


def test_the_head_alone_both_ways(mnist):
    variables = classifier_variables(mnist, "mnist")
    assert set(variables["params"]) == {"head"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 514_218  # the published MNIST script's
    head = variables["params"]["head"]
    np.testing.assert_array_equal(head["layer_3"]["kernel"], mnist["fc_spinal_layer3.0.weight"].T)
    np.testing.assert_array_equal(head["output"]["bias"], mnist["fc_out.0.bias"])
    back = classifier_state_dict(variables, "mnist")
    assert back.keys() == mnist.keys()
    for name, array in mnist.items():
        np.testing.assert_array_equal(back[name], array)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fc_spinal_layer1.0.weight": None}, "1 missing: fc_spinal_layer1.0.weight"),
        ({"fc_spinal_layer2.0.weight": None}, "1 missing: fc_spinal_layer2.0.weight"),
        ({"fc_out.0.weight": None, "fc_out.0.bias": None}, "2 missing: fc_out.0.bias, fc_out.0.weight"),
        ({"fc_out.0.weight": (10, 1000)}, "1 of another shape: fc_out.0.weight [10, 1000] for [10, 1296]"),
        ({"fc_spinal_layer1.0.weight": (7,)}, "1 of another shape: fc_spinal_layer1.0.weight [7] for [128, 784]"),
        ({"fc_spinal_layer4.1.weight": (3,)}, "1 of another shape: fc_spinal_layer4.1.weight [3] for [128]"),
        ({"l1.0.weight": (64, 1, 3, 3)}, "1 extra: l1.0.weight"),
    ],
)
def test_one_wrong_tensor_of_a_head_is_the_only_one_told(mnist, change, told):
    wrong = {**mnist, **{name: shape and np.zeros(shape, np.float32) for name, shape in change.items()}}
    with pytest.raises(DataError) as caught:
        classifier_variables({name: array for name, array in wrong.items() if array is not None}, "mnist")
    assert str(caught.value) == f"the state dict does not fit the layout 'mnist': {told}"


def test_an_empty_state_dict_is_refused():
    with pytest.raises(DataError, match=r"\d+ missing: .* and \d+ more$"):
        classifier_variables({}, "vgg5")


def test_the_layouts_are_told_apart(mnist):
    with pytest.raises(DataError, match="does not fit the layout 'qmnist'"):
        classifier_variables(mnist, "qmnist")
    with pytest.raises(ValueError, match="layout must be one of 'mnist', 'vgg5', 'qmnist', 'resnet18'"):
        classifier_variables(mnist, "letters")


def test_a_head_of_another_kind_is_refused():
    variables = {"params": {"head": {"output": {"kernel": np.zeros((3, 2)), "bias": np.zeros(2)}}}}
    with pytest.raises(ValueError, match="classifier_state_dict expects layer_1"):
        classifier_state_dict(variables, "mnist")


def test_every_variant_has_weights_and_a_layout():
    assert set(PRETRAINED) == set(VARIANTS) <= set(LAYOUTS)
    assert PRETRAINED["wide_resnet101_2"] == "hf:timm/wide_resnet101_2.tv_in1k"
