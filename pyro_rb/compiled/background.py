# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
Graphs are compiled by Inductor in a process of their own, so that steps need not wait.

Not in a thread: what is compiled saves the state of the random number generators and puts it
back, between which the steps of the main thread would have drawn.
"""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import Any, Callable, List, Sequence

import torch

from pyro_rb.compiled.portable import from_list, to_list, without_tensors
from pyro_rb.compiled.torch_private import (
    Compiled,
    compile_graph,
    load,
    prepare_load,
)

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from pyro_rb.compiled.background import main; main(sys.argv[2])"
)


class InductorError(RuntimeError):
    """Inductor failed."""


class Compilation:
    """
    A graph that is being compiled.

    :param module: the graph.
    :param inputs: tensors such as it will be called with.
    :param bool background: whether to return at once.
    :param bool is_long: whether it is of several steps.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        inputs: Sequence[torch.Tensor],
        background: bool,
        is_long: bool = False,
    ) -> None:
        self._is_long = is_long
        self._graph, self._constants = without_tensors(module)
        self._inputs = [_describe(x) for x in [*inputs, *self._constants]]
        self._process: Any = None
        if background:
            self._start()

    def _start(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="pyro_rb_")
        with open(os.path.join(self._folder, "graph"), "wb") as file:
            work = to_list(self._graph), self._inputs, self._is_long, _get_settings()
            pickle.dump(work, file)
        try:
            with open(os.path.join(self._folder, "error"), "wb") as error:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _COMMAND, json.dumps(sys.path), self._folder],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=error,
                    start_new_session=True,  # Ctrl-C is for the steps
                )
        except (OSError, TypeError):  # where there is no interpreter to start
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        prepare_load()
        weakref.finalize(self, _stop, self._process, self._folder, os.getpid())

    def is_done(self) -> bool:
        """Whether :meth:`result` returns at once, or there is nothing to wait for."""
        return self._process is None or self._process.poll() is not None

    def result(self) -> Callable[..., Any]:
        """
        What is to be called with tensors, and returns a list of tensors.

        :raises InductorError: if it failed.
        """
        try:
            return _with_constants(self._result(), self._constants)
        except Exception as e:  # no C++ compiler, say
            raise InductorError(f"{type(e).__name__}: {e}") from e

    def _result(self) -> Compiled:
        if self._process is not None:
            self._process.wait()
            path = os.path.join(self._folder, "program")
            if os.path.exists(path):
                return load(path)
            if self._process.returncode != 0:
                with open(os.path.join(self._folder, "error"), errors="replace") as file:
                    lines = file.read().strip().splitlines()
                code = f"its process ended with {self._process.returncode}"
                raise RuntimeError(lines[-1] if lines else code)
        # There is no other process, or what it made could not be written.
        return compile_graph(self._graph, _make(self._inputs), self._is_long)


def _with_constants(program: Compiled, constants: List[torch.Tensor]) -> Callable[..., Any]:
    if not constants:
        return program
    return lambda *inputs: program(*inputs, *constants)


def _describe(x: torch.Tensor) -> Any:
    return tuple(x.shape), x.stride(), x.dtype, x.device


def _make(inputs: Sequence[Any]) -> List[torch.Tensor]:
    return [torch.empty_strided(*x[:2], dtype=x[2], device=x[3]) for x in inputs]


def _get_settings() -> Any:
    return torch.get_num_threads(), torch.get_float32_matmul_precision()


def _stop(process: Any, folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        if process.poll() is None:
            _kill(process.pid)
        process.stdin.close()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def main(folder: str) -> None:
    """Of the process that compiles. It ends when the process that started it has ended."""
    threading.Thread(target=_follow, daemon=True).start()
    with open(os.path.join(folder, "graph"), "rb") as file:
        nodes, inputs, is_long, (num_threads, precision) = pickle.load(file)
    torch.set_num_threads(num_threads)
    torch.set_float32_matmul_precision(precision)
    program = compile_graph(from_list(nodes), _make(inputs), is_long)
    if program.is_saveable():
        path = os.path.join(folder, "program")
        program.save(path=path + ".part", format="binary")
        os.rename(path + ".part", path)


def _follow() -> None:
    sys.stdin.read()
    _kill(os.getpid())


def _kill(pid: int) -> None:
    """A process that compiles, with the compilers that it started."""
    if hasattr(os, "killpg"):
        os.killpg(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGTERM)
