"""The command `fastscore sample`: options become a job, the job is drawn, the result written."""

import os
import sys
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch
from tyro.conf import Positional, arg

from fastscore import distributed, models, schedules
from fastscore.cli import draw, pictures, rows, run_folder, splits, widths
from fastscore.cli.conditions import ConditionOptions, of_all_classes, open_conditions
from fastscore.cli.parts import Parts
from fastscore.cli.sampler_options import SamplerOptions
from fastscore.training import files, signals


@dataclass(frozen=True)
class CheckpointOptions:
    """What an official checkpoint leaves open.

    Args:
        arch: of a checkpoint, ncsn, ncsnv2, ncsnv2deeper, ncsnv2deepest or ncsnpp; unless given it
            follows from the names in the file.
        ema: take a checkpoint's averaged weights.
        sigma_max: largest noise, for checkpoints that store no ladder (NCSN, CAS).
        sigma_min: smallest noise, likewise.
        levels: number of noise levels, likewise.
        image_size: of a checkpoint's samples; 32, 128 (ncsnv2deeper) or 256 (ncsnv2deepest) unless
            given.
        nonlinearity: of a checkpoint's config, which the file does not tell: elu, relu, lrelu or
            swish.
        rescaled: likewise: its data were in [-1, 1].
        logit_transform: likewise: its data were logits.
        sde: of score_sde's checkpoints, the process: ve, vp or subvp; unless given it is ve where
            the network has Fourier features.
        continuous: likewise, of vp: the process has continuous times.
        fir: likewise, which the file of some does not tell.
        skip_rescale: likewise.
        centered: likewise: its data were in [-1, 1]; samples are in [0, 1] all the same.
        scale_by_sigma: likewise, of ve.
        beta_min: likewise, of vp and subvp.
        beta_max: likewise.
        std: likewise, of CAS.
        target: likewise, of CAS: gaussian or dae.
    """

    arch: str | None = None
    ema: bool = True
    sigma_max: float | None = None
    sigma_min: float | None = None
    levels: int | None = None
    image_size: int | None = None
    nonlinearity: str | None = None
    rescaled: bool | None = None
    logit_transform: bool | None = None
    sde: str | None = None
    continuous: bool | None = None
    fir: bool | None = None
    skip_rescale: bool | None = None
    centered: bool | None = None
    scale_by_sigma: bool | None = None
    beta_min: float | None = None
    beta_max: float | None = None
    std: bool | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        given = [value is not None for value in self._ladder()]
        if any(given) and not all(given):
            raise ValueError(
                "sample: sigma_max, sigma_min and levels are given together or not at all."
            )

    def open(self, file: Path) -> torch.nn.Module:
        """The network of a checkpoint."""
        sigmas = None if self.levels is None else schedules.geometric(*self._ladder())
        options = asdict(self)
        for name in ("sigma_max", "sigma_min", "levels"):
            del options[name]
        return models.load_official(file, sigmas=sigmas, **options).requires_grad_(False)

    def _ladder(self):
        return self.sigma_max, self.sigma_min, self.levels


# Options of their own among those of the command, without a prefix.
_Options = TypeVar("_Options")
_Merged = Annotated[_Options, arg(name="")]


@dataclass(frozen=True)
class SampleOptions:
    """Draw samples of a trained run, or of an official checkpoint (NCSN, NCSNv2, CAS, score_sde),
    as a grid.

    Started by torchrun, the processes share the batches, and one writes the samples that a single
    process would have drawn.

    Args:
        run: run folder, or a checkpoint (.pth).
        sampler: the sampler.
        conditions: on the samples.
        checkpoint: what a checkpoint leaves open.
        n: number of samples.
        out: a .png for a grid, or a .npz for the samples themselves (array `images`); of a table a
            .csv, or a .npz (arrays `table` and `columns`), in the table's units.
        seed: of the sampler.
        first_sample: global number of the first sample; splits of one run agree.
        batch_size: samples computed at a time; a job of several batches goes on where it was
            interrupted when the command is given again.
        path: a .png for the way of the first eight samples through the noise levels.
        ema_width: of the averaged weights, a share of the training, for a run that was trained with
            ema_widths.
    """

    run: Positional[Path]
    sampler: _Merged[SamplerOptions] = field(default_factory=SamplerOptions)
    conditions: _Merged[ConditionOptions] = field(default_factory=ConditionOptions)
    checkpoint: _Merged[CheckpointOptions] = field(default_factory=CheckpointOptions)
    n: Annotated[int, arg(aliases=["-n"])] = 100
    out: Path = Path("grid.png")
    seed: int = 0
    first_sample: int = 0
    batch_size: int = 100
    path: Path | None = None
    ema_width: float | None = None

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch_size < 1:
            raise ValueError(
                f"sample: n and batch_size must be at least 1; got {self.n} and {self.batch_size}."
            )
        if self.out.suffix not in (".png", ".npz", ".csv"):
            raise ValueError(
                f"sample: out must end in .png or .npz, or in .csv for a table; got {self.out}."
            )
        if self.path is not None and self.path.suffix != ".png":
            raise ValueError(f"sample: path must end in .png; got {self.path}.")
        for file in (self.out, self.path):
            if file is not None and not file.parent.is_dir():
                raise ValueError(f"sample: the folder {file.parent} does not exist.")
            if file is not None and file.is_dir():
                raise ValueError(f"sample: {file} is a folder; it must be the name of a file.")

        if self.of_checkpoint:
            if self.ema_width is not None:
                raise ValueError(f"sample: ema_width is for run folders; {self.run} is none.")
            transformed = self.checkpoint.rescaled or self.checkpoint.logit_transform
            if self.conditions.condition and transformed:
                raise ValueError(
                    "sample: conditions are for networks of images in [0, 1], not for rescaled or "
                    "logit-transformed ones."
                )
        elif self.checkpoint != CheckpointOptions():
            *names, last = (f.name for f in fields(CheckpointOptions))
            raise ValueError(
                f"sample: {', '.join(names)} and {last} are for checkpoints; {self.run} is none."
            )

    @property
    def of_checkpoint(self) -> bool:
        """Whether it is of an official checkpoint, not of a run folder."""
        return self.run.is_file() or self.run.suffix == ".pth"


def sample(options: _Merged[SampleOptions]) -> None:
    """Draw samples of a trained run, or of an official checkpoint (NCSN, NCSNv2, CAS, score_sde),
    as a grid.

    Started by torchrun, the processes share the batches, and one writes the samples that a single
    process would have drawn.
    """
    units = None if options.of_checkpoint else splits.units(options.run)
    rows.check(options.out, options.path, units)
    job = prepare(options)
    rank, world_size = distributed.environment()
    if rank == 0 and job.batches < world_size:
        warnings.warn(
            f"{job.n} samples in batches of {job.batch_size} are work for {job.batches} of "
            f"{world_size} processes; a smaller batch_size gives some to each.",
            stacklevel=2,
        )

    parts = None
    if job.batches > 1:
        parts = Parts(options.out.with_name(f"{options.out.name}.parts"), job.depends_on)
    with signals.stop_on_signals() as stop:
        try:
            result = draw.draw_shown("sample", job, stop.check, parts)
        except KeyboardInterrupt:
            kept = ""
            if parts is not None and parts.folder.exists():
                kept = f"; {parts.folder} keeps the finished batches, the same command goes on"
            print("interrupted" + kept, file=sys.stderr)
            sys.exit(stop.status or 130)

    # The others have sent theirs.
    if result is None:
        return
    if units is None:
        write(options.out, result)
    else:
        rows.write(options.out, result.samples, units)
    if options.path is not None:
        pictures.save_strip(options.path, result.path)
    if parts is not None:
        parts.remove()
    beside = f" (first the {', '.join(result.shown)})" if result.shown else ""
    print(f"{job.n} samples: {options.out}{beside}")
    if "labels" in job.depends_on and not options.conditions.condition:
        print(
            f"all classes in order, guided with weight {job.depends_on['weight']:g}; "
            "--condition class=none for samples of no class"
        )


def prepare(options: SampleOptions) -> draw.Job:
    """The job that the options stand for, with its networks on this process's device."""
    if options.of_checkpoint:
        net = options.checkpoint.open(options.run)
        sigmas, shape = net.sigmas, net.sample_shape
    else:
        net, sigmas, shape, _ = run_folder.open_run(options.run)
        if options.ema_width is not None:
            net = widths.network(options.run, net, options.ema_width)
    conditions = of_all_classes(options.conditions, net)
    under = None
    if conditions.condition or conditions.context is not None:
        under = open_conditions(conditions, options.run)
    return draw.prepare(
        net.to(_device()),
        sigmas,
        shape,
        options.n,
        seed=options.seed,
        first_sample=options.first_sample,
        batch_size=options.batch_size,
        condition=under,
        **asdict(options.sampler),
    )


def _device():
    """This rank's GPU (LOCAL_RANK, modulo their number), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def write(out: Path, result: draw.Drawn) -> None:
    """Write samples and what is shown beside them: a .png as one grid, a .npz as arrays."""
    # Of the same command when it was killed.
    files.sweep(out.parent, out.name)
    shown = {name: t.float() for name, t in result.shown.items()}
    if out.suffix == ".npz":
        arrays = {**shown, "images": result.samples}
        arrays = {name: t.clamp(0, 1).numpy() for name, t in arrays.items()}
        with files.replacing(out, sum(array.nbytes for array in arrays.values())) as file:
            np.savez(file, **arrays)
    else:
        beside = [t[None] for t in shown.values()]
        pictures.save_grid(out, torch.cat([*beside, result.samples]))
