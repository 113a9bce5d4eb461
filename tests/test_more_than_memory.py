"""Training on more data than memory holds: an array in a file of holes, under a limit."""

import json
import sys
from pathlib import Path

import children
import pytest

MIB = 1 << 20


def trained(tmp_path, mebibytes, limit, kind):
    """The figures of a run on an array of so many bytes, in a process of its own."""
    command = [sys.executable, __file__, tmp_path, mebibytes, limit, kind]
    done = children.run(command, check=True, seconds=600)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_run_takes_a_small_part_of_its_data_in_memory(tmp_path, kind):
    """128 MiB of bytes, 512 as float32, under 224 MiB above what the libraries take."""
    figures = trained(tmp_path, 128, 224, kind)
    print(figures)
    assert figures["steps"] == 3 and figures["in_memory"] is False
    # Blocks of 16 MiB: as stored, as float32, and as bytes to be digested.
    assert figures["grown"] < 96 * MIB


@pytest.mark.slow(2)
@pytest.mark.processes
def test_a_run_on_two_gibibytes(tmp_path):
    figures = trained(tmp_path, 2048, 512, "npy")
    print(figures)
    assert figures["steps"] == 3 and figures["in_memory"] is False
    assert figures["grown"] < 96 * MIB


def main(folder, mebibytes, limit, kind):
    """Train for three steps under a limit of the address space; print what it took."""
    import resource
    import time
    import zipfile

    import numpy as np

    from fastscore.cli import splits
    from fastscore.cli.config import TrainConfig
    from fastscore.cli.fit import fit

    shape = (mebibytes * MIB // 64**2, 64, 64)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    path = folder / "x.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        begun = file.tell()
        # A white image, then a hole.
        file.write(b"\xff" * 64**2)
        file.truncate(begun + mebibytes * MIB)
    if kind == "npz":
        with zipfile.ZipFile(folder / "x.npz", "w") as archive:
            archive.write(path, "images.npy")
    data = folder / f"x.{kind}"

    # Whatever is loaded at the first use: a run beforehand.
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 8, "steps": 3}
    np.save(folder / "small.npy", np.full((9, 64, 64), 255, np.uint8))
    list(fit(TrainConfig(**options, data=str(folder / "small.npy"), out=folder / "before")))

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit * MIB,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    config = TrainConfig(**options, data=str(data), out=folder / "run")
    steps = len(list(fit(config)))
    figures = {
        "steps": steps,
        "in_memory": splits.source(config).in_memory,
        "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
