# Caltech-101, the paper's model trained better: cosine schedule, larger batches, label smoothing, bfloat16;
# with a tenth of each class held out to select the epoch by.
#   command   pspinal-jax train caltech101 --data.path DIR
#   expected  not run: Wide-ResNet-101-2 wants a GPU (the paper reports 97.76 %)
#   time      not measured
from pspinal_jax.recipes import Card, DataConfig, ModelConfig, OptimizerConfig, Recipe

recipe = Recipe(
    card=Card(name="caltech101", row="Caltech-101", model="Wide-ResNet-101-2 and head", published_accuracy=97.76),
    data=DataConfig(
        name="caltech101",
        image_size="own",
        validation_fraction=0.1,
        augment="rotation_crop_flip",
    ),
    model=ModelConfig(backbone="wide_resnet101_2", weights="pretrained", layer_width=200, dropout_rate=0.35),
    optimizer=OptimizerConfig(learning_rate=0.01, nesterov=True, schedule="cosine"),
    epochs=12,
    batch_size=64,
    eval_batch_size=64,
    label_smoothing=0.1,
    dtype="bfloat16",
)
