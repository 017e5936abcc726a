# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""``python -m pyro_rb check``, ``noise`` and ``fit``."""

import json
import math
import sys
import textwrap
from pathlib import Path

import pyro
import pytest
import torch

from pyro_rb.__main__ import main
from pyro_rb.diagnostics.fit.fit import fit
from pyro_rb.diagnostics.noise.noise import measure_noise

pytestmark = pytest.mark.slow

USER_MODULE = """
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        loc = pyro.param("loc", torch.tensor(2.0))
        pyro.sample("z", dist.Normal(loc, 0.7))

    def straight_through(x):
        loc = pyro.param("loc", torch.tensor(2.0))
        z = pyro.sample("z0", dist.Normal(loc, 0.7), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(z + (z.round() - z).detach(), log_density=0.0))

    def sometimes_nan(x):
        bad = torch.where(torch.rand(()) < 0.1, torch.tensor(float("nan")), torch.tensor(0.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z * (1 + bad), 1.0, validate_args=False), obs=x)

    def make_args():
        return (torch.tensor(0.7),)
"""
FILES = ["--json", "out.json", "--html", "out.html", "--plot", "out.png"]


@pytest.fixture(autouse=True)
def user_module(tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text(textwrap.dedent(USER_MODULE))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("ours", None)


def call(command, *more, guide="guide", model="model"):
    what = ["--model", f"ours:{model}", "--guide", f"ours:{guide}", "--args", "ours:make_args"]
    return main([command, *what, "--no-progress", *more])


def written():
    assert Path("out.png").read_bytes()[1:4] == b"PNG"
    page = Path("out.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<svg" in page and "Model ours:" in page
    return json.loads(Path("out.json").read_text())


def test_check(capsys):
    assert call("check", "--loss", "STLTrace_ELBO", "--num-samples", "100", *FILES) == 0
    assert capsys.readouterr().out.startswith("no bias seen in 1 parameter value, 100 paired draws")
    found = written()
    assert found["failure"] is None and found["max_abs_z"] == max(found["z_scores"].values()) < found["threshold"]


def test_check_that_fails(capsys):
    reference = ["--reference", "RenyiELBO:alpha=0,num_particles=8"]
    assert call("check", "--loss", "Trace_ELBO", *reference, "--num-samples", "200", *FILES) == 1
    assert "biased in loc: z = " in capsys.readouterr().out
    found = written()
    assert found["failure"].startswith("biased in loc") and found["z_scores"]["loc"] > found["threshold"]


def test_check_without_power(capsys):
    assert call("check", "--loss", "STLTrace_ELBO", "--num-samples", "50", "--detect", "1e-4", *FILES) == 1
    assert "too little power in loc" in capsys.readouterr().out
    assert written()["z_scores"]["loc"] < written()["threshold"]


def test_noise(capsys):
    assert call("noise", "--num-samples", "200", "--rel-error", "0.1", "0.01", *FILES) == 0
    import ours

    pyro.clear_param_store()
    with torch.device("cpu"):  # as the command by default
        noise = measure_noise("Trace_ELBO", ours.model, ours.guide, args=ours.make_args(), num_samples=200)
    assert f"num_particles for a relative error of 0.01: {noise.required_particles(0.01)}" in capsys.readouterr().out
    found = written()
    assert found["required_particles"] == {"0.1": noise.required_particles(0.1), "0.01": noise.required_particles(0.01)}
    assert found["variance"] == pytest.approx(noise.variance)


def test_fit(capsys):
    arguments = ["--loss", "STLTrace_ELBO", "--learning-rate", "0.05", "--tolerance", "0.05", "--save", "store.pt"]
    assert call("fit", *arguments, *FILES) == 0
    assert "STLTrace_ELBO: converged after " in capsys.readouterr().out
    found = written()
    assert found["stopped"] == "converged" and len(found["losses"]) == found["check"]["step"] and not found["bad_steps"]
    pyro.clear_param_store()
    pyro.get_param_store().load("store.pt", map_location="cpu")
    assert pyro.param("loc").item() == pytest.approx(0.35, abs=0.1)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_fit_that_skips(capsys):
    assert call("fit", "--on-bad", "skip", "--max-steps", "100", *FILES, model="sometimes_nan") == 0
    out = capsys.readouterr().out
    found = written()
    assert "not converged in 100 steps" in out and f"{len(found['bad_steps'])} of 100 steps skipped" in out
    assert 2 <= len(found["bad_steps"]) <= 25 and "at model site 'x'" in out
    assert found["losses"][found["bad_steps"][0] - 1] is None


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_fit_that_raises(capsys):
    assert call("fit", "--max-steps", "100", model="sometimes_nan") == 2
    assert "First bad number: at model site 'x', argument 'loc' of Normal is nan" in capsys.readouterr().err


def test_interrupt_leaves_what_was_trained(capsys, monkeypatch):
    from pyro.infer import SVI

    usual, calls = SVI.step, []

    def step(self, *args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return usual(self, *args)

    monkeypatch.setattr(SVI, "step", step)
    assert call("fit", *FILES) == 130
    out, err = capsys.readouterr()
    assert "Trace_ELBO: interrupted after 7 steps" in out and err.endswith("python -m pyro_rb: interrupted\n")
    assert len(written()["losses"]) == 7


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["fit", "--max-steps", "0"], "--max-steps: expected at least 1, got 0"),
        (["check", "--loss", "nonsense"], "no loss 'nonsense'"),
        (["check", "--reference", "nonsense"], "no loss 'nonsense'"),
        (["noise", "--num-samples", "3"], "expected num_samples >= 40"),
        (["noise", "--plot", "out.abc"], "cannot plot to 'out.abc'"),
        (["noise", "--seed", "-1"], "--seed: expected 0"),
        (["fit", "--json", "missing/out.json"], "there is no directory 'missing'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert call(*arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_model_is_required(capsys):
    assert main(["check"]) == 2
    assert "check needs --model" in capsys.readouterr().err


def test_losses_without_a_value_are_not_drawn():
    """A figure of a run in which every step was bad."""
    from pyro_rb.diagnostics.fit.fit import Fit
    from pyro_rb.diagnostics.show.plot_tools import draw_fit

    assert draw_fit(Fit("Trace_ELBO", [math.nan] * 3, bad_steps=[1, 2, 3])).axes


def test_fit_is_that_of_svi():
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(1.0)), 1.0))

    values = []
    for train in ("fit", "svi"):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        optim = pyro.optim.Adam({"lr": 0.1})
        if train == "fit":
            fit("Trace_ELBO", model, guide, optim, max_steps=20)
        else:
            svi = SVI(model, guide, optim, Trace_ELBO())
            for _ in range(20):
                svi.step()
        values.append(pyro.param("loc").item())
    assert values[0] == values[1]


def test_minibatches(capsys):
    Path("ours.py").write_text(Path("ours.py").read_text() + textwrap.dedent("""
        def batch():
            return (torch.randn(()),)
    """))
    sys.modules.pop("ours", None)
    # A fixed datum has none of its noise.
    assert call("noise", "--batches", "--args", "ours:batch", "--json", "moving.json") == 0
    assert call("noise", "--args", "ours:batch", "--json", "fixed.json") == 0
    moving, fixed = (json.loads(Path(f"{name}.json").read_text())["variance"] for name in ("moving", "fixed"))
    assert moving - fixed == pytest.approx(1.0, rel=0.3)
    capsys.readouterr()
    what = ["--model", "ours:model", "--guide", "ours:guide", "--args", "ours:batch", "--batches"]
    assert main([*what, "--num-samples", "4", "--burn-in", "1", "--train-steps", "2", "--no-progress"]) == 0
    assert "After 2 training steps" in capsys.readouterr().out
    sys.modules["ours"].number = (3,)
    assert main([*what[:4], "--args", "ours:number", "--batches", "--no-progress"]) == 2
    assert "--batches: --args must name a function" in capsys.readouterr().err
