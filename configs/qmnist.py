# QMNIST, the paper's model trained better: AdamW, one cycle, label smoothing; 5,000 images held out.
#   command   pspinal-jax train qmnist
#   expected  not run: data not available offline (the paper reports 99.6867 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="qmnist", row="QMNIST", model="VGG-5 and head", published_accuracy=99.6867),
    data=DataConfig(
        name="qmnist",
        num_classes=10,
        mean=0.1307,
        std=0.3081,
        num_validation=5000,
        augment="perspective_rotation",
    ),
    model=ModelConfig(backbone="vgg5", layer_width=64, dropout_rate=0.2, layer_dropout_rate=0.5, norm="batch"),
    optimizer=OptimizerConfig(name="adamw", learning_rate=3e-3, weight_decay=0.05, schedule="one_cycle"),
    epochs=20,
    batch_size=128,
    label_smoothing=0.1,
)
