"""Streamed images on two processes: each decodes its own rows of a batch, and together they are one process."""

import chex
import numpy as np
import pytest
from processes_support import metrics, run_to_the_end

from pspinal_jax.backbones import resnet
from pspinal_jax.data.folder import read_folder
from pspinal_jax.runs.result import load_variables

pytestmark = pytest.mark.slow

EPOCHS = 2
TRAIN, VALIDATION, TEST = 30, 6, 9  # what 15 images a class leave of three classes
"""30 in batches of 8 leave 6, which does not divide over 4 devices: each has all of them."""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("images") / "noise", np.random.default_rng(0)
    for label in range(3):
        (folder / f"class_{label}").mkdir(parents=True)
        for index in range(15):
            image = rng.integers(0, 120, (40, 40, 3))
            image[..., label] += 90
            Image.fromarray(image.astype(np.uint8)).save(folder / f"class_{label}" / f"{index:02}.png")
    # Each image is decoded once to check it, and never again: what is counted below is decoded to be used.
    read_folder(folder, image_size=32, test_fraction=0.2, split_seed=0, strict=True)
    return folder


def arguments(images, workdir, *flags):
    text = (
        f"train folder --data.path {images} --workdir {workdir} --model.backbone resnet18 --model.weights None "
        f"--data.image-size 32 --batch-size 8 --eval-batch-size 8 --model.layer-width 8 --epochs {EPOCHS} "
        "--data.validation-fraction 0.2 --data.no-drop-remainder --optimizer.name sgd --optimizer.learning-rate 0.001"
    )
    return [*text.split(), *flags]


@pytest.mark.parametrize(("devices", "flags"), [(2, ()), (1, ("--mesh.fsdp", "2"))])
def test_two_processes_decode_a_part_each(images, tmp_path, monkeypatch, devices, flags):
    both = run_to_the_end(tmp_path, arguments(images, tmp_path / "two", *flags), devices=devices, TINY_RESNET="1")
    (alone,) = run_to_the_end(
        tmp_path, arguments(images, tmp_path / "one", *flags), processes=1, devices=2 * devices, TINY_RESNET="1"
    )
    assert alone.seen["decoded"] == EPOCHS * (TRAIN + VALIDATION) + TEST
    decoded = [process.seen["decoded"] for process in both]
    tails = EPOCHS * 6 if devices == 2 else 0  # decoded twice
    assert sum(decoded) == alone.seen["decoded"] + tails
    assert max(decoded) < 0.75 * alone.seen["decoded"]
    monkeypatch.setitem(resnet.VARIANTS, "resnet18", resnet.Variant((1, 1, 1, 1), 1))
    monkeypatch.setattr(resnet, "STAGE_CHANNELS", (4, 4, 8, 8))
    found, expected = (load_variables(tmp_path / name)[0] for name in ("two", "one"))
    chex.assert_trees_all_close(found, expected, rtol=0, atol=1e-3)
    for found, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for key in ("train_loss", "validation_loss"):
            np.testing.assert_allclose(found[key], expected[key], rtol=1e-3)


def test_features_are_made_by_two_processes(images, tmp_path):
    flags = ["--freeze", "backbone", "--cache-features", "--data.augment", "none"]
    run_to_the_end(tmp_path, arguments(images, tmp_path / "two", *flags), TINY_RESNET="1")
    run_to_the_end(tmp_path, arguments(images, tmp_path / "one", *flags), processes=1, devices=4, TINY_RESNET="1")
    found, expected = (dict(np.load(tmp_path / name / "features.npz")) for name in ("two", "one"))
    assert set(found) == set(expected)
    for name in found:
        if found[name].dtype.kind == "U":
            assert (found[name] == expected[name]).all()
        else:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
