"""The ResNet family, without PyTorch. Deep variants are traced only; resnet18 at 32x32 runs."""

import doctest
import math

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax import lax
from jax import numpy as jnp

from pspinal_jax.backbones import ResNet, num_features, resnet
from pspinal_jax.backbones.resnet import Conv, ResidualBlock

IMAGES = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)


COMPILE_FAST = {"xla_backend_optimization_level": 0}


def compiled(function):
    """Compiled quickly rather than well, and run once: most of what these tests cost is compilation."""
    return jax.jit(function, compiler_options=COMPILE_FAST)


@pytest.fixture(scope="module")
def small():
    """A network with one basic block a stage, so that what runs here compiles in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(resnet.VARIANTS, "small", resnet.Variant((1, 1, 1, 1), 1))
        yield ResNet("small")


@pytest.fixture(scope="module")
def variables(small):
    """As after initialisation, but drawn by NumPy, and statistics near what such activations have."""
    rng = np.random.default_rng(5)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            return (
                rng.normal(size=leaf.shape).astype(np.float32) * (2 / math.prod(leaf.shape[:2] + leaf.shape[3:])) ** 0.5
            )
        low, high = {"scale": (0.8, 1.2), "bias": (-0.2, 0.2), "mean": (-0.2, 0.2), "var": (0.8, 1.2)}[kind]
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of("small"))


def shapes_of(variant, images=IMAGES, **options):
    return jax.eval_shape(lambda: ResNet(variant, **options).init(jax.random.key(0), images, train=False))


def trained(model, variables, images=IMAGES):
    """Features in training, new statistics, and the gradient of sum(sin(features))."""

    def loss(params):
        features, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.sin(features).sum(), (features, new["batch_stats"])

    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_trees_close(ours, expected, tolerance):
    ours, expected = flatten_dict(ours, sep="/"), flatten_dict(expected, sep="/")
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(np.asarray(ours[name]) - np.asarray(value)).max() / max(np.abs(value).max(), 1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("variant", "with_classifier"),
    [  # torchvision's documentation, "num_params" of each model's IMAGENET1K_V1 weights: with the 1000-class fc
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("wide_resnet50_2", 68_883_240),
        ("wide_resnet101_2", 126_886_696),
    ],
)
def test_parameter_counts(variant, with_classifier):
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(variant)["params"]))
    assert count + 1000 * num_features(variant) + 1000 == with_classifier


def test_every_variant_is_counted_and_documented():
    counted = test_parameter_counts.pytestmark[0].args[1]
    assert [variant for variant, _ in counted] == list(resnet.VARIANTS)
    assert list(resnet.ResNetName.__args__) == list(resnet.VARIANTS)


def test_parameter_tree():
    """Where a bottleneck has its 3x3 convolution and its shortcut, and that it has no bias but the norm's."""
    params = flatten_dict(shapes_of("wide_resnet50_2")["params"], sep="/")
    kernels = {name.removesuffix("/kernel"): leaf.shape for name, leaf in params.items() if name.endswith("kernel")}
    assert kernels["stem"] == (7, 7, 3, 64)
    assert kernels["stage_2/block_1/conv_1"] == (1, 1, 256, 256)
    assert kernels["stage_2/block_1/conv_2"] == (3, 3, 256, 256)
    assert kernels["stage_2/block_1/conv_3"] == (1, 1, 256, 512)
    assert kernels["stage_2/block_1/shortcut"] == (1, 1, 256, 512)
    assert {name for name in kernels if name.endswith("shortcut")} == {
        f"stage_{s}/block_1/shortcut" for s in range(1, 5)
    }
    assert set(params) == {f"{name}/{leaf}" for name in kernels for leaf in ("kernel", "norm/scale", "norm/bias")}
    basic = flatten_dict(shapes_of("resnet18")["params"], sep="/")
    shortcuts = {name.split("/")[0] for name in basic if "shortcut" in name}
    assert shortcuts == {"stage_2", "stage_3", "stage_4"}  # stage 1 keeps the stem's 64 channels


def test_initialisation():
    """Kernels normal(0, sqrt(2 / (K K O))), norm 1/0/0/1, the last of a block included."""
    block = ResidualBlock((Conv(16, 1), Conv(24, 3, 2), Conv(64, 1)))
    variables = compiled(lambda key: block.init(key, jnp.ones((1, 4, 4, 32)), train=False))(jax.random.key(0))
    for name, value in flatten_dict(variables["params"], sep="/").items():
        if name.endswith("kernel"):
            expected = (2 / (value.shape[0] ** 2 * value.shape[3])) ** 0.5
            assert np.std(value) == pytest.approx(expected, rel=4 / (2 * value.size) ** 0.5), name
            # A normal distribution has 4.6 % of its values beyond two standard deviations, a uniform one none.
            assert np.mean(np.abs(value) > 2 * expected) == pytest.approx(0.0455, abs=0.03), name
        else:
            assert np.all(value == (1 if name.endswith("scale") else 0)), name
    for name, value in flatten_dict(variables["batch_stats"], sep="/").items():
        assert np.all(value == (0 if name.endswith("mean") else 1)), name


def traced(model, size):
    """Shapes of the variables, and of (features, new variables) in evaluation and in training."""
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def apply(variables, images):
        return [model.apply(variables, images, train=train, mutable=["batch_stats"]) for train in (False, True)]

    return init, jax.eval_shape(apply, init, images)


@pytest.mark.parametrize(("variant", "size"), [("resnet18", (32, 32)), ("resnet18", (224, 97)), ("resnet50", (65, 33))])
def test_any_size_gives_one_vector(variant, size):
    _, results = traced(ResNet(variant), size)
    assert {features.shape for features, _ in results} == {(2, num_features(variant))}


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "result"),
    [(None, jnp.float32, jnp.float32), (jnp.bfloat16, jnp.float32, jnp.bfloat16), (None, jnp.bfloat16, jnp.float32)],
)
def test_dtypes(small, dtype, param_dtype, result):
    init, results = traced(ResNet("small", dtype=dtype, param_dtype=param_dtype), (32, 32))
    assert {leaf.dtype for leaf in jax.tree.leaves(init["params"])} == {jnp.dtype(param_dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(init["batch_stats"])} == {jnp.dtype(jnp.float32)}
    assert {features.dtype for features, _ in results} == {jnp.dtype(result)}
    assert {leaf.dtype for leaf in jax.tree.leaves(results[1][1])} == {jnp.dtype(jnp.float32)}


@pytest.fixture(scope="module")
def in_training(small, variables):
    return compiled(lambda v: trained(small, v))(variables)


def test_training_and_evaluation(small, variables, in_training):
    """Training normalises with the batch and moves every statistic; evaluation uses them and nothing else."""
    _, (features, new) = in_training
    evaluate = compiled(lambda v, x: small.apply(v, x, train=False))
    before = evaluate(variables, IMAGES)
    assert np.abs(features - before).max() > 0.1
    old = flatten_dict(variables["batch_stats"])
    assert all(np.all(value != old[name]) for name, value in flatten_dict(new).items())
    moved = {**variables, "batch_stats": new}
    after = evaluate(moved, IMAGES)
    assert np.abs(after - before).max() > 0.1
    # One image's features do not depend on the others of its batch.
    others = np.concatenate([IMAGES[:1], 3 * IMAGES[1:][::-1]])
    np.testing.assert_allclose(evaluate(moved, others)[0], after[0], rtol=1e-5, atol=1e-5)


def test_remat_gives_the_same_numbers(small, optimised):
    maps = np.random.default_rng(7).normal(size=(3, 6, 5, 64)).astype(np.float32)
    plain, saving = (resnet.ResNetStage("small", 2, remat=remat) for remat in (False, True))
    variables = compiled(lambda key: plain.init(key, maps, train=False))(jax.random.key(0))
    tree = jax.eval_shape(lambda: saving.init(jax.random.key(0), maps, train=False))
    assert jax.tree.map(lambda leaf: leaf.shape, tree) == jax.tree.map(lambda leaf: leaf.shape, variables)
    results = [compiled(lambda v, m=m: trained(m, v, maps))(variables) for m in (plain, saving)]
    (gradient, (features, new)), (ours_gradient, (ours_features, ours_new)) = results
    np.testing.assert_allclose(ours_features, features, rtol=0, atol=1e-5)
    assert_trees_close(ours_new, new, 1e-5)
    assert_trees_close(ours_gradient, gradient, 1e-4)
    models = (small, ResNet("small", remat=True))
    programs = [str(jax.make_jaxpr(lambda v, m=m: trained(m, v)[0])(shapes_of("small"))) for m in models]
    assert "remat" not in programs[0] and programs[1].count("remat") >= 4  # one a block


def test_bfloat16_is_close_to_float32(small, variables):
    def features(model):
        return compiled(lambda v: model.apply(v, IMAGES, train=False))(variables)

    half, full = features(ResNet("small", dtype=jnp.bfloat16)), features(small)
    assert half.dtype == jnp.bfloat16
    assert 0 < np.abs(half.astype(np.float32) - full).max() / np.abs(full).max() < 0.1


def test_statistics_are_never_dropped_in_silence(small, variables):
    with pytest.raises(ValueError, match="batch_stats is not mutable"):
        jax.eval_shape(lambda v: small.apply(v, IMAGES, train=True), variables)


@pytest.mark.parametrize("shape", [(4, 32, 32), (4, 31, 64, 3), (4, 64, 31, 3), (4, 32, 32, 1), (4, 3, 32, 32)])
def test_other_image_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"resnet18 takes images of shape \[N, H, W, 3\].* 32, got"):
        shapes_of("resnet18", jnp.ones(shape))


def test_integer_images_are_refused():
    with pytest.raises(TypeError, match="floating-point array, got uint8"):
        shapes_of("resnet18", np.ones((4, 32, 32, 3), np.uint8))


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match=r"variant must be one of 'resnet18', .*, got 'resnet20'"):
        ResNet("resnet20")
    with pytest.raises(ValueError, match="got 'vgg5'"):
        num_features("vgg5")


@pytest.mark.parametrize(
    ("shape", "learns"), [((1, 32, 32, 3), False), ((0, 64, 64, 3), False), ((1, 32, 33, 3), True)]
)
def test_a_training_batch_needs_two_positions(small, variables, shape, learns):
    def run(variables):
        return small.apply(variables, jnp.ones(shape), train=True, mutable=["batch_stats"])

    if learns:
        assert jax.eval_shape(run, variables)[0].shape == (1, 512)
    else:
        with pytest.raises(ValueError, match="use a larger batch or train=False"):
            jax.eval_shape(run, variables)


@pytest.mark.slow
def test_example():
    result = doctest.testmod(resnet)
    assert result.attempted > 0 and result.failed == 0


def test_blocks_equal_the_equation():
    """relu(f(x) + shortcut(x)) of a strided bottleneck, from lax's convolutions with explicit padding."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 7, 6, 8)).astype(np.float32)
    block = ResidualBlock((Conv(4, 1), Conv(4, 3, 2), Conv(16, 1)))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, train=False))
    variables = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)

    def layer(name, x, stride):
        params, stats = variables["params"][name], variables["batch_stats"][name]["norm"]
        pad = params["kernel"].shape[0] // 2
        y = lax.conv_general_dilated(
            x, params["kernel"], (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        scale = params["norm"]["scale"] / np.sqrt(stats["var"] + 1e-5)
        return (y - stats["mean"]) * scale + params["norm"]["bias"]

    y = np.maximum(layer("conv_1", x, 1), 0)
    y = np.maximum(layer("conv_2", y, 2), 0)
    expected = np.maximum(layer("conv_3", y, 1) + layer("shortcut", x, 2), 0)
    got = compiled(lambda v: block.apply(v, x, train=False))(variables)
    assert got.shape == (2, 4, 3, 16)
    np.testing.assert_allclose(got, expected, rtol=1e-4)
