"""Which score tells pictures of no known class from others: the tables in docs/unknown.md.

    python results/unknown.py folders CALTECH101.zip FRUITS.zip MNIST.npz pictures
    python results/unknown.py strangers FRUITS.zip MNIST.npz strangers.npz
    python results/unknown.py scores CALTECH_FEATURES.npz strangers.npz

`folders` writes the pictures of 81 classes of Caltech-101 to pictures/known, a folder a class, those of the others to
pictures/unseen, and 500 pictures each to pictures/noise, digits and fruit. `strangers` computes EfficientNet-Lite0's
features of 500 pictures each of noise, digits and fruit. `scores` holds 20 classes of Caltech-101 out, three times
others, and once all birds; trains the recipe `linear` on four fifths of each other class's 30 pictures, puts the
threshold where it keeps 95 % of the last fifth, and counts the test pictures of known classes that it keeps and the
strangers that it rejects.
"""

import io
import sys
import tempfile
import zipfile
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax

import pspinal_jax
from pspinal_jax.data.dataset import split_by_class
from pspinal_jax.models import build_model, with_default_preprocessing
from pspinal_jax.recipes import load_recipe
from pspinal_jax.weights import backbone_variables

COUNT, KEPT = 500, 0.95
BIRDS = ("emu", "flamingo", "flamingo_head", "ibis", "pigeon", "rooster")


def noise(rng):
    """Pictures [H, W, 3] of noise: of single pixels, and of patches that are 4 to 32 pixels wide."""
    for index in range(COUNT):
        side = (224, 56, 28, 14, 7)[index % 5]
        pixels = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        yield pixels.resize((224, 224), Image.BICUBIC if index % 2 else Image.NEAREST)


def pictures(fruits, mnist):
    """500 pictures of each kind of strangers."""
    with np.load(mnist) as file:
        digits = [Image.fromarray(image) for image in file["test_images"][:COUNT]]
    with zipfile.ZipFile(fruits) as archive:
        names = sorted(name for name in archive.namelist() if "test/" in name and name.endswith(".jpg"))
        names = names[:: len(names) // COUNT][:COUNT]
        fruit = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    return {"noise": list(noise(np.random.default_rng(0))), "digits": digits, "fruit": fruit}


def strangers(fruits, mnist, output):
    """Write the features of strangers as arrays [500, 1280] by kind."""
    model = build_model(with_default_preprocessing(load_recipe("folder")), (224, 224, 3), 2)
    weights = backbone_variables("efficientnet_lite0", "pretrained")
    variables = {name: {"backbone": tree} for name, tree in weights.items()}
    features = jax.jit(lambda images: model.apply(variables, images, False, method="features"))
    found = {}
    for kind, images in pictures(fruits, mnist).items():
        pixels = np.stack([np.asarray(image.convert("RGB").resize((224, 224), Image.BILINEAR)) for image in images])
        found[kind] = np.concatenate([features(pixels[i : i + 50]) for i in range(0, COUNT, 50)])
    np.savez(output, **found)


def folders(caltech, fruits, mnist, output):
    """Write the folders."""
    output = Path(output)
    with zipfile.ZipFile(caltech) as archive:
        names = sorted({name.split("/")[1] for name in archive.namelist() if name.endswith(".jpg")})
        held = {names[index] for index in np.random.default_rng(0).permutation(len(names))[:20]}
        for name in archive.namelist():
            if name.endswith(".jpg"):
                _, label, file = name.split("/")
                path = output / ("unseen" if label in held else "known") / label / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
    for kind, images in pictures(fruits, mnist).items():
        (output / kind).mkdir()
        for index, image in enumerate(images):
            image.save(output / kind / f"{index:03}.png")


def unit(rows):
    """`rows` [N, D] of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def candidates(train, labels, head):
    """Name -> score (features [N, D], logits [N, C]) -> [N], larger for what is known."""
    means = np.stack([train[labels == label].mean(0) for label in range(labels.max() + 1)])
    centre, within = train.mean(0), train - means[labels]
    of_train = train @ head[0] + head[1]
    covariance = 0.9 * within.T @ within / len(train)
    covariance[np.diag_indices(len(covariance))] += 0.1 * within.var(0).mean()
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T
    null = np.linalg.eigh(np.cov(train.T))[1][:, :-256]

    def nearest(x, z):
        return -np.sort(-(unit(x) @ unit(train).T), 1)[:, :5].mean(1)

    def mahalanobis(x, z):
        """Lee et al., NeurIPS 2018; the covariance is shrunk by a tenth."""
        return -cdist(x @ whiten, means @ whiten).min(1)

    def virtual_logit(x, z):
        """ViM (Wang et al., CVPR 2022), of 256 principal directions."""
        scale = of_train.max(1).mean() / np.linalg.norm((train - centre) @ null, axis=1).mean()
        return logsumexp(z, axis=1) - scale * np.linalg.norm((x - centre) @ null, axis=1)

    def cosine(x, z):
        return (unit(x) @ unit(means).T).max(1)

    return {
        "maximum probability": lambda x, z: softmax(z, axis=1).max(1),
        "maximum logit": lambda x, z: z.max(1),
        "energy": lambda x, z: logsumexp(z, axis=1),
        "energy and cosine": lambda x, z: (
            logsumexp(z, axis=1) / logsumexp(of_train, axis=1).std() + cosine(x, z) / cosine(train, z).std()
        ),
        "virtual logit": virtual_logit,
        "distance to class means": lambda x, z: -cdist(x, means).min(1),
        "Mahalanobis distance to class means": mahalanobis,
        "cosine to the 5 nearest": nearest,
        "cosine to class means, centred": lambda x, z: (unit(x - centre) @ unit(means - centre).T).max(1),
        "cosine to class means": cosine,
    }


def draws(caltech):
    """Yield (name of the strangers, known classes' features and labels to train on, features held out, known test
    features, strangers' features).
    """
    with np.load(caltech) as file:
        data, names = {name: file[name] for name in file.files}, file["class_names"].tolist()
    held = [np.random.default_rng(seed).permutation(len(names))[:20] for seed in range(3)]
    for number, classes in enumerate([*held, [names.index(name) for name in BIRDS]]):
        known = np.setdiff1d(np.arange(len(names)), classes)
        numbered = np.full(len(names), -1)
        numbered[known] = np.arange(len(known))
        labels, test = numbered[data["train_labels"]], numbered[data["test_labels"]]
        inputs, tested = data["train_images"].astype(np.float32), data["test_images"].astype(np.float32)
        inputs, labels = inputs[labels >= 0], labels[labels >= 0]
        rest, fold = split_by_class(labels, 0.2, number)
        kind = "20 classes" if number < 3 else "birds"
        yield kind, inputs[rest], labels[rest], inputs[fold], tested[test >= 0], tested[test < 0]


def scores(caltech, strange):
    """Print the table."""
    found = {}
    for kind, train, labels, held_out, known, unseen in draws(caltech):
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "data.npz")
            np.savez(path, train_images=train, train_labels=labels, test_images=train, test_labels=labels)
            run = pspinal_jax.train("linear", data__path=path, workdir=Path(place, "run"))
            output = run.variables["params"]["head"]["output"]
        head = np.asarray(output["kernel"]), np.asarray(output["bias"])
        groups = {"known": known, kind: unseen, **np.load(strange)}
        for name, score in candidates(train, labels, head).items():

            def of(rows, score=score, head=head):
                return score(rows, rows @ head[0] + head[1])

            ordered = np.sort(of(held_out))
            threshold = ordered[int((len(ordered) + 1) * (1 - KEPT)) - 1]
            for group, rows in groups.items():
                passed = (of(rows) >= threshold).mean()
                found.setdefault(name, {}).setdefault(group, []).append(passed if group == "known" else 1 - passed)
    kinds = ["known", "20 classes", "birds", "fruit", "digits", "noise"]
    for name, values in found.items():
        spread = 100 * np.std(values["20 classes"], ddof=1)
        cells = [f"{100 * np.mean(values[kind]):.1f}" + f" ± {spread:.1f}" * (kind == "20 classes") for kind in kinds]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    {"folders": folders, "strangers": strangers, "scores": scores}[sys.argv[1]](*sys.argv[2:])
