# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the scripts in ``examples`` share, and their models."""

import argparse
import csv
import json
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal

from models.bayesian_regression import model as regression
from models.mixture import evaluate as mixture_elbo
from models.mixture import guide as mixture_guide
from models.mixture import model as mixture
from models.sparse_gamma_def import SparseGammaDEF
from models.ss_vae import SemiSupervisedVae, make_batches
from pyro_rb import RaoBlackwellTopK_ELBO
from pyro_rb.diagnostics.run.losses import make_loss
from support.command_line import find_device, make_parser, run
from support.losses import add_loss_option, mark_for, train_each
from support.results import report
from support.training import Run, end_of, take_turns, train_tuned


def test_device_that_is_not_there():
    assert find_device("cpu") == "cpu"
    with pytest.raises(SystemExit, match="--device abacus: .*Expected a device of this machine"):
        find_device("abacus")


@pytest.mark.parametrize(
    "name, message",
    [
        ("Trace_ELB", "no loss 'Trace_ELB': did you mean Trace_ELBO"),
        ("Trace_ELBO:particles=2", "cannot make the loss .*unexpected keyword argument 'particles'"),
        ("Trace_MMD:kernel=1", "--loss Trace_MMD: it is no ELBO.* Expected another loss"),
    ],
)
def test_loss_that_is_not_there(name, message):
    parser = make_parser("A script.")
    add_loss_option(parser, "Trace_ELBO")
    assert parser.parse_args([]).loss == ["Trace_ELBO"]
    with pytest.raises(SystemExit, match=message) as caught:
        parser.parse_args(["--loss", "STLTrace_ELBO", name])
    assert "\n" not in str(caught.value)


def train(name, values):
    """A step of the mixture."""
    pyro.clear_param_store()
    loss = make_loss(name)
    svi = pyro.infer.SVI(mixture, mark_for(loss, mixture_guide), pyro.optim.Adam({}), loss)
    svi.step(values)
    return name


@pytest.mark.parametrize(
    "name, message",
    [
        ("TraceMeanField_ELBO", "discrete site: take RaoBlackwellTopK_ELBO"),
        ("TraceTailAdaptive_ELBO", "Give it several.* as TraceTailAdaptive_ELBO:num_particles=4,vectorize_particles"),
        ("RenyiELBO:alpha=0", "no gradient to the parameters of the guide's discrete sites"),
        ("DReG_ELBO", "'component' from Categorical .*use Trace_ELBO"),
    ],
)
def test_loss_that_does_not_apply(name, message, capsys):
    values = torch.randn(5)
    message = f"^--loss {name} does not apply here: .*{message}"
    names = ["Trace_ELBO", name, "RaoBlackwellTopK_ELBO"]
    assert train_each(names, train, values) == ["Trace_ELBO", "RaoBlackwellTopK_ELBO"]
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    with pytest.raises(SystemExit, match=message) as caught:
        train_each([name], train, values)
    assert str(caught.value) == line


def test_errors_that_are_no_fault_of_the_loss_pass():
    def fail(name):
        raise NotImplementedError("an operation that the device has not")

    with pytest.raises(NotImplementedError, match="the device has not"):
        train_each(["Trace_ELBO"], fail)


def test_marks():
    """Only Pyro's enumeration sees them."""
    for loss in (Trace_ELBO(), RaoBlackwellTopK_ELBO(), RenyiELBO(alpha=0.5)):
        assert mark_for(loss, mixture_guide) is mixture_guide
    marked = mark_for(TraceEnum_ELBO(), mixture_guide)
    trace = pyro.poutine.trace(marked).get_trace(torch.randn(3))
    assert trace.nodes["component"]["infer"]["enumerate"] == "parallel"


def test_interrupt(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script"])

    def main(args):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run(main, argparse.ArgumentParser())
    assert caught.value.code == 130


def make_toy(loc):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(loc)), 0.5))

    return lambda: (model, guide)


def test_runs_do_not_disturb_each_other():
    def measure(run):
        return {"loc": pyro.param("loc").item(), "noise": torch.rand(()).item()}

    def make_batches():
        return [(x,) for x in torch.randn(6).split(2)]

    def train(*locs):
        runs = {loc: Run(make_toy(loc), Trace_ELBO(), {"lr": 0.1}, seed=1) for loc in locs}
        history = take_turns(runs, 3, make_batches, measure)
        return {loc: [note["loc"] for note in notes] for loc, notes in history.items()}, history

    pyro.clear_param_store()
    together, history = train(0.0, 2.0)
    alone = {**train(0.0)[0], **train(2.0)[0]}
    assert together == alone and len(set(together[0.0])) == 3
    assert len(pyro.get_param_store()) == 0
    end = end_of([history, history], 2.0)
    assert end["loc"].tolist() == [together[2.0][-1]] * 2
    assert history[2.0][0]["seconds"] == history[2.0][0]["epoch"] <= history[2.0][1]["seconds"]


def test_tuned_training():
    """All rates at the first seed, the best at the others; runs take turns."""
    log = []

    class Descent:
        def __init__(self, name, rate, seed):
            self.key, self.result = (name, rate, seed), 1.0

        def go_on(self):
            log.append(self.key)
            name, rate, _ = self.key
            self.result -= rate if name == "bold" or rate < 0.5 else -rate

    found = train_tuned(Descent, ["bold", "shy"], [0.1, 0.9], [3, 4], num_turns=2)
    assert {name: rate for name, (rate, _) in found.items()} == {"bold": 0.9, "shy": 0.1}
    assert [run.key for run in found["shy"][1]] == [("shy", 0.1, 3), ("shy", 0.1, 4)]
    first = [("bold", 0.1, 3), ("bold", 0.9, 3), ("shy", 0.1, 3), ("shy", 0.9, 3)]
    assert log == 2 * first + 2 * [("bold", 0.9, 4), ("shy", 0.1, 4)]


def test_several_tables(tmp_path, capsys):
    rows = {"_one": [{"a": "1"}], "_two": [{"b": "2"}]}
    report(argparse.Namespace(out=str(tmp_path / "x"), smoke_test=False), rows)
    assert [(tmp_path / f"x{name}.csv").read_text() for name in rows] == ["a\n1\n", "b\n2\n"]
    assert capsys.readouterr().out.split() == ["a", "---", "1", "b", "---", "2"]


def test_results(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"loss": "A", "ELBO": "-1.50"}, {"loss": "B", "ELBO": "-1.25"}]
    args = argparse.Namespace(out="results/table", smoke_test=False, seed=3, data_dir="somewhere")
    report(args, rows, truth=7, curves=[0.125] * 100)
    printed = capsys.readouterr().out
    assert "A       -1.50" in printed and "truth: 7" in printed and "0.125" not in printed
    found = json.loads((tmp_path / "results" / "table.json").read_text())
    assert found["rows"] == rows and found["truth"] == 7
    assert found["settings"]["seed"] == 3 and "data_dir" not in found["settings"]
    lines = (tmp_path / "results" / "table.csv").read_text().splitlines()
    assert list(csv.DictReader(lines)) == rows
    args.out = None
    report(args, rows)
    args.smoke_test = True
    report(args, rows)
    assert len(list(tmp_path.rglob("*.*"))) == 2  # a smoke test leaves nothing


def gradient_of_classifier(aux_weight, *batch):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    vae = SemiSupervisedVae(num_pixels=6, style_size=2, width=4, aux_weight=aux_weight)
    loss = RaoBlackwellTopK_ELBO(k=10, max_plate_nesting=1)
    loss.loss_and_grads(vae.model, vae.guide, *batch)
    grad = vae.classifier[-1].bias.grad
    return torch.zeros(10) if grad is None else grad


def test_semi_supervised_batches():
    """Without labels the ELBO teaches the classifier; with labels only the auxiliary loss does."""
    images, labels = torch.bernoulli(torch.full((8, 6), 0.5)), torch.arange(8)
    assert gradient_of_classifier(0.0, images).abs().max() > 1e-3
    assert not gradient_of_classifier(0.0, images, labels).any()
    one, two = (gradient_of_classifier(weight, images, labels) for weight in (1.0, 2.0))
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(two, 2 * one)


def test_semi_supervised_epoch():
    images, labels = torch.arange(10.0).unsqueeze(-1), torch.arange(10)
    batches = make_batches(images, labels, batch_size=2, num_labelled=4)
    assert [len(batch) for batch in batches].count(2) == 2 and len(batches) == 5
    assert sorted(torch.cat([batch[0] for batch in batches]).flatten().tolist()) == list(range(10))
    for batch in batches:
        assert all((batch[0] < 4) == (len(batch) == 2))
        if len(batch) == 2:
            assert (batch[0].flatten() == batch[1]).all()


@pytest.mark.parametrize("name", ["mixture", "regression", "gamma"])
def test_vectorized_particles(name):
    """Same ELBO as in a loop, up to the noise of both."""
    if name == "mixture":
        values = torch.tensor([-4.0, -1.0, 1.5, 5.0]).repeat(5)
        pair = mixture, mixture_guide, values
    elif name == "regression":
        features = torch.randn(30, 4)
        data = features, features.sum(-1)
        pair = regression, AutoMultivariateNormal(regression), *data
    else:
        family = SparseGammaDEF([2, 3], 4)
        pair = family.model, family.guide, torch.full((6, 4), 2.0)
    Trace_ELBO().loss(*pair)
    draws = torch.tensor([Trace_ELBO().loss(*pair) for _ in range(200)])
    vectorized = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1).loss(*pair)
    error = (draws.var() * (1 / 200 + 1 / 2000)).sqrt()
    assert abs(draws.mean() - vectorized) < 5 * error
    if name == "mixture":  # the exact sum, of other draws of the rest
        assert abs(draws.mean() / 20 + mixture_elbo(values, 2000)) < 5 * error / 20
