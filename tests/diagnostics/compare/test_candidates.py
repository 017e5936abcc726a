# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import functools
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal

from pyro_rb.diagnostics import check_unbiased, choose_losses, compare
from pyro_rb.diagnostics.compare import chooser as choose_module
from pyro_rb.diagnostics.compare.candidates import PARTICLES
from pyro_rb.diagnostics.run.losses import ENUMERATED
from tests.infer.r2g2.models import net
from tests.support.models import conj, discrete_first, mix

pytestmark = pytest.mark.slow

# Without training and compilation, which take their time.
compare = functools.partial(compare, train_steps=0, steps=0)

TOP_K = "RaoBlackwellTopK_ELBO:budget=4"
QUICK = dict(num_samples=40, num_burn_in=0, progress=False)


def usual(losses):
    """Without those that are Trace_ELBO or STLTrace_ELBO at another speed, and the one for any model."""
    return [n for n in losses if not re.search("vectorize|Jit|RaoBlackwell_ELBO", n)]


def positions(num_values, num_items=3):
    """x_i ~ Normal(locs[z_i], .5) with a discrete z_i."""
    locs = torch.linspace(-2.0, 2.0, num_values)

    def model():
        with pyro.plate("data", num_items):
            z = pyro.sample("z", dist.Categorical(torch.ones(num_values) / num_values))
            pyro.sample("x", dist.Normal(locs[z], 0.5), obs=torch.linspace(-1.0, 1.0, num_items))

    def guide():
        logits = pyro.param("logits", torch.zeros(num_items, num_values))
        with pyro.plate("data", num_items):
            pyro.sample("z", dist.Categorical(logits=logits))

    return model, guide


def test_reparameterized_guide():
    case = conj()
    choice = choose_losses(case.model, case.guide, case.args)
    assert choice.reference == "Trace_ELBO"
    assert usual(choice.losses) == ["TraceMeanField_ELBO", "STLTrace_ELBO", "STLTrace_ELBO:1.0"]
    assert choice.left_out["TraceGraph_ELBO"] == "all sites of the guide are reparameterized"
    assert choice.left_out[ENUMERATED] == choice.left_out[TOP_K] == "the guide has no discrete site"


def test_jacobian_of_a_constrained_latent():
    case = mix()
    choice = choose_losses(case.model, AutoNormal(case.model), case.args)
    assert "TraceMeanField_ELBO" not in choice.losses
    assert choice.left_out["TraceMeanField_ELBO"] == (
        "biased on this guide: Pyro's KL divergence of a Delta leaves out its log_density, "
        "here the Jacobian of 'tau', 'w'"
    )
    # A hand-written guide has none, and the closed form is right.
    assert "TraceMeanField_ELBO" in choose_losses(case.model, case.guide, case.args).losses


def test_mean_field_restriction_that_cannot_be_verified():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def guide():
        b = pyro.sample("b", dist.Normal(pyro.param("b_loc", torch.tensor(0.0)), 1.0))
        pyro.sample("a", dist.Normal(pyro.param("a_loc", torch.tensor(0.0)) + b, 1.0))

    left_out = choose_losses(model, guide).left_out
    assert left_out["TraceMeanField_ELBO"].startswith("Failed to verify mean field restriction")


def test_no_score_to_remove():
    case = conj()
    choice = choose_losses(case.model, AutoDelta(case.model), case.args)
    assert choice.left_out["STLTrace_ELBO"] == "the guide has no site whose score could be removed"
    assert "STLTrace_ELBO:1.0" not in choice.losses


def test_discrete_sites():
    choice = choose_losses(*positions(20))
    assert usual(choice.losses) == ["TraceGraph_ELBO", ENUMERATED, TOP_K]
    assert "STLTrace_ELBO" in choice.left_out
    assert choice.left_out["TraceMeanField_ELBO"] == "'z' is not reparameterized"


def test_few_values_are_all_summed():
    choice = choose_losses(*positions(3))
    assert usual(choice.losses) == ["TraceGraph_ELBO", ENUMERATED]
    assert choice.left_out[TOP_K] == "there are too few values: all are summed"


def test_discrete_and_continuous_sites():
    case = discrete_first()
    losses = choose_losses(case.model, case.guide).losses
    assert usual(losses) == ["TraceGraph_ELBO", ENUMERATED, "STLTrace_ELBO", "STLTrace_ELBO:1.0"]


def test_annotated_guide_needs_no_wrapper():
    model, guide = positions(20)
    choice = choose_losses(model, config_enumerate(guide))
    assert "TraceEnum_ELBO" in choice.losses and ENUMERATED not in choice.losses
    assert choice.left_out[TOP_K] == "it treats no site; 'z': infer={'enumerate': 'parallel'}"


def test_costs_outside_of_a_plate():
    """What neither enumeration nor top-k can treat is said by name."""

    def model():
        with pyro.plate("plate", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", 3):
            pyro.sample("b", dist.Bernoulli(logits=pyro.param("q", torch.zeros(3))))

    choice = choose_losses(model, guide)
    reason = "'b': used outside of its plates, summed up or read as a number for 'x'"
    assert choice.left_out[TOP_K] == f"it treats no site; {reason}"


def test_too_many_joint_values(monkeypatch):
    """Four sites of 12 values that one likelihood joins: 20736 evaluations."""

    def model():
        total = sum(pyro.sample(f"z{i}", dist.Categorical(torch.ones(12) / 12)) for i in range(4))
        pyro.sample("x", dist.Normal(total.float(), 1.0), obs=torch.tensor(3.0))

    def guide():
        for i in range(4):
            pyro.sample(f"z{i}", dist.Categorical(logits=pyro.param(f"l{i}", torch.zeros(12))))

    assert ENUMERATED in choose_losses(model, guide).losses
    monkeypatch.setattr(choose_module, "MAX_ELEMENTS", 10000)
    choice = choose_losses(model, guide)
    assert usual(choice.losses) == ["TraceGraph_ELBO", TOP_K]
    assert choice.left_out[ENUMERATED].startswith("too many joint values, or not")
    assert "a tensor of 20736 elements is needed, more than 10000" in choice.left_out[ENUMERATED]


@pytest.mark.parametrize("num_steps", [3, 12])
def test_a_chain_is_summed_one_site_after_another(num_steps):
    """5 ** 12 joint values, of which only pairs meet."""

    def model(y):
        trans = pyro.param("trans", torch.full((5, 5), 0.2), constraint=dist.constraints.simplex)
        z = torch.tensor(0)
        with pyro.plate("sequences", len(y)):
            for t in range(num_steps):
                z = pyro.sample(f"z_{t}", dist.Categorical(trans[z]))
                pyro.sample(f"y_{t}", dist.Normal(z.float(), 0.8), obs=y[:, t])

    def guide(y):
        logits = pyro.param("logits", torch.zeros(num_steps, len(y), 5))
        with pyro.plate("sequences", len(y)):
            for t in range(num_steps):
                pyro.sample(f"z_{t}", dist.Categorical(logits=logits[t]))

    assert ENUMERATED in choose_losses(model, guide, (torch.randn(6, num_steps),)).losses


def test_many_sites_that_one_likelihood_joins():
    """2 ** 40 joint values: they must not be tried."""

    def model():
        total = sum(pyro.sample(f"z{i}", dist.Bernoulli(0.5)) for i in range(40))
        pyro.sample("x", dist.Normal(total, 1.0), obs=torch.tensor(3.0))

    def guide():
        for i in range(40):
            pyro.sample(f"z{i}", dist.Bernoulli(logits=pyro.param(f"l{i}", torch.zeros(()))))

    choice = choose_losses(model, guide)
    assert ENUMERATED not in choice.losses and "elements is needed" in choice.left_out[ENUMERATED]


def test_unbounded_counts_are_not_enumerated():
    def model():
        k = pyro.sample("k", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(4.0))

    def guide():
        pyro.sample("k", dist.Poisson(pyro.param("rate", torch.tensor(2.0))))

    choice = choose_losses(model, guide)
    assert usual(choice.losses) == ["TraceGraph_ELBO", TOP_K]
    assert choice.left_out[ENUMERATED] == "'k' cannot be enumerated"


def test_dependence_through_control_flow():
    """TraceGraph_ELBO does not see it: its gradient would be biased without a warning."""

    def model(y):
        count = 0
        while pyro.sample(f"go{count}", dist.Bernoulli(0.5)) > 0:
            count += 1
        pyro.sample("y", dist.Normal(float(count), 1.0), obs=y)

    def guide(y):
        prob, count = pyro.param("prob", torch.tensor(0.5)), 0
        while pyro.sample(f"go{count}", dist.Bernoulli(prob)) > 0:
            count += 1

    args = (torch.tensor(1.5),)
    choice = choose_losses(model, guide, args)
    assert "TraceGraph_ELBO" not in choice.losses
    assert "nothing that depends on 'go0'" in choice.left_out["TraceGraph_ELBO"]
    # What is claimed of it, by exact enumeration of the first 15 counts: it is far from the gradient.
    prob = torch.tensor(0.5, requires_grad=True)
    counts = torch.arange(15.0)
    log_q = counts * prob.log() + (1 - prob).log()
    log_p = (counts + 1) * math.log(0.5) + dist.Normal(counts, 1.0).log_prob(args[0])
    (exact,) = torch.autograd.grad(-(log_q.exp() * (log_p - log_q)).sum(), prob)
    with pytest.raises(AssertionError, match="biased in prob"):
        check_unbiased("TraceGraph_ELBO", model, guide, {"prob": exact}, args=args, projections=0, num_samples=200)
    check_unbiased("Trace_ELBO", model, guide, {"prob": exact}, args=args, projections=0)


def test_dependence_through_tensors():
    choice = choose_losses(*positions(3))
    assert "TraceGraph_ELBO" in choice.losses


def test_no_latent_site():
    def model():
        pyro.sample("x", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=torch.tensor(0.3))

    choice = choose_losses(model, lambda: None)
    assert usual(choice.losses) == [] and set(choice.left_out.values()) == {"the guide has no latent site"}
    assert compare(model, lambda: None, **QUICK).notes == []


def test_model_that_enumerates():
    """Only losses that sum out the model's site have the right objective."""

    @config_enumerate
    def model():
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(loc + z, 0.5), obs=torch.tensor([0.0, 1.0, 0.3]))

    guide = AutoNormal(pyro.poutine.block(model, hide=["z"]))
    choice = choose_losses(model, guide)
    assert choice.reference == "TraceEnum_ELBO" and choice.losses == ["RaoBlackwell_ELBO"]
    assert choice.left_out["STLTrace_ELBO"] == "it does not sum out the model's 'z'"
    result = compare(model, guide, **QUICK)
    assert [row.name for row in result.states[0].losses] == ["TraceEnum_ELBO", "RaoBlackwell_ELBO"]
    assert not [row for state in result.states for row in state.losses if row.error or row.biased]


def test_importance_weighted_reference():
    case = conj(width=1.0)
    choice = choose_losses(case.model, case.guide, case.args, reference="RenyiELBO:alpha=0,num_particles=5")
    assert usual(choice.losses) == [
        "DReG_ELBO:num_particles=5", "DReG_ELBO:num_particles=5,control_variate_scale=adaptive"
    ]
    assert choice.left_out["STLTrace_ELBO"] == "the ELBO, another objective"


def test_reference_with_another_objective():
    case = conj()
    choice = choose_losses(case.model, case.guide, case.args, reference="RenyiELBO:alpha=0.5")
    assert usual(choice.losses) == []
    assert choice.left_out["STLTrace_ELBO"] == "another objective than RenyiELBO:alpha=0.5"


def test_reference_is_not_listed_twice():
    case = conj()
    choice = choose_losses(case.model, case.guide, case.args, reference="STLTrace_ELBO")
    assert "STLTrace_ELBO" not in choice.losses and "STLTrace_ELBO" not in choice.left_out
    assert "STLTrace_ELBO:1.0" in choice.losses


def test_candidate_that_fails_is_left_out():
    """TraceGraph_ELBO has no differentiable_loss, which plain modules need."""

    class Guide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(3, 20))

        def forward(self):
            with pyro.plate("data", 3):
                pyro.sample("z", dist.Categorical(logits=self.logits))

    choice = choose_losses(positions(20)[0], Guide())
    assert usual(choice.losses) == [ENUMERATED, TOP_K]
    assert "TraceGraph_ELBO has no differentiable_loss" in choice.left_out["TraceGraph_ELBO"]


def regression():
    """For each row a product with the weights, which vectorized particles turn into one for each particle and row."""
    x, y = torch.randn(7, 2), torch.randn(7)

    def model():
        weights = pyro.sample("weights", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 7):
            pyro.sample("y", dist.Normal((x * weights.unsqueeze(-2)).sum(-1), 1.0), obs=y)

    return model


def test_model_that_is_another_with_vectorised_particles():
    model = regression()
    choice = choose_losses(model, AutoNormal(model))
    assert not any("num_particles" in name for name in choice.losses)
    for name in (f"Trace_ELBO:{PARTICLES}", f"STLTrace_ELBO:{PARTICLES}"):
        assert "another with vectorized particles: 'y' has more dimensions" in choice.left_out[name]
    named = compare(model, AutoNormal(model), f"Trace_ELBO:{PARTICLES}", train_steps=0, num_samples=60, progress=False)
    (note,) = named.notes
    assert named.states[0].losses[1].biased and "Does it?" in note and "each row counts 10 times" in note


def test_particles_of_a_large_model(monkeypatch):
    monkeypatch.setattr(choose_module, "MAX_ELEMENTS", 50)

    def model():
        with pyro.plate("six", 6):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    choice = choose_losses(model, AutoNormal(model))
    assert not any("num_particles" in name for name in choice.losses)
    assert "its particles together would draw 60 numbers" in choice.left_out[f"Trace_ELBO:{PARTICLES}"]


def test_world_is_left_as_found():
    model, guide = positions(20)
    state = torch.get_rng_state()
    choose_losses(model, guide)
    assert not pyro.get_param_store()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.filterwarnings("error")
def test_warnings_of_the_trials_are_not_shown():
    model, guide = positions(20)
    choose_losses(model, guide, reference="Trace_ELBO")
    assert isinstance(choose_module.make_loss(ENUMERATED), TraceEnum_ELBO)


def test_projected_sites(monkeypatch):
    """Losses that pyro_rb has are taken by their report, whatever they are."""
    from pyro_rb.infer import STLTrace_ELBO

    class R2G2_ELBO(STLTrace_ELBO):
        treatment = "projected (linear)"

        def __init__(self, pre_activations="shared"):
            super().__init__()

        def report(self):
            rows = super().report()
            return type(rows)(row._replace(treatment=self.treatment) for row in rows)

    monkeypatch.setattr("pyro_rb.infer.R2G2_ELBO", R2G2_ELBO, raising=False)
    case = conj()
    choice = choose_losses(case.model, case.guide, case.args)
    assert "R2G2_ELBO" in choice.losses
    R2G2_ELBO.treatment = "plain"
    left_out = choose_losses(case.model, case.guide, case.args).left_out
    assert left_out["R2G2_ELBO"] == "it projects no site; 'z': reparameterized draw"


def test_local_mode_is_named_where_it_could_be_used():
    """Whether rows are independent, only the user knows; so it is measured if asked for, and not else."""
    case = net()
    choice = choose_losses(case.model, case.guide, case.args)
    assert "R2G2_ELBO" in choice.losses and "R2G2_ELBO:local" not in choice.losses
    assert choice.left_out["R2G2_ELBO:local"] == "right only if no row has an effect on another; then name it in losses"
    result = compare(case.model, case.guide, ["R2G2_ELBO:local"], case.args, **QUICK)
    assert [row.name for row in result.states[0].losses] == ["Trace_ELBO", "R2G2_ELBO:local"]
    # Without a linear map there is no such mode, and no word about it.
    case = conj()
    choice = choose_losses(case.model, case.guide, case.args)
    assert "R2G2_ELBO:local" not in {*choice.losses, *choice.left_out}


def test_bounds_of_a_subsample():
    """RenyiELBO raises the weights to a power where a plate around everything subsamples; DReG_ELBO does not."""
    data = torch.linspace(-1.0, 1.0, 8)

    def model(size):
        with pyro.plate("data", len(data), subsample_size=size) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[rows])

    def guide(size):
        loc = pyro.param("loc", torch.zeros(len(data)))
        with pyro.plate("data", len(data), subsample_size=size) as rows:
            pyro.sample("z", dist.Normal(loc[rows], 1.0))

    usual, name = "RenyiELBO:alpha=0,num_particles=4", "DReG_ELBO:num_particles=4"
    adaptive = f"{name},control_variate_scale=adaptive"
    assert choose_losses(model, guide, (None,), reference=usual).losses == [name, adaptive]
    choice = choose_losses(model, guide, (4,), reference=usual)
    assert not choice.losses
    assert choice.left_out[name] == (
        "another objective: where 'data' subsamples, RenyiELBO multiplies the log weights, not the bound; take "
        "DReG_ELBO:num_particles=4,control_variate_scale=0.0 as reference, which does not"
    )
    reference = f"{name},control_variate_scale=0.0"
    assert choose_losses(model, guide, (4,), reference=reference).losses == [name, adaptive]
    # And so it is: with the same draws, the one loss is biased beside the one reference only.
    sizes = {**QUICK, "num_samples": 120}
    row = compare(model, guide, [name], (4,), reference=reference, **sizes).states[0].losses[1]
    assert row.name == name and not row.biased
    assert compare(model, guide, [name], (4,), reference=usual, **sizes).states[0].losses[1].biased


@pytest.mark.parametrize("kind", ["labels of the guide", "scale"])
def test_reference_where_trace_elbo_is_biased(kind):
    """``tests/infer/test_left_out.py`` shows the bias."""
    x = torch.tensor([0.5, -0.3])

    def scaling():
        return pyro.poutine.scale(scale=pyro.param("beta", torch.tensor(0.7)) if kind == "scale" else 1.0)

    def model():
        with pyro.plate("data", 2), scaling():
            z = pyro.sample("z", dist.Normal(0.0, 1.0) if kind != "scale" else dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        logits = pyro.param("logits", torch.zeros(2))
        with pyro.plate("data", 2), scaling():
            k = pyro.sample("k" if kind != "scale" else "z", dist.Bernoulli(logits=logits),
                            infer={"is_auxiliary": kind != "scale"})  # fmt: skip
            if kind != "scale":
                pyro.sample("z", dist.Normal(k, 0.7))

    choice = choose_losses(model, guide)
    assert choice.reference == "TraceEnum_ELBO"
    assert {"STLTrace_ELBO", "RaoBlackwell_ELBO"} & set(choice.losses)
