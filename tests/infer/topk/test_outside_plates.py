# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Costs that depend on a guide site from outside of its plates, or on a sum over its slots."""

import pickle
import warnings
from functools import lru_cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from pyro_rb.infer import RaoBlackwellTopK_ELBO
from pyro_rb.infer.outside_plates import PERIOD
from tests.infer.topk.models import gradient, table
from tests.support.brute_force import exact_gradient, exact_loss
from tests.support.cases import Case, positive
from tests.support.common import assert_unbiased

WEIGHTS = (1.0, 2.0, 3.0)
REPLICATES = 2000
NO_BASELINE = "single draw, no baseline: num_particles > 1 or infer={'baseline': ...} gives one"


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def topk(**kwargs):
    return RaoBlackwellTopK_ELBO(max_plate_nesting=2, **kwargs)


def treatments(elbo):
    return {row.site: row.treatment for row in elbo.report()}


# -- Every cost depends on every site: then the cost is that of Trace_ELBO -----------------


def in_a_plate(use, infer=None, size=3):
    """Coins in a plate, and one observation outside of it."""

    def model():
        with pyro.plate("plate", size):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(use(b), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", size):
            pyro.sample("b", dist.Bernoulli(logits=table("q", size)), infer=infer or {})

    return Case(model, guide)


@lru_cache
def _script():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_double)


def _double(b):
    return torch.relu(b * 2.0)


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b):
        return b * b

    @staticmethod
    def backward(ctx, grad):
        return grad


USES = {
    "product": lambda b: b @ torch.tensor(WEIGHTS),
    "sum": lambda b: b.sum(),
    "mean": lambda b: b.mean(),
    "one of them": lambda b: b[1],
    "element": lambda b: 2.0 * b[..., 1],
    "slice": lambda b: b[..., 1:2] * b[..., 2:],
    "index": lambda b: torch.tensor([0.0, 3.0, 1.0, 7.0])[b.sum().long()],
    "item": lambda b: torch.tensor(b.sum().item()),
    "if": lambda b: torch.tensor(2.0) if b.sum() > 1 else torch.tensor(0.0),
    "list": lambda b: torch.tensor(sum(w * v for w, v in zip(WEIGHTS, b.tolist()))),
    "numpy": lambda b: torch.tensor(float(b.cpu().numpy().sum())),
    "vmap": lambda b: torch.vmap(lambda v: 2.0 * v)(b).sum(),
    "script": lambda b: _script()(b).sum(),
    "function": lambda b: _Square.apply(b).sum(),
    "in place": lambda b: torch.zeros(3).add_(b).sum(),
    "buffer": lambda b: _filled(torch.zeros(5), b).sum(),
}


def _filled(buffer, b):
    buffer[1:4] = b
    return buffer


def vectors():
    """Bernoulli vectors in one plate, costs outside and in another plate."""

    def model():
        with pyro.plate("plate", 2):
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
        pyro.sample("x", dist.Normal(b.sum() ** 2, 1.0), obs=torch.tensor(2.0))
        with pyro.plate("other", 3):
            pyro.sample("y", dist.Normal(b.prod(), 1.0), obs=torch.tensor([0.0, 1.0, 2.0]))

    def guide():
        with pyro.plate("plate", 2):
            pyro.sample("b", dist.Bernoulli(logits=table("q", 2, 2)).to_event(1))

    return Case(model, guide)


def downstream():
    """A site of the guide outside of the plate depends on the one inside."""

    def model():
        with pyro.plate("plate", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(b.sum() - 1.0)))
        pyro.sample("x", dist.Normal(2.0 * c, 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", 3):
            b = pyro.sample("b", dist.Bernoulli(logits=table("q", 3)))
        pyro.sample("c", dist.Bernoulli(logits=(b * table("w", 3)).sum()))

    return Case(model, guide)


def one_hot():
    def model():
        with pyro.plate("plate", 2):
            b = pyro.sample("b", dist.OneHotCategorical(torch.ones(3)))
        pyro.sample("x", dist.Normal((b @ torch.tensor(WEIGHTS)).sum(), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", 2):
            pyro.sample("b", dist.OneHotCategorical(logits=table("q", 2, 3)))

    return Case(model, guide)


def nested():
    """A site in two plates, a cost in one of them."""

    def model():
        with pyro.plate("outer", 2, dim=-1):
            with pyro.plate("inner", 3, dim=-2):
                b = pyro.sample("b", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(b.double().sum(-2), 1.0), obs=torch.tensor([1.0, 3.0]))

    def guide():
        with pyro.plate("outer", 2, dim=-1), pyro.plate("inner", 3, dim=-2):
            pyro.sample("b", dist.Categorical(logits=table("q", 3, 2, 3)))

    return Case(model, guide)


def gamma():
    """Another site that is not reparameterized."""
    fake = pyro.distributions.testing.fakes.NonreparameterizedGamma

    def model():
        with pyro.plate("plate", 3):
            g = pyro.sample("g", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(g.mean(), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", 3):
            pyro.sample("g", fake(positive("a", 1.0, 2.0, 3.0), torch.ones(3)))

    return Case(model, guide)


def subsampled():
    def model():
        with pyro.plate("plate", 4, subsample_size=2) as i:
            b = pyro.sample("b", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal((b * torch.arange(4.0)[i]).sum(), 1.0), obs=torch.tensor(2.0))

    def guide():
        with pyro.plate("plate", 4, subsample_size=2) as i:
            pyro.sample("b", dist.Bernoulli(logits=table("q", 4)[i]))

    return Case(model, guide)


def scaled():
    def model():
        with poutine.scale(scale=2.0), pyro.plate("plate", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        with poutine.scale(scale=3.0):
            pyro.sample("x", dist.Normal(b.sum(), 1.0), obs=torch.tensor(2.0))

    def guide():
        with poutine.scale(scale=2.0), pyro.plate("plate", 3):
            pyro.sample("b", dist.Bernoulli(logits=table("q", 3)))

    return Case(model, guide)


def summed_up(use):
    """No plate; but the use of one value is a sum over its slots."""

    def model():
        k = pyro.sample("k", dist.Categorical(torch.ones(4)))
        pyro.sample("x", dist.Normal(use(k.double()), 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("k", dist.Categorical(logits=table("q", 4)))

    return Case(model, guide)


SUMS = {
    "mean of one": lambda k: k.mean(),
    "centred": lambda k: k - 0.5 * k.mean(),
    "norm": lambda k: k / (1.0 + k.norm()),
    "largest": lambda k: 1.0 * int(k.max()),
}
CASES = {
    **{name: lambda use=use: in_a_plate(use) for name, use in USES.items()},
    **{name: lambda use=use: summed_up(use) for name, use in SUMS.items()},
    **{f.__name__: f for f in (vectors, downstream, one_hot, nested, gamma, subsampled, scaled)},
}
#: What stops with an error of a shape where all values are put in the place of a draw.
SHAPES = ["product", "in place", "buffer", "element", "slice"]
DEFAULTS = sorted(set(CASES) - {*SHAPES, "list", "downstream", "nested"})


@pytest.mark.parametrize("name, k", [(n, 0) for n in CASES] + [(n, 1) for n in DEFAULTS])
def test_a_single_draw_has_the_full_cost(name, k):
    """The gradient of Trace_ELBO at the same draws, but for that of log q in the cost."""
    case, elbo = CASES[name](), topk(k=k)
    for seed in range(3):
        # The first step may begin anew.
        elbo.loss(case.model, case.guide)
        pyro.set_rng_seed(seed)
        trace = poutine.trace(case.guide).get_trace()
        parameters = list(case.parameters().values())
        own = torch.autograd.grad(trace.log_prob_sum(), parameters)
        actual, expected = (_step(e, case, seed) for e in (elbo, Trace_ELBO(max_plate_nesting=2)))
        torch.testing.assert_close(actual, [x + y for x, y in zip(expected, own)], rtol=1e-9, atol=1e-9)
        pyro.set_rng_seed(seed)
        torch.testing.assert_close(list(gradient(elbo, case).values()), actual)
    (row,) = [row for row in elbo.report() if row.site != "c"]
    assert row.treatment == NO_BASELINE
    assert name in SUMS or "used outside of its plates" in row.reason


@pytest.mark.parametrize("name", SHAPES)
def test_the_hint_of_a_shape_error_is_right(name):
    case = CASES[name]()
    message = r"(?s)guide sites \['b'\].*inside of plates \['plate'\] is used outside, set infer=\{'topk': 0\}"
    errors = (AssertionError, IndexError, RuntimeError, ValueError)
    with pytest.raises(errors, match=message):
        topk().loss(case.model, case.guide)
    case = in_a_plate(USES[name], infer={"topk": 0})
    topk().loss(case.model, case.guide)


def _step(elbo, case, seed):
    parameters = case.parameters()
    for p in parameters.values():
        p.grad = None
    pyro.set_rng_seed(seed)
    elbo.loss_and_grads(case.model, case.guide)
    return [p.grad.clone() for p in parameters.values()]


# -- Other costs are independent: against the sum over all joint values ---------------------


def copies(name, num, *shape):
    return pyro.param(name, lambda: table("_" + name, *shape).detach().expand(num, *shape).clone())


def outer(num):
    """A plate of copies with parameters of their own: as many gradients in one call."""
    return pyro.plate("copies", num, dim=-2)


def inner(size=2):
    return pyro.plate("inner", size, dim=-1)


def total(b):
    return (b * torch.tensor(WEIGHTS[: b.shape[-1]])).sum(-1, keepdim=True)


def observe(loc, name="x", value=2.0):
    pyro.sample(name, dist.Normal(loc, 1.0), obs=torch.tensor(value))


def coins(num):
    """Enumerated in full by default."""

    def model():
        with outer(num):
            with inner(3):
                b = pyro.sample("b", dist.Bernoulli(0.4))
            observe(total(b))

    def guide():
        with outer(num), inner(3):
            pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 3)))

    return Case(model, guide)


def chain(num):
    """What depends on c depends on b, by the weights of the values of c."""

    def model():
        with outer(num):
            with inner():
                b = pyro.sample("b", dist.Bernoulli(0.4))
            c = pyro.sample("c", dist.Bernoulli(torch.sigmoid(total(b) - 1.0)))
            observe(3.0 * c)

    def guide():
        with outer(num):
            with inner():
                b = pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 2)))
            pyro.sample("c", dist.Bernoulli(logits=copies("w", num, 1) * total(b)))

    return Case(model, guide)


def siblings(num):
    """A cost in another plate. The slots of c and d stay."""

    def model():
        with outer(num):
            with inner():
                b = pyro.sample("b", dist.Bernoulli(0.4))
                d = pyro.sample("d", dist.Categorical(torch.ones(3)))
                observe(d.double(), "y", 1.0)
            with pyro.plate("other", 2, dim=-1):
                c = pyro.sample("c", dist.Categorical(torch.ones(3)))
                observe(c + 2.0 * b.mean(-1, keepdim=True))

    def guide():
        with outer(num):
            with inner():
                pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 2)))
                pyro.sample("d", dist.Categorical(logits=copies("r", num, 2, 3)))
            with pyro.plate("other", 2, dim=-1):
                pyro.sample("c", dist.Categorical(logits=copies("s", num, 2, 3)))

    return Case(model, guide)


def below_slots(num):
    """The site inside depends on slots outside, which stay."""

    def model():
        with outer(num):
            g = pyro.sample("g", dist.Categorical(torch.ones(4)))
            with inner():
                b = pyro.sample("b", dist.Bernoulli(0.2 + 0.1 * g))
            observe(total(b) + g)

    def guide():
        with outer(num):
            g = pyro.sample("g", dist.Categorical(logits=copies("q", num, 1, 4)))
            with inner():
                pyro.sample("b", dist.Bernoulli(logits=copies("r", num, 2) + 0.4 * g))

    return Case(model, guide)


def event_vectors(num):
    def model():
        with outer(num):
            with inner():
                b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2)).to_event(1))
                observe(b.sum(-1), "y")
            observe(total(b[..., 0] * b[..., 1]))

    def guide():
        with outer(num), inner():
            pyro.sample("b", dist.Bernoulli(logits=copies("q", num, 2, 2)).to_event(1))

    return Case(model, guide)


FOUND = {
    coins: {"b": "single"},
    chain: {"b": "single", "c": "exact"},
    siblings: {"b": "single", "c": "top-k", "d": "top-k"},
    below_slots: {"g": "top-k", "b": "single"},
    event_vectors: {"b": "single"},
}
OPTIONS = {
    "default": {},
    "budget": {"budget": 2},
    "no baseline": {"num_particles": 2, "baseline": None},
    "particles": {"num_particles": 3},
    "vectorized": {"num_particles": 3, "vectorize_particles": True},
    "probe": {"baseline": "reinforce+"},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make", FOUND)
def test_unbiased(make, options):
    expected, loss = _exact(make)
    case, elbo = make(REPLICATES), RaoBlackwellTopK_ELBO(max_plate_nesting=2, **OPTIONS[options])
    samples = gradient(elbo, case)
    found = {site: treatment.split()[0].strip(",") for site, treatment in treatments(elbo).items()}
    assert found == FOUND[make]
    samples = {name: samples[name] for name in expected}
    assert_unbiased(samples, expected, detect=1.0)
    value = elbo.loss(case.model, case.guide) / REPLICATES
    assert value == pytest.approx(loss, rel=0.1)


@lru_cache
def _exact(make):
    case = make(1)
    loss = exact_loss(case).item()
    expected = {name: grad[0] for name, grad in exact_gradient(case).items() if name[0] != "_"}
    pyro.clear_param_store()
    return expected, loss


def test_a_sum_over_values_of_the_model():
    """Enumeration in the model, outside of the plate of the guide's site."""

    def make(sum_out):
        def model():
            with outer(REPLICATES):
                if sum_out:
                    y = pyro.sample("y", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                else:
                    y = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
                with inner():
                    b = pyro.sample("b", dist.Categorical(torch.ones(3)))
                    if sum_out:
                        observe(b * (1.0 + y))
                if not sum_out:
                    log_x = dist.Normal(b * (1.0 + y), 1.0).log_prob(torch.tensor(2.0))
                    log_y = dist.Bernoulli(0.3).log_prob(y)
                    pyro.factor("x", (log_x.sum(-1, keepdim=True) + log_y).logsumexp(0))

        def guide():
            with outer(REPLICATES), inner():
                pyro.sample("b", dist.Categorical(logits=copies("q", REPLICATES, 2, 3)))

        return Case(model, guide)

    for seed in range(2):
        losses, grads = [], []
        for sum_out in (True, False):
            case, elbo = make(sum_out), topk(k=0)
            elbo.loss(case.model, case.guide)
            pyro.set_rng_seed(seed)
            grads.append(gradient(elbo, case)["q"])
            losses.append(elbo.loss(case.model, case.guide))
        torch.testing.assert_close(*grads)
    case, elbo = make(True), topk()
    elbo.loss(case.model, case.guide)
    (row,) = elbo.report()
    assert row.treatment == NO_BASELINE and "a sum over model sites" in row.reason


# -- When it is found, and what it costs ------------------------------------------------------


def counted(case):
    calls = []

    def model():
        calls.append(1)
        case.model()

    return Case(model, case.guide), calls


def test_it_is_found_at_the_first_step_and_remembered():
    case, calls = counted(in_a_plate(USES["sum"]))
    elbo = topk()
    num_calls = []
    for _ in range(5):
        calls.clear()
        elbo.loss_and_grads(case.model, case.guide)
        num_calls.append(len(calls))
    assert num_calls == [2, 1, 1, 1, 1]
    copied = pickle.loads(pickle.dumps(elbo))
    calls.clear()
    copied.loss_and_grads(case.model, case.guide)
    assert len(calls) == 1 and treatments(copied) == treatments(elbo)


def hidden(branch):
    """Costs in another plate depend on b now and then, which no shape shows."""

    def model():
        with pyro.plate("plate", 3):
            b = pyro.sample("b", dist.Bernoulli(0.4))
        n = pyro.sample("n", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("other", 2):
            pyro.sample("x", dist.Normal(b.sum() if branch(n) else torch.zeros(()), 1.0), obs=2 * torch.ones(2))

    def guide():
        with pyro.plate("plate", 3):
            pyro.sample("b", dist.Bernoulli(logits=table("q", 3)))
        pyro.sample("n", dist.Normal(torch.zeros(()), 1.0))

    return Case(model, guide)


def test_control_flow_by_a_draw_is_watched_at_each_step():
    """It is never used unseen: the gradient has one of two values of its own."""
    case, elbo, seen = hidden(lambda n: n > 1.0), topk(), []
    for _ in range(60):
        elbo.loss(case.model, case.guide)
        seen.append(treatments(elbo)["b"])
        if seen[-1] != "exact":
            break
    assert len(seen) > 1 and seen[-1] == NO_BASELINE
    rng = pyro.util.get_rng_state()
    elbo.loss(case.model, case.guide)
    pyro.util.set_rng_state(rng)
    trace = poutine.trace(case.guide).get_trace()
    assert trace.nodes["b"]["value"].shape == (3,)


def test_control_flow_by_other_things_is_found_soon():
    step = [0]
    case, elbo = hidden(lambda n: step[0] >= 20), topk()
    for step[0] in range(20 + PERIOD):
        elbo.loss(case.model, case.guide)
        assert step[0] >= 20 or treatments(elbo)["b"] == "exact"
    assert treatments(elbo)["b"] == NO_BASELINE


def test_few_steps_are_watched(monkeypatch):
    from pyro_rb.infer import outside_plates

    watched = []

    class Provenance(outside_plates.Provenance):
        def __enter__(self):
            watched.append(step)
            return super().__enter__()

    monkeypatch.setattr(outside_plates, "Provenance", Provenance)
    for make, expected in ((siblings, [0, 0, 1, 17, 33]), (in_one_plate, [0, 1])):
        elbo, case = topk(), make(2)
        watched.clear()
        for step in range(40):
            elbo.loss(case.model, case.guide)
        assert watched == expected


def in_one_plate(num):
    """All costs are in the plate of the site, and have the dim of its slots."""

    def model():
        with outer(num), inner():
            observe(pyro.sample("b", dist.Categorical(torch.ones(5))).double())

    def guide():
        with outer(num), inner():
            pyro.sample("b", dist.Categorical(logits=copies("q", num, 2, 5)))

    return Case(model, guide)


def test_a_structure_is_used_when_it_is_first_seen():
    """Else draws that lead to a rare one would be rarer in the gradient."""

    def program():
        for i in range(20):
            b = pyro.sample(f"b_{i}", dist.Bernoulli(0.6), infer={"topk": 0})
            if b == 0:
                break

    elbo = topk()
    for seed in range(30):
        pyro.set_rng_seed(seed)
        (pair,) = elbo._get_traces(program, program, (), {})
        pyro.set_rng_seed(seed)
        assert list(pair[1].nodes) == list(poutine.trace(program).get_trace().nodes)


@pytest.mark.parametrize("use", ["zeros_like", "checked", "type", "one_hot", "asserted"])
def test_what_is_no_dependence(use):
    uses = {
        "zeros_like": lambda d: 0.0 * torch.zeros_like(d[..., :1]),
        "checked": lambda d: 1.0 if torch.isnan(d).any() else 2.0,
        "type": lambda d: torch.ones(2).to(d),
        "one_hot": lambda d: (torch.nn.functional.one_hot(d.long(), 4).shape[-1]) * torch.ones(2),
        "asserted": _asserted,
    }

    def model():
        with inner():
            d = pyro.sample("d", dist.Categorical(torch.ones(4)))
            observe(d.double(), "y")
        with pyro.plate("other", 2):
            loc = uses[use](d.double())
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.zeros(2))

    def guide():
        with inner():
            pyro.sample("d", dist.Categorical(logits=table("q", 2, 4)))

    elbo = topk()
    elbo.loss(model, guide)
    assert treatments(elbo)["d"].startswith("top-k")


def test_the_size_of_a_table_is_no_use():
    """It is read from the rates, which depend on a site before."""

    def guide():
        a = pyro.sample("a", dist.Categorical(logits=table("q", 3)))
        pyro.sample("b", dist.Poisson(1.0 + a))
        pyro.sample("c", dist.Binomial(torch.tensor(9.0), (1.0 + a) / 4.0))
        pyro.sample("d", dist.Categorical(torch.ones(5)))

    elbo = topk(k=2)
    elbo.loss(guide, guide)
    assert {site: treatment.split(",")[0] for site, treatment in treatments(elbo).items()} == {
        "a": "exact", "b": "top-k", "c": "top-k", "d": "top-k"
    }


def _asserted(d):
    assert (d >= 0).all()
    return torch.zeros(2)


def test_sums_over_particles_are_refused():
    case = in_a_plate(lambda b: b.sum())
    elbo = topk(k=0, num_particles=2, vectorize_particles=True)
    message = "Site 'x' depends on a sum over all of guide site 'b'.*vectorize_particles=False"
    for method in ("loss", "loss_and_grads", "differentiable_loss"):
        with pytest.raises(ValueError, match=message):
            getattr(elbo, method)(case.model, case.guide)
    topk(num_particles=2).loss(case.model, case.guide)


@pytest.mark.parametrize("how", ["parallel", "sequential"])
def test_annotated_sites_have_a_single_draw_too(how):
    case, plain = (in_a_plate(lambda b: b.sum(), infer=infer) for infer in ({"enumerate": how}, {"topk": 0}))
    steps = []
    for one in (case, plain):
        elbo = topk()
        elbo.loss(one.model, one.guide)
        steps.append(_step(elbo, one, seed=1))
        assert treatments(elbo) == {"b": NO_BASELINE}
    torch.testing.assert_close(*steps)
