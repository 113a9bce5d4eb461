"""A run folder.

It holds config.toml, metrics.jsonl, split.safetensors (which images are held out) and the last
saves, each a folder step-N of weights.safetensors (averaged), state.safetensors (to resume) and
manifest.json. Folders of earlier versions, which have the weights and the state beside the config,
are read, and get the new form as they go on.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastscore import regular
from fastscore.cli import config_file, metrics
from fastscore.cli.config import CHANGEABLE, TYPES, TrainConfig
from fastscore.cli.networks import build
from fastscore.training import checkpoint, files, saves
from fastscore.training.gradients import device_of

CONFIG = "config.toml"
_FORMAT = 2   # of config.toml; from 2 on it carries its digest
_TENSORS = ("weights", "state")


class TrainedRun(NamedTuple):
    """What a run folder holds: the averaged network, its ladder, an image's shape, the options."""

    net: nn.Module
    sigmas: Tensor
    shape: tuple[int, int, int]
    config: TrainConfig


def open_run(folder: str | Path, task: str = "score") -> TrainedRun:
    """The network of a run folder, frozen and in evaluation mode, and what belongs to it.

    folder: of the run, for its newest save, or of one of its saves.

    Raises:
        ValueError: it is no run folder, its weights are damaged, or the run is of the other task.
    """
    config, shape = read_config(folder)
    if config.task != task and task == "score":
        raise ValueError(
            f"{folder} holds a classifier, not a score network; sample takes it as --classifier."
        )
    if config.task != task:
        raise ValueError(
            f"{folder} holds a score network, not a classifier (train --task classifier)."
        )

    weights = read_weights(folder)
    try:
        num_classes = len(weights["last.bias"]) if task == "classifier" else None
        # Nothing is allocated for a config that the weights are not of.
        with torch.device("meta"):
            net, sigmas = build(config, shape, num_classes)
        _check_shapes(net, weights)
        net.to_empty(device="cpu")
        net.load_state_dict(weights)
    except (RuntimeError, KeyError):
        raise ValueError(
            f"{folder} is damaged: its weights are not those of the network in its {CONFIG}."
        ) from None
    return TrainedRun(net.eval().requires_grad_(False), sigmas, shape, config)


def _check_shapes(net, weights):
    wanted, found = ({k: t.shape for k, t in each.items()} for each in (net.state_dict(), weights))
    if wanted != found:
        raise KeyError("shapes")


def holds_run(folder: str | Path) -> bool:
    """Whether a run has begun in a folder."""
    return (Path(folder) / CONFIG).exists()


def is_saved(folder: str | Path) -> bool:
    """Whether a folder holds a run that has been saved."""
    return bool(saves.of_run(folder)) or (Path(folder) / "state.safetensors").exists()


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The averaged weights of the newest save, or of the one whose folder it is.

    Raises:
        ValueError: they are damaged, or nothing has been saved yet.
    """
    save = saves.at(folder)
    if save is not None:
        data = save.read("weights.safetensors")
        return checkpoint.loads(data, f"{folder}: weights.safetensors", sealed=False)
    data = saves.read_newest(folder, "weights.safetensors")
    if data is not None:
        return checkpoint.loads(data, f"{folder}: weights.safetensors", sealed=False)
    if not is_saved(folder):
        raise ValueError(f"{folder} holds a run that has not been saved yet.")
    return checkpoint.load(Path(folder) / "weights.safetensors")


def resumed(config: TrainConfig) -> TrainConfig:
    """The options of the run in `out`, with the steps that are asked for now.

    Raises:
        ValueError: there is no such run, or another option has a value that is not the run's.
    """
    out = Path(config.out)
    if not holds_run(out):
        raise ValueError(f"train: {out} holds no run to resume.")

    stored = read_config(out)[0]
    for name in sorted(config.given - CHANGEABLE - {"out", "resume"}):
        value, of_run = getattr(config, name), getattr(stored, name)
        if value != of_run:
            raise ValueError(
                f"train: the run in {out} has {name} {of_run}, which --resume cannot change; "
                f"got {value}."
            )

    changed = {name: getattr(config, name) for name in CHANGEABLE & config.given}
    whole = replace(stored, **changed, out=config.out, resume=True)
    whole.check()
    return whole


def write_config(out: Path, config: TrainConfig, shape: tuple[int, int, int]) -> None:
    """Write the options, and the shape of an image, under their digest."""
    import tomli_w

    options = asdict(config)
    del options["resume"], options["file"]
    options |= {"out": str(config.out), "shape": list(shape), "format": _FORMAT}
    text = f"# sha256 = {files.BLANK}\n{tomli_w.dumps(options)}"
    files.write_atomic(out / CONFIG, files.sealed(text.encode()))


def read_config(folder: str | Path) -> tuple[TrainConfig, tuple[int, int, int]]:
    """(options, sample shape (C, H, W)) of a run folder, or of that of a save.

    Raises:
        ValueError: it is no run folder, or its config is not what was written.
    """
    folder = Path(folder)
    if saves.at(folder) is not None:
        folder = folder.parent
    path = folder / CONFIG
    if not path.exists():
        raise ValueError(f"{folder} is not a run folder: it has no {CONFIG}.")

    data = regular.read(path)
    if files.is_sealed(data) is False:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one that it states.")
    try:
        config, shape, version = _config_of(data, folder)
    # Lists in lists without end are a RecursionError.
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error.args[0]}.") from None
    # Earlier versions had none.
    if files.is_sealed(data) is None and (version >= _FORMAT or saves.of_run(folder)):
        raise ValueError(f"{path} is damaged: it does not state its SHA-256.")
    return config, shape


def _config_of(data, folder):
    values = config_file.parsed(data)
    missing = {"shape", "data", "steps", "width"} - values.keys()
    if missing:
        raise ValueError(f"it does not say {', '.join(sorted(missing))}")

    shape = values["shape"]
    if type(shape) is not list or not all(type(n) is int and n > 0 for n in shape):
        raise ValueError("shape must be a list of positive ints")
    options = {name: value for name, value in values.items() if name in TYPES}
    options = config_file.of_types(options, TYPES)
    # Wherever the folder has been moved to.
    options["out"] = str(folder)
    return TrainConfig(**options), tuple(shape), values.get("format", 1)


def save(
    out: Path,
    net: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_done: int,
    sums: dict[str, Tensor],
    *,
    last: saves.Save | None = None,
    seed: int = 0,
    keep: int = 2,
    best: dict[str, Any] | None = None,
    processes: int = 1,
    more: dict[str, bytes] | None = None,
) -> saves.Save:
    """Save the averaged weights, and everything that `restore` reads, as one.

    Args:
        sums: what the metrics hold since the last record.
        last: the intact save before it. keep: how many are kept.
        best: step and loss of the save of the least held-out loss, which is kept beside them.
        processes: how many trained it. more: further files of the save.
    """
    tensors = checkpoint.state_of(net, ema, optimizer, steps_done)
    tensors["state"] |= {f"metrics.{k}": v for k, v in sums.items()}
    contents = {}
    for name, t in tensors.items():
        try:
            contents[f"{name}.safetensors"] = checkpoint.dumps(t, sealed=False)
        except ValueError as error:
            what = {"weights": "the averages", "state": "the state"}[name]
            raise ValueError(
                f"train: {what} after {steps_done} steps cannot be saved: {error}"
            ) from None
    # Noise, levels and each step's images are functions of these two.
    about = {"key": {"seed": seed, "step": steps_done}}
    # What the order of sums depends on, and so the last bits.
    about["made_by"] = {"processes": processes, "threads": torch.get_num_threads()}
    about["made_by"] |= {"torch": torch.__version__, "device": device_of(net).type}
    options = {"last": last, "keep": keep, "logs": (metrics.FILE,)}
    if best is not None:
        about["best"] = best
        options["best"] = best["step"]
    contents |= more or {}
    made = saves.commit(out, steps_done, contents, about=about, **options)

    # Of an earlier version, and older than this save.
    for name in _TENSORS:
        for file in (f"{name}.safetensors", f"{name}.safetensors.json"):
            (out / file).unlink(missing_ok=True)
    return made


class Restored(NamedTuple):
    """Where a run goes on: the save, the steps that are done, and what the metrics held."""

    save: saves.Save | None
    steps_done: int
    sums: dict[str, Tensor]


def restore(
    out: Path,
    net: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    writes: bool = True,
) -> Restored:
    """Load what `save` wrote, from the newest save that is intact.

    Records of steps that were done after it are dropped: they are done again.

    writes: False for a process that leaves the folder to another.

    Raises:
        ValueError: the run is damaged.
    """
    found, contents = saves.newest_intact(out) or (None, {})
    if found is not None:
        tensors = {
            name: checkpoint.loads(contents.pop(f"{name}.safetensors"), found.folder, sealed=False)
            for name in _TENSORS
        }
    elif is_saved(out):
        tensors = {name: checkpoint.load(out / f"{name}.safetensors") for name in _TENSORS}
    else:
        if writes:
            metrics.forget_after(0, out)
        return Restored(None, 0, {})

    try:
        steps_done = checkpoint.restore(net, ema, optimizer, tensors)
    except (RuntimeError, KeyError):
        raise ValueError(
            f"{out} is damaged: its state is not that of the network in its {CONFIG}."
        ) from None
    if writes and found is None:
        metrics.forget_after(steps_done, out)
    elif writes:
        metrics.forget_after_save(found)
    begun = {k[8:]: v for k, v in tensors["state"].items() if k.startswith("metrics.")}
    return Restored(found, steps_done, begun)
