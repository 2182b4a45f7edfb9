"""The sbatch script of docs/scaling.md under stand-ins for srun and scontrol: stopped when its time is up, requeued."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes_support import free_port, metrics, run_to_the_end, small, write_four_classes

REPOSITORY = Path(__file__).parents[2]

SRUN = """#!/bin/bash
# The same command for each of two tasks, with the variables that tell them apart. The first time, SIGTERM to both
# once an epoch has ended, as --signal=TERM@120 before the end.
shift
tasks=()
for id in 0 1; do
    SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & tasks+=($!)
done
if [ ! -e stopped ] && [ -z "$FAILING" ]; then
    until grep -qs . run/metrics.jsonl; do sleep 0.05; done
    touch stopped
    kill -TERM "${tasks[@]}"
fi
status=0
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""


def write_commands(folder):
    texts = {
        "srun": SRUN,
        "scontrol": '#!/bin/bash\necho "$@" >> requeued\n',
        "pspinal-jax": f'#!/bin/bash\nexec {sys.executable} -m pspinal_jax "$@"\n',
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.slow
def test_the_sbatch_script_goes_on_after_its_time_was_up(tmp_path):
    page = (REPOSITORY / "docs" / "scaling.md").read_text()
    (script,) = re.findall(r"```\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
    data = write_four_classes(tmp_path / "four.npz")
    arguments = " ".join(small(data, tmp_path / "run", "--epochs", "40"))
    script, count = re.subn(r"train fruits360 .*?(?= --distributed)", arguments, script, flags=re.DOTALL)
    assert count == 1
    script = script.replace("/shared/runs/fruits360", str(tmp_path / "run"))
    write_commands(tmp_path / "bin")
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "NPROC": "8"}

    def submit(**more):
        environment = os.environ | variables | {"JAX_COORDINATOR_PORT": str(free_port())} | more
        return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)

    failed = submit(FAILING="1", JAX_PLATFORMS="none")
    assert failed.returncode != 0 and not (tmp_path / "requeued").exists()
    first = submit()
    assert first.returncode == 0, first.stderr
    assert "stopped by SIGTERM; the run is saved" in first.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and not (tmp_path / "run" / "result.json").exists()
    second = submit()
    assert second.returncode == 0 and "results in" in second.stdout, second.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    run_to_the_end(tmp_path, small(data, tmp_path / "whole", "--epochs", "40"), devices=1)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
