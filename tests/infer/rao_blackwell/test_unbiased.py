# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""z-tests of the mean gradient against exact ones, by replicates of small models in a plate."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_rb import RaoBlackwell_ELBO
from tests.infer.rao_blackwell.models import (
    PROBLEMS,
    Problem,
    case,
    data,
    fixed,
    parameter,
    replicates,
    score_function,
)
from tests.infer.rao_blackwell.structures import (
    STRUCTURES,
    SUBSETS,
    beside_a_chain,
    subsampled,
    switching,
)
from tests.support.common import assert_unbiased

pytestmark = pytest.mark.slow

ALL = {**PROBLEMS, **STRUCTURES}
FEW_VALUES = {
    "budget": {},
    "no_baseline": {"baseline": None},
    "one_more_draw": {"baseline": "reinforce+"},
    "path": {"control_variate_scale": 1.0},
    "some_path": {"control_variate_scale": 0.4},
    "no_projection": {"pre_activations": None},
    "shared": {"pre_activations": "shared"},
    "vectorized": {"num_particles": 3, "vectorize_particles": True},
    "looped": {"num_particles": 2},
}
SETTINGS = {
    "default": {},
    "all_values": {"k": 10},
    "k1": {"k": 1},
    "k0_n2": {"k": 0, "num_samples": 2},
    **{name: {"budget": 3, **options} for name, options in FEW_VALUES.items()},
}
FEW = ("budget", "k1", "vectorized")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def check(problem, expected=None, detect=0.4, **options):
    """Unbiased at the settings, once the scale of the score is learned."""
    elbo = RaoBlackwell_ELBO(max_plate_nesting=problem.nesting, **options)
    num_burn_in = 0 if isinstance(options.get("control_variate_scale"), float) else 3
    rows = problem.draw(elbo, num_burn_in)
    expected = problem.exact if expected is None else expected
    assert_unbiased(rows, expected, projections=40, detect=detect)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_settings(name, setting):
    check(PROBLEMS[name], detect=0.6 if setting == "no_baseline" else 0.4, **SETTINGS[setting])


@pytest.mark.parametrize("setting", FEW)
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name, setting):
    check(STRUCTURES[name], **SETTINGS[setting])


@pytest.mark.parametrize("name", ["chain", "regression", "score_function", "partly_observed"])
def test_references(name):
    """What the exact gradients are worth: Trace_ELBO, which shares nothing with their computation."""
    problem = replace(ALL[name], num=5000)
    rows = problem.draw(Trace_ELBO(max_plate_nesting=problem.nesting))
    assert_unbiased(rows, problem.exact, projections=40, detect=0.7)


@pytest.mark.parametrize("setting", FEW)
def test_subsamples(setting):
    """The mean over all subsets of the mean gradient given each."""
    whole = Problem(subsampled, rules={"z": 60}).exact
    elbo = RaoBlackwell_ELBO(max_plate_nesting=2, **SETTINGS[setting])
    rows = [
        Problem(lambda num: subsampled(num, i)).draw(elbo, num_burn_in=3)
        for i in range(len(SUBSETS))
    ]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in whole}
    assert_unbiased(mean, whole, projections=40, detect=0.4)


@pytest.mark.parametrize("setting", FEW)
def test_switching_states(setting):
    """A Gaussian site after a discrete one in ``markov``."""
    rules = {f"z_{t}": 30 for t in range(2)}
    expected = Problem(lambda num: switching(num, iter), 1, rules).exact
    check(Problem(lambda num: switching(num, pyro.markov), 1), expected, **SETTINGS[setting])


@pytest.mark.parametrize("setting", FEW)
def test_sites_beside_a_chain(setting):
    """Pyro gives them dims that sites in ``markov`` have, and takes one for the other."""
    expected = Problem(lambda num: beside_a_chain(num, iter), 1).exact
    check(Problem(lambda num: beside_a_chain(num, pyro.markov), 1), expected, **SETTINGS[setting])


@pytest.mark.parametrize("options", [{}, {"k": 1}])
def test_less_history_in_the_guide(options):
    """Sites that share a dim in the guide are not apart in the model."""

    def chain(history):
        s = torch.tensor(0.0)
        for t in pyro.markov(range(3), history=history):
            s = pyro.sample(f"s_{t}", dist.Bernoulli(logits=s))

    elbo = RaoBlackwell_ELBO(max_plate_nesting=0, **options)
    assert math.isfinite(elbo.loss(lambda: chain(1), lambda: chain(2)))
    with pytest.raises(ValueError, match=r"site 's_2' are along dim -1.*as much history in the guide"):
        elbo.loss(lambda: chain(2), lambda: chain(1))


# -- Sites without a table ---------------------------------------------------------------


@pytest.mark.parametrize(
    "options, infer",
    [
        ({"draws": 3}, {}),
        ({"draws": 1}, {"draws": 4}),
        ({"draws": 1, "num_particles": 4, "vectorize_particles": True}, {}),
        ({"draws": 3, "num_particles": 2, "vectorize_particles": True}, {}),
        ({"num_particles": 4, "vectorize_particles": True}, {"rao_blackwell": False}),
    ],
)
def test_score_function_sites(options, infer):
    problem = replace(PROBLEMS["score_function"], make=lambda num: score_function(num, **infer))
    check(problem, PROBLEMS["score_function"].exact, detect=0.5, **options)


@pytest.mark.parametrize(
    "name, site, infer",
    [
        *(("chain", site, {"rao_blackwell": False}) for site in "zyd"),
        *(("discrete_first", site, {"rao_blackwell": False}) for site in "zyd"),
        *(("regression", site, {"rao_blackwell": False}) for site in ("w", "tau", "s")),
        ("chain", "y", {"topk": {"k": 2, "num_samples": 2}}),
        ("chain", "y", {"topk": {"budget": 4}}),
        ("chain", "y", {"topk": 0}),
        ("chain", "d", {"draws": 3}),
        ("chain", "d", {"enumerate": "parallel"}),
        *(("chain", site, {"enumerate": "parallel", "num_samples": 3}) for site in "zyd"),
        *(("discrete_first", site, {"enumerate": "parallel", "num_samples": 3}) for site in "zyd"),
    ],
)
def test_options_of_a_site(name, site, infer):
    problem = PROBLEMS[name]

    def make(num):
        made = problem.make(num)
        made.guide = pyro.poutine.infer_config(made.guide, lambda s: infer if s["name"] == site else {})
        return made

    check(replace(problem, make=make), problem.exact, detect=0.7, control_variate_scale=1.0)


# -- Costs outside of a plate that depend on a site inside -------------------------------


def switches(num, kind="bernoulli", is_vector=False, **infer):
    """Three switches in a plate, of which the datum outside of it sees the sum."""
    weights = torch.tensor([1.0, 2.0, 3.0])

    def make(logits):
        fn = dist.Bernoulli(logits=logits[..., 0]) if kind == "bernoulli" else dist.Categorical(logits=logits)
        return fn.to_event(1) if is_vector else fn

    def sample(logits):
        if is_vector:
            return pyro.sample("b", make(logits), infer=infer)
        with data(3):
            return pyro.sample("b", make(logits.squeeze(-3)), infer=infer)

    def model(num):
        with replicates(num, -2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            b = sample(torch.zeros(1, 1, 3, 4))
            total = (weights * b).sum(-1)
            total = total if is_vector else total.unsqueeze(-1)
            pyro.sample("x", dist.Normal(total + z, 1.0), obs=torch.tensor(2.0))

    def guide(num):
        logits = parameter(num, "logits", 0.7 * fixed(1, 3, 4, seed=1))
        loc = parameter(num, "loc", torch.full((1,), 0.4))
        with replicates(num, -2):
            pyro.sample("z", dist.Normal(loc, 0.7))
            sample(logits)

    return case(model, guide, num)


@pytest.mark.filterwarnings("ignore:at .* possibly invalid dependency:RuntimeWarning")
@pytest.mark.parametrize(
    "kind, options, infer",
    [
        ("bernoulli", {}, {}),
        ("bernoulli", {"k": 0, "num_samples": 1}, {}),
        ("bernoulli", {}, {"topk": 0}),
        ("bernoulli", {}, {"draws": 2}),
        ("categorical", {}, {}),
        ("categorical", {"k": 10}, {}),
        ("categorical", {"k": 0, "num_samples": 2}, {}),
        ("bernoulli", {"num_particles": 3, "vectorize_particles": True}, {}),
    ],
)
def test_cost_outside_of_the_plate(kind, options, infer):
    """Right, though weights of slots say nothing of such a cost."""
    expected = Problem(lambda num: switches(num, kind, True), rules={"b": 0, "z": 10}).exact
    problem = Problem(lambda num: switches(num, kind, **infer), num=4000)
    check(problem, expected, detect=0.6, control_variate_scale=1.0, **options)
