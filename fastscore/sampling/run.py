"""What all samplers share: the state they yield, the checks at their door, and a run, which keeps
what was checked."""

import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from fastscore import backend, direct, random
from fastscore.losses.projections import check_score
from fastscore.messages import printed, shown
from fastscore.modes import evaluated
from fastscore.ops import checks
from fastscore.ops.noisy_update_functions import update
from fastscore.sampling.score import explain, prepared, single_values
from fastscore.scalars import RUN, offset
from fastscore.schedules import step_size_from_lr
from fastscore.tensors import dense

# σ_1 > ... > σ_L, as it is given.
Ladder = torch.Tensor | Sequence[float]

LARGEST = torch.finfo(torch.float32).max

# Who is shown the first score of the run that begins: `sample` and `states`, which may read on the
# host.
WATCH = contextvars.ContextVar("watch", default=None)


@printed
class State(NamedTuple):
    """What every sampler yields.

    level: number of the noise level just done (in annealed_langevin, the number of levels after the
        last denoise).
    sigma: the noise at which x now stands; 0 where there are no levels, and after a last denoise.
    x: the samples, (B, *); a sampler never writes into them again.
    step: updates done so far, which is the noise key's step of the next one: the same call with
        x=state.x and start=state.step goes on bit for bit.
    diagnostics: None, or a dict of (B,) tensors.
    """

    level: int
    sigma: float
    x: torch.Tensor
    step: int
    diagnostics: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Run:
    """The fixed part of one run of a sampler, checked when it began."""

    op: str
    given: Callable  # the score as it was given
    call: Callable  # and as it is called
    key: random.Key
    first_sample: int
    size: int  # elements per sample
    root_temperature: float
    project: Callable[..., Tensor] | None
    diagnostics: bool
    backend: str
    door: Any = None  # straight to the kernels
    watch: Any = None

    def projected(self, x: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        """x, or what the caller's `project` makes of it."""
        if self.project is None:
            return x
        y = self.project(x, sigma, step)
        checks.check_like(self.op, "the result of project", y, x)
        return y

    def value(self, x: torch.Tensor, *sigma: torch.Tensor) -> Any:
        """What the score returns for x, unchecked."""
        try:
            return self.call(x, *sigma)
        except (RuntimeError, IndexError, ValueError) as error:
            explain(self.op, self.given, x, error)
            raise

    def score(self, x: torch.Tensor, *sigma: torch.Tensor) -> torch.Tensor:
        """The score of x, in x's dtype; sigma is (B,), or not there for a score of x alone."""
        s = self.value(x, *sigma)
        if not (
            type(s) is type(x) is torch.Tensor
            and s.dtype == x.dtype
            and dense(s)
            and s.shape == x.shape
            and s.device == x.device
        ):
            self._check_score(s, x)
        if self.watch is not None:
            self.watch.see(s, *sigma)

        # Under autocast a score has another dtype.
        return s if s.dtype == x.dtype else s.to(x.dtype)

    def _check_score(self, s, x):
        if x.dim() == 1 and isinstance(s, torch.Tensor) and s.shape != x.shape:
            found = f"got {tuple(s.shape)} for x{single_values(x)}"
            raise ValueError(f"{self.op}: score must have the shape of x; {found}")
        check_score(self.op, s, x, "score")
        checks.check_as_real(self.op, "score", s, x)

    def noisy_update(
        self,
        x: torch.Tensor,
        direction: torch.Tensor,
        drift: float | torch.Tensor,
        diffusion: float | torch.Tensor,
        step: int,
        stream: int = random.LANGEVIN,
    ) -> torch.Tensor:
        """x + a d + b z: the op, whose coefficients are not looked at on the host where they come
        from the state."""
        if self.door is not None:
            _, seed, _, _, first = self.key
            y = self.door.noisy_update(
                direct.TERMS, x, direction, drift, diffusion, seed, step, stream, first, None
            )
            if y is not None:
                return y

        key, *numbers = self.key.at(step, stream)
        return update(x, direction, drift, diffusion, key, tuple(numbers), self.backend)

    def langevin_coefficients(self, e: float | torch.Tensor) -> tuple[Any, Any]:
        """Drift ε/2 and diffusion √(T ε)."""
        root = e.sqrt() if isinstance(e, torch.Tensor) else math.sqrt(e)
        return 0.5 * e, root * self.root_temperature

    def norms(self, x: torch.Tensor, s: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """‖x‖ and ‖s‖ of each sample; None unless asked for."""
        if not self.diagnostics:
            return None
        return {"x_norm": norm(x), "score_norm": norm(s)}

    def diagnose(
        self, x: torch.Tensor, s: torch.Tensor, drift: Any, diffusion: Any
    ) -> dict[str, torch.Tensor] | None:
        """The norms, and the ratio of drift to noise a ‖s‖ / (b √d), of an update; None unless
        asked for."""
        if not self.diagnostics:
            return None
        found = self.norms(x, s)
        if not (isinstance(diffusion, float) and diffusion == 0):
            found["snr"] = drift * found["score_norm"] / (diffusion * math.sqrt(self.size))
        return found


def begin(
    op: str,
    score: Callable,
    x: torch.Tensor,
    *,
    temperature: float,
    project: Callable[..., Tensor] | None,
    diagnostics: bool,
    seed: int | torch.Tensor | None,
    first_sample: int,
) -> Run:
    """Check what every sampler takes; returns its `Run`."""
    for name, f in (("score", score), ("project", project)):
        if not callable(f) and (f is not None or name == "score"):
            raise TypeError(f"{op}: {name} must be callable; got {type(f).__name__}.")
    checks.check_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (B, *); got shape ().")

    first_sample = check_count(op, "first_sample", first_sample)
    size = math.prod(x.shape[1:])
    first = offset(op, first_sample, size)
    temperature = number(op, "temperature", temperature, LARGEST)
    seed = random.draw_seed() if seed is None else seed
    key = random.noise_key(op, seed, 0, random.LANGEVIN, 0, first, x.device)
    chosen = backend.choose(x.device)
    door = direct.door if chosen == "cpp" else direct.served.get(chosen)
    straight = key.tensor is None and not is_compiling()
    return Run(
        op=op,
        given=score,
        call=prepared(score, x),
        key=key,
        first_sample=first_sample,
        size=size,
        root_temperature=math.sqrt(temperature),
        project=None if project is None else evaluated(project),
        diagnostics=bool(diagnostics),
        backend=chosen,
        door=door if straight else None,
        watch=WATCH.get(),
    )


def without_gradients(sampler: Callable[..., Iterator[State]]) -> Callable[..., Iterator[State]]:
    """The generator under torch.no_grad(), which the caller's code between two states is not: as
    the decorator of that name, at a tenth of its cost per state."""

    @functools.wraps(sampler)
    def states(*arguments):
        run = sampler(*arguments)
        while True:
            enabled = torch.is_grad_enabled()
            torch._C._set_grad_enabled(False)
            try:
                state = next(run)
            except StopIteration:
                return
            finally:
                torch._C._set_grad_enabled(enabled)
            yield state

    return states


def norm(t: torch.Tensor) -> torch.Tensor:
    """‖t‖ of each sample, (B,)."""
    rows = t.flatten(1) if t.dim() > 1 else t[:, None]
    return torch.linalg.vector_norm(rows, dim=1, dtype=checks.compute_dtype(t.dtype))


def check_count(op: str, name: str, value: int, most: int | None = None) -> int:
    """The value as an int, checked."""
    value = checks.integer(op, name, value, 0)
    if most is not None and value > most:
        updates = "the updates of the whole run"
        raise ValueError(f"{op}: {name} must be at most {most}, {updates}; got {shown(value)}.")
    return value


def check_updates(op: str, name: str, value: int, levels: int = 1) -> int:
    """A number of updates, or of updates per level; beyond 2^32 of them in a run the noise would
    come again."""
    value = check_count(op, name, value)
    if value * levels > RUN:
        per = f" for {levels} levels" if levels > 1 else ""
        found = f"got {name} = {shown(value)}{per}"
        raise ValueError(f"{op}: a run has at most 2^32 updates, whose noise differs; {found}.")
    return value


def number(op: str, name: str, value: float, most: float = math.inf) -> float:
    """A finite float >= 0."""
    return checks.number(op, name, value, 0, most)


def epsilon(
    op: str,
    step_size: float | torch.Tensor | None,
    step_lr: float | torch.Tensor | None,
    x: torch.Tensor,
) -> float | torch.Tensor:
    """ε from exactly one of step_size (ε) and NCSN's step_lr (ε/2)."""
    if (step_size is None) == (step_lr is None):
        found = "neither" if step_size is None else "both"
        ways = "either step_size (ε) or step_lr (NCSN's η = ε/2)"
        raise ValueError(f"{op}: give {ways}; got {found}.")
    if step_size is None:
        return step_size_from_lr(checks.coefficient(op, "step_lr", step_lr, x, minimum=0))
    return checks.coefficient(op, "step_size", step_size, x, minimum=0)


def per_sample(sigma: float, x: torch.Tensor) -> torch.Tensor:
    """σ for each sample, (B,), as scores take it."""
    return torch.full((x.shape[0],), sigma, dtype=checks.compute_dtype(x.dtype), device=x.device)


def noiseless_update(x: torch.Tensor, s: torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """x + c s, rounded once; c a float or (B,)."""
    dtype = checks.compute_dtype(x.dtype)
    if isinstance(c, torch.Tensor):
        return (x.to(dtype) + checks.expand(c, x) * s.to(dtype)).to(x.dtype)
    if x.dtype == dtype:
        return torch.add(x, s, alpha=c)
    return torch.add(x.to(dtype), s.to(dtype), alpha=c).to(x.dtype)
