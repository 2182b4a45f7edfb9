"""What a row of the table answers on the test examples: enough for accuracy, F1, likelihood and calibration.

Probabilities have one temperature a training, which is fitted on its validation part.
"""

import base64
from typing import Any, NamedTuple

import numpy as np

from pspinal_jax.runs.calibration import fit_temperature
from pspinal_jax.runs.scores import log_softmax

MIN_PROBABILITY = 2.0**-24
"""The smallest that float16 holds; likelihoods are of no less."""
NEVER = -1e30
"""The score of a class without a training example."""
_DTYPES = {"predictions": "<u2", "log_likelihood": "<f2", "confidence": "<f2"}
_MAX_CALIBRATED = 5000


class Answers(NamedTuple):
    """A row's answers on the test examples of K splits, of S trainings on each.

    Attributes:
      labels: int [K, T], true classes.
      correct: bool [K, S, T].
      predicted: int [K, S, T], classes; None, as what follows, where an earlier version recorded none.
      log_likelihood: float32 [K, S, T], log of the calibrated probability of the true class, nats.
      confidence: float32 [K, S, T], calibrated probability of the predicted class.
    """

    labels: np.ndarray
    correct: np.ndarray
    predicted: np.ndarray | None
    log_likelihood: np.ndarray | None
    confidence: np.ndarray | None


def find_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The T at which softmax(`scores` / T) is likeliest for `labels`: scores [V, C], labels int [V]."""
    step = -(-len(labels) // _MAX_CALIBRATED)
    scores = _finite(scores[::step])
    known = np.flatnonzero(scores.max(0) > NEVER / 2)
    return fit_temperature(scores[:, known], np.searchsorted(known, labels[::step]))


def calibrated(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities float16 [T, C] of `scores` [T, C]."""
    return np.exp(_log_probabilities(scores, temperature)).astype(np.float16)


def _log_probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    return log_softmax(_finite(scores) / temperature)


def log_likelihoods(scores: np.ndarray, temperature: float, labels: np.ndarray) -> np.ndarray:
    """Of true `labels` [T], float64 [T]."""
    log = _log_probabilities(scores, temperature)[np.arange(len(labels)), labels]
    return np.maximum(log, np.log(MIN_PROBABILITY))


def _finite(scores: np.ndarray) -> np.ndarray:
    """float64; a training that diverged knows nothing."""
    return np.nan_to_num(np.asarray(scores, np.float64), nan=0.0, posinf=-NEVER, neginf=NEVER)


def as_record(scores: np.ndarray, temperature: float, labels: np.ndarray) -> dict[str, Any]:
    """The entries of a record in trials.jsonl, from `scores` [T, C] and true `labels` [T]."""
    rows, predictions, log = np.arange(len(labels)), scores.argmax(1), _log_probabilities(scores, temperature)
    truth = log_likelihoods(scores, temperature, labels)
    found = {"predictions": predictions, "log_likelihood": truth, "confidence": np.exp(log[rows, predictions])}
    texts = {f"test_{name}": base64.b64encode(found[name].astype(kind)).decode() for name, kind in _DTYPES.items()}
    correct = predictions == labels
    return {"test_accuracy": float(correct.mean()), "test_hits": packed(correct), **texts}


def read_records(records: list[list[dict[str, Any]]], labels: np.ndarray) -> Answers:
    """The answers in `records` of K splits, of S trainings each; labels int [K, T]."""
    flat, shape = [record for each in records for record in each], (len(records), len(records[0]), labels.shape[1])
    correct = np.stack([unpacked(record["test_hits"], shape[2]) for record in flat]).reshape(shape)

    def read(name: str) -> np.ndarray | None:
        if any(f"test_{name}" not in record for record in flat):
            return None
        arrays = [np.frombuffer(base64.b64decode(record[f"test_{name}"]), _DTYPES[name]) for record in flat]
        return np.stack(arrays).astype(np.int32 if name == "predictions" else np.float32).reshape(shape)

    return Answers(labels, correct, *map(read, _DTYPES))


def packed(correct: np.ndarray) -> str:
    """Bools [T] as text."""
    return base64.b64encode(np.packbits(correct).tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """The `count` bools that `packed` made `text` of."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count).astype(bool)
