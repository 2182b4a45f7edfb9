"""Weights to and from PyTorch: files that it writes, the published layouts both ways, and what is never unpickled."""

import os
import pickle

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402
from torch_published import Head, VGG5Classifier, resnet_classifier  # noqa: E402
from torch_resnet import TorchResNet, arrays_of, randomised  # noqa: E402

from pspinal_jax.backbones import VGG5, ResNet  # noqa: E402
from pspinal_jax.errors import DataError  # noqa: E402
from pspinal_jax.heads import ProgressiveSpinalHead  # noqa: E402
from pspinal_jax.models import Classifier  # noqa: E402
from pspinal_jax.weights import (  # noqa: E402
    classifier_state_dict,
    classifier_variables,
    read_state_dict,
    resnet_variables,
)

pytestmark = pytest.mark.torch


def assert_close(ours, theirs, tolerance):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


# Layout, our head and backbone, the script's module, one input's shape.
PUBLISHED = {
    "mnist": ("mnist", {"norm": "batch"}, (128, 10), None, lambda: Head(784, 128, 10, batch_norm=True), (784,)),
    "kmnist": ("vgg5", {}, (64, 10), VGG5, lambda: VGG5Classifier(64, 10), (28, 28, 1)),
    "letters": ("vgg5", {}, (128, 62), VGG5, lambda: VGG5Classifier(128, 62), (28, 28, 1)),
    "qmnist": (
        "qmnist",
        {"norm": "batch", "layer_dropout_rate": 0.5},
        (64, 10),
        VGG5,
        lambda: VGG5Classifier(64, 10, batch_norm=True, layer_dropout=True),
        (28, 28, 1),
    ),
    "photographs": (
        "resnet18",
        {},
        (20, 7),
        lambda: ResNet("resnet18"),
        lambda: resnet_classifier(18, 20, 7),
        (40, 33, 3),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_classifiers_both_ways(name):
    layout, options, (width, classes), backbone, build, shape = PUBLISHED[name]
    model = randomised(build()).eval()
    state_dict = arrays_of(model)
    variables = classifier_variables(state_dict, layout)

    head = ProgressiveSpinalHead(classes, width, **options)
    ours = Classifier(head, backbone() if backbone else None)
    inputs = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    tree = jax.eval_shape(lambda: ours.init(jax.random.key(0), inputs, train=False))
    assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, dict(tree))
    logits = jax.jit(lambda v: ours.apply(v, inputs, train=False))(variables)
    theirs = torch.from_numpy(inputs)
    assert_close(logits, model(theirs if theirs.ndim == 2 else theirs.permute(0, 3, 1, 2)), 1e-5)

    back = classifier_state_dict(jax.tree.map(jax.numpy.asarray, variables), layout)
    kept = {key: array for key, array in state_dict.items() if not key.endswith("num_batches_tracked")}
    assert back.keys() == kept.keys()
    for key, array in kept.items():
        np.testing.assert_array_equal(back[key], array)
    build().load_state_dict({key: torch.from_numpy(array) for key, array in back.items()}, strict=True)


def agrees(model, path, variant):
    """The file, read back, computes what the module computes."""
    save_file(model.state_dict(), path)
    variables = resnet_variables(read_state_dict(path), variant)
    images = np.random.default_rng(1).normal(size=(2, 65, 65, 3)).astype(np.float32)
    features = jax.jit(lambda v: ResNet(variant).apply(v, images, train=False))(variables)
    kept, model.fc = model.fc, torch.nn.Identity()
    with torch.no_grad():
        assert_close(features, model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)), 1e-4)
    model.fc = kept


def test_a_resnet_file_written_by_torch(tmp_path):
    model = randomised(TorchResNet(18, fc=lambda features: torch.nn.Linear(features, 1000)))
    path = tmp_path / "x.safetensors"
    agrees(model, path, "resnet18")
    tensors = model.state_dict()
    assert len(tensors) == 122
    tensors["layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    tensors["layer9.weight"] = tensors.pop("bn1.bias")
    save_file(tensors, path)
    with pytest.raises(DataError) as caught:
        resnet_variables(read_state_dict(path), "resnet18")
    assert str(caught.value) == (
        "the state dict does not fit resnet18: 1 missing: bn1.bias; 1 extra: layer9.weight; "
        "1 of another shape: layer1.0.conv1.weight [64, 64, 1, 1] for [64, 64, 3, 3]"
    )


@pytest.mark.slow
def test_a_wide_resnet101_2_file_written_by_torch(tmp_path):
    model = randomised(TorchResNet(101, 2, fc=lambda features: torch.nn.Linear(features, 1000)))
    assert len(model.state_dict()) == 626
    assert sum(tensor.numel() for tensor in model.parameters()) == 126_886_696
    agrees(model, tmp_path / "x.safetensors", "wide_resnet101_2")


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_files(tmp_path, legacy):
    tensors = {
        "a": torch.randn(3, 2),
        "b": torch.randn(4).bfloat16(),
        "c": torch.tensor(3),
        "d": torch.randn(2).double(),
    }
    tensors["e"] = torch.nn.Parameter(torch.randn(2, 2).half())
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    read = read_state_dict(tmp_path / "x.pth")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor.detach().float().numpy() if name != "c" else 3)
        assert read[name].dtype == (np.int64 if name == "c" else np.float32)


def refusal(path):
    with pytest.raises(DataError) as caught:
        read_state_dict(path)
    assert str(caught.value).startswith(f"weights: {path} ") and "\n" not in str(caught.value)
    return str(caught.value)


class Malicious:
    """Unpickling this makes a directory."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def save_zip(held, path):
    torch.save(held, path)


def save_legacy(held, path):
    torch.save(held, path, _use_new_zipfile_serialization=False)


def save_pickle(held, path):
    path.write_bytes(pickle.dumps(held))


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
def test_pickled_code_does_not_run(tmp_path, save):
    for held in (Malicious(tmp_path / "made"), {"weight": torch.zeros(1), "more": Malicious(tmp_path / "made")}):
        save(held, tmp_path / "x.pt")
        message = refusal(tmp_path / "x.pt")
        assert "is not a readable state dict" in message and "save model.state_dict() alone" in message
        assert not (tmp_path / "made").exists()
    with open(tmp_path / "x.pt", "rb") as file:  # that it would have, unpickled
        contents = file.read()
    assert b"mkdir" in contents


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_pickled_module_is_refused(tmp_path, save):
    save(Head(8, 4, 2), tmp_path / "x.pt")
    assert "save model.state_dict() alone" in refusal(tmp_path / "x.pt")
