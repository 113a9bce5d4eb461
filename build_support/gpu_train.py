"""Train a score network of 32×32 colour images in minutes: DATA=... gpu_train.py FOLDER SECONDS.

DATA is what `fastscore.datasets.open` takes; discs and boxes on gradients, drawn here, unless
given. FOLDER gets, as it goes:

    train.jsonl      a row of each form that was timed, of every 50 steps, and of the end
    train-state.pt   where the training is after an interruption; the same command goes on there
    train.png        samples of the averaged network

A form is a memory format and a precision; the quickest is trained, until four fifths of the time
are over or all steps are done.
"""

import contextlib
import json
import math
import os
import struct
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import DEVICE, EMULATED

import fastscore
from fastscore import datasets, losses, models, sampling, schedules, training
from fastscore.training import signals

SIDE, IMAGES, BATCH = (8, 64, 4) if EMULATED else (32, 20_000, 128)
STEPS, RECORDED, TIMED, SAMPLES = (4, 2, 1, 4) if EMULATED else (20_000, 50, 10, 64)
NETWORK: dict[str, Any] = {"width": 128, "multipliers": (1, 2, 2), "attention": (1,)}
if EMULATED:
    NETWORK = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (1,)}
LEVELS = 4 if EMULATED else 60
RATE, WARMUP, SEED = 3e-4, 200, 0
SHARE = 0.8   # of the time, for training


def drawn(n: int, side: int) -> Tensor:
    """A disc and a box, each in a colour of its own, on a gradient between two others."""
    generator = torch.Generator().manual_seed(SEED)

    def uniform(channels):
        return torch.rand(n, channels, 1, 1, generator=generator)

    line = torch.linspace(0, 1, side)
    x, y = line.expand(side, side), line[:, None].expand(side, side)
    slope = (uniform(1) * x + uniform(1) * y) / 2
    images = uniform(3) * (1 - slope) + uniform(3) * slope

    square = (x - uniform(1)).square() + (y - uniform(1)).square()
    images = torch.where(square < (0.1 + 0.2 * uniform(1)).square(), uniform(3), images)
    inside = ((x - uniform(1)).abs() < 0.15) & ((y - uniform(1)).abs() < 0.15)
    return torch.where(inside, uniform(3), images)


def forms() -> dict[str, tuple[torch.memory_format, torch.dtype | None]]:
    """Memory format and autocast of each, by its name."""
    precisions = {"float32": None}
    if EMULATED or torch.cuda.is_bf16_supported():
        precisions["bfloat16"] = torch.bfloat16
    formats = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
    return {
        f"{layout} {precision}": (formats[layout], autocast)
        for layout in formats
        for precision, autocast in precisions.items()
    }


class Job:
    """A network with its data and its optimizer, on the device."""

    def __init__(
        self, source: datasets.Source, layout: torch.memory_format, autocast: torch.dtype | None
    ) -> None:
        count = min(len(source), 10_000)
        some = source.read(torch.arange(count) * len(source) // count)
        std = float(some.std())
        self.source = source.to(DEVICE)
        self.layout = layout
        self.autocast = autocast
        # From beyond the largest distance between two images, as the mean of an image's pixels
        # varies by many times the deviation of one.
        self.sigmas = schedules.geometric(80 * std, 0.04 * std, LEVELS).to(DEVICE)
        self.start = sampling.start_like(some, SAMPLES, sigma=80 * std, seed=SEED).to(DEVICE)
        torch.manual_seed(SEED)
        moments = {"data_mean": float(some.mean()), "data_std": std}
        net = models.UNet(2, source.shape[0], **moments, **NETWORK)
        self.net = net.to(DEVICE, memory_format=layout)
        self.optimizer = torch.optim.Adam(self.net.parameters(), RATE, fused=True)
        # Of the last tenth of the steps, however many there will be.
        self.ema = training.power_averaged(self.net, 0.1)

    def steps(self, first: int, end: int) -> Iterator[training.Step]:
        options = {"steps": end, "first_step": first}
        loader = datasets.batches(self.source, BATCH, seed=SEED, **options)
        options |= {"optimizer": self.optimizer, "ema": self.ema, "autocast": self.autocast}

        def loss(net, batch, step):
            for group in self.optimizer.param_groups:
                group["lr"] = RATE * min(1, (step + 1) / WARMUP)
            x = batch[1].to(DEVICE).contiguous(memory_format=self.layout)
            return losses.noise_conditional(net, x, self.sigmas, seed=SEED, step=step)

        return training.training_loop(self.net, loader, loss, grad_clip=1.0, **options)

    def state(self, step: int) -> dict[str, Any]:
        parts = {"net": self.net, "ema": self.ema, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()} | {"step": step}

    def restore(self, state: dict[str, Any]) -> int:
        """The number of steps that are done."""
        self.net.load_state_dict(state["net"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        return state["step"]

    def samples(self) -> Tensor:
        options = {"sampler": "probability_flow", "sigmas": self.sigmas}
        with torch.no_grad():
            return fastscore.sample(self.ema.eval(), x=self.start, **options).float().cpu()


def peak() -> float | None:
    """GiB of the device's memory at most; None where there is no device."""
    return None if EMULATED else round(torch.cuda.max_memory_allocated() / 2**30, 3)


def timed(source: datasets.Source, name: str) -> dict[str, Any]:
    """Images a second and the memory of a few steps, after as many that are not counted."""
    if not EMULATED:
        torch.cuda.reset_peak_memory_stats()
    job = Job(source, *forms()[name])
    for _ in job.steps(0, TIMED):
        pass
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in job.steps(TIMED, 2 * TIMED):
        pass
    torch.cuda.synchronize()
    rate = TIMED * BATCH / (time.perf_counter() - start)
    return {"form": name, "images/s": round(rate, 1), "peak GiB": peak()}


class Log:
    """Rows of a file, one each line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def of(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if name in row]


def train(job: Job, log: Log, kept: Path, until: float) -> int:
    """Steps until then, or until a signal, after which it goes on; the number of all."""
    first = done = 0
    if kept.exists():
        first = done = job.restore(torch.load(kept, map_location=DEVICE, weights_only=True))
    sums, since = [], time.perf_counter()
    with signals.stop_on_signals() as stop:
        for state in job.steps(first, STEPS):
            done = state.step + 1
            sums.append(state.losses.mean())
            if done % RECORDED == 0 or done == STEPS:
                # The only wait for the device.
                loss = torch.stack(sums).mean().item() / math.prod(job.source.shape)
                rate = len(sums) * BATCH / (time.perf_counter() - since)
                log.add({"step": done, "loss": loss, "images/s": round(rate, 1)})
                sums, since = [], time.perf_counter()
            if stop or since > until:
                break
        torch.save(job.state(done), kept)
    if stop:
        print(f"interrupted after step {done}")
        sys.exit(stop.status)
    return done


def main(folder: Path, seconds: float, data: str | None) -> None:
    start = time.perf_counter()
    log = Log(folder / "train.jsonl")
    if log.of("end"):
        print("there already")
        return
    source = datasets.open(data or (drawn(IMAGES, SIDE), None))
    if not EMULATED:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    known = {row["form"] for row in log.of("form")}
    for name in forms():
        if name not in known:
            log.add(timed(source, name))

    best = max(log.of("form"), key=lambda row: row["images/s"])["form"]
    if not EMULATED:
        torch.cuda.reset_peak_memory_stats()
    job = Job(source, *forms()[best])
    done = train(job, log, folder / "train-state.pt", start + SHARE * seconds)
    write_png(folder / "train.png", grid(job.samples()))
    rows = log.of("step")
    end = {
        "end": done,
        "form": best,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "data": data or "drawn",
        "parameters": sum(p.numel() for p in job.net.parameters()),
        "images/s": sorted(row["images/s"] for row in rows)[len(rows) // 2],
        "loss": [rows[0]["loss"], rows[-1]["loss"]],
        "peak GiB": peak(),
    }
    print(json.dumps(log.add(end)))


def grid(images: Tensor) -> Tensor:
    """(N, C, H, W) in [0, 1] -> uint8 (rows, columns, 3), a pixel between images."""
    images = torch.nn.functional.pad(images.clamp(0, 1), (1, 1, 1, 1), value=0.25)
    columns = math.ceil(math.sqrt(len(images)))
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    if images.shape[1] != 3:
        images = images[:, :1].expand(-1, 3, -1, -1)
    rows = [torch.cat(list(row), 2) for row in images.split(columns)]
    return (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte()


def write_png(path: Path, image: Tensor) -> None:
    """Without Pillow, which a machine with a GPU and no network may lack."""
    height, width, _ = image.shape

    def chunk(kind, data):
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    # No filter before each line.
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        if EMULATED:
            import emulate

            stack.enter_context(emulate.installed())
            stack.enter_context(emulate.torch_cuda())
        main(Path(sys.argv[1]), float(sys.argv[2]), os.environ.get("DATA"))
