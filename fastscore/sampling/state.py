"""What all samplers share: the state they yield, the checks at their door, one look at the score and one noisy move."""

import contextvars
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastscore import backend, random
from fastscore.losses.projections import check_score
from fastscore.messages import printed, shown
from fastscore.modes import evaluated
from fastscore.ops import checks
from fastscore.ops.noisy_update import update
from fastscore.sampling.asking import asked, single
from fastscore.scalars import choice as choice
from fastscore.scalars import offset
from fastscore.schedules import step_size_from_lr

LARGEST = torch.finfo(torch.float32).max

# Who is shown the first score of the run that begins: `sample` and `states`, which may read on the host.
WATCH = contextvars.ContextVar("watch", default=None)


@printed
class State(NamedTuple):
    """What every sampler yields.

    level: number of the noise level just done (in annealed_langevin, the number of levels after the last denoise).
    sigma: the noise at which x now stands; 0 where there are no levels, and after a last denoise.
    x: the samples, (B, *); a sampler never writes into them again.
    step: updates done so far, which is the noise key's step of the next one: the same call with x=state.x and start=state.step goes on
        bit for bit.
    diagnostics: None, or a dict of (B,) tensors.
    """

    level: int
    sigma: float
    x: torch.Tensor
    step: int
    diagnostics: dict | None = None


@dataclass(frozen=True)
class Run:
    """The fixed part of one run of a sampler."""

    op: str
    score: Callable
    seed: int
    first_sample: int
    size: int   # elements per sample
    root_temperature: float
    project: Callable | None
    diagnostics: bool
    backend: str
    watch: object = None

    def look(self, x, sigma, each, step):
        """The projected x and its score; each is σ as (B,), or None for a score of x alone."""
        x = self.projected(x, sigma, step)
        return x, self.answer(x, each)

    def answer(self, x, each):
        """The score of x in x's dtype: under autocast its own is another one."""
        s = self.score(x) if each is None else self.score(x, each)
        if x.dim() == 1 and isinstance(s, torch.Tensor) and s.shape != x.shape:
            raise ValueError(f"{self.op}: score must have the shape of x; got {tuple(s.shape)} for x{single(x)}")
        check_score(self.op, s, x, "score")
        checks.check_as_real(self.op, "score", s, x)
        if self.watch is not None:
            self.watch.see(s, each)
        return s if s.dtype == x.dtype else s.to(x.dtype)

    def projected(self, x, sigma, step):
        if self.project is None:
            return x
        y = self.project(x, sigma, step)
        checks.check_like(self.op, "the result of project", y, x)
        return y

    def move(self, x, direction, drift, diffusion, step, stream=random.LANGEVIN):
        """x + a d + b z: `noisy_update`, but coefficients that come from the state are not looked at on the host."""
        return update(x, direction, drift, diffusion, *self.key(x, step, stream), self.backend)

    def key(self, x, step, stream):
        """The noise key as the raw ops take it: a tensor or None, and four numbers."""
        key, *numbers = random.noise_key(self.op, self.seed, step, stream, 0, self.first_sample * self.size, x.device)
        return key, tuple(numbers)

    def langevin_coefficients(self, epsilon):
        """Drift ε/2 and diffusion √(T ε)."""
        root = epsilon.sqrt() if isinstance(epsilon, torch.Tensor) else math.sqrt(epsilon)
        return 0.5 * epsilon, root * self.root_temperature

    def norms(self, x, s):
        """‖x‖ and ‖s‖ of each sample; None unless asked for."""
        if not self.diagnostics:
            return None
        return {"x_norm": norm(x), "score_norm": norm(s)}

    def diagnose(self, x, s, drift, diffusion):
        """The norms, and the ratio of drift to noise a ‖s‖ / (b √d), of an update; None unless asked for."""
        told = self.norms(x, s)
        if told is not None and not (isinstance(diffusion, float) and diffusion == 0):
            told["snr"] = drift * told["score_norm"] / (diffusion * math.sqrt(self.size))
        return told


def begin(op, score, x, *, temperature, project, diagnostics, seed, first_sample):
    """Check what every sampler takes; returns its `Run`."""
    for name, f in (("score", score), ("project", project)):
        if not callable(f) and (f is not None or name == "score"):
            raise TypeError(f"{op}: {name} must be callable; got {type(f).__name__}.")
    checks.check_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be (B, *); got shape ().")
    first_sample, size = check_count(op, "first_sample", first_sample), math.prod(x.shape[1:])
    offset(op, first_sample, size)
    temperature = number(op, "temperature", temperature, LARGEST)
    seed = random.draw_seed() if seed is None else seed
    random.noise_key(op, seed, 0, random.LANGEVIN, 0, first_sample * size, x.device)   # refused here, not after a call of the score
    score = asked(op, score, x)
    project = None if project is None else evaluated(project)
    return Run(
        op, score, seed, first_sample, size, math.sqrt(temperature), project, bool(diagnostics), backend.choose(x.device), WATCH.get()
    )


def norm(t):
    """‖t‖ of each sample, (B,)."""
    return torch.linalg.vector_norm(t.flatten(1) if t.dim() > 1 else t[:, None], dim=1, dtype=checks.compute_dtype(t.dtype))


def check_count(op, name, value, maximum=None):
    """The value as an int, checked."""
    if not checks.whole(value) or value < 0:
        raise ValueError(f"{op}: {name} must be a non-negative int; got {shown(value)}.")
    if maximum is not None and value > maximum:
        raise ValueError(f"{op}: {name} must be at most {maximum}, the updates of the whole run; got {shown(value)}.")
    return checks.plain_int(value)


def check_updates(op, name, value, levels=1):
    """A number of updates, or of updates per level; beyond 2^32 of them in a run the noise would come again."""
    value = check_count(op, name, value)
    if value * levels > 2**32:
        per = f" for {levels} levels" if levels > 1 else ""
        raise ValueError(f"{op}: a run has at most 2^32 updates, whose noise differs; got {name} = {shown(value)}{per}.")
    return value


def number(op, name, value, most=math.inf):
    """A finite float >= 0."""
    return checks.number(op, name, value, 0, most)


def epsilon(op, step_size, step_lr, x):
    """ε from exactly one of step_size (ε) and NCSN's step_lr (ε/2)."""
    if (step_size is None) == (step_lr is None):
        found = "neither" if step_size is None else "both"
        raise ValueError(f"{op}: give either step_size (ε) or step_lr (NCSN's η = ε/2); got {found}.")
    if step_size is None:
        return step_size_from_lr(checks.coefficient(op, "step_lr", step_lr, x, minimum=0))
    return checks.coefficient(op, "step_size", step_size, x, minimum=0)


def spread(sigma, x):
    """σ for each sample, (B,), as scores take it."""
    return torch.full((x.shape[0],), sigma, dtype=checks.compute_dtype(x.dtype), device=x.device)


def shifted(x, s, c):
    """x + c s without noise, rounded once; c a float or (B,)."""
    dtype = checks.compute_dtype(x.dtype)
    if isinstance(c, torch.Tensor):
        return (x.to(dtype) + checks.expand(c, x) * s.to(dtype)).to(x.dtype)
    return torch.add(x.to(dtype), s.to(dtype), alpha=c).to(x.dtype)
