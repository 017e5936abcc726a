# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Runs scripts with ``--smoke-test`` and warnings as errors, as many at a time as there are cores.

Each has a process of its own, forked from one that has imported the libraries already: that takes as long as most of
them run. What a script prints comes in one piece.
"""

import atexit
import os
import runpy
import sys
import tempfile
import time
import traceback
import warnings

import matplotlib.pyplot  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch._dynamo  # noqa: F401  # the first optimizer imports it

import pyro_rb  # noqa: F401


def start(script, log):
    """The number of a process that runs the script."""
    child = os.fork()
    if child:
        return child
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    sys.argv, sys.path[0] = [script, "--smoke-test"], os.path.dirname(script)
    warnings.simplefilter("error")
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def main(scripts):
    scripts, running, failed = sorted(scripts, reverse=True), {}, []
    while scripts or running:
        while scripts and len(running) < os.cpu_count():
            script, log = scripts.pop(), tempfile.TemporaryFile()
            running[start(script, log)] = script, log, time.monotonic()
        child, status = os.wait()
        script, log, begin = running.pop(child)
        log.seek(0)
        print(f"--- {script} --smoke-test: {time.monotonic() - begin:.0f} s")
        print(log.read().decode(), flush=True)
        if status:
            failed.append(script)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
