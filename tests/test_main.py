# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""``python -m pyro_rb`` as a user meets it."""

import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from pathlib import Path

import pytest

from pyro_rb.__main__ import main
from pyro_rb.diagnostics.cli import commands
from pyro_rb.diagnostics.compare import along_training

pytestmark = pytest.mark.slow

QUICK = ["--num-samples", "4", "--burn-in", "1", "--no-progress"]

USER_MODULE = """
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.autoguide import AutoNormal
    from torch import nn

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("z", dist.Normal(loc, 0.8))

    def arguments():
        return (torch.tensor(0.7),)

    def make_args_and_kwargs():
        return (), {"x": torch.tensor(0.7)}

    def wide(model):
        return AutoNormal(model, init_scale=2.0)

    auto = AutoNormal(model)

    class Model(nn.Module):
        def forward(self, x):
            model(x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.tensor(0.0))

        def forward(self, x):
            pyro.sample("z", dist.Normal(self.loc, 0.8))

    def other_guide(x):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 0.8))

    def broken_model(x):
        return model(x / 0 + undefined)

    def multi_line(x):
        pyro.sample("z", dist.Normal(torch.tensor(float("nan")), 1.0))

    def one_tensor():
        return torch.tensor(0.7)

    number = 3
    x = torch.tensor(0.7)

    def from_variables(x, obs=None):
        model(x)

    def needs_more(x, y):
        model(x)
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(textwrap.dedent(USER_MODULE))
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    (tmp_path / "syntax.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("mine", "broken", "syntax"):
        sys.modules.pop(name, None)


def mine(guide="mine:guide", model="mine:model", args="mine:arguments"):
    """Compares before training only; as the last of two, ``--train-steps`` of a test counts."""
    return ["--model", model, "--guide", guide, "--args", args, "--train-steps", "0", *QUICK]


def command(*arguments, **options):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), **options.pop("env", {})}
    options = {"text": True, **options}
    return subprocess.run(
        [sys.executable, "-m", "pyro_rb", *arguments],
        capture_output=True, env=environment, timeout=120, **options
    )


def test_embedded_models(capsys):
    assert main([*QUICK, "--train-steps", "0", "2"]) == 0
    out, err = capsys.readouterr()
    assert "Eight schools (Rubin 1981)" in out and "Batting averages (Efron and Morris 1975)" in out
    assert out.count("Before training") == out.count("After 2 training steps") == 2
    for name in ("Trace_ELBO", "STLTrace_ELBO", "STLTrace_ELBO:1.0"):
        assert out.count("\n" + name + "  ") == 6  # two states of two models, and two rankings
    assert out.count("Not tried: TraceMeanField_ELBO (biased on this guide") == 2
    assert out.count("No advice: 4 gradients of each loss at a state are too few") == 2
    assert out.count("variance         of the gradient") == 1
    assert err == ""


def test_user_model_in_a_process():
    """Without Matplotlib, which plots alone need: a module that cannot be imported stands before the real one."""
    Path("matplotlib.py").write_text("raise ImportError('not here')\n")
    done = command(*mine(), "--train-steps", "2", "--losses", "STLTrace_ELBO", "--json", "out.json")
    # Pyro tells what it has guessed.
    errors = [line for line in done.stderr.splitlines() if not line.startswith("INFO")]
    assert done.returncode == 0 and errors == []
    assert done.stdout.startswith("Model mine:model, guide mine:guide\n1 parameter value,")
    assert "After 1 training steps" in done.stdout
    (comparison,) = json.loads(Path("out.json").read_text())["comparisons"]
    assert [state["step"] for state in comparison["states"]] == [0, 1, 2]
    assert comparison["parameters"] == {"loc": []}


@pytest.mark.parametrize(
    "guide", ["mine:guide", "mine:auto", "mine:wide", "mine:Guide", "pyro.infer.autoguide:AutoNormal",
              "pyro.infer.autoguide:AutoNormalMessenger"]
)
def test_kinds_of_guides(guide, capsys):
    assert main([*mine(guide), "--losses", "STLTrace_ELBO"]) == 0
    assert "not measured" not in capsys.readouterr().out


@pytest.mark.parametrize("path", ["mine.py", "./mine.py", "my models/été.py", "package/inner.py"])
@pytest.mark.parametrize("absolute", [False, True])
def test_files(path, absolute, capsys, tmp_path):
    """A path, also with spaces and letters; a part of a package may import its neighbours."""
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    if path.startswith("package"):
        (file.parent / "__init__.py").touch()
        (file.parent / "neighbour.py").write_text(textwrap.dedent(USER_MODULE))
        file.write_text("from .neighbour import arguments, guide, model")
    else:
        file.write_text(textwrap.dedent(USER_MODULE))
    spec = str(file) if absolute else path
    given = ["--model", f"{spec}:model", "--guide", f"{spec}:guide", "--args", f"{spec}:arguments"]
    try:
        assert main([*given, *QUICK, "--losses", "STLTrace_ELBO"]) == 0
        assert f"Model {spec}:model, guide {spec}:guide" in capsys.readouterr().out
        # The file has a model of the usual name.
        assert main(["--model", spec, "--args", f"{spec}:arguments", *QUICK, "--losses", "STLTrace_ELBO"]) == 0
    finally:
        for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", "")).startswith(str(tmp_path))]:
            del sys.modules[name]


@pytest.mark.parametrize(
    "lines",
    [
        "def make_args(): return (torch.tensor(0.7),)",
        "args = (torch.tensor(0.7),)",
        "args = 'of something else'",
        "def model(*, x): z = pyro.sample('z', dist.Normal(x, 1.0))",
    ],
)
def test_arguments_of_the_script(lines, capsys):
    with open("mine.py", "a") as file:
        file.write(lines)
    assert main(["--model", "mine:model", *QUICK, "--losses", "STLTrace_ELBO"]) == 0
    assert "not measured" not in capsys.readouterr().out


def test_a_script_that_trains():
    with open("mine.py", "a") as file:
        file.write("guide(x)")
    losses = ["--losses", "STLTrace_ELBO", "--train-steps", "0"]
    done = command("compare", "--model", "mine:model", "--guide", "mine:guide", *QUICK, *losses)
    assert done.returncode == 0
    assert "warning: importing 'mine' has run and maybe trained a model" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_of_any_alphabet(encoding):
    """The encoding is that of the terminal: it makes no difference to files."""
    names = ["\u03b2", "\u53c2\u6570", "a$b$c{", "\ud800", "_x"]
    lines = [f"pyro.sample({ascii(name)}, dist.Normal(0.0, 1.0))" for name in names]
    Path("mine.py").write_text(
        "import pyro\nimport pyro.distributions as dist\n\ndef model():\n    " + "\n    ".join(lines)
    )
    files = ["--json", "out.json"] + (["--html", "out.html", "--plot", "out.svg"] if encoding == "ascii" else [])
    arguments = ["--model", "mine:model", "--train-steps", "1", *QUICK, "--losses", "STLTrace_ELBO", *files]
    done = command(*arguments, env={"PYTHONIOENCODING": encoding}, encoding=encoding, text=None)
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(Path("out.json").read_text())["comparisons"][0]["parameters"]
    assert {f"AutoNormal.locs.{name}" for name in names} < found.keys()
    assert all(Path(name).exists() for name in files[1::2])


def test_what_was_measured_before_an_error(capsys):
    with open("mine.py", "a") as file:
        file.write(textwrap.dedent("""
            calls = []

            def fails(x):
                calls.append(1)
                assert len(calls) != 60, "sixty"
                model(x)
            """))
    arguments = [*mine(model="mine:fails"), "--losses", "STLTrace_ELBO", "--train-steps", "0", "100"]
    assert main([*arguments, "--json", "out.json"]) == 2
    out, err = capsys.readouterr()
    assert "STLTrace_ELBO" in out and "Ended early, by an error: training with Trace_ELBO failed at step" in out
    assert "error: training with Trace_ELBO failed at step" in err and "sixty" in err
    assert len(json.loads(Path("out.json").read_text())["comparisons"][0]["states"]) == 1


def test_fit_looks_at_its_file_first(capsys):
    given = ["--model", "mine:model", "--args", "mine:arguments", "--no-progress"]
    assert main(["fit", *given, "--save", "no/such/file"]) == 2
    assert "--save: there is no directory 'no/such'" in capsys.readouterr().err


def test_other_inputs(capsys):
    arguments = ["--model", "mine:Model", "--args", "mine:make_args_and_kwargs", *QUICK]
    assert main([*arguments, "--losses", "Trace_ELBO:num_particles=2"]) == 0
    out = capsys.readouterr().out
    assert "Model mine:Model, guide AutoNormal" in out
    assert "Trace_ELBO:num_particles=2" in out and "TraceMeanField_ELBO" not in out


def test_plot(capsys):
    assert main([*mine(), "--losses", "STLTrace_ELBO", "--plot", "out.svg"]) == 0
    assert "<svg" in Path("out.svg").read_text()


def test_help_and_version(capsys):
    for option, expected in (("--help", "examples:"), ("--version", "pyro_rb 0.")):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


BAD = {
    "no module": (mine(guide="nowhere.at_all:guide"), "--guide: no module named 'nowhere'"),
    "no attribute": (mine(model="mine:modle"), "--model: module 'mine' has no 'modle'"),
    "no colon": (
        mine(model="mine.model"),
        "--model: expected package.module:name or path/to/file.py:name, got 'mine.model'",
    ),
    "no file": (mine(model="nowhere/mine.py:model"), "--model: there is no file 'nowhere/mine.py' in "),
    "file without it": (mine(model="./mine.py:modle"), "--model: module 'mine' has no 'modle'"),
    "no arguments": (
        ["--model", "mine:needs_more"],
        "--model mine:needs_more needs 'y': give --args MODULE:make_args, a function that returns (x, y), or define",
    ),
    "broken import": (
        mine(guide="broken:guide"),
        "--guide: importing 'broken' failed: No module named 'no_such_package'",
    ),
    "syntax error": (mine(guide="syntax:f"), "--guide: importing 'syntax' failed: SyntaxError: "),
    "not callable": (mine(model="mine:number"), "--model: expected something callable, got 3"),
    "guide not callable": (mine(guide="mine:number"), "--guide: expected something callable, got 3"),
    "sites": (mine(guide="mine:other_guide"), "model and guide do not match: the model's latent site 'z' is not"),
    "model raises": (mine(model="mine:broken_model"), "NameError: name 'undefined' is not defined (--traceback"),
    "model raises lines": (mine(model="mine:multi_line"), "ValueError: Expected parameter loc"),
    "arguments": (
        mine(args="mine:one_tensor"),
        "--args: mine:one_tensor should return a tuple, or (tuple, dict), got Tensor",
    ),
    "loss": ([*mine(), "--losses", "STL"], "no loss 'STL': "),
    "loss argument": ([*mine(), "--losses", "Trace_ELBO:3,4,5,6,7,8,9,1,2,3,4"], "cannot make the loss"),
    "json": ([*mine(), "--json", "no/such/dir/o.json"], "--json: there is no directory 'no/such/dir'"),
    "json directory": ([*mine(), "--json", "."], "--json: '.' is a directory"),
    "plot": ([*mine(), "--plot", "figure.doc"], "cannot plot to 'figure.doc': the extension is 'doc'"),
    "device": ([*mine(), "--device", "gpu"], "--device gpu: "),
    "seed": ([*mine(), "--seed", "-1"], "--seed: expected 0 to 2**32 - 1, got -1"),
    "burn-in": ([*mine(), "--burn-in", "-1"], "--burn-in: expected 0 or more, got -1"),
    "samples": ([*mine(), "--num-samples", "1"], "--num-samples: expected at least 2, got 1"),
    "steps": ([*mine(), "--train-steps", "-5"], "--train-steps: expected 0 or more, got -5"),
    "rate": ([*mine(), "--learning-rate", "0"], "--learning-rate: expected more than 0, got 0.0"),
    "rel-error": ([*mine(), "--rel-error", "0"], "--rel-error: expected more than 0, got 0.0"),
    "max-seconds": ([*mine(), "--max-seconds", "-1"], "--max-seconds: expected more than 0, got -1.0"),
    "batches": (
        [*mine(args="mine:make_args_and_kwargs"), "--batches"],
        "--batches: mine:make_args_and_kwargs returned (tuple, dict). Expected a tuple of positional arguments",
    ),
    "html": ([*mine(), "--html", "no/o.html"], "--html: there is no directory 'no'"),
    "guide alone": (["--guide", "mine:guide"], "--guide needs --model"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith("python -m pyro_rb: error: " + message)


def test_bad_input_in_a_process():
    done = command(*mine(guide="mine:nothing"))
    assert done.returncode == 2
    assert done.stderr == "python -m pyro_rb: error: --guide: module 'mine' has no 'nothing'\n"


def test_unknown_option(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--modle", "x"])
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_traceback_on_demand(capsys):
    assert main([*mine(model="mine:broken_model"), "--traceback"]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "in broken_model" in err


def test_file_that_cannot_be_written_in_the_end(capsys, monkeypatch):
    monkeypatch.setattr("pyro_rb.diagnostics.cli.options.os.access", lambda *_: True)
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    assert main([*mine(), "--json", "/dev/full"]) == 2
    assert "error: cannot write: " in capsys.readouterr().err


def test_missing_matplotlib():
    Path("matplotlib.py").write_text("raise ImportError('not here')\n")
    done = command(*mine(), "--plot", "out.png")
    assert done.returncode == 2
    assert done.stderr == (
        "python -m pyro_rb: error: plots need matplotlib, which is not installed: "
        'pip install "pyro_rb[plot]"\n'
    )


def test_current_directory_is_put_back():
    before = list(sys.path)
    main(mine(guide="mine:nothing"))
    assert sys.path == before


def test_progress_bar_and_interrupt():
    """Ctrl-C leaves what was measured until then, as a table and in files."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [*mine()[:-1], "--num-samples", "100000", "--json", "out.json", "--html", "out.html"]
    terminal, stderr = os.openpty()  # a bar is for terminals only
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_rb", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
        # A shell that runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(stderr)
    text = ""
    try:
        deadline = time.time() + 60
        while "%|" not in text and time.time() < deadline:
            if select.select([terminal], [], [], 1)[0]:
                text += os.read(terminal, 10000).decode()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        text += os.read(terminal, 100000).decode()
    finally:
        process.kill()
        os.close(terminal)
    assert process.returncode == 130
    assert "Traceback" not in text
    assert text.rstrip().endswith("python -m pyro_rb: interrupted")
    assert "At the parameters as they are, interrupted after" in out and "STLTrace_ELBO" in out
    (comparison,) = json.loads(Path("out.json").read_text())["comparisons"]
    assert comparison["interrupted"] and comparison["states"][0]["stopped"] == "interrupted"
    assert "interrupted after" in Path("out.html").read_text()


def test_interrupt_before_anything_was_measured(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(along_training, "measure", interrupt)
    assert main([*mine(), "--json", "out.json"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and err == "python -m pyro_rb: interrupted\n"
    assert not Path("out.json").exists()


def test_interrupt_keeps_what_was_finished(capsys, monkeypatch):
    """The second of two models was not begun."""
    usual, calls = commands.compare, []

    def compare(**kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return usual(**kwargs)

    monkeypatch.setattr(commands, "compare", compare)
    assert main([*QUICK, "--train-steps", "0", "--json", "out.json"]) == 130
    assert "Eight schools" in capsys.readouterr().out
    assert len(json.loads(Path("out.json").read_text())["comparisons"]) == 1


def test_page(capsys):
    assert main([*mine(), "--html", "out.html"]) == 0
    text = Path("out.html").read_text()
    assert text.startswith("<!DOCTYPE html>") and "Model mine:model, guide mine:guide" in text


@pytest.mark.parametrize("kind", ["parameters", "training", "elbo"])
def test_other_plots(kind, capsys):
    arguments = [*mine(), "--losses", "STLTrace_ELBO", "--train-steps", "2"]
    assert main([*arguments, "--plot", "out.svg", "--plot-kind", kind]) == 0
    assert "<svg" in Path("out.svg").read_text()


def test_relative_error_and_time(capsys):
    arguments = [*mine(), "--losses", "STLTrace_ELBO", "--json", "out.json"]
    assert main([*arguments, "--rel-error", "100"]) == 0
    assert "as exact as asked for after 4 gradients" in capsys.readouterr().out
    assert main([*arguments, "--num-samples", "1000000", "--max-seconds", "0.2"]) == 0
    assert "time over after" in capsys.readouterr().out
    settings = json.loads(Path("out.json").read_text())["comparisons"][0]["settings"]
    assert settings["max_seconds"] == 0.2 and settings["rel_error"] is None


def test_closed_pipe():
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    arguments = [sys.executable, "-m", "pyro_rb", *mine(), "--losses", "STLTrace_ELBO"]
    pipe = subprocess.PIPE
    with subprocess.Popen(arguments, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
