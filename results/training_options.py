"""What each option of training gains on Caltech-101: accuracy, balanced accuracy, seconds, three seeds each.

    python results/training_options.py prepare FEATURES.npz CALTECH101.zip FOLDER
    python results/training_options.py run FOLDER SET [OPTION ..]
    python results/training_options.py table FOLDER
    python results/training_options.py cost FOLDER SET

`prepare` writes the data sets into FOLDER:

  even         FEATURES.npz as it is: 30 photographs of each of 101 classes to train, the rest to test
  natural      all its 8,677, half of every class to train: 16 to 400 a class, as the photographs come
  five         five of its classes, 986 photographs, one class more than ten times as large as each other, half of each
               class to train: features of the pretrained EfficientNet-Lite0
  five_random  the same five classes, from the zip's photographs at 96 pixels: features of a ResNet-18 of random
               weights, as `train folder --model.weights None --freeze backbone` has them
  five_folder  these photographs themselves, with the recipe `folder` and that backbone, a fifth of each class to test
               and a tenth of the rest to select the epoch by
  lookalikes   photographs of twelve classes that are easily taken for one another, half of each class to test: the
               recipe `folder` without its colour jitter, the whole pretrained EfficientNet-Lite0, at 96 pixels

`run` trains the recipe `features`, but for the last two, with one option after the other, and `table` prints what came
out as Markdown. Where nothing is held out, a run takes the last epoch; nothing is selected on test data. `cost` takes
turns of 40 steps with each option, and prints the fastest turn's milliseconds a step: others may use the machine too.
"""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

import pspinal_jax

SEEDS = 3
FOLDER = {
    "model.backbone": "resnet18",
    "model.weights": None,
    "data.image_size": 96,
    "data.augment": "none",
    "freeze": "backbone",
    "cache_features": True,
    # As `folder` trained on cached features when this was measured.
    "model.head": "progressive",
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.01,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 0.0,
    "epochs": 12,
    "batch_size": 32,
    "label_smoothing": 0.1,
    "data.validation_fraction": 0.1,
}
FINE_TUNE = {
    "data.image_size": 96,
    "data.test_fraction": 0.5,
    "data.validation_fraction": 0.0,
    "augment.color_jitter": 0.0,
    "epochs": 10,
}
FIVE = ("airplanes", "beaver", "crocodile", "pigeon", "stapler")
LOOKALIKES = (
    *("ant", "beaver", "cougar_body", "cougar_face", "crab", "crayfish", "crocodile", "crocodile_head"),
    *("lobster", "lotus", "scorpion", "water_lilly"),
)
OF_PHOTOGRAPHS = {
    "none": {},
    "augment_none": {"data.augment": "none"},
    "resized_crop": {"data.augment": "resized_crop_flip"},
    "color_jitter_0.3": {"augment.color_jitter": 0.3},
    "none_seeds_3_to_5": {"seed": 3},
    "color_jitter_0.3_seeds_3_to_5": {"augment.color_jitter": 0.3, "seed": 3},
    "mixup_0.2": {"augment.mixup": 0.2},
    "cutmix_1": {"augment.cutmix": 1.0},
    "fit_crop": {"data.fit": "crop"},
    "fit_pad": {"data.fit": "pad"},
    "backbone_rate_0.1": {"optimizer.backbone_rate": 0.1},
}
OPTIONS = {
    "none": {},
    "class_weights": {"class_weights": "balanced"},
    "sampler": {"sampler": "balanced"},
    "warmup": {"optimizer.schedule": "cosine", "optimizer.warmup_epochs": 2.0},
    "cosine": {"optimizer.schedule": "cosine"},
    "clip": {"gradient_clip": 1.0},
    "ema_0.99": {"ema_decay": 0.99},
    "ema_0.999": {"ema_decay": 0.999},
    "mixup_0.2": {"augment.mixup": 0.2},
    "mixup_1.0": {"augment.mixup": 1.0},
    "held_out": {"data.num_validation": 300},
    "patience": {"data.num_validation": 300, "patience": 5},
}


def halves(inputs, labels, class_names):
    """Half of every class to train, the other to test; drawn by a fixed seed."""
    rng, train = np.random.default_rng(0), []
    for label in range(len(class_names)):
        members = rng.permutation(np.flatnonzero(labels == label))
        train.append(members[: (len(members) + 1) // 2])
    taken = np.sort(np.concatenate(train))
    rest = np.setdiff1d(np.arange(len(labels)), taken)
    return {
        "train_images": inputs[taken],
        "train_labels": labels[taken],
        "test_images": inputs[rest],
        "test_labels": labels[rest],
        "class_names": np.array(class_names),
    }


def prepare(features, archive, folder):
    """Write the data sets into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(features) as arrays:
        names = [str(name) for name in arrays["class_names"]]
        inputs = np.concatenate([arrays["train_images"], arrays["test_images"]])
        labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]])
        np.savez(folder / "even.npz", **arrays)
    np.savez(folder / "natural.npz", **halves(inputs, labels, names))
    numbers = [names.index(name) for name in FIVE]
    chosen = np.isin(labels, numbers)
    relabelled = np.searchsorted(numbers, labels[chosen])
    assert sorted(numbers) == numbers
    np.savez(folder / "five.npz", **halves(inputs[chosen], relabelled, FIVE))
    with zipfile.ZipFile(archive) as zipped:
        for member in zipped.namelist():
            parts = Path(member).parts
            for name, classes in (("five", FIVE), ("lookalikes", LOOKALIKES)):
                if len(parts) == 3 and parts[1] in classes:
                    place = folder / f"{name}_photographs" / parts[1] / parts[2]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(zipped.read(member))
    extract = "extract-features folder --model.backbone resnet18 --model.weights None --data.image-size 96"
    extract += " --data.augment none --data.test-fraction 0.5 --data.validation-fraction 0"
    places = ["--data.path", str(folder / "five_photographs"), "--output", str(folder / "five_random.npz")]
    subprocess.run([sys.executable, "-m", "pspinal_jax", *extract.split(), *places], check=True)


def run(folder, data, options):
    """Train on the data set of that name, and add a line for each of `options` to results.jsonl."""
    for option in options:
        workdir = folder / "runs" / data / option
        settings = {"data.path": folder / f"{data}.npz", "num_seeds": SEEDS, "workdir": workdir}
        photographs = {"five_folder": ("five", FOLDER), "lookalikes": ("lookalikes", FINE_TUNE)}
        if data in photographs:
            name, changes = photographs[data]
            settings |= changes | {"data.path": folder / f"{name}_photographs"}
        change = (OF_PHOTOGRAPHS if data == "lookalikes" else OPTIONS)[option]
        started = time.perf_counter()
        trained = pspinal_jax.train("folder" if data in photographs else "features", **settings | change)
        seconds = time.perf_counter() - started
        classes = []
        for index in range(SEEDS):
            found = pspinal_jax.load_run(workdir, index).evaluate()["class_accuracy"].values()
            classes.append([value for value in found if value is not None])
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        line = {
            "data": data,
            "option": option,
            "accuracy": trained.result["test_accuracy"]["each"],
            "balanced_accuracy": np.mean(classes, axis=1).tolist(),
            "worst_class": np.min(classes, axis=1).tolist(),
            "epochs": len(lines),
            "seconds": round(seconds, 1),
        }
        with (folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line)


def table(folder):
    """Print the lines of results.jsonl."""

    def percent(values):
        return f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}"

    print("| data | option | accuracy % | balanced accuracy % | worst class % | epochs |")
    print("|---|---|---|---|---|---|")
    for line in map(json.loads, (folder / "results.jsonl").open()):
        numbers = [percent(line[name]) for name in ("accuracy", "balanced_accuracy", "worst_class")]
        cells = [line["data"], line["option"], *numbers, str(line["epochs"])]
        print(f"| {' | '.join(cells)} |")


def cost(folder, data):
    """Print milliseconds a step by option, as Markdown."""
    import dataclasses

    import jax

    from pspinal_jax.data import load_data
    from pspinal_jax.recipes import AugmentConfig, load_recipe
    from pspinal_jax.runs.build import set_up
    from pspinal_jax.training.keys import make_order
    from pspinal_jax.training.programs import SeedStates

    plain = load_recipe("features")
    plain = dataclasses.replace(plain, data=dataclasses.replace(plain.data, path=folder / f"{data}.npz"))
    changes = {
        "none": {},
        "class_weights": {"class_weights": "balanced"},
        "clip": {"gradient_clip": 1.0},
        "ema": {"ema_decay": 0.99},
        "mixup": {"augment": AugmentConfig(mixup=0.2)},
    }
    loaded, turns, times = load_data(plain.data), {}, {name: [] for name in changes}
    for name, change in changes.items():
        recipe = dataclasses.replace(plain, **change)
        setup = set_up(recipe, loaded)
        states, stage = SeedStates(setup.programs, [0]), setup.stages[0]
        order = make_order(stage.subset, setup.examples.count, vectorized=False)
        states.plan_epoch(order, 0, np.full((1, stage.steps_per_epoch), 1e-3, np.float32))
        setup.examples.warm_up(states, stage)
        turns[name] = (setup, states, stage)
    for _ in range(20):
        for name, (setup, states, stage) in turns.items():
            chunk = next(setup.examples.chunks(states, stage, 0, lambda remaining: 40))
            start = time.perf_counter()
            states.run(chunk)
            times[name].append((time.perf_counter() - start) / 40)
    print(f"jax {jax.__version__}, {jax.devices()}")
    print("| option | ms a step |\n|---|---|")
    for name, each in times.items():
        print(f"| {name} | {1000 * min(each):.2f} |")


def main():
    """Do what the arguments say."""
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        prepare(*map(Path, arguments))
    elif command == "run":
        options = OF_PHOTOGRAPHS if arguments[1] == "lookalikes" else OPTIONS
        run(Path(arguments[0]), arguments[1], arguments[2:] or list(options))
    elif command == "cost":
        cost(Path(arguments[0]), arguments[1])
    else:
        table(Path(arguments[0]))


if __name__ == "__main__":
    main()
