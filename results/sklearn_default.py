"""`HeadClassifier()` beside scikit-learn's `LogisticRegression()` and `MLPClassifier()`, each as it comes.

  python results/sklearn_default.py [--seeds 3] [--features FILE.npz]

On scikit-learn's digits and, of a .npz file of features as `train features` takes it, on 30 examples a class. A seed
cuts the test set (a quarter of the digits; of features what is left) and seeds the classifiers.
"""

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from pspinal_jax.sklearn import HeadClassifier

CLASSIFIERS = {
    "HeadClassifier()": lambda seed: HeadClassifier(random_state=seed),
    "LogisticRegression()": lambda seed: LogisticRegression(),
    "MLPClassifier()": lambda seed: MLPClassifier(random_state=seed),
}


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--features", type=Path)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of scikit-learn, where its default number of iterations is too small
    sets = {"digits": (*load_digits(return_X_y=True), 0.75)}
    if args.features is not None:
        data = np.load(args.features)
        parts = [("train_images", "train_labels"), ("test_images", "test_labels")]
        x, y = (np.concatenate([data[pair[index]] for pair in parts]) for index in range(2))
        sets[args.features.stem] = (x.astype(np.float32), y, 30 * len(np.unique(y)))
    for name, (x, y, size) in sets.items():
        for classifier, make in CLASSIFIERS.items():
            found = []
            for seed in range(args.seeds):
                train_x, test_x, train_y, test_y = train_test_split(
                    x, y, train_size=size, random_state=seed, stratify=y
                )
                start = time.perf_counter()
                fitted = make(seed).fit(train_x, train_y)
                seconds = time.perf_counter() - start
                accuracy = 100 * fitted.score(test_x, test_y)
                found.append((accuracy, log_loss(test_y, fitted.predict_proba(test_x)), seconds))
            means, deviations = np.mean(found, 0), np.std(found, 0, ddof=1)
            cells = [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in zip(means[:2], deviations[:2], strict=True)]
            print(f"| {name} | `{classifier}` | {cells[0]} | {cells[1]} | {np.median(found, 0)[2]:.1f} |", flush=True)


if __name__ == "__main__":
    main()
