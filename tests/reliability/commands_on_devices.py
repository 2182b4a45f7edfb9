"""Run as a script: commands, a JSON list of lists of arguments, in one process on so many simulated devices.

Prints a JSON list of [exit status, standard output, standard error].
"""

import contextlib
import io
import json
import sys

import jax

from pspinal_jax.__main__ import main

jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
done = []
for arguments in json.loads(sys.argv[2]):
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    done.append([status, out.getvalue(), errors.getvalue()])
print(json.dumps(done))
