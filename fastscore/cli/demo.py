"""The command `fastscore demo`."""

from pathlib import Path

from fastscore.cli import evaluate, run_folder
from fastscore.cli.config import TrainConfig
from fastscore.cli.train import train


def demo(out: Path = Path("demo"), steps: int | None = None) -> None:
    """Train on the 8x8 digits, sample, and report.

    Args:
        out: run folder; a finished one is only evaluated again, an interrupted one goes on.
        steps: number of updates; 9000 unless given, or those of the run that goes on.
    """
    resume = (out / run_folder.CONFIG).exists()
    train(TrainConfig(data="digits", out=out, held_out=300, steps=steps, resume=resume))
    evaluate.evaluate(out)
