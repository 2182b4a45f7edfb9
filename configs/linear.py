# A linear layer on features: what --freeze backbone --cache-features trains where no flag says otherwise.
#   command   pspinal-jax train linear --data.path features.npz
#   expected  as scikit-learn's LogisticRegression: docs/photographs.md
#   time      seconds
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="linear", row="none", model="linear layer on features"),
    data=DataConfig(name="features"),
    model=ModelConfig(head="dense", dropout_rate=0.0),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.05, schedule="one_cycle"),
    epochs=60,
    batch_size=32,
)
