# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Measures several losses side by side at one state of the parameters."""

import time
from typing import Any, Dict, List, Optional

import torch
from pyro.util import set_rng_seed
from torch import Tensor
from tqdm import tqdm

from pyro_rb.diagnostics import stats
from pyro_rb.diagnostics.bias import coordinate_name
from pyro_rb.diagnostics.gradients import GradientSampler
from pyro_rb.diagnostics.report import LossResult

# Draws are gathered in about this many blocks; the spread of the blocks' variances gives
# the standard error of the variance.
NUM_BLOCKS = 20


class Gauge:
    """Measures one loss at one state."""

    def __init__(self, name: str, sampler: GradientSampler) -> None:
        self.name = name
        self.sampler = sampler
        self.failure: Optional[Exception] = None
        self.moments = stats.RunningMoments()
        self.difference = stats.RunningMoments()  # to the reference, draw by draw
        self.losses = stats.RunningMoments()
        self.seconds: List[float] = []
        self.deviations: List[float] = []  # of each gradient from the mean, squared
        self.block = stats.RunningMoments()
        self.block_variances: List[Tensor] = []  # each [number of parameters]
        self.sizes = [tensor.numel() for tensor in sampler.tensors]
        self.cuda = any(tensor.is_cuda for tensor in sampler.tensors)

    def draw(self, seed: int) -> Tensor:
        """One gradient as a vector ``[P]``; remembers its time and loss."""
        set_rng_seed(seed)
        self._wait()
        start = time.perf_counter()
        loss = self.sampler.step()
        self._wait()
        self.seconds.append(time.perf_counter() - start)
        self.losses.update(torch.tensor(loss, dtype=torch.double, device="cpu"))
        gradients = self.sampler.collect()
        vector = torch.cat([g.reshape(-1).to(gradients[0].device) for g in gradients])
        if not vector.isfinite().all():
            bad = [n for n, g in zip(self.sampler.names, gradients) if not g.isfinite().all()]
            raise ValueError(f"the gradient of {bad[0]!r} is not finite")
        return vector

    def update(self, vector: Tensor, reference: Tensor) -> None:
        self.deviations.append(self.block.update(vector).item())
        self.difference.update(vector - reference)

    def end_block(self) -> None:
        variance = self.block.variance.split(self.sizes)
        self.block_variances.append(torch.stack([v.sum() for v in variance]))
        self.moments.merge(self.block)
        self.block = stats.RunningMoments()

    def reset(self) -> None:
        """Forgets what was measured, not what the loss has learned."""
        self.losses, self.seconds = stats.RunningMoments(), []

    def result(self, reference: "Gauge", threshold: float) -> LossResult:
        if self.failure is not None:
            return LossResult(self.name, error=one_line(self.failure))
        result = LossResult(self.name, reference=self is reference)
        by_parameter = torch.stack(self.block_variances)  # [B, number of parameters]
        total = by_parameter.sum(1)
        result.variance = self.moments.variance.sum().item()
        result.variance_ratio, result.variance_ratio_error = stats.ratio_of_means(
            total, torch.stack(reference.block_variances).sum(1)
        )
        if result.variance > 0:
            shares = by_parameter.sum(0) / total.sum()
            result.variance_shares = dict(zip(self.sampler.names, shares.tolist()))
        deviations = torch.tensor(self.deviations, dtype=torch.double, device="cpu")
        if len(deviations) >= 100:
            result.tail_share = stats.tail_share(deviations)
        seconds = torch.tensor(self.seconds, dtype=torch.double, device="cpu")
        base = torch.tensor(reference.seconds, dtype=torch.double, device="cpu")
        result.seconds = stats.median_and_error(seconds)[0]
        result.time_ratio, result.time_ratio_error = stats.median_and_error(seconds / base)
        result.cost_ratio = result.variance_ratio * result.time_ratio
        result.loss = self.losses.mean.item()
        result.loss_error = self.losses.standard_error.item()
        if not result.reference:
            self._add_bias(result, reference, threshold)
        return result

    def _add_bias(self, result: LossResult, reference: "Gauge", threshold: float) -> None:
        largest = max(self.moments.rms.max().item(), reference.moments.rms.max().item())
        dtype = max((t.dtype for t in self.sampler.tensors), key=lambda d: torch.finfo(d).eps)
        test = stats.MeanTest(
            self.difference.mean,
            self.difference.standard_error,
            self.difference.count,
            stats.rounding_error(largest, dtype),
        )
        result.bias_z, result.bias_threshold = test.max_abs_z, threshold
        worst = int(test.z.abs().argmax())
        result.bias_at = self._coordinate(worst)
        result.biased = result.bias_z > threshold
        size = reference.moments.rms.square().sum().sqrt().item()
        if size > 0:
            result.bias_size = abs(test.difference[worst].item()) / size
            result.detectable_bias = test.detectable_bias(threshold).max().item() / size

    def _coordinate(self, index: int) -> str:
        for name, tensor in zip(self.sampler.names, self.sampler.tensors):
            if index < tensor.numel():
                return coordinate_name(name, tensor.shape, index)
            index -= tensor.numel()
        raise IndexError(index)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def measure(
    gauges: List[Gauge], burn_in: List[int], draws: List[int], bar: tqdm, warned: "WarningLog"
) -> None:
    """
    Draws from all gauges in turn. One that fails is left out from there on; if it is the
    first, the reference, that is the end.
    """
    reference = gauges[0]
    block_size = max(2, len(draws) // NUM_BLOCKS)
    for i, seed in enumerate(burn_in + draws):
        if i == len(burn_in):
            for gauge in gauges:
                gauge.reset()
        vectors: Dict[str, Tensor] = {}
        live = [gauge for gauge in gauges if gauge.failure is None]
        turn = i % len(live)  # no loss always runs on another's warm cache
        for gauge in live[turn:] + live[:turn]:
            try:
                vectors[gauge.name] = gauge.draw(seed)
            except Exception as error:
                gauge.sampler.clear()
                gauge.failure = error
                if gauge is reference:
                    return
            warned.collect(gauge.name)
        bar.update()
        if i < len(burn_in):
            continue
        drawn = i - len(burn_in) + 1
        for gauge in live:
            if gauge.failure is None:
                gauge.update(vectors[gauge.name], vectors[reference.name])
                # A last block of one draw would have no variance.
                if drawn == len(draws) or (
                    drawn % block_size == 0 and len(draws) - drawn >= block_size
                ):
                    gauge.end_block()


class WarningLog:
    """Warnings raised while losses run, each kept once."""

    def __init__(self, log: List[Any]) -> None:
        self.seen: Dict[str, None] = {}
        self._log = log

    def collect(self, source: str) -> None:
        for item in self._log:
            # As Python does by default: deprecations concern developers.
            if not issubclass(item.category, (DeprecationWarning, PendingDeprecationWarning)):
                self.seen[f"{source}: {one_line(item.message)}"] = None
        self._log.clear()


def one_line(error: Any) -> str:
    """An exception or warning, with its type if an exception, on one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, Warning):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
