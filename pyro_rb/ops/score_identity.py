# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""
When does a score have mean zero?

Path gradients drop the term ``d log q(z; phi) / d phi`` at fixed ``z``. Its mean is the derivative of the
total mass, which is zero, less the mass that enters where an end of the support moves. So it is zero where
the support stays and the derivative of the density can be integrated, as for Gamma and Beta at any
concentration, although their densities may be infinite at the ends. A learned transform moves every point; no
mass leaves the real line if its tails are light, nor the positive numbers if zero stays. Besides, ``log_prob``
must be the log density of the draw at any value. As neither is seen from outside, there are lists of what is
known, and nothing is evaluated.
"""

from functools import partial
from typing import Any, Iterable, Iterator, List, Optional, Set, Tuple

import torch
from torch.distributions import (
    AffineTransform,
    Distribution,
    MultivariateNormal,
    Transform,
    constraints,
)

from pyro_rb.ops import zuko
from pyro_rb.ops.family import is_exactly
from pyro_rb.ops.zuko import as_transformed

# Classes are told by name and home, as nothing of Pyro is imported here.
_HOMES = ("torch.distributions.", "pyro.distributions.", "torch.nn.", "pyro.nn.", "zuko.")
# A subclass from elsewhere is known by its parent if it has none of its own.
_METHODS = {"__call__", "rsample", "log_prob", "score_parts", "icdf"}

_AROUND = set(
    """AffineBeta BoxUniform DiagNormal ExpandedDistribution Independent IndependentHMM InverseGamma
    LogNormal LogisticNormal Pareto RelaxedBernoulli RelaxedOneHotCategorical TransformedDistribution
    Weibull""".split()
)
_GAUSSIAN = {"LowRankMultivariateNormal", "MultivariateNormal", "Normal"}
# Their support stays, and tails on the real line are light.
_LIGHT = _GAUSSIAN | set(
    """AsymmetricLaplace AVFMultivariateNormal Beta Chi2 ContinuousBernoulli Dirichlet Exponential FisherSnedecor
    Gamma GaussianHMM Gumbel HalfCauchy HalfNormal Kumaraswamy Laplace Logistic LogitRelaxedBernoulli
    MixtureOfDiagNormals MixtureOfDiagNormalsSharedCovariance OMTMultivariateNormal ProjectedNormal SkewLogistic
    SoftAsymmetricLaplace SoftLaplace Wishart""".split()
)
# Their support stays, but no learned transform may follow: heavy tails, or a surface.
_LAST = {"Cauchy", "ExpRelaxedCategorical", "MultivariateStudentT", "StudentT"}

_ELEMENTWISE = {"AffineTransform", "ExpTransform", "SigmoidTransform", "SoftplusTransform", "TanhTransform"}
# All that they depend on are their attributes.
_PLAIN = _ELEMENTWISE | set(
    """CholeskyTransform CorrCholeskyTransform DiscreteCosineTransform HaarTransform LowerCholeskyAffine
    OrderedTransform Permute PermutationTransform PowerTransform ReshapeTransform SimplexToOrderedTransform
    SoftclipTransform StickBreakingTransform""".split()
)
# From the real line to the real line.
_FLOWS = set(
    """AffineAutoregressive AffineCoupling BatchNorm ConditionedGeneralizedChannelPermute ConditionedHouseholder
    ConditionedSpline GeneralizedChannelPermute Householder LULinearTransform RotationTransform Spline
    SplineAutoregressive SplineCoupling""".split()
) | zuko.LAYERS | zuko.ELEMENTWISE
# Likewise, but with a density for their last draw only. Block autoregressive ones may have bounds.
_FORWARD = set(
    "BlockAutoregressive ConditionedPlanar ConditionedRadial NeuralAutoregressive Planar Radial".split()
)
# Continuous, the transforms with their slopes, and the same at each call; the noisy ones in evaluation mode.
_NOISY = {"BatchNorm", "Dropout"}
_PARTS = _FLOWS | _FORWARD | _NOISY | zuko.NETWORKS | set(
    """AutoRegressiveNN ConditionalAutoRegressiveNN ConditionalDenseNN ConditionalHouseholder ConditionalPlanar
    ConditionalRadial ConditionalSpline DenseNN ELU ELUTransform GELU Identity LeakyReLU Linear LogSigmoid LogSoftmax
    MaskedBlockLinear MaskedLinear ModuleList ReLU Sequential SiLU Sigmoid SigmoidTransform Softplus Tanh
    TanhTransform""".split()
)
# Their determinant is another one than that of their Jacobian.
_INEXACT = {"ConditionedMatrixExponential", "MatrixExponential", "Sylvester"}
# They look their draw up, or read an attribute of it.
_WITH_MEMORY = _FORWARD | set(
    "Polynomial RelaxedBernoulliStraightThrough RelaxedOneHotCategoricalStraightThrough".split()
)

# Of a normal distribution they make no heavier tails than those of an exponential, to any power.
_KEEP_TAILS = (
    _ELEMENTWISE | _FORWARD | zuko.LAYERS | {"Permute", "PermutationTransform", "SoftclipTransform"}
) - {"NeuralAutoregressive"}

_InverseTransform = type(AffineTransform(0.0, 1.0).inv)
_MEMORY = "log_prob works only on the very tensor that was drawn"
_MAYBE = "the mean of its score may not be zero"
# A constraint or None, and whether the density vanishes at all ends, faster than any power.
_Support = Tuple[Any, bool]


def base_dists(fn: Distribution) -> Iterator[Distribution]:
    """
    Yields ``fn``, its ``base_dist``, the ``base_dist`` of that, and so on.

    :param fn: any distribution, wrapped or not.

    >>> normal = torch.distributions.Normal(torch.zeros(3), 1.0)
    >>> fn = torch.distributions.Independent(normal, 1)
    >>> [type(d).__name__ for d in base_dists(fn)]
    ['Independent', 'Normal']
    """
    layer: Optional[Distribution] = fn
    while layer is not None:
        yield layer
        layer = getattr(as_transformed(layer), "base_dist", None)


def flat_transforms(fn: Distribution) -> List[Transform]:
    """
    All transforms under ``fn``, innermost first, composed ones taken apart.

    :param fn: any distribution, wrapped or not.

    >>> LogNormal = torch.distributions.LogNormal(0.0, 1.0)
    >>> [type(t).__name__ for t in flat_transforms(LogNormal)]
    ['ExpTransform']
    """
    layers = reversed(list(base_dists(fn)))
    return [part for layer in layers for part in flat_parts(getattr(as_transformed(layer), "transforms", ()))]


def flat_parts(transforms: Iterable[Any]) -> List[Any]:
    """
    :param transforms: of which composed ones are taken apart.

    >>> half = AffineTransform(0.0, 0.5)
    >>> flat_parts([torch.distributions.ComposeTransform([half, half])])
    [AffineTransform(), AffineTransform()]
    """
    return [part for t in transforms for part in _parts(t)]


def _parts(transform: Any) -> List[Transform]:
    if type(transform) is _InverseTransform:
        return [part.inv for part in reversed(_parts(transform.inv))]
    name = _name(type(transform))
    if name in ("ComposeTransform", "ComposeTransformModule"):
        return [leaf for part in transform.parts for leaf in _parts(part)]
    if name == "IndependentTransform":
        return _parts(transform.base_transform)
    parts = zuko.parts_of(transform)
    return [transform] if parts is None else flat_parts(parts)


class _Obstacle(Exception):
    pass


def score_obstacle(fn: Distribution, at_draw: bool = False) -> Optional[str]:
    """
    Why the mean of the score of ``fn`` may not be zero, or None where it is known to be zero. Do not keep the
    result: it depends on which tensors require grad, and on the mode of modules.

    The score of ``Uniform(0, b)`` with respect to ``b`` is ``-1 / b`` at every draw.

    :param fn: any distribution, wrapped or not.
    :param bool at_draw: whether the density is wanted only at the last draw, while it is known how that draw was made.

    >>> b = torch.tensor(2.0, requires_grad=True)
    >>> score_obstacle(torch.distributions.Uniform(0.0, b))
    'its support depends on a parameter'
    >>> score_obstacle(torch.distributions.Gamma(b, b)) is None
    True
    """
    try:
        _support(fn)
    except _Obstacle as obstacle:
        return str(obstacle)
    if not at_draw and any(known_name(t) in _WITH_MEMORY for t in flat_transforms(fn)):
        return _MEMORY
    return None


def _support(fn: Any) -> _Support:
    fn = as_transformed(fn)
    known = _known_class(fn)
    name = known.__name__
    if name in _LIGHT:
        return _bare(getattr(known, "support", None)), name in _GAUSSIAN
    if name in _AROUND:
        support = _support(fn.base_dist)
        for transform in flat_parts(getattr(fn, "transforms", ())):
            support = _transformed(support, transform)
        return support
    if name == "MaskedMixture":
        first, second = _support(fn.component0), _support(fn.component1)
        return first if first == second else (None, False)
    if name in ("FoldedDistribution", "MaskedDistribution"):
        _support(fn.base_dist)
    elif name == "Uniform":
        if _requires_grad(fn.low) or _requires_grad(fn.high):
            raise _Obstacle("its support depends on a parameter")
        return _bare(fn.support), False
    elif name == "Delta":
        raise _Obstacle("a Delta has no score identity")
    elif name not in _LAST:
        raise _not_known(type(fn))
    return None, False


def _transformed(support: _Support, transform: Any) -> _Support:
    space, vanishes = support
    is_inverse = type(transform) is _InverseTransform
    inner = transform.inv if is_inverse else transform
    name = _name(type(inner))
    is_flow = name in _FLOWS | _FORWARD
    if is_flow:
        _check_parts(inner, set())
        if is_inverse and zuko.is_bisected(inner):
            raise _Obstacle(f"{_MAYBE}: it is inverted by bisection, between bounds where draws may end")
    elif name not in _PLAIN:
        raise _not_known(type(inner))
    domain = _bare(transform.domain)
    if domain is not space and domain is not constraints.real:
        raise _Obstacle(f"{_MAYBE}: {name} of another support than its domain")
    is_learned = is_flow or any(map(_requires_grad, vars(inner).values()))
    stays = not is_learned or space is constraints.real or name == "PowerTransform"
    after = _bare(transform.codomain) if domain is space else None
    if name == "AffineTransform":
        stays = stays or vanishes
        if space is constraints.positive:
            is_zero = _is(inner.loc, 0)
            stays = stays or is_zero or not (is_inverse or _requires_grad(inner.loc))
            after = space if is_zero else None
    elif name in ("Permute", "ReshapeTransform"):
        after = space
    elif name == "BlockAutoregressive":
        stays = vanishes
    elif name in zuko.LAYERS:
        stays = stays or vanishes
    if not stays:
        raise _Obstacle(f"{_MAYBE}: learned {name}")
    return after, vanishes and name in _KEEP_TAILS


def _check_parts(part: Any, seen: Set[int]) -> None:
    """What computes the parameters of a flow has to be known down to the last function."""
    part = part.func if isinstance(part, partial) else part
    part = getattr(part, "__self__", part)
    if id(part) in seen:
        return
    seen.add(id(part))
    cls = part if isinstance(part, type) else type(part)
    name = _name(cls)
    if name not in _PARTS:
        raise _not_known(cls)
    if cls is part:
        return
    state = vars(part)
    if state.get("_forward_hooks") or state.get("_forward_pre_hooks") or name in _NOISY and part.training:
        raise _Obstacle(f"{_MAYBE}: {name} may differ from call to call")
    for value in (*state.values(), *state.get("_modules", {}).values()):
        if callable(value) and type(value) is not _InverseTransform:
            _check_parts(value, seen)


def _known_class(fn: Distribution) -> type:
    """The class of torch or Pyro by which ``fn`` draws, and computes its density."""
    if is_exactly(fn, MultivariateNormal):  # GPyTorch's as well
        return MultivariateNormal
    if _METHODS.isdisjoint(vars(fn)):
        for cls in type(fn).__mro__:
            if cls.__module__.startswith(_HOMES):
                return cls
            if not _METHODS.isdisjoint(vars(cls)):
                break
    raise _not_known(type(fn))


def known_name(part: Any) -> Optional[str]:
    """
    The name of the class of a part of a distribution, if it is of PyTorch or Pyro.

    >>> known_name(torch.nn.ReLU())
    'ReLU'
    """
    return _name(type(part))


def _name(cls: type) -> Optional[str]:
    return cls.__name__ if cls.__module__.startswith(_HOMES) else None


def _not_known(cls: type) -> _Obstacle:
    if _name(cls) in _INEXACT:
        return _Obstacle("its log_abs_det_jacobian is not that of its Jacobian")
    if _name(cls) in _WITH_MEMORY:
        return _Obstacle(_MEMORY)
    package = cls.__module__.partition(".")[0]
    owner = "" if _name(cls) or package in ("__main__", "builtins") else f" of {package}"
    return _Obstacle(f"{_MAYBE}: {cls.__name__}{owner} is not known")


def _bare(space: Any) -> Any:
    while isinstance(space, constraints.independent):
        space = space.base_constraint
    if _is(getattr(space, "lower_bound", None), 0) and _is(getattr(space, "upper_bound", None), 1):
        return constraints.unit_interval
    return constraints.positive if space is constraints.nonnegative else space


def _is(value: object, number: int) -> bool:
    return isinstance(value, (int, float)) and value == number


def _requires_grad(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
