"""Whole models: preprocessing, backbone and head."""

from pspinal_jax.models.build import abstract_variables, build_model
from pspinal_jax.models.classifier import Classifier

__all__ = ["Classifier", "abstract_variables", "build_model"]
