"""`pspinal-jax prepare` as a user sees it, alone, twice at once, and killed half-way."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from pspinal_jax.__main__ import main
from pspinal_jax.data import load_data
from pspinal_jax.recipes import DataConfig


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(folder, num_train=30, num_test=20):
    """MNIST's four files, decompressed; image i is filled with i modulo 251."""
    folder.mkdir()
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = np.broadcast_to((np.arange(count) % 251).astype(np.uint8)[:, None, None], (count, 28, 28))
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx((np.arange(count) % 10).astype(np.uint8)))
    return folder


def command(raw, data_dir):
    flags = ["--raw", str(raw), "--data-dir", str(data_dir)]
    return [sys.executable, "-W", "error", "-m", "pspinal_jax", "prepare", "mnist", *flags]


def assert_whole(data_dir, num_train=30, num_test=20):
    data = load_data(DataConfig("mnist", data_dir=data_dir))
    assert (len(data.train), len(data.test)) == (num_train, num_test)
    np.testing.assert_array_equal(data.train.inputs[:, 3, 4, 0], np.arange(num_train) % 251)


def test_it_says_where_the_data_is_and_how_to_train(tmp_path, capsys):
    raw = write_mnist(tmp_path / "raw")
    args = ["prepare", "mnist", "--raw", str(raw), "--data-dir", str(tmp_path / "my data")]
    assert main(args) == 0
    out, err = capsys.readouterr()
    where = tmp_path / "my data" / "mnist" / "1.0.0"
    train = f"train on it with: pspinal-jax train mnist --data.data-dir '{tmp_path / 'my data'}'"
    assert out.splitlines() == [f"mnist is prepared in {where}", train]
    assert "prepare mnist: 100%" in err and "50.0/50.0" in err
    assert_whole(tmp_path / "my data")
    assert main(args) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"mnist is already prepared in {where}; delete that folder to prepare it again",
        train,
    ]


def test_digits_need_no_files(tmp_path, capsys):
    assert main(["prepare", "digits", "--data-dir", str(tmp_path)]) == 0
    assert f"digits is prepared in {tmp_path / 'digits' / '1.0.0'}" in capsys.readouterr().out
    assert len(load_data(DataConfig("digits", data_dir=tmp_path)).train) == 1437


@pytest.mark.parametrize(
    ("args", "status", "fragments"),
    [
        ([], 2, ["prepare takes a data set: digits, mnist", "emnist_letters"]),
        (["mnits"], 2, ["unknown data set 'mnits'", "expected one of digits, mnist"]),
        (["mnist", "--rwa", "x"], 2, ["--rwa"]),
        (["digits", "--raw", "."], 2, ["comes with scikit-learn"]),
        (["mnist", "--raw", ".", "--npz", "a.npz"], 2, ["not both"]),
        (["mnist", "--raw", "nowhere"], 1, ["nowhere does not exist", "train-images-idx3-ubyte.gz"]),
        (["emnist-letters", "--raw", "."], 1, [". lacks emnist-letters-train-images-idx3-ubyte.gz", "gzip.zip"]),
        (["mnist", "--npz", "none.npz"], 1, ["none.npz cannot be read as an .npz file"]),
    ],
)
def test_a_wrong_command_gets_one_line(tmp_path, monkeypatch, capsys, args, status, fragments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "unused"))
    if args:
        args = [*args, "--data-dir", "data"]
    assert main(["prepare", *args]) == status
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for fragment in fragments:
        assert fragment in error, error
    assert not list(tmp_path.iterdir())


def test_without_a_network_it_ends_within_seconds_and_says_what_to_do(tmp_path):
    code = (
        "import sys, dataclasses\nfrom pspinal_jax.__main__ import main\nfrom pspinal_jax.data import catalogue\n"
        "entry = catalogue.CATALOGUE['kmnist']\n"
        "moved = [dataclasses.replace(item, url='http://127.0.0.1:9/' + item.file) for item in entry.downloads]\n"
        "catalogue.CATALOGUE['kmnist'] = dataclasses.replace(entry, downloads=tuple(moved))\n"
        "sys.exit(main(['prepare', 'kmnist', '--data-dir', sys.argv[1]]))"
    )
    run, env = [sys.executable, "-c", code, str(tmp_path / "data")], {**os.environ, "no_proxy": "*"}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env, timeout=60)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: kmnist: train-images-idx3-ubyte.gz is missing")
    assert done.stderr.endswith("run: pspinal-jax prepare kmnist --raw DIR\n") and done.stderr.count("\n") == 1


def test_two_at_once_both_succeed(tmp_path):
    raw = write_mnist(tmp_path / "raw", 2000, 100)
    pipe = subprocess.PIPE
    run = command(raw, tmp_path / "data")
    processes = [subprocess.Popen(run, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    said = sorted(out.splitlines()[0].split(" in ")[0] for out, _ in outputs)
    assert said == ["mnist is already prepared", "mnist is prepared"]
    assert_whole(tmp_path / "data", 2000, 100)
    assert {path.name for path in (tmp_path / "data" / "mnist").iterdir()} == {"1.0.0", ".1.0.0.arrays.npz"}


def test_killed_half_way_nothing_looks_prepared_and_the_next_run_succeeds(tmp_path, capsys):
    raw = write_mnist(tmp_path / "raw", 20_000, 100)
    folder = tmp_path / "data" / "mnist"
    process = subprocess.Popen(command(raw, tmp_path / "data"), stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(folder.glob("incomplete.*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [path.name.split(".")[0] for path in folder.iterdir()] == ["incomplete"]
    assert main(["train", "mnist", "--data.data-dir", str(tmp_path / "data"), "--workdir", str(tmp_path / "run")]) == 1
    assert "run: pspinal-jax prepare mnist --data-dir" in capsys.readouterr().err

    again = subprocess.run(
        command(write_mnist(tmp_path / "small"), tmp_path / "data"), capture_output=True, text=True, check=False
    )
    assert again.returncode == 0 and "mnist is prepared in" in again.stdout, again.stderr
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]
    assert_whole(tmp_path / "data")


def test_interrupted_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    from pspinal_jax.data import prepare

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "read_raw", interrupt)
    args = ["prepare", "mnist", "--raw", str(tmp_path), "--data-dir", str(tmp_path / "data")]
    assert main(args) == 1
    assert capsys.readouterr().err == "error: stopped before mnist was prepared; run the same command again\n"


def test_help_answers_without_importing_anything_heavy():
    code = (
        "import sys\nfrom pspinal_jax.__main__ import main\n"
        "try:\n    main(['prepare', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'PIL'}\n"
        "print('loaded:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--raw" in done.stdout and "emnist_letters" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded: []"
