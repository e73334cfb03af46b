"""What a parameter is worth to the other objective, and how strongly EWC holds it for that.

An :class:`Importance` measures what one objective's phase did; an :class:`ImportanceWeights` turns the measure, summed
over phases, into weights of the penalty. Both work on dictionaries from parameter names to tensors: a scalar per tensor,
or a value per element.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from hbat_lightning.functional import literal_weights, proportional_weights, squared_displacement

Tensors = Mapping[str, Tensor]


class Importance(ABC):
    """Measures how important parameters are for the phase that has just ended.

    Args:
        decay: What is left of older phases when a new one is added; 1 sums over rounds, as the official code.
        per_element: A value per element instead of one, the mean, per tensor.
    """

    samples = 0
    """Training rows of the ended phase to run through at its end, one at a time; 0 is none."""

    def __init__(self, decay: float = 1.0, per_element: bool = False) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.decay, self.per_element = decay, per_element

    @abstractmethod
    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """Importance from one phase.

        Args:
            before: Parameters at its start.
            after: Parameters at its end.
            gradients: Gradients of ``samples`` rows of its data, one at a time, at its end.

        Returns:
            Per parameter a scalar, or a tensor of its shape.
        """

    def observe(self, gradients: Tensors, units: float) -> None:  # noqa: B027  most importances ignore gradients
        """See the task's gradient of one optimizer step, before any penalty is added to it.

        Args:
            gradients: Per parameter the gradient of the window's mean loss.
            units: What the mean is over: supervised tokens, or pairs.
        """

    def accumulate(self, old: Tensors | None, new: Tensors) -> dict[str, Tensor]:
        """``decay · old + new``."""
        if old is None:
            return dict(new)
        return {name: self.decay * old[name] + value for name, value in new.items()}

    def reset(self) -> None:  # noqa: B027  most importances have no state
        """Forget everything: a new run begins."""

    def state_dict(self) -> dict[str, Tensor]:
        """What has been observed in the phase in hand."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027  most importances have no state
        """Take over what had been observed."""

    def _reduce(self, value: Tensor) -> Tensor:
        return value if self.per_element else value.mean()


class DriftImportance(Importance):
    """How far the phase moved a parameter: Hbat's replacement of Fisher information (arXiv 2406.15178).

    ``I += mean((θ_end − θ_start)²)``, the mean over a tensor's elements.
    """

    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """See :meth:`Importance.measure`."""
        return {name: self._reduce(squared_displacement(before[name], value)) for name, value in after.items()}


class UniformImportance(Importance):
    """The same for all: EWC becomes a plain quadratic pull to the phase start. A control."""

    def __init__(self) -> None:
        super().__init__(decay=0.0)

    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """1 per tensor."""
        return {name: torch.ones((), device=value.device) for name, value in after.items()}


class RandomImportance(Importance):
    """Drawn anew at every switch, uniform in [0, 1): the paper's HAT-Random control.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__(decay=0.0)
        self.seed = seed
        self._draws = 0

    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """A random number per tensor."""
        generator = torch.Generator().manual_seed(self.seed + self._draws)
        self._draws += 1
        values = torch.rand(len(after), generator=generator)
        return {name: values[n].to(value.device) for n, (name, value) in enumerate(after.items())}

    def reset(self) -> None:
        """Draw from the start again."""
        self._draws = 0

    def state_dict(self) -> dict[str, Tensor]:
        """How often was drawn."""
        return {"draws": torch.tensor(self._draws)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on after that many draws."""
        self._draws = int(state["draws"])


class RunningFisher(Importance):
    """Diagonal Fisher from the gradients that training makes anyway, without extra passes.

    The mean over the phase's steps of ``n g²``, with g the gradient of the window's mean loss over n units (tokens,
    pairs). For independent units with a mean gradient of zero, n g² estimates the mean *squared* gradient of one unit,
    whatever the batch size; where the mean is not zero it is too large by ``(n - 1)`` times its square.

    Args:
        decay: See :class:`Importance`; below 1 this is online EWC (Schwarz et al. 2018).
        per_element: See :class:`Importance`.
    """

    def __init__(self, decay: float = 1.0, per_element: bool = True) -> None:
        super().__init__(decay, per_element)
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def reset(self) -> None:
        """Forget the sums."""
        self._sums, self._steps = {}, 0

    @torch.no_grad()
    def observe(self, gradients: Tensors, units: float) -> None:
        """Add ``n g²``; a step with a non-finite gradient is left out."""
        if not _finite(gradients):
            return
        for name, gradient in gradients.items():
            wide = gradient.float()
            if name in self._sums:
                self._sums[name].addcmul_(wide, wide, value=units)
            else:
                self._sums[name] = wide.square().mul_(units)
        self._steps += 1

    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """The mean over the phase; then observation starts anew."""
        zero = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in after.items()}
        means = {name: self._reduce(self._sums.get(name, zero[name]) / max(1, self._steps)) for name in after}
        self._sums, self._steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Sums and the number of steps of the phase in hand."""
        return {**{f"sum.{name}": value for name, value in self._sums.items()}, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from these sums."""
        self._steps = int(state["steps"])
        self._sums = {name.removeprefix("sum."): value for name, value in state.items() if name != "steps"}


class ExactFisher(Importance):
    """Diagonal empirical Fisher: the mean of squared gradients of a row's log-likelihood, at the end of the phase.

    The square is taken row by row, before the mean; the mean of gradients, squared, is another and much smaller thing
    (van de Ven 2025, arXiv 2502.11756). Labels are those of the data. A row's log-likelihood is the sum over its tokens
    (for pairs: minus the pair's loss); :class:`RunningFisher` is per token, so under one strength the two pull differently.
    Rows whose gradient is not finite are left out.

    Args:
        samples: Rows to run through.
        decay: See :class:`Importance`.
        per_element: See :class:`Importance`.
    """

    def __init__(self, samples: int = 64, decay: float = 1.0, per_element: bool = True) -> None:
        super().__init__(decay, per_element)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.samples = samples

    def measure(self, before: Tensors, after: Tensors, gradients: Iterator[Tensors]) -> dict[str, Tensor]:
        """See :meth:`Importance.measure`."""
        sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in after.items()}
        rows = 0
        for row in gradients:
            if not _finite(row):
                continue
            rows += 1
            for name, gradient in row.items():
                sums[name].add_(gradient.float().square())
        return {name: self._reduce(value / max(1, rows)) for name, value in sums.items()}


def _finite(gradients: Tensors) -> bool:
    norms = torch._foreach_norm(list(gradients.values()))
    return bool(torch.isfinite(torch.stack([norm.float() for norm in norms])).all())


class ImportanceWeights(ABC):
    """Turns importance into weights of the penalty."""

    @abstractmethod
    def weights(self, importance: Tensors, strength: float) -> dict[str, Tensor]:
        r"""Factors c of the penalty :math:`\sum_n c_n \lVert\theta_n - \theta^*_n\rVert^2`.

        Args:
            importance: Per parameter a scalar or a tensor of its shape.
            strength: The callback's ``strength``.

        Returns:
            fp32 tensors like the importance, with the strength in them.
        """


class LiteralWeights(ImportanceWeights):
    r"""The official code's: :math:`c_n = M \lambda^2\,\mathrm{softmax}_n(\kappa^2 I_n)`, with λ the strength, officially 1.

    One-hot in practice (see :func:`hbat_lightning.functional.literal_weights`): kept to reproduce, and to compare.

    Args:
        kappa: The official ``ewc_mse_factor``.
        max_weight: M, the official ``ewc_max_weight``; 100 is its default.
    """

    def __init__(self, kappa: float = 1e10, max_weight: float = 100.0) -> None:
        self.kappa, self.max_weight = kappa, max_weight

    def weights(self, importance: Tensors, strength: float) -> dict[str, Tensor]:
        """See :meth:`ImportanceWeights.weights`."""
        if any(value.dim() for value in importance.values()):
            raise ValueError("LiteralWeights are per tensor: use an importance with per_element false")
        shares = literal_weights(torch.stack(list(importance.values())), self.kappa)
        factor = self.max_weight * strength**2
        return {name: (factor * share).float() for name, share in zip(importance, shares, strict=True)}


class ProportionalWeights(ImportanceWeights):
    r"""Scale-free: :math:`c_n = \mathrm{strength} \cdot N I_n^{1/\tau} / \sum_m I_m^{1/\tau}`, of mean ``strength``.

    Args:
        tau: 1 is proportional to importance, large values approach a uniform pull, small ones a single tensor.
    """

    def __init__(self, tau: float = 1.0) -> None:
        if tau <= 0:
            raise ValueError(f"tau must be > 0, got {tau}")
        self.tau = tau

    def weights(self, importance: Tensors, strength: float) -> dict[str, Tensor]:
        """See :meth:`ImportanceWeights.weights`."""
        flat = torch.cat([value.flatten().double() for value in importance.values()])
        parts = torch.split(proportional_weights(flat, self.tau), [value.numel() for value in importance.values()])
        return {
            name: (strength * part).float().reshape(value.shape)
            for (name, value), part in zip(importance.items(), parts, strict=True)
        }


class RawWeights(ImportanceWeights):
    """The importance as it is, times the strength: textbook EWC with a Fisher importance (Kirkpatrick et al. 2017).

    Their penalty has a factor ½, ours has none: ``strength`` here is their λ / 2.
    """

    def weights(self, importance: Tensors, strength: float) -> dict[str, Tensor]:
        """See :meth:`ImportanceWeights.weights`."""
        return {name: (strength * value).float() for name, value in importance.items()}
