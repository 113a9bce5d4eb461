"""The options of `fastscore train`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional
from tyro.constructors import PrimitiveConstructorSpec

from fastscore import schedules
from fastscore.cli import config_file
from fastscore.losses.noise_conditional import METHODS
from fastscore.losses.projections import DISTRIBUTIONS


def _unless_given(default):
    """An option that is None until `TrainConfig.given` is known.

    One that equals the default may have been given.
    """
    return field(default=None, metadata={"default": default, "type": type(default)})


_OUT = Path("runs/digits")

# What --resume may change: it does not change the weights of a step that is done.
CHANGEABLE = {"steps", "skip", "keep", "held_out_every", "tensorboard"}


def _of_network(kind):
    """An option whose default is that of the network in `NETWORKS`, or follows from the data."""
    return field(default=None, metadata={"default": None, "type": kind})


# What each network has unless it is given, or the training data call for something else
# (networks.resolved); what is None is known to a run that has begun. What a network does not have
# is there for runs of earlier versions.
_NO_UNET = {"multipliers": (), "blocks": 0, "attention": (), "patch": 0, "classes": 0}
_NO_UNET |= {"data_mean": 0.5, "data_std": 0.5, "weighting": "even"}
_CONTEXT = {"context": 0}
_MLP = {"steps": 9000, "batch_size": 256, "lr": 2e-3, "levels": 16, "width": 256}
_MLP |= {"sigma_max": 1.0, "sigma_min": 0.01, **_NO_UNET, **_CONTEXT}
_NCSN = _MLP | {"batch_size": 64, "lr": 1e-3, "width": 32}
_UNET = {"steps": 2000, "batch_size": 32, "lr": 3e-3, "levels": 50, "width": 32}
_UNET |= {"sigma_max": None, "sigma_min": None, **_CONTEXT}
_UNET |= {"multipliers": (1, 2), "blocks": 1, "attention": (), "patch": 2}
_UNET |= {"classes": None, "data_mean": None, "data_std": None, "weighting": "edm"}
NETWORKS = {"mlp": _MLP, "ncsn": _NCSN, "unet": _UNET}
LEVELS = 10**6

# --flip, and None where it is not given.
_FLAG = PrimitiveConstructorSpec(
    nargs=0,
    metavar="",
    instance_from_str=lambda words: True,
    is_instance=lambda value: value is None or isinstance(value, bool),
    str_from_instance=lambda value: [],
)


@dataclass
class TrainConfig:
    """Train a noise-conditional score network, or a classifier of noisy images.

    Options that are not given have their defaults; with resume, the values of the run. `given`
    holds the names of those that are. They are checked when the config is made; with resume, once
    those of the run are known.

    Args:
        task: score (unless given), or classifier (of noisy images; for sample --condition class=K).
        data: digits (unless given), mnist, fashion, a folder of images, an .npz file with an array
            named images, an .npy file, or a table (.csv, .parquet); what a file does not say is
            said behind its name, such as faces:rgb, x.npz:channels-last:max=16 or
            x.csv:label=species.
        out: run folder to create; runs/digits unless given.
        network: mlp (residual ScoreMLP), ncsn (convolutional RefineNet) or unet (convolutional, and
            told the classes of the images where these have labels); unless given unet for images
            with a side of 16 or more, and mlp for others and where depth is given.
        loss: denoising (unless given), denoising-vr (at small σ of less variance, twice the cost),
            sliced, sliced-vr (variance reduced) or exact (the whole trace: small images only).
        projections: random directions per image, of the sliced losses; 1 unless given.
        distribution: of the directions, rademacher (unless given), gaussian or sphere.
        steps: number of updates; unless given 9000 of an mlp, and of others as many as fit in the
            budget.
        budget: minutes that the training may take, by a measurement of a few steps, in place of
            steps; 10 unless given or 0.
        batch_size: images per update, of all processes together; 256 unless given, 32 of a unet,
            64 of an ncsn.
        accumulate: parts of a process's share that go through the network one after another, to
            save memory; 1 unless given.
        lr: Adam's learning rate, 2e-3 unless given, 3e-3 of a unet, 1e-3 of an ncsn; it rises over
            100 steps and falls to zero along a cosine.
        levels: number of noise levels; 16 unless given, 50 of a unet.
        sigma_max: largest noise, in units of the [0, 1] pixel range; 1 unless given, of a unet 8
            times the standard deviation of the images, or twice that of whole images.
        sigma_min: smallest noise; 0.01 unless given, of a unet 1/25 of that standard deviation.
        width: width of the mlp (unless given 256, or more where the samples have more values), ngf
            of the ncsn (32), or channels of the unet's first level (32, or 64 with a GPU).
        depth: residual blocks of the mlp; 3 unless given.
        multipliers: of the unet's width, by level; each level has half the side of the one before.
            Unless given 1 2, and one more 2 whenever the side doubles from 40 on.
        blocks: residual blocks of a level of the unet; 1 unless given.
        attention: levels of the unet, from 0, with self-attention; none unless given.
        patch: side of the patches that the unet takes for one place; unless given 2, and 1 with a
            GPU.
        classes: how many the unet knows; those of the labels unless given, 0: none, and the labels
            are not looked at.
        context: length of the vectors that an mlp or a unet is told, in an .npz the array context
            (N, length) beside images; that of the array unless given, 0: it is not looked at.
        label_drop: share of the images whose label or context is not told, so that the network
            knows all images together, too; 0.1 unless given.
        data_mean: of all values of the data, for the unet; that of the training images unless
            given.
        data_std: their standard deviation, likewise.
        weighting: of the noise levels: even, or for the unet edm (unless given), with levels below
            data_std more often and the loss at each multiplied by 1 + (σ/data_std)².
        ema_decay: decay of the averaged weights; 0.999 unless given.
        ema_widths: of more averages, which each save keeps, as shares of the training; from two of
            them, such as 0.05 0.1, sample --ema-width makes that of any width. None unless given.
        held_out: images kept away from training, for evaluation; 0 unless given. The run remembers
            which.
        flip: mirror half of the training images, left and right.
        shift: move training images by up to so many pixels, each way; the pixels of the edge are
            repeated. 0 unless given.
        crop: train on parts of so many pixels a side, from anywhere in the images; elsewhere their
            middle stands for them. 0, unless given: the whole images.
        grey_levels: spread each grey level of the training images evenly over its cell, for
            likelihoods: 256 for 8-bit images. 0, unless given: not at all.
        skip_corrupt: files of a folder that may be left out because they cannot be read; 0 unless
            given.
        seed: of everything that is random; 0 unless given.
        precision: float32 (unless given), or bfloat16: the network computes in it where PyTorch
            finds that safe; weights, norms' statistics and losses stay float32.
        channels_last: keep images and the weights of convolutions in that order, which some GPUs
            and CPUs compute faster.
        compile: the network by torch.compile; of the denoising loss only.
        grad_clip: largest norm of the gradient; 0, unless given: it is not clipped.
        skip: updates that may be skipped because their loss or gradient is not finite; 0 unless
            given: the run stops at the first.
        keep: saves that are kept, at least 2; 2 unless given. Beside them is kept the one of the
            least held-out loss, of those saves at whose step it was looked at.
        held_out_every: steps between two looks at the loss of the held-out images; 500 unless
            given.
        tensorboard: records and samples for TensorBoard in the run's folder, too.
        resume: go on with the run in `out`, with its options; steps, skip, keep, held_out_every and
            tensorboard may be others. With more steps the learning rate follows the longer cosine,
            so a finished run does not end as a longer one would have.
        file: TOML file of options; those that are given beside it come first.
    """

    task: str | None = _unless_given("score")
    data: str | None = _unless_given("digits")
    out: Path | None = field(default=None, metadata={"default": _OUT, "type": Path})
    network: str | None = _of_network(str)
    loss: str | None = _unless_given("denoising")
    projections: int | None = _unless_given(1)
    distribution: str | None = _unless_given("rademacher")
    steps: int | None = _of_network(int)
    budget: float | None = _unless_given(0.0)
    batch_size: int | None = _of_network(int)
    accumulate: int | None = _unless_given(1)
    lr: float | None = _of_network(float)
    levels: int | None = _of_network(int)
    sigma_max: float | None = _of_network(float)
    sigma_min: float | None = _of_network(float)
    width: int | None = _of_network(int)
    depth: int | None = _unless_given(3)
    multipliers: tuple[int, ...] | None = _of_network(tuple)
    blocks: int | None = _of_network(int)
    attention: tuple[int, ...] | None = _of_network(tuple)
    patch: int | None = _of_network(int)
    classes: int | None = _of_network(int)
    context: int | None = _of_network(int)
    label_drop: float | None = _unless_given(0.1)
    data_mean: float | None = _of_network(float)
    data_std: float | None = _of_network(float)
    weighting: str | None = _of_network(str)
    ema_decay: float | None = _unless_given(0.999)
    ema_widths: tuple[float, ...] | None = field(
        default=None, metadata={"default": (), "type": config_file.Floats}
    )
    held_out: int | None = _unless_given(0)
    flip: Annotated[bool | None, _FLAG] = _unless_given(False)
    shift: int | None = _unless_given(0)
    crop: int | None = _unless_given(0)
    grey_levels: int | None = _unless_given(0)
    skip_corrupt: int | None = _unless_given(0)
    seed: int | None = _unless_given(0)
    precision: str | None = _unless_given("float32")
    channels_last: Annotated[bool | None, _FLAG] = _unless_given(False)
    compile: Annotated[bool | None, _FLAG] = _unless_given(False)
    grad_clip: float | None = _unless_given(0.0)
    skip: int | None = _unless_given(0)
    keep: int | None = _unless_given(2)
    held_out_every: int | None = _unless_given(500)
    tensorboard: Annotated[bool | None, _FLAG] = _unless_given(False)
    resume: bool = False
    file: Positional[Path | None] = None

    def __post_init__(self) -> None:
        if self.file is not None:
            for name, value in config_file.read(self.file, TYPES).items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
            self.file = None
        self.given: frozenset[str] = frozenset(
            f.name for f in fields(self) if getattr(self, f.name) is not None
        )
        for f in fields(self):
            if f.metadata and f.name not in self.given:
                setattr(self, f.name, f.metadata["default"])
        if self.network is None and (
            self.data == "digits" or self.task == "classifier" or "depth" in self.given
        ):
            self.network = "mlp"
        for name, value in NETWORKS.get(self.network, {}).items():
            if name not in self.given:
                setattr(self, name, value)
        if not self.resume:
            self.check()

    def check(self) -> None:
        """Raise ValueError unless the options are in range and fit each other."""
        for name in ("data", "out"):
            try:
                str(getattr(self, name)).encode()
            except UnicodeEncodeError:
                found = str(getattr(self, name))
                raise ValueError(
                    f"train: {name} must be text that UTF-8 can hold; got {found!r}."
                ) from None
        choices = {
            "task": ("score", "classifier"),
            "network": tuple(NETWORKS),
            "loss": METHODS,
            "distribution": DISTRIBUTIONS,
            "weighting": ("even", "edm"),
            "precision": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            # None: what follows from data that are not known yet.
            if getattr(self, name) not in (None, *allowed):
                listed = (
                    f"one of {', '.join(allowed)}" if len(allowed) > 2 else " or ".join(allowed)
                )
                raise ValueError(f"train: {name} must be {listed}; got {getattr(self, name)!r}.")

        counts = ("steps", "batch_size", "accumulate", "levels", "width", "depth", "projections")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train: {name} must be at least 1; got {value}.")
        if self.levels is not None and self.levels > LEVELS:
            raise ValueError(f"train: levels must be at most {LEVELS}; got {self.levels}.")
        for name in ("shift", "crop", "grey_levels", "skip_corrupt"):
            if getattr(self, name) < 0:
                raise ValueError(f"train: {name} must be at least 0; got {getattr(self, name)}.")
        if self.shift and self.crop:
            raise ValueError(
                f"train: give either shift or crop; got {self.shift} and {self.crop}."
            )
        if self.grey_levels == 1:
            raise ValueError("train: grey_levels must be 0 or at least 2; got 1.")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise ValueError(f"train: lr must be positive and finite; got {self.lr}.")
        if not 0 <= self.budget < float("inf"):
            raise ValueError(f"train: budget must be positive and finite; got {self.budget}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train: ema_decay must be in [0, 1); got {self.ema_decay}.")
        for width in self.ema_widths:
            if not 0.001 <= width <= 0.28:
                raise ValueError(f"train: ema_widths must be in 0.001..0.28; got {width}.")
        if len(set(self.ema_widths)) < len(self.ema_widths):
            raise ValueError("train: ema_widths must differ; one is given twice.")

        sliced = self.loss.startswith("sliced")
        if not sliced and (self.projections, self.distribution) != (1, "rademacher"):
            raise ValueError(
                "train: projections and distribution belong to the sliced losses; the loss is "
                f"{self.loss}."
            )
        if self.task == "classifier":
            defaults = {"network": "mlp", "loss": "denoising", "context": 0, "label_drop": 0.1}
            for name, value in defaults.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"train: {name} belongs to task score; a classifier is an mlp trained by "
                        "cross-entropy."
                    )
        self._check_unet()
        self._check_engine()
        if None not in (self.sigma_max, self.sigma_min, self.levels):
            schedules.geometric(self.sigma_max, self.sigma_min, self.levels)

    def _check_engine(self):
        if not 0 <= self.grad_clip < float("inf"):
            raise ValueError(f"train: grad_clip must be 0 or positive; got {self.grad_clip}.")
        for name, least in (("skip", 0), ("keep", 2), ("held_out_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"train: {name} must be at least {least}; got {getattr(self, name)}."
                )
        if self.compile and self.loss != "denoising":
            raise ValueError(
                f"train: compile belongs to the denoising loss; the derivatives of the loss "
                f"{self.loss} run eagerly."
            )
        if self.channels_last and self.network == "mlp":
            raise ValueError("train: channels_last belongs to networks of convolutions; got mlp.")

    def _check_unet(self):
        if self.network in ("mlp", "ncsn"):
            for name, value in _NO_UNET.items():
                if getattr(self, name) != value:
                    raise ValueError(
                        f"train: {name} belongs to network unet; the network is {self.network}."
                    )
        elif self.network == "unet" and self.depth != 3:
            raise ValueError("train: depth belongs to network mlp; the network is unet.")
        for name in ("classes", "context"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"train: {name} must be at least 0; got {value}.")
        if not 0 <= self.label_drop <= 1:
            raise ValueError(f"train: label_drop must be in [0, 1]; got {self.label_drop}.")


# Of what a file may give; `resume` may not.
TYPES = {f.name: f.metadata["type"] for f in fields(TrainConfig) if f.metadata}
