# A head on features that a backbone gave before: what `pspinal-jax extract-features` writes, or an .npz of your own.
#   command   pspinal-jax train features --data.path features.npz
#   expected  depends on the features
#   time      seconds
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="features", row="none", model="head on features"),
    data=DataConfig(name="features"),
    model=ModelConfig(layer_width=256, dropout_rate=0.2),
    optimizer=OptimizerConfig(name="adamw", learning_rate=1e-3, weight_decay=0.05, schedule="one_cycle"),
    epochs=30,
    batch_size=64,
    label_smoothing=0.1,
)
