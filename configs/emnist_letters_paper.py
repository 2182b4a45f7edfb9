# EMNIST-Letters as published: VGG-5, Adam, the learning rate steered by the test accuracy; test evaluated every epoch.
# Images lie on their side, as they are stored and as the script saw them; 26 outputs for the 26 classes, not 62.
#   command   pspinal-jax train emnist-letters-paper
#   expected  not run: data not available offline (the paper reports 95.86 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="emnist-letters-paper", row="EMNIST-Letters", model="VGG-5 and head", published_accuracy=95.86),
    data=DataConfig(
        name="emnist_letters",
        num_classes=26,
        mean=0.1307,
        std=0.3081,
        augment="perspective_rotation",
        transposed=True,
        drop_remainder=False,
    ),
    model=ModelConfig(backbone="vgg5", layer_width=128, dropout_rate=0.2),
    optimizer=OptimizerConfig(name="adam", learning_rate=0.005, steering="best_on_test"),
    epochs=200,
    batch_size=50,
    protocol="paper",
)
