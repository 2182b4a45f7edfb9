"""What the row of logistic regression costs and gives, beside scikit-learn's on the same rows.

  python results/logistic_row.py FEATURES.npz [--seeds 5]

As `compare` does it on the file's own split: 45 values of C under each scaling of the features, the chosen one for
every seed's validation part, and once on training and validation examples. The first of two times compiles.
"""

import argparse
import os
import time
from pathlib import Path

from sklearn.linear_model import LogisticRegression

from pspinal_jax.comparison.baselines import BASELINES, FIRST_BASELINES
from pspinal_jax.comparison.search import Comparer
from pspinal_jax.comparison.settings import CompareConfig
from pspinal_jax.comparison.trial_log import Key, TrialLog
from pspinal_jax.data.npz import read_npz


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    data = read_npz(args.features, None)
    for name in [*FIRST_BASELINES, "lda", "nearest_mean"]:
        del BASELINES[name]
    for which in ("with compilation", "compiled"):
        log = TrialLog(None)
        comparer = Comparer(data, CompareConfig(heads=("dense",), trials=1, num_seeds=args.seeds), log, shown=False)
        busy = time.process_time()
        comparer.run()
        busy = time.process_time() - busy  # a second of it is the linear layer's
        seconds = sum(record["seconds"] for key, record in log.records.items() if key.method == "logistic")
        print(
            f"logistic, {which}: {seconds:.1f} s, of processors {busy:.1f}, load {os.getloadavg()[0]:.1f}", flush=True
        )
    record = log.records[Key("refit", 0, "logistic", 0)]
    print(f"  {record['setting']}: {100 * record['test_accuracy']:.2f} %")
    pool, test = comparer.splits[0]
    for c in (0.01, 0.1, 1.0, 10.0):
        start, busy = time.perf_counter(), time.process_time()
        model = LogisticRegression(C=c, max_iter=1000).fit(comparer.inputs[pool], comparer.labels[pool])
        score = 100 * model.score(comparer.inputs[test], comparer.labels[test])
        cost = f"{time.perf_counter() - start:.1f} s, of processors {time.process_time() - busy:.1f}"
        print(f"scikit-learn, C {c:g}: {score:.2f} %, {cost}", flush=True)


if __name__ == "__main__":
    main()
