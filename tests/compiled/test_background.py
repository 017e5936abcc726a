# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""While another process compiles, steps are replayed; it ends with what it is for."""

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import time

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_rb
from pyro_rb import CompiledSVI
from pyro_rb.compiled import background
from tests.compiled import models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

#: In the place of Inductor: waits for a file, then ends with a status.
WAIT = """
import os, sys, time
while not os.path.exists(sys.argv[2] + "/go"):
    time.sleep(0.02)
"""


def make(kind, loss, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, args = models.conjugate()
    return kind(model, guide, pyro.optim.Adam({"lr": 0.02}), loss, **options), args(0)


def steps(svi, args, num_steps):
    losses = [svi.step(*args) for _ in range(num_steps)]
    store = {k: p.detach().clone() for k, p in pyro.get_param_store().named_parameters()}
    return losses, store


@pytest.fixture
def started(monkeypatch):
    """The processes, which wait."""
    found = []
    start = background.Compilation._start

    def note(self):
        start(self)
        found.append((self._process, self._folder))

    monkeypatch.setattr(background, "_COMMAND", WAIT)
    monkeypatch.setattr(background, "prepare_load", lambda: None)
    monkeypatch.setattr(background.Compilation, "_start", note)
    return found


def let_go(started):
    for process, folder in started:
        if not os.path.exists(folder):  # it ended with the loss
            continue
        open(os.path.join(folder, "go"), "w").close()
        process.wait()


def stand_in(graph, inputs, is_long=False):
    """Instead of Inductor."""
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize("kind, num", [(SVI, 1), (CompiledSVI, 2)])
def test_switches_when_it_is_ready(started, monkeypatch, kind, num):
    monkeypatch.setattr(background, "compile_graph", stand_in)
    expected = steps(*make(SVI, Trace_ELBO()), 40)
    loss = pyro_rb.compile(Trace_ELBO())
    svi, args = make(kind, loss)
    first = steps(svi, args, 20)[0]
    assert loss.report()[-1].treatment == "replayed"
    assert len(started) == num
    let_go(started)
    second, store = steps(svi, args, 20)
    torch.testing.assert_close((first + second, store), expected)
    assert loss.report()[-1].treatment == "compiled"
    gc.collect()
    assert not any(os.path.exists(folder) for _, folder in started)


def test_several_steps(started, monkeypatch):
    monkeypatch.setattr(background, "compile_graph", stand_in)
    svi, args = make(CompiledSVI, pyro_rb.compile(Trace_ELBO()), unroll=4)
    expected = svi.run(60, *args, progress_bar=False)
    assert len(started) == 3
    svi, args = make(CompiledSVI, pyro_rb.compile(Trace_ELBO()), unroll=4)
    losses = [svi.run(20, *args, progress_bar=False)]
    let_go(started)
    losses.append(svi.run(40, *args, progress_bar=False))
    torch.testing.assert_close(torch.cat(losses), expected)
    (made,) = svi._steps.values()
    assert set(made.ready) == {1, 4} and not made.coming


def test_failure(started):
    """One warning with the last line of what it said; the graph is replayed."""
    expected = steps(*make(SVI, Trace_ELBO()), 20)
    loss = pyro_rb.compile(Trace_ELBO())
    svi, args = make(CompiledSVI, loss)
    first = steps(svi, args, 5)[0]
    for process, folder in started:
        with open(os.path.join(folder, "error"), "w") as file:
            file.write("Traceback\nValueError: no such thing\n")
        process.kill()
        process.wait()
    with pytest.warns(UserWarning, match="replayed: Inductor failed: .*ValueError: no such thing") as caught:
        second, store = steps(svi, args, 15)
    assert len(caught) == 1
    torch.testing.assert_close((first + second, store), expected)
    assert loss.report()[-1].treatment == "replayed"


def test_no_interpreter(monkeypatch):
    """It is compiled here."""
    monkeypatch.setattr(sys, "executable", None)
    monkeypatch.setattr(background, "compile_graph", stand_in)
    loss = pyro_rb.compile(Trace_ELBO())
    steps(*make(SVI, loss), 15)
    assert loss.report()[-1].treatment == "compiled"


def test_ends_with_the_loss(started):
    loss = pyro_rb.compile(Trace_ELBO())
    svi, args = make(SVI, loss)
    steps(svi, args, 5)
    ((process, folder),) = started
    # Ctrl-C is for the steps.
    assert os.getsid(process.pid) != os.getsid(0)
    del svi, loss
    gc.collect()
    assert process.poll() is not None
    assert not os.path.exists(folder)


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_meanwhile(started, copy_of):
    loss = pyro_rb.compile(Trace_ELBO())
    steps(*make(SVI, loss), 5)
    other = copy_of(loss)
    assert other.num_graphs == 0 and other.background is True
    assert len(started) == 1


def test_ends_with_the_interpreter(tmp_path):
    """Whichever way that ends: what compiles looks for the end of its input."""
    script = """
import os, subprocess, sys
from pyro_rb.compiled import background
code = "import threading, time; from pyro_rb.compiled.background import _follow; "
code += "print('ready', flush=True); threading.Thread(target=_follow, daemon=True).start(); time.sleep(60)"
process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
    stdout=subprocess.PIPE, start_new_session=True)
process.stdout.readline()
print(process.pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    for _ in range(200):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        with open(f"/proc/{pid}/stat") as file:  # where nobody waits for it, it stays as a zombie
            if file.read().split()[2] == "Z":
                return
        time.sleep(0.05)
    raise AssertionError("it did not end")


@needs_compiler
def test_inductor():
    """In a process of its own, with the draws of the eager loss."""
    expected = steps(*make(SVI, Trace_ELBO()), 40)
    loss = pyro_rb.compile(Trace_ELBO())
    svi, args = make(SVI, loss)
    first = steps(svi, args, 20)[0]
    (graph,) = loss.program(svi.model, svi.guide).graphs
    if graph._compilation is not None:
        graph._compilation._process.wait()
    second, store = steps(svi, args, 20)
    torch.testing.assert_close((first + second, store), expected, rtol=1e-4, atol=1e-4)
    assert loss.report()[-1].treatment == "compiled"
