"""Run as a script: `pspinal-jax ARGS..`, watched, as one process of several.

The environment says what to do: DEVICES simulates so many; STOP=PROCESS:STEP:SIGNAL sends that process a signal before
step STEP, counted over the run, and takes that step alone, or, where STEP is "model", before the model is built;
TINY_RESNET makes resnet18 small; FULL=PROCESS:BYTES lets that process write no file beyond so many bytes, as on a full
disk; HERE in an argument stands for the folder $HERE/PROCESS; OBSERVED names a file for what was seen: how many images
were decoded, whether the data set stood prepared when it was asked for, and the step that the run went on from.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))

from pspinal_jax.__main__ import main  # noqa: E402
from pspinal_jax.backbones import resnet  # noqa: E402
from pspinal_jax.data import load  # noqa: E402
from pspinal_jax.data.images import decode as decoding  # noqa: E402
from pspinal_jax.data.tfds import find_prepared  # noqa: E402
from pspinal_jax.distributed import index  # noqa: E402
from pspinal_jax.runs import train  # noqa: E402
from pspinal_jax.training.examples import InMemoryExamples  # noqa: E402
from pspinal_jax.training.loop import Trainer  # noqa: E402

seen = {"decoded": 0, "prepared": [], "from": None}


def watch():
    decode, prepare, restore = decoding.decode, load.prepare_data_set, Trainer._restore

    def counted(*args):
        seen["decoded"] += 1
        return decode(*args)

    def asked(data_set, data_dir):
        seen["prepared"].append(find_prepared(data_dir, data_set.name) is not None)
        return prepare(data_set, data_dir)

    def restored(self):
        restore(self)
        seen["from"] = self.progress.serial

    decoding.decode, load.prepare_data_set, Trainer._restore = counted, asked, restored


def stop_early(process, name):
    set_up = train.set_up

    def stopping(*args):
        if index() == int(process):
            os.kill(os.getpid(), signal.Signals[name])
        return set_up(*args)

    train.set_up = stopping


def stop_at(process, step, name):
    if step == "model":
        return stop_early(process, name)
    chunk_steps, InMemoryExamples.first_chunk = Trainer._chunk_steps, 1

    def stopping(self, remaining):
        steps, left = chunk_steps(self, remaining), int(step) - self.progress.serial
        if left == 0 and index() == int(process):
            os.kill(os.getpid(), signal.Signals[name])
        return min(steps, max(left, 1)) if left >= 0 else steps

    Trainer._chunk_steps = stopping


watch()
if "FULL" in os.environ:
    process, size = map(int, os.environ["FULL"].split(":"))
    if f"--process-id {process}" in " ".join(sys.argv):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
if "STOP" in os.environ:
    stop_at(*os.environ["STOP"].split(":"))
if "TINY_RESNET" in os.environ:
    resnet.VARIANTS["resnet18"] = resnet.Variant((1, 1, 1, 1), 1)
    resnet.STAGE_CHANNELS = (4, 4, 8, 8)
process = sys.argv[-1] if "--process-id" in sys.argv else "0"
status = main([word.replace("HERE", f"{os.environ.get('HERE')}/{process}") for word in sys.argv[1:]])
if "OBSERVED" in os.environ:
    Path(os.environ["OBSERVED"]).write_text(json.dumps(seen))
sys.exit(status)
