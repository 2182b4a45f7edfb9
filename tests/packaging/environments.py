"""Environments with nothing in them but what is asked for."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*command, cwd, **environment):
    """Run a command without what this process's environment adds to Python's path; gives its standard output."""
    parts = [str(part) for part in command]
    ran = subprocess.run(parts, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}: {ran.stdout[-2000:]}{ran.stderr[-2000:]}"
    return ran.stdout


def make_environment(folder, what, *, constrained=True):
    """Install `what` and what it requires into a new environment in `folder`; gives its folder of commands.

    What it requires has the versions of constraints.txt or, if not `constrained`, those that a newcomer gets.
    """
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    commands = folder / ("Scripts" if os.name == "nt" else "bin")
    constraints = REPOSITORY / "constraints.txt"
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", what]
    run(commands / "python", *install, *(["-c", constraints] if constrained else []), cwd=folder)
    return commands
