"""The fixtures of tests/runs, here too: a small network under the name of a real one, and images to train it on."""

import importlib.util
import sys
from pathlib import Path

RUNS = Path(__file__).parents[2] / "runs"
sys.path.insert(0, str(RUNS))
spec = importlib.util.spec_from_file_location("fixtures_of_runs", RUNS / "conftest.py")
fixtures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixtures)
pictures, tiny_flags, tiny_resnet = fixtures.pictures, fixtures.tiny_flags, fixtures.tiny_resnet
