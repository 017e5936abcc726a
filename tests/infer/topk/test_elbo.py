# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What must hold exactly: identities, options, errors and the report."""

import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormalMessenger
from pyro.infer.util import torch_item

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from tests.infer.topk.models import (
    ALL,
    ENUMERABLE,
    enumerated,
    exact_gradient,
    fixed,
    gradient,
    mixture,
    model_enumeration,
    one_site,
    sequential_plate,
    table,
)
from tests.support.cases import Case

pytestmark = pytest.mark.slow

NO_BASELINE = "single draw, no baseline: num_particles > 1 or infer={'baseline': ...} gives one"
TREATED = [name for name in ALL if name != "bernoullis"]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


# Given the nesting of plates, no draws are spent on guessing it.
NESTING = {"max_plate_nesting": 2}


def topk(**kwargs):
    return RaoBlackwellTopK_ELBO(**NESTING, **kwargs)


def trace_enum(**kwargs):
    return TraceEnum_ELBO(strict_enumeration_warning=False, **NESTING, **kwargs)


def step(elbo, case, seed=0):
    """Loss and gradients of one call of loss_and_grads."""
    pyro.set_rng_seed(seed)
    parameters = case.parameters()
    for p in parameters.values():
        p.grad = None
    loss = elbo.loss_and_grads(case.model, case.guide, *case.args)
    return torch.tensor(loss), {name: p.grad for name, p in parameters.items()}


def assert_close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- Identities -----------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("options", [{"k": 8}, {"budget": 8}, {"k": 7, "baseline": None}])
def test_all_values_are_trace_enum(name, options):
    case = ALL[name]()
    assert_close(step(topk(**options), case), step(trace_enum(), enumerated(case)), 0.0)


def test_all_values_of_a_long_markov_chain_are_trace_enum():
    num_steps = 40
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]])

    def model():
        z = 0
        for t in pyro.markov(range(num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
            pyro.sample(f"x_{t}", dist.Normal(1.0 * z, 1.0), obs=torch.tensor(1.0))

    def guide():
        logits = pyro.param("logits", lambda: torch.randn(num_steps, 2))
        for t in pyro.markov(range(num_steps)):
            pyro.sample(f"z_{t}", dist.Categorical(logits=logits[t]))

    case = Case(model, guide)
    elbo = topk(k=2)
    assert_close(step(elbo, case), step(trace_enum(), enumerated(case)), 0.0)
    assert {row.treatment for row in elbo.report()} == {"exact"}


@pytest.mark.parametrize("name", ALL)
def test_plain_draws_are_trace_enum(name):
    case = ALL[name]()
    elbo = topk(k=0, num_samples=1)
    for seed in range(3):
        assert_close(step(elbo, case, seed), step(trace_enum(), case, seed), 0.0)


@pytest.mark.parametrize("name", ENUMERABLE)
def test_no_noise_where_the_complement_is_empty(name):
    """k summed categories hold all of the mass, others have probability 0."""
    case = ALL[name]()
    with torch.no_grad():
        for key, p in case.parameters().items():
            if key.startswith(("q", "logits")):
                # Two categories are possible.
                p[..., 2:] = -1000.0
    if name == "binomial":
        return
    elbo = topk(k=2)
    for seed in range(2):
        pyro.set_rng_seed(seed)
        assert_close(gradient(elbo, case), exact_gradient(case))


@pytest.mark.parametrize("name", TREATED)
@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": 0, "num_samples": 2}])
def test_value_does_not_depend_on_the_baseline(name, options):
    """But with a budget, of which more goes to draws where there is none."""
    case, losses = ALL[name](), []
    for baseline in (None, "loo"):
        elbo = topk(baseline=baseline, **options)
        for method in ("loss", "loss_and_grads", "differentiable_loss"):
            pyro.set_rng_seed(0)
            loss = getattr(elbo, method)(case.model, case.guide, *case.args)
            losses.append(torch_item(loss))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)


@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
@pytest.mark.parametrize("name", TREATED)
def test_entrances_agree(name, baseline):
    case = ALL[name]()
    for particles in ({}, {"num_particles": 3}, {"num_particles": 3, "vectorize_particles": True}):
        elbo = topk(baseline=baseline, **particles)
        loss, grads = step(elbo, case)
        pyro.set_rng_seed(0)
        actual = gradient(elbo, case)
        assert_close(actual, {n: torch.zeros_like(p) if grads[n] is None else grads[n] for n, p in actual.items()})
        pyro.set_rng_seed(0)
        assert float(loss) == pytest.approx(elbo.loss(case.model, case.guide, *case.args))


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"budget": 3}, {"k": 0, "num_samples": 2}])
def test_loo_does_not_see_a_constant(options):
    case, elbo = mixture(), topk(**options)

    def shifted(x):
        pyro.factor("constant", torch.tensor(1000.0))
        return case.model(x)

    for seed in range(3):
        grads = []
        for model in (case.model, shifted):
            pyro.set_rng_seed(seed)
            grads.append(gradient(elbo, Case(model, case.guide, case.args)))
        assert_close(*grads)


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"budget": 3}, {"k": 0, "num_samples": 2}])
def test_loo_has_no_noise_at_the_posterior(options):
    cost = fixed(6)

    def model():
        z = pyro.sample("z", dist.Categorical(logits=torch.zeros(6)))
        pyro.sample("x", dist.Normal(cost[z], 1.0), obs=torch.tensor(0.7))

    def guide():
        logits = pyro.param("logits", lambda: dist.Normal(cost, 1.0).log_prob(torch.tensor(0.7)))
        pyro.sample("z", dist.Categorical(logits=logits))

    case = Case(model, guide)
    assert_close(gradient(topk(**options), case), {"logits": torch.zeros(6)})


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"budget": 3}])
def test_loo_removes_barren_sites(options):
    """Sites on which nothing depends get no noise from the costs of others."""
    case = sequential_plate()

    def model():
        for i in pyro.plate("data", 4):
            pyro.sample(f"z_{i}", dist.Categorical(logits=table("logits", 4, 6)[i].detach()))

    barren = Case(model, case.guide)
    actual = gradient(topk(**options), barren)
    assert_close(actual, {name: torch.zeros_like(g) for name, g in actual.items()})


def test_a_masked_element_has_no_gradient():
    case, mask = mixture(), torch.tensor([True, False, True, True])
    case.model, case.guide = (poutine.mask(f, mask) for f in (case.model, case.guide))
    for baseline in (None, "loo", "reinforce+"):
        grad = gradient(topk(baseline=baseline), case)["logits"]
        assert (grad[1] == 0).all() and grad[mask].any(-1).all()


def test_scale_multiplies_the_gradient():
    case, other = mixture(), mixture()
    other.model, other.guide = (poutine.scale(f, 7.0) for f in (case.model, case.guide))
    for baseline in (None, "loo", "reinforce+"):
        elbo = topk(baseline=baseline)
        loss, grads = step(elbo, case)
        assert_close(step(elbo, other), (7 * loss, {n: 7 * g for n, g in grads.items()}))


def test_sequential_enumeration_of_another_site():
    """One trace for each value of b, all with the same draws of a."""

    def make(enumerate_b):
        def model():
            a = pyro.sample("a", dist.Categorical(logits=torch.zeros(5)))
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(fixed(5)[a] + b, 1.0), obs=torch.tensor(0.4))

        def guide():
            pyro.sample("a", dist.Categorical(logits=table("q_a", 5)))
            pyro.sample("b", dist.Bernoulli(logits=table("q_b")), infer={"enumerate": enumerate_b})

        return Case(model, guide)

    for baseline in (None, "loo", "reinforce+"):
        elbo = topk(baseline=baseline)
        parallel = step(elbo, make("parallel"))
        sequential = step(elbo, make("sequential"))
        assert_close(sequential, parallel)


def test_shared_draws_do_not_change_with_the_dtype():
    losses = []
    for dtype in (torch.float64, torch.float32):
        pyro.clear_param_store()
        case = mixture()
        with torch.no_grad():
            for p in case.parameters().values():
                p.data = p.data.to(dtype)
        case.args = (case.args[0].to(dtype),)
        elbo = topk(k=2)
        loss, grads = step(elbo, case)
        assert all(g.dtype == dtype for g in grads.values())
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# -- Numerical corners -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": 1, "num_samples": 2}, {"budget": 3}])
@pytest.mark.parametrize(
    "logits",
    [
        [0.0, -math.inf, -math.inf, -math.inf, -math.inf],
        [0.0, 0.0, -math.inf, -math.inf, -math.inf],
        [200.0, 0.0, 0.0, 0.0, 0.0],
        [100.0, 50.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
    ],
)
def test_gradients_are_finite(dtype, baseline, options, logits):
    torch.set_default_dtype(dtype)
    start = torch.tensor([logits, [0.0] * 5])

    def model():
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(logits=table("prior", 5)))
            pyro.sample("x", dist.Normal(table("locs", 5)[z], 1.0), obs=torch.ones(2))

    def guide():
        with pyro.plate("data", 2):
            # -inf is no real number for the validation of a Categorical.
            q = dist.Categorical(logits=pyro.param("logits", start), validate_args=False)
            pyro.sample("z", q)

    elbo = topk(baseline=baseline, **options)
    for seed in range(5):
        loss, grads = step(elbo, Case(model, guide), seed)
        assert loss.isfinite()
        assert all(g.isfinite().all() and g.dtype == dtype for g in grads.values())


def test_nan_is_reported():
    case = mixture()
    with torch.no_grad():
        case.parameters()["logits"].fill_(math.nan)
    with pyro.validation_enabled(False):
        for method in ("loss", "loss_and_grads", "differentiable_loss"):
            with pytest.warns(UserWarning, match="Encountered NaN: loss"):
                getattr(topk(), method)(case.model, case.guide, *case.args)


# -- Options -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1.0, "1", True])
def test_invalid_k(value):
    with pytest.raises(ValueError, match="Invalid k: .*Expected an int >= 0"):
        topk(k=value)


@pytest.mark.parametrize("name", ["num_samples", "budget", "max_evaluations"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
def test_invalid_counts(name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}: .*Expected an int(eger)? (>= 1|that is at least 1)"):
        topk(**{name: value})


@pytest.mark.parametrize("others", [{"k": 1}, {"num_samples": 1}, {"k": 0, "num_samples": 2}])
def test_budget_excludes_the_others(others):
    with pytest.raises(ValueError, match="Found budget=4 together with k=.*Expected a budget"):
        topk(budget=4, **others)


@pytest.mark.parametrize("value", ["LOO", "nvil", 1, False])
def test_invalid_baseline(value):
    with pytest.raises(ValueError, match="Invalid baseline: .*Expected one of"):
        topk(baseline=value)


def test_defaults():
    assert topk().options == (1, 1, None, 0)
    assert topk(k=3, num_samples=2).options == (3, 2, None, 0)
    assert topk(budget=3).options.budget == 3
    assert topk().baseline == "loo"


def test_positional_arguments_are_pyros():
    ours, pyros = (loss(3, 2, None, True, False) for loss in (RaoBlackwellTopK_ELBO, TraceEnum_ELBO))
    names = ["num_particles", "max_plate_nesting", "vectorize_particles", "strict_enumeration_warning", "retain_graph"]
    assert [getattr(ours, n) for n in names] == [getattr(pyros, n) for n in names] == [3, 3, True, False, None]
    assert RaoBlackwellTopK_ELBO(8).num_particles == 8
    with pytest.raises(TypeError, match="positional"):
        RaoBlackwellTopK_ELBO(1, 1, None, False, True, False, None, None, -1.0, 3)


def test_guide_messengers_are_refused():
    case = mixture()
    with pytest.raises(NotImplementedError, match="GuideMessenger"):
        topk().loss(case.model, AutoNormalMessenger(case.model), *case.args)


def test_marginals_and_posterior_are_trace_enums():
    case, elbo = model_enumeration(), topk()
    results = []
    for e in (elbo, trace_enum()):
        pyro.set_rng_seed(0)
        marginals = e.compute_marginals(case.model, case.guide, *case.args)
        pyro.set_rng_seed(0)
        e.sample_posterior(case.model, case.guide, *case.args)
        results.append(marginals["y"].logits.detach())
    assert_close(*results)


def test_pickle():
    case, elbo = mixture(), topk(budget=3)
    step(elbo, case)
    copied = pickle.loads(pickle.dumps(elbo))
    assert str(copied.report()) == str(elbo.report())
    assert_close(step(copied, case), step(elbo, case))


def test_no_grad():
    case = mixture()
    elbo = topk()
    svi = SVI(case.model, case.guide, pyro.optim.Adam({}), elbo)
    pyro.set_rng_seed(0)
    expected = svi.evaluate_loss(*case.args)
    with torch.no_grad():
        pyro.set_rng_seed(0)
        loss = elbo.differentiable_loss(case.model, case.guide, *case.args)
    assert not loss.requires_grad and float(loss) == pytest.approx(expected)


def test_no_parameters():
    def guide():
        pyro.sample("z", dist.Categorical(logits=fixed(6)))

    case = Case(one_site(learned=False).model, guide)
    elbo = topk()
    loss = elbo.differentiable_loss(case.model, case.guide)
    assert not loss.requires_grad
    elbo.loss_and_grads(case.model, case.guide)


# -- Options of a site -----------------------------------------------------------------


def with_options(options, case=None):
    case = case or mixture()
    guide = poutine.infer_config(
        case.guide, lambda site: {"topk": options} if site["type"] == "sample" and site["name"] == "z" else {}
    )
    return Case(case.model, guide, case.args)


@pytest.mark.parametrize(
    "site, own, default",
    [
        (3, {"k": 3}, {}),
        (2, {"k": 2, "num_samples": 2}, {"num_samples": 2}),
        (2, {"k": 2}, {"budget": 4}),
        ({"k": 2}, {"k": 2, "num_samples": 2}, {"num_samples": 2}),
        ({"num_samples": 2}, {"k": 2, "num_samples": 2}, {"k": 2}),
        ({"num_samples": 2}, {"k": 1, "num_samples": 2}, {"budget": 4}),
        ({"k": 0, "num_samples": 3}, {"k": 0, "num_samples": 3}, {}),
        ({"budget": 3}, {"budget": 3}, {"k": 1, "num_samples": 3}),
        ({}, {"budget": 3}, {"budget": 3}),
        ({"k": 4}, {"k": 5}, {}),
    ],
)
def test_options_of_a_site(site, own, default):
    expected = step(topk(**own), mixture())
    assert_close(step(topk(**default), with_options(site)), expected, 0.0)


@pytest.mark.parametrize("baseline", [None, "loo", "reinforce+"])
def test_zero_is_a_plain_draw(baseline):
    elbo = topk(k=2, num_samples=4, baseline=baseline)
    assert_close(step(elbo, with_options(0)), step(trace_enum(), mixture()), 0.0)
    (row,) = elbo.report()
    assert row.treatment == (NO_BASELINE if baseline else "single draw, no baseline")
    assert row.reason == "infer={'topk': 0}"


@pytest.mark.parametrize(
    "options, message",
    [
        (-1, "Invalid k at guide site 'z': -1. Expected an int >= 0"),
        (True, "Invalid k at guide site 'z': True"),
        ("all", "Invalid k at guide site 'z': 'all'"),
        ({"num_samples": 0}, "Invalid num_samples at guide site 'z': 0. Expected an int >= 1"),
        ({"budget": 0}, "Invalid budget at guide site 'z': 0"),
        ({"budget": 2, "k": 1}, "Found budget=2 together with k=1 .* at guide site 'z'"),
        ({"n": 2}, r"Unknown options \['n'\] .* at guide site 'z'. Expected some of"),
    ],
)
def test_invalid_options_of_a_site(options, message):
    case, elbo = with_options(options), topk()
    with pytest.raises(ValueError, match=message):
        elbo.loss(case.model, case.guide, *case.args)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_enumerate_and_topk_exclude_each_other(how):
    case = with_options(2)
    guide = config_enumerate(case.guide, how)
    with pytest.raises(ValueError, match=f"'enumerate': '{how}', 'topk': 2.*at guide site 'z'.*Expected one"):
        topk().loss(case.model, guide, *case.args)


@pytest.mark.parametrize("how", ["all", True, "flat"])
def test_invalid_enumerate(how):
    """Pyro would take the values to be enumerated, and leave the score out."""
    case = mixture()
    guide = poutine.infer_config(case.guide, lambda site: {"enumerate": how} if site["name"] == "z" else {})
    with pytest.raises(ValueError, match=f"'enumerate': {how!r}.* at guide site 'z'.*Expected 'parallel'"):
        topk().loss(case.model, guide, *case.args)


@pytest.mark.parametrize("options", [{"default": "parallel"}, {"default": "sequential"}, {"default": None}])
def test_annotated_sites_keep_their_meaning(options):
    # A loop over all combinations in a plate is for small cases.
    case = one_site()
    guide = config_enumerate(case.guide, **options)
    case = Case(case.model, guide)
    elbo = topk()
    assert_close(step(elbo, case), step(trace_enum(), case), 0.0)
    (row,) = elbo.report()
    assert row.treatment == ("as TraceEnum_ELBO" if options["default"] else NO_BASELINE)
    assert row.reason == f"infer={{'enumerate': {options['default']!r}}}"


@pytest.mark.parametrize("infer", [{"num_samples": 2}, {"num_samples": 2, "tmc": "mixture"}])
def test_number_of_samples_without_enumeration_changes_nothing(infer):
    """As in TraceEnum_ELBO, which looks at it only beside "enumerate"."""
    case = mixture()
    guide = poutine.infer_config(case.guide, lambda site: infer if site["name"] == "z" else {})
    for options in ({}, {"k": 2}, {"budget": 3}, {"k": 5}, {"k": 0}):
        elbo = topk(**options)
        expected, reasons = step(elbo, case), elbo.report()
        assert_close(step(elbo, Case(case.model, guide, case.args)), expected, 0.0)
        assert elbo.report() == reasons


def test_local_sampling_keeps_its_meaning():
    case = mixture()
    guide = config_enumerate(case.guide, num_samples=4, expand=True)
    case = Case(case.model, guide, case.args)
    assert_close(step(topk(), case), step(trace_enum(), case), 0.0)


@pytest.mark.parametrize("infer", [{}, {"topk": 2}])
def test_a_table_that_becomes_too_large_in_training(infer):
    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Poisson(300.0))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Poisson(pyro.param("rate", torch.tensor(300.0))), infer=infer)

    elbo, treated = topk(), []
    for rate in (300.0, 1e9, 1.0, 1e12):
        pyro.param("rate", torch.tensor(rate)).data.fill_(rate)
        loss, grads = step(elbo, Case(model, guide))
        assert loss.isfinite() and grads["rate"].isfinite()
        treated.append(elbo.report()[0])
    assert [row.treatment.split(",")[0] for row in treated] == ["top-k", "single draw"] * 2
    assert "elements, more than" in treated[1].reason and "1e-9 of the mass" in treated[0].reason


# -- Report ---------------------------------------------------------------------------


def test_report_of_a_mixed_guide():
    def model():
        c = pyro.sample("categorical", dist.Categorical(logits=fixed(6)))
        b = pyro.sample("coin", dist.Bernoulli(0.4))
        n = pyro.sample("normal", dist.Normal(torch.zeros(()), 1.0))
        e = pyro.sample("event", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))
        m = pyro.sample("masked", dist.Bernoulli(0.3).mask(torch.tensor(True)))
        o = pyro.sample("one", dist.Categorical(torch.ones(1)))
        pyro.sample("x", dist.Normal(c + b + n + e.sum(-1) + m + o, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("categorical", dist.Categorical(probs=torch.tensor([0.7, 0.1, 0.1, 0.05, 0.03, 0.02])))
        pyro.sample("coin", dist.Bernoulli(0.4))
        pyro.sample("normal", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("event", dist.Bernoulli(0.3 * torch.ones(2)).to_event(1))
        pyro.sample("masked", dist.Bernoulli(0.3).mask(torch.tensor(True)))
        pyro.sample("one", dist.Categorical(torch.ones(1)))

    elbo = topk()
    with pytest.raises(RuntimeError, match="Expected a step"):
        elbo.report()
    elbo.loss(model, guide)
    assert elbo.report() == [
        ("categorical", "top-k, k = 1, n = 1, complement 0.3", "2 of 6 values"),
        ("coin", "exact", "2 of 2 values"),
        ("normal", "as TraceEnum_ELBO", "reparameterized"),
        (
            "event",
            "top-k, k = 1, n = 1, complement 0.51",
            "2 of 4 joint values; in a plate, without to_event(), each variable has values of its own",
        ),
        ("masked", NO_BASELINE, "a masked distribution; use poutine.mask in its place"),
        ("one", "as TraceEnum_ELBO", "one value"),
    ]
    elbo = topk(k=2, baseline="reinforce+")
    elbo.loss(model, guide)
    assert elbo.report()[0] == (
        "categorical",
        "top-k, k = 2, n = 1, complement 0.2",
        "4 of 6 values, one of them for the baseline",
    )


def test_report_of_a_supplied_value():
    case, elbo = mixture(), topk()
    trace = poutine.trace(case.guide).get_trace(*case.args)
    with poutine.replay(trace=trace):
        loss = elbo.loss(case.model, case.guide, *case.args)
        expected = trace_enum().loss(case.model, case.guide, *case.args)
    assert loss == pytest.approx(expected)
    assert elbo.report()[0][1:] == ("as TraceEnum_ELBO", "its value was supplied, not drawn")


# -- Errors at a step -----------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"budget": 3}, {"k": 0}])
def test_values_that_a_prior_does_not_have(options):
    """With validation off PyTorch says so too. More dims are not to blame."""
    shape = torch.linspace(0.0, 1.0, 80)

    def model():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Categorical(logits=shape * torch.arange(1.0, 5.0).unsqueeze(-1)))

    def guide():
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Categorical(logits=torch.linspace(0.0, 9.0, 100).expand(4, 100)))

    with pyro.validation_enabled(False):
        with pytest.raises(RuntimeError, match="out of bounds") as info:
            for _ in range(3):
                topk(**options).loss(model, guide)
    assert "one more dim" not in str(info.value)


@pytest.mark.parametrize(
    "use, error",
    [
        (lambda z: z.item(), RuntimeError),
        (lambda z: 1 if z == 2 else 0, RuntimeError),
        (lambda z: fixed(5)[int(z)], RuntimeError),
        (lambda z: z.double().view(4), RuntimeError),
        (lambda z: z.double().squeeze() + torch.zeros(7), RuntimeError),
    ],
)
def test_hint_for_code_that_cannot_be_vectorized(use, error):
    def model():
        z = pyro.sample("z", dist.Categorical(torch.ones(5)))
        pyro.sample("x", dist.Normal(torch.zeros(()), 1.0 + use(z)), obs=torch.tensor(0.0))

    def guide():
        pyro.sample("z", dist.Categorical(logits=table("logits", 5)))

    with pytest.raises((error, ValueError), match=r"(?s).*guide sites \['z'\].*infer=\{'topk': 0\}"):
        topk(k=2).loss(model, guide)


def test_no_hint_for_other_errors():
    def model():
        raise ValueError("the shape of things to come")

    def guide():
        pyro.sample("n", dist.Normal(torch.zeros(()), 1.0))

    with pytest.raises(ValueError) as info:
        topk().loss(model, guide)
    assert "topk" not in str(info.value)

    def failing():
        guide()
        pyro.sample("z", dist.Categorical(torch.ones(5)))
        raise ValueError("unrelated")

    with pytest.raises(ValueError) as info:
        topk().loss(model, failing)
    assert "topk" not in str(info.value)
