"""Averages of weights whose width is chosen after the training: what saves keep, and the network
that is made of it."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from fastscore import training
from fastscore.averages import Averaged
from fastscore.cli.config import TrainConfig
from fastscore.training import checkpoint, saves

FILE = "averages.safetensors"


def begun(config: TrainConfig, net: nn.Module, save: saves.Save | None) -> list[Averaged]:
    """The averages of the run's widths, as they were in a save."""
    averages = [training.power_averaged(net, width) for width in config.ema_widths]
    if averages and save is not None:
        for average, state in zip(averages, _states(save)):
            average.load_state_dict(state)
    return averages


def contents(averages: Sequence[Averaged]) -> dict[str, bytes]:
    """The files that a save holds for them."""
    tensors = {
        f"{i}.{name}": t
        for i, average in enumerate(averages)
        for name, t in average.state_dict().items()
    }
    return {FILE: checkpoint.dumps(tensors, sealed=False)} if tensors else {}


def network(folder: str | Path, net: nn.Module, width: float) -> nn.Module:
    """The network of a run as the average of this width, of all saves that the run has.

    Raises:
        ValueError: the run keeps no averages, or too few for this width.
    """
    own = saves.at(folder)
    states = []
    for save in saves.of_run(folder) if own is None else [own]:
        if FILE in save.manifest()["files"]:
            states += _states(save)
    if not states:
        raise ValueError(
            f"sample: ema_width needs a run that keeps averages (train --ema-widths 0.05 0.1); "
            f"{folder} has none."
        )
    try:
        return training.post_hoc(net, states, width).requires_grad_(False)
    except ValueError as error:
        more = "train with --keep for more saves, or with other --ema-widths"
        raise ValueError(f"sample: {str(error).rstrip('.')}; {more}.") from None


def _states(save) -> list[dict[str, Tensor]]:
    """The state of each average."""
    tensors = checkpoint.loads(save.read(FILE), f"{save.folder}: {FILE}", sealed=False)
    found: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        number, _, inner = name.partition(".")
        found.setdefault(number, {})[inner] = t
    return [found[number] for number in sorted(found, key=int)]
