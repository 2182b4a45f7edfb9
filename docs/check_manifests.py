"""Check the Kubernetes manifests of a page against the models of their operators.

pip install kubeflow-trainer-api pyyaml; python docs/check_manifests.py docs/scaling.md
"""

import re
import sys
from pathlib import Path

import yaml
from kubeflow_trainer_api import models

MODELS = {"TrainJob": models.TrainerV1alpha1TrainJob, "JobSet": models.JobsetV1alpha2JobSet}


def unknown(given: object, kept: object, place: str = "") -> list[str]:
    """The fields of `given` that the model, which drops what it does not know, has not kept."""
    if isinstance(given, dict) and isinstance(kept, dict):
        lost = [f"{place}.{key}" for key in given if key not in kept]
        return lost + [
            line for key in given if key in kept for line in unknown(given[key], kept[key], f"{place}.{key}")
        ]
    if isinstance(given, list) and isinstance(kept, list):
        pairs = zip(given, kept, strict=True)
        return [line for index, (one, other) in enumerate(pairs) for line in unknown(one, other, f"{place}[{index}]")]
    return []


for block in re.findall(r"^```yaml\n(.*?)^```", Path(sys.argv[1]).read_text(), re.DOTALL | re.MULTILINE):
    manifest = yaml.safe_load(block)
    model = MODELS[manifest["kind"]].from_dict(manifest)
    if model is None or (lost := unknown(manifest, model.to_dict())):
        raise SystemExit(f"{manifest['kind']}: fields that the model does not know: {', '.join(lost)}")
    print(f"{manifest['kind']} {manifest['metadata']['name']}: as its model has it")
