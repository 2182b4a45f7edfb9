"""Batches come decoded and in the order given, whoever decodes them."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from images_support import InMemory, numbered, picture

from pspinal_jax.data import stream as stream_module
from pspinal_jax.data.images import ImageSplit
from pspinal_jax.data.stream import stream
from pspinal_jax.errors import DataError, RunError

SIZE = (5, 4)
ORDER = np.array([3, 0, 9, 9, 1, 7, 2, 8, 5, 4, 0])


def cut(split, order, batch_size, first_batch=0, workers=0):
    """The stream of batches of one size, and then what is left."""
    starts = range(first_batch * batch_size, len(order), batch_size)
    return stream(split, (order[start : start + batch_size] for start in starts), SIZE, workers)


def numbers(batches):
    """What the pictures of each batch show."""
    shown = []
    for images, labels in batches:
        assert images.dtype == np.uint8 and images.shape == (len(labels), *SIZE, 3) and type(images) is np.ndarray
        assert labels.dtype == np.int32 and (images == images[:, :1, :1]).all()
        np.testing.assert_array_equal(images[:, 0, 0, 0] % 3, labels)
        shown.append(images[:, 0, 0, 0].tolist())
    return shown


def test_batches_keep_the_order_and_the_last_is_smaller():
    assert numbers(cut(numbered(10), ORDER, 4)) == [[3, 0, 9, 9], [1, 7, 2, 8], [5, 4, 0]]
    assert numbers(cut(numbered(10), ORDER[:8], 4)) == [[3, 0, 9, 9], [1, 7, 2, 8]]
    assert numbers(cut(numbered(10), ORDER, 100)) == [ORDER.tolist()]
    assert numbers(cut(numbered(10), ORDER[:0], 4)) == []


def test_starting_later_reads_nothing_of_what_comes_before(tmp_path):
    photos = numbered(10, seen=tmp_path)
    assert numbers(cut(photos, ORDER, 4, first_batch=1)) == [[1, 7, 2, 8], [5, 4, 0]]
    assert {path.name for path in tmp_path.iterdir()} == set("1728540")
    assert numbers(cut(photos, ORDER, 4, first_batch=3)) == []


def test_closing_early_stops_reading_ahead(tmp_path):
    batches = cut(numbered(200, seen=tmp_path), np.arange(200), 1)
    next(batches)
    batches.close()
    assert len(list(tmp_path.iterdir())) < 100


@pytest.mark.parametrize("taken", [False, True])
def test_a_picture_that_cannot_be_decoded_is_named(taken):
    photos = ImageSplit(InMemory([picture(0), b"no picture", picture(2)]), np.zeros(3, np.int32))
    order, place = np.arange(3), 1
    if taken:
        photos, order = photos.take(np.array([2, 1])).take(np.array([1])), np.array([0])
    with pytest.raises(DataError, match=f"picture {place}: the image cannot be decoded: its format is not known"):
        list(cut(photos, order, 2))


def test_workers_give_the_same_batches_beside_jax_and_end_when_closed_early():
    jax.block_until_ready(jax.numpy.ones(3) + 1)
    order = np.concatenate([ORDER, np.zeros(50, int)])
    batches = cut(numbered(10), order, 4, first_batch=1, workers=2)
    first = numbers(itertools.islice(batches, 3))
    assert first == numbers(itertools.islice(cut(numbered(10), order, 4, first_batch=1), 3))
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers_gives_the_same_batches_to_the_end(workers):
    assert numbers(cut(numbered(10), ORDER, 2, workers=workers)) == numbers(cut(numbered(10), ORDER, 2))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_worker_that_dies_is_noticed():
    batches = cut(numbered(10), np.tile(ORDER, 50), 4, workers=1)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="a worker process that decodes images ended unexpectedly"):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_in_a_worker_is_the_same_error():
    photos = ImageSplit(InMemory([picture(0), b"no picture", picture(2)]), np.zeros(3, np.int32))
    with pytest.raises(DataError) as caught:
        list(cut(photos, np.arange(3), 2, workers=1))
    assert str(caught.value) == "picture 1: the image cannot be decoded: its format is not known"


def test_a_worker_ends_as_failed_once_its_main_process_has_ended(monkeypatch):
    class Main:
        def join(self):
            done.append("joined")

    done = []
    monkeypatch.setattr(multiprocessing, "parent_process", Main)
    monkeypatch.setattr(os, "_exit", done.append)
    stream_module._end_with_main_process()
    assert done == ["joined", 1]
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    stream_module._end_with_main_process()
    assert len(done) == 2, "a process without a parent goes on"


@pytest.mark.slow
def test_workers_survive_an_interrupt_and_end_with_a_main_process_that_is_killed(tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import multiprocessing, sys\nimport numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from images_support import numbered\nfrom pspinal_jax.data.stream import stream\n"
        "if __name__ == '__main__':\n"
        "    batches = stream(numbered(10), np.zeros((250, 4), int), (5, 4), workers=1)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    for _ in sys.stdin:\n        print(len(next(batches)[1]), flush=True)\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True) as process:
        worker = int(process.stdout.readline())
        os.kill(worker, signal.SIGINT)
        for _ in range(20):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "4\n"
        process.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()


END = {
    "read to its end": "for _ in batches: pass",
    "closed early": "next(batches)\n    batches.close()",
    "still open when the process ends": "next(batches)\n    globals()['kept'] = batches",
    "left by an error": "next(batches)\n    sys.exit(0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", END)
def test_a_process_with_workers_ends_without_a_word(how, tmp_path):
    script = tmp_path / "main.py"
    script.write_text(
        "import sys\nimport numpy as np\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from images_support import numbered\nfrom pspinal_jax.data.stream import stream\n"
        "if __name__ == '__main__':\n"
        f"    batches = stream(numbered(10), np.zeros((11, 9), int), (50, 40), workers=2)\n    {END[how]}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_workers_of_a_script_without_a_main_guard_are_one_line_that_says_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport numpy as np\n"
        "from test_images_stream import numbered, stream\n"
        "list(stream(numbered(10), np.arange(10).reshape(5, 2), (5, 4), workers=2))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    *_, last = done.stderr.splitlines()
    assert done.returncode == 1 and last.startswith("pspinal_jax.errors.RunError: a worker process that decodes images")
    assert f'`if __name__ == "__main__":` before what {script} does' in last
    assert done.stderr.count("Traceback") == 1, "the workers themselves say nothing"


def test_importing_it_does_not_load_jax():
    code = (
        "import sys\nimport pspinal_jax.data.images\n"
        "from pspinal_jax.data import stream\n"
        "from pspinal_jax.data.images import decode\n"
        "print(sorted({'jax', 'flax', 'tensorflow_datasets', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
