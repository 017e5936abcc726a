# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What the report says of each kind of site."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.testing import fakes

from pyro_rb import RaoBlackwell_ELBO
from tests.infer.rao_blackwell.models import fixed
from tests.support.cases import positive, real


def many_kinds():
    """A guide with a site of each kind, and a model that the values go into."""

    def model():
        pyro.sample("delta", dist.Normal(0.0, 1.0))
        z = pyro.sample("normal", dist.Normal(0.0, 1.0))
        s = pyro.sample("lognormal", dist.LogNormal(0.0, 1.0))
        g = pyro.sample("gamma", dist.Gamma(2.0, 2.0))
        bits = pyro.sample("bits", dist.Bernoulli(0.5 * torch.ones(6)).to_event(1))
        w = pyro.sample("weights", dist.Normal(torch.zeros(20), 1.0).to_event(1))
        b = pyro.sample("bernoulli", dist.Bernoulli(0.5))
        y = pyro.sample("categorical", dist.Categorical(torch.ones(6)))
        pyro.sample("marked", dist.Categorical(torch.ones(4)))
        pyro.sample("alone", dist.Categorical(torch.ones(4)))
        f = z + bits.sum(-1) + b + y + g
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Normal(f + fixed(3, 20).float() @ w, s), obs=torch.zeros(3))

    def guide():
        pyro.sample("delta", dist.Delta(real("point", 0.3)))
        pyro.sample("normal", dist.Normal(real("loc", 0.1), 1.0))
        pyro.sample("lognormal", dist.LogNormal(real("log", 0.1), 0.5))
        pyro.sample("gamma", fakes.NonreparameterizedGamma(positive("a", 2.0), 2.0))
        bits = pyro.param("bit_logits", torch.zeros(6))
        pyro.sample("bits", dist.Bernoulli(logits=bits).to_event(1))
        loc, scale = pyro.param("w_loc", torch.zeros(20)), positive("w_scale", 0.5)
        pyro.sample("weights", dist.Normal(loc, scale).to_event(1))
        pyro.sample("bernoulli", dist.Bernoulli(logits=real("on", 0.1)))
        pyro.sample("categorical", dist.Categorical(logits=pyro.param("logits", torch.zeros(6))))
        marked = dist.Categorical(logits=pyro.param("marked_logits", torch.zeros(4)))
        pyro.sample("marked", marked, infer={"enumerate": "parallel"})
        alone = dist.Categorical(logits=pyro.param("alone_logits", torch.zeros(4)))
        pyro.sample("alone", alone, infer={"rao_blackwell": False})

    return model, guide


def rows_of(model, guide, num_steps=1, **options):
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1, **options)
    for _ in range(num_steps):
        elbo.loss_and_grads(model, guide)
    rows = {row.site: row for row in elbo.report()}
    assert len(rows) == len(elbo.report())
    return rows


KINDS = {
    "delta": ("as ", "Delta"),
    "normal": ("path gradient, c = ", "."),
    "lognormal": ("path gradient, c = ", "."),
    "gamma": (".", "2 draws"),
    "bits": (".", "2 antithetic draws: 64 joint values; in a plate, without to_event"),
    "weights": ("projected", "3 rows, fan-in 20"),
    "bernoulli": ("exact", "2 of 2 values"),
    "categorical": ("exact", "6 of 6 values"),
    "marked": ("as ", "'enumerate': 'parallel'"),
    "alone": ("as ", "rao_blackwell"),
}


@pytest.mark.parametrize("site", KINDS)
def test_kinds_of_sites(site):
    rows = rows_of(*many_kinds())
    assert list(rows) == list(KINDS)
    treatment, reason = KINDS[site]
    assert re.search(treatment, rows[site].treatment), rows[site]
    assert re.search(reason, rows[site].reason), rows[site]
    if "draws" in reason:
        assert "top-k" not in rows[site].treatment


def test_numbers_of_draws():
    model, guide = many_kinds()
    by_site = {"bits": {"draws": 5}, "categorical": {"topk": {"k": 2, "num_samples": 2}}}
    guide = poutine.infer_config(guide, lambda site: by_site.get(site["name"], {}))
    rows = rows_of(model, guide, draws=4)
    assert "5 draws" in rows["bits"].reason and "4 draws" in rows["gamma"].reason
    assert "4 of 6 values" in rows["categorical"].reason and "k = 2" in rows["categorical"].treatment


def test_scale_is_the_one_that_was_used():
    rows = rows_of(*many_kinds(), control_variate_scale=0.25)
    assert rows["normal"].treatment == "path gradient, c = 0.25"


def test_no_projection():
    rows = rows_of(*many_kinds(), pre_activations=None)
    assert rows["weights"].treatment.startswith("path gradient")


def test_remedy_for_a_score_function_without_a_baseline():
    row = rows_of(*many_kinds(), draws=1)["gamma"]
    assert "num_particles" in row.treatment, row
    row = rows_of(*many_kinds(), draws=1, num_particles=3)["gamma"]
    assert "particles" in row.treatment + row.reason and "num_particles" not in row.treatment, row


@pytest.mark.filterwarnings("ignore:at .* possibly invalid dependency:RuntimeWarning")
@pytest.mark.parametrize("vectorize", [False, True])
def test_cost_outside_of_the_plate(vectorize):
    """Such a site has a single draw, and a baseline from particles only."""

    def model():
        with pyro.plate("data", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(b.sum(-1, keepdim=True), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("data", 3):
            pyro.sample("b", dist.Bernoulli(logits=real("logits", 0.3, -0.5, 1.0)))

    particles = {"num_particles": 3, "vectorize_particles": True} if vectorize else {}
    row = rows_of(model, guide, num_steps=2, **particles)["b"]
    assert "x" in re.findall(r"\w+", row.reason), row
    assert vectorize or "num_particles" in row.treatment, row


def test_supplied_value():
    model, guide = many_kinds()
    trace = poutine.trace(lambda: pyro.sample("normal", dist.Normal(0.0, 1.0))).get_trace()
    assert "supplied" in rows_of(model, poutine.replay(guide, trace=trace))["normal"].reason


def test_before_the_first_step():
    with pytest.raises(RuntimeError, match="there was none"):
        RaoBlackwell_ELBO().report()


def test_prints_as_a_table():
    elbo = RaoBlackwell_ELBO(max_plate_nesting=1)
    elbo.loss_and_grads(*many_kinds())
    lines = str(elbo.report()).splitlines()
    assert lines[0].split() == ["site", "treatment", "reason"] and len(lines) == 2 + len(KINDS)


def test_report_is_that_of_the_latest_step():
    def make(kind):
        def model():
            pyro.sample(kind, dist.Normal(0.0, 1.0))

        def guide():
            scale = pyro.param(f"{kind}_scale", torch.tensor(0.5), constraint=constraints.positive)
            pyro.sample(kind, dist.Normal(0.0, scale))

        return model, guide

    elbo = RaoBlackwell_ELBO()
    for kind in ("first", "second"):
        elbo.loss_and_grads(*make(kind))
        assert [row.site for row in elbo.report()] == [kind]
