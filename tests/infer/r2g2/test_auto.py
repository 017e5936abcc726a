# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Pre-activations drawn row by row, where rows are proven to have no effect on one another."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_rb.infer import R2G2_ELBO, row_check
from tests.infer.r2g2.models import fixed, reasons, spent, treatments
from tests.support.cases import Case
from tests.support.common import assert_unbiased
from tests.support.elbo_contract import assert_same, draw_gradients, evaluate

pytestmark = pytest.mark.slow

ROWS, INPUTS, UNITS = 6, 9, 8
LAYERS = ("w1_unconstrained", "w2_unconstrained")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def sample_weights(name, *shape):
    return pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))


def network(hidden=None, last=None, x=None):
    """Two layers with one output; ``hidden`` and ``last`` are applied to the results."""
    x = fixed(ROWS, INPUTS, seed=1) if x is None else x
    h = F.linear(x, sample_weights("w1", UNITS, x.shape[-1])).tanh()
    h = h if hidden is None else hidden(h)
    f = F.linear(h, sample_weights("w2", 1, UNITS)).squeeze(-1)
    return f if last is None else last(f)


def observe(f, plate="data"):
    with pyro.plate(plate, len(f)):
        pyro.sample(f"y_{plate}", dist.Normal(f, 0.5), obs=0.5 * fixed(len(f), seed=2))


def behind(**layers):
    return lambda: observe(network(**layers))


def with_guide(model):
    return Case(model, AutoNormal(model, init_scale=0.3))


def is_local(elbo):
    found = treatments(elbo)
    return [found[name] == "local" for name in LAYERS if name in found]


# -- Which models are proven ---------------------------------------------------------------


def penalized(penalty, plate=False):
    def model():
        f = network()
        observe(f)
        if plate:
            with pyro.plate("penalty", ROWS):
                pyro.factor("factor", penalty(f))
        else:
            pyro.factor("factor", penalty(f))

    return model


def outputs():
    f = F.linear(fixed(ROWS, INPUTS, seed=1), sample_weights("w1", 3, INPUTS)).tanh()
    with pyro.plate("data", ROWS):
        pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=fixed(ROWS, 3))


def outputs_in_a_plate():
    f = F.linear(fixed(ROWS, INPUTS, seed=1), sample_weights("w1", ROWS, INPUTS)).tanh()
    with pyro.plate("data", ROWS, dim=-2), pyro.plate("outputs", ROWS, dim=-1):
        pyro.sample("y", dist.Normal(f, 0.5), obs=fixed(ROWS, ROWS))


def latent_of_each_row():
    f = network()
    with pyro.plate("data", ROWS):
        z = pyro.sample("z", dist.Normal(f, 0.5))
        pyro.sample("y", dist.Normal(z.tanh(), 0.5), obs=torch.ones(ROWS))


def masked_and_scaled():
    f = network()
    with poutine.scale(scale=3.0), poutine.mask(mask=torch.arange(ROWS) > 2):
        observe(f)


def two_sites():
    f = network()
    observe(f)
    observe(2.0 * f, "again")


def with_dropout():
    observe(network(hidden=lambda h: F.dropout(h, 0.3)))


APART = {
    "network": behind(),
    "layer_norm": behind(hidden=lambda h: F.layer_norm(h, (UNITS,))),
    "softmax_of_units": behind(hidden=lambda h: h.softmax(-1)),
    "dropout": with_dropout,
    "outputs": outputs,
    "outputs_in_a_plate": outputs_in_a_plate,
    "latent": latent_of_each_row,
    "masked_and_scaled": masked_and_scaled,
    "two_sites": two_sites,
    "factor_of_rows": penalized(lambda f: -f.square(), plate=True),
    "factor_of_others": penalized(lambda f: torch.ones(())),
    "changed_in_place": behind(last=lambda f: (1.0 * f).mul_(2.0)),
}


def batch_norm(x):
    return F.batch_norm(x, None, None, training=True)


def contrastive():
    z = F.linear(fixed(ROWS, INPUTS, seed=1), sample_weights("w1", UNITS, INPUTS))
    with pyro.plate("data", ROWS):
        pyro.sample("y", dist.Categorical(logits=z @ z.mT), obs=torch.arange(ROWS))


def sequences():
    """Two positions of three sequences, in rows."""
    observe(network().reshape(3, 2).mean(-1))


def ensemble():
    f = network(x=fixed(ROWS, INPUTS, seed=1).repeat(4, 1)).reshape(4, ROWS)
    with pyro.plate("data", ROWS):
        pyro.factor("y", dist.Normal(f, 0.5).log_prob(fixed(ROWS, seed=2)).logsumexp(0))


def other_plate():
    f = network()
    observe(f)
    observe(f[:3], "others")


def one_event():
    f = network()
    pyro.sample("y", dist.Normal(f, 0.5).to_event(1), obs=fixed(ROWS, seed=2))


def attention(h):
    return F.scaled_dot_product_attention(h[None], h[None], h[None])[0]


GRAPH = (torch.eye(ROWS) + torch.eye(ROWS).roll(1, 0)).double() / 2

#: Both layers are behind nothing that keeps rows apart.
COUPLED = {
    "batch_norm_at_the_end": behind(last=lambda f: batch_norm(f.unsqueeze(-1)).squeeze(-1)),
    "softmax_over_rows": behind(last=lambda f: f.log_softmax(0)),
    "contrastive": contrastive,
    "sequences": sequences,
    "ensemble": ensemble,
    "factor": penalized(lambda f: -f.mean().square()),
    "other_plate": other_plate,
    "one_event": one_event,
    "pairs": behind(last=lambda f: f + f.reshape(3, 2).flip(-1).reshape(ROWS) ** 2),
    "one_pair": behind(last=lambda f: f + (torch.arange(ROWS) == 1) * f[0]),
    "graph_at_the_end": behind(last=lambda f: GRAPH @ f),
    "other_order": behind(last=lambda f: f.flip(0)),
    "weak": behind(last=lambda f: f * (1.0 + 1e-4 * f.mean())),
    "in_place": behind(last=lambda f: (1.0 * f).sub_(f.mean())),
    # Without a derivative that shows it.
    "detached": behind(last=lambda f: f * f.detach().square().mean().sqrt()),
    "number": behind(last=lambda f: f - f.median().item()),
    "sorted": behind(last=lambda f: f.sort().values),
}
#: Nor shows it in each draw.
SOMETIMES = {
    "maximum": behind(last=lambda f: f + (torch.arange(ROWS) == f.argmax())),
    "branch": behind(last=lambda f: f.exp() if f.mean() > 0.3 else f),
    "clipped": behind(last=lambda f: f + (f.detach().sum() - 3.0).clamp(min=0.0)),
}


@pytest.mark.parametrize("name", APART)
def test_rows_that_are_apart_are_drawn_one_by_one(name):
    """From the first step on, with the numbers that local mode would have drawn."""
    case = with_guide(APART[name])
    evaluate(spent(case), case)
    found = []
    for mode in ("auto", "local"):
        elbo = R2G2_ELBO(pre_activations=mode)
        pyro.set_rng_seed(0)
        found.append([evaluate(elbo, case) for _ in range(3)])
        assert is_local(elbo) and all(is_local(elbo))
        assert ("rows are independent" in reasons(elbo)[LAYERS[0]]) == (mode == "auto")
    assert_same(*found)


@pytest.mark.parametrize("name", COUPLED)
def test_rows_that_are_coupled_share_their_weights(name):
    """From the first step on: with the gradients of shared mode."""
    case = with_guide(COUPLED[name])
    evaluate(spent(case), case)
    for seed in range(3):
        elbo = R2G2_ELBO(pre_activations="auto")
        assert_same(evaluate(elbo, case, seed=seed), evaluate(R2G2_ELBO(), case, seed=seed))
        assert is_local(elbo) and not any(is_local(elbo))
        assert "not local: " in reasons(elbo)[LAYERS[0]]


def test_one_pair_of_rows_is_found_at_once():
    """Whether or not the two are in the same half: by its derivative."""
    case = with_guide(COUPLED["one_pair"])
    for seed in range(12):
        elbo = R2G2_ELBO(pre_activations="auto")
        evaluate(elbo, case, seed=seed)
        assert not any(is_local(elbo))


@pytest.mark.parametrize("name", SOMETIMES)
def test_coupling_that_is_not_there_in_each_draw_is_found_in_the_first_steps(name):
    case = with_guide(SOMETIMES[name])
    pyro.set_rng_seed(0)
    for _ in range(5):
        elbo = R2G2_ELBO(pre_activations="auto")
        for _ in range(16):
            evaluate(elbo, case)
        assert not any(is_local(elbo))


def test_reasons():
    for name, reason in (("factor", "rows have an effect on one another"), ("sequences", f"no plate of {ROWS} rows")):
        case, elbo = with_guide(COUPLED[name]), R2G2_ELBO(pre_activations="auto")
        evaluate(elbo, case)
        assert reasons(elbo)[LAYERS[0]].endswith(f"not local: {reason}")


HALF_COUPLED = {
    "batch_norm": behind(hidden=batch_norm),
    "graph": behind(hidden=lambda h: GRAPH @ h),
    "attention": behind(hidden=attention),
}


@pytest.mark.parametrize("name", HALF_COUPLED)
def test_layer_behind_a_coupling_is_local(name):
    case, elbo = with_guide(HALF_COUPLED[name]), R2G2_ELBO(pre_activations="auto")
    num_samples = 250 if name == "batch_norm" else 50
    ours = draw_gradients(elbo, case, num_samples, seed=0)
    assert is_local(elbo) == [False, True]
    plain = draw_gradients(spent(case), case, num_samples, seed=1)
    assert_unbiased(ours, independent=plain, detect=1.0)


def test_particles():
    case = with_guide(APART["network"])
    elbo, local = (R2G2_ELBO(num_particles=3, pre_activations=mode) for mode in ("auto", "local"))
    assert_same(evaluate(elbo, case, seed=0), evaluate(local, case, seed=0))
    assert all(is_local(elbo))


def test_one_row():
    case = with_guide(lambda: observe(network(x=fixed(1, INPUTS, seed=1)) ** 2))
    elbo = R2G2_ELBO(pre_activations="auto")
    evaluate(elbo, case)
    assert all(is_local(elbo))


# -- When it is checked ----------------------------------------------------------------------


def counted(model):
    runs = []

    def run():
        runs.append(1)
        model()

    return run, runs


def runs_of_steps(elbo, case, runs, num_steps):
    found = []
    for _ in range(num_steps):
        del runs[:]
        evaluate(elbo, case)
        found.append(len(runs))
    return found


def test_checks_are_made_at_the_first_steps_and_now_and_then():
    model, runs = counted(APART["network"])
    case = with_guide(model)
    # One run, and two more with other noise in one half of the rows and in the other.
    assert runs_of_steps(R2G2_ELBO(pre_activations="auto"), case, runs, 9) == [3, 3, 1, 3, 1, 1, 1, 3, 1]
    model, runs = counted(COUPLED["factor"])
    case = with_guide(model)
    assert runs_of_steps(R2G2_ELBO(pre_activations="auto"), case, runs, 4) == [2, 1, 1, 1]


def by_functions(norm):
    return lambda h: h - h.mean(0) if norm.training else h


def by_flag(norm):
    return lambda h: F.batch_norm(h, norm.running_mean, norm.running_var, training=norm.training)


@pytest.mark.parametrize("forward", [None, by_functions, by_flag])
def test_training_mode(forward):
    """``train()`` and ``eval()`` of a module that the loss knows nothing of."""
    norm = torch.nn.BatchNorm1d(UNITS, affine=False)
    if forward is not None:
        norm.forward = forward(norm)
    model, runs = counted(behind(hidden=norm))
    norm.eval()
    case, elbo = with_guide(model), R2G2_ELBO(pre_activations="auto")
    for is_training in (False, True, False, True):
        norm.train(is_training)
        for _ in range(3):
            evaluate(elbo, case)
            assert is_local(elbo) == [not is_training, True]
    assert runs_of_steps(elbo, case, runs, 1) == [1]


def test_other_number_of_rows():
    """Each is checked at its first step, here the one where rows of an odd number are coupled."""
    size = [4]

    def model():
        f = network(x=fixed(size[0], INPUTS, seed=1))
        observe(f * (1.0 + (size[0] % 2) * f.mean()))

    model, runs = counted(model)
    case, elbo = with_guide(model), R2G2_ELBO(pre_activations="auto")
    for size[0] in (4, 6, 5, 4, 5):
        evaluate(elbo, case)
        assert is_local(elbo) == [size[0] % 2 == 0] * 2


def test_coupling_that_no_function_shows():
    """A number that changes: it is found at the next check."""
    strength = torch.zeros(())
    case, elbo = with_guide(behind(last=lambda f: f * (1.0 + strength * f.mean()))), R2G2_ELBO(pre_activations="auto")
    for step in range(1, 9):
        strength.fill_(float(step >= 6))
        evaluate(elbo, case)
        assert all(is_local(elbo)) == (step < 8)


def test_functions_that_change_at_each_step(monkeypatch):
    monkeypatch.setattr(row_check, "MAX_CASES", 3)
    step = [0]

    def last(f):
        for _ in range(step[0]):
            f = f.tanh()
        return f

    case, elbo = with_guide(behind(last=last)), R2G2_ELBO(pre_activations="auto")
    for step[0] in range(5):
        evaluate(elbo, case)
        assert all(is_local(elbo)) == (step[0] <= 3)
    assert "not local: not the same functions from step to step" in reasons(elbo)[LAYERS[0]]


def test_functions_that_change_at_each_run():
    runs = []

    def last(f):
        runs.append(1)
        for _ in range(len(runs)):
            f = f.tanh()
        return f

    case, elbo = with_guide(behind(last=last)), R2G2_ELBO(pre_activations="auto")
    for _ in range(3):
        evaluate(elbo, case)
        assert not any(is_local(elbo))


def test_model_that_fails_at_other_noise():
    runs = []

    def last(f):
        runs.append(1)
        if len(runs) > 1:
            raise KeyError("of the model")
        return f

    case = with_guide(behind(last=lambda f: f))
    case.model = behind(last=last)
    with pytest.raises(KeyError, match="of the model"):
        evaluate(R2G2_ELBO(pre_activations="auto"), case)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("name", ["network", "factor"])
def test_copies_go_on(name, clone):
    case = with_guide({**APART, **COUPLED}[name])
    elbo = R2G2_ELBO(pre_activations="auto")
    for _ in range(3):
        evaluate(elbo, case)
    assert_same(evaluate(clone(elbo), case, seed=0), evaluate(elbo, case, seed=0))


def test_losses_and_schedules_are_not_checked():
    model, runs = counted(APART["network"])
    case = with_guide(model)
    elbo = R2G2_ELBO(pre_activations="auto", num_steps=1)
    evaluate(elbo, case)
    del runs[:]
    elbo.loss(case.model, case.guide)
    evaluate(elbo, case)
    assert len(runs) == 2 and not any(is_local(elbo))
