"""`benchmark input` measures the same pictures for everyone, in small; its numbers are not tested."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from pspinal_jax.__main__ import main
from pspinal_jax.benchmark import whole as benchmark
from pspinal_jax.errors import RunError


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "NUM_FILES", 4)
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 2)
    monkeypatch.setattr(benchmark, "SIZE", (120, 130))  # smaller, and JPEG would be decoded at a half


def test_photographs_are_cut_the_same_every_time():
    assert benchmark.cut_image(3) == benchmark.cut_image(3) != benchmark.cut_image(5)
    data = benchmark.cut_image(3)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG" and image.mode == "RGB"
        assert abs(image.width - 500) <= 40 and abs(image.height - 375) <= 30
    assert 15_000 < len(data) < 120_000


def test_without_torch_or_workers_to_spare_it_reports_the_rest(small, without_torch, tmp_path, monkeypatch, capsys):
    start = benchmark.stream
    monkeypatch.setattr(benchmark, "stream", lambda *given, workers=0: start(*given))
    assert main(["benchmark", "input", "--workdir", str(tmp_path), "--pictures", "20", "--rounds", "2"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    (table,) = results["entries"]
    assert list(table["alternatives"]) == ["stream, 2 workers", "stream, threads"]
    for values in table["alternatives"].values():
        assert len(values["images_per_second"]) == 2 and min(values["images_per_second"]) > 0
    assert "pillow" in results["versions"] and (tmp_path / "results.png").stat().st_size > 3000
    assert "left out: PyTorch: torch is not installed" in capsys.readouterr().out
    assert main(["benchmark", "input", "--workdir", str(tmp_path), "--pictures", "17"]) == 2
    assert "at least --pictures 18" in capsys.readouterr().err


def test_a_different_batch_is_noticed():
    def batches(value):
        def start():
            yield np.full((1, 2, 2, 3), value, np.uint8), np.zeros(1, np.int32)

        return start

    benchmark.check_same_batches({"a": batches(1), "b": batches(1)})
    with pytest.raises(RunError, match="b and a give different batches"):
        benchmark.check_same_batches({"a": batches(1), "b": batches(2)})


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torch_gives_the_same_batches_and_is_timed(small, tmp_path):
    pytest.importorskip("torch")
    order = np.arange(20) % 4
    passes = benchmark.image_passes(benchmark.write_images(tmp_path, 4), order, 0)
    del passes["stream, 0 workers"]
    benchmark.check_same_batches(passes)
    assert list(passes) == ["stream, threads", "torch DataLoader, 0 workers"]
    assert all(min(values["images_per_second"]) > 0 for values in benchmark.measure_passes(passes, 1).values())
