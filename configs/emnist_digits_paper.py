# EMNIST-Digits as published: VGG-5, Adam, the learning rate steered by the test accuracy; test evaluated every epoch.
# Images lie on their side, as they are stored and as the script saw them.
#   command   pspinal-jax train emnist-digits-paper
#   expected  not run: data not available offline (the paper reports 99.82 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="emnist-digits-paper", row="EMNIST-Digits", model="VGG-5 and head", published_accuracy=99.82),
    data=DataConfig(
        name="emnist_digits",
        num_classes=10,
        mean=0.1307,
        std=0.3081,
        augment="perspective_rotation",
        transposed=True,
        drop_remainder=False,
    ),
    model=ModelConfig(backbone="vgg5", layer_width=64, dropout_rate=0.2),
    optimizer=OptimizerConfig(name="adam", learning_rate=0.005, steering="best_on_test"),
    epochs=50,
    batch_size=64,
    protocol="paper",
)
