"""Files of other people: damaged, hostile, or none of their kind. Each is one sentence, at once.

Each sample is read in a process of its own under a limit of memory; what it takes is printed.
"""

import collections
import contextlib
import io
import json
import os
import pickle
import re
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from PIL import Image

from fastscore import datasets, images
from fastscore.cli import observations, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit

MIB = 1 << 20
CAP = 64 * MIB   # above what the libraries take


# Writers of hostile files


class Gadget:
    """Executed by whoever unpickles it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def npy_header(descr, shape, *, version=(1, 0), pad=0, extra=""):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, {extra}}}"
    text += " " * pad + "\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + size + text.encode()


def zipped(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def unfolding(begin, mebibytes):
    """`begin` and so many MiB of zeros, deflated; made quickly: a block that ends in a full flush
    may be repeated."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = squeeze.compress(bytes(MIB)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = squeeze.compress(begin) + squeeze.flush(zlib.Z_FULL_FLUSH)
    return data + block * mebibytes + b"\3\0"


def bomb(mebibytes, shape, *, name=b"images.npy", others=None, declared=None):
    """An archive of small members and of one that unfolds; its sum is wrong, at its very end."""
    others = zipped(others or {})
    begin = npy_header("|u1", shape)
    data = unfolding(begin, mebibytes)
    size = len(begin) + mebibytes * MIB if declared is None else declared

    end = others.rindex(b"PK\5\6")
    count, length, start = struct.unpack("<HII", others[end + 10 : end + 20])
    head = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0)
    local = b"PK\3\4" + head + name + data
    entry = b"PK\1\2\x14\0" + head + struct.pack("<HHHII", 0, 0, 0, 0, start) + name
    directory = others[start : start + length] + entry
    counts = (0, 0, count + 1, count + 1)
    tail = struct.pack("<HHHHIIH", *counts, len(directory), start + len(local), 0)
    return others[:start] + local + directory + b"PK\5\6" + tail


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *middle, rows=b"", colour=0):
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *middle, chunk(b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def jpeg(width, height):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4 :]


def fifo(path):
    os.mkfifo(path)


def write(name, content):
    def make(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content(folder) if callable(content) else content)
        return path

    return make


def special(name, make_it):
    def make(folder):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        make_it(path)
        return path

    return make


def pickled(folder):
    return pickle.dumps(Gadget(folder / "executed"))


def objects(folder):
    buffer = io.BytesIO()
    np.save(buffer, np.array([Gadget(folder / "executed")], object), allow_pickle=True)
    return buffer.getvalue()


TINY = np.full((2, 4, 4), 255, np.uint8)
SAMPLES = {
    "fifo.npz": special("x.npz", fifo),
    "fifo.npy": special("x.npy", fifo),
    "fifo among pictures": special("x/a.png", fifo),
    "device.npy": special("x.npy", lambda path: path.symlink_to("/dev/zero")),
    "device among pictures": special("x/a.png", lambda path: path.symlink_to("/dev/zero")),
    "link to itself": special("x/a.png", lambda path: path.symlink_to(path)),
    "pickle.npy": write("x.npy", pickled),
    "pickle.npz": write("x.npz", pickled),
    "objects.npy": write("x.npy", objects),
    "objects.npz": write("x.npz", lambda folder: zipped({"images.npy": objects(folder)})),
    "code in a header.npy": write(
        "x.npy", npy_header("|u1", "__import__('os').system('touch executed')")
    ),
    "declares an exbibyte.npy": write("x.npy", npy_header("|u1", (2**40, 1024, 1024)) + bytes(99)),
    "sizes that wrap.npy": write("x.npy", npy_header("<f8", (2**62, 4, 4)) + bytes(99)),
    "a header of 3 GiB.npy": special(
        "x.npy", lambda path: endless(path, b"\x93NUMPY\2\0" + struct.pack("<I", 3 << 30))
    ),
    "four GiB in four MiB.npz": write("x.npz", lambda _: bomb(4095, (4095, 1024, 1024))),
    "labels of four GiB.npz": write(
        "x.npz",
        lambda _: bomb(
            4095, (4095 * MIB,), name=b"labels.npy", others={"images.npy": npy_bytes(TINY)}
        ),
    ),
    "a lying directory.npz": write(
        "x.npz", lambda _: bomb(4095, (4095, 1024, 1024), declared=1 << 20)
    ),
    "a lying header.npz": write("x.npz", lambda _: bomb(4095, (9, 8, 8), declared=128 + 9 * 64)),
    "twenty thousand members.npz": write(
        "x.npz", lambda _: zipped({f"../../{i}.npy": b"" for i in range(20_000)})
    ),
    "ten GiB.png": write("x/a.png", png(100_000, 100_000, rows=bytes(2 * MIB))),
    "half a GiB of colours.png": write(
        "x/a.png", png(13_000, 13_000, rows=bytes(MIB), colour=2)
    ),
    "text that unfolds.png": write(
        "x/a.png", png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(256 * MIB))))
    ),
    "four gigapixels.jpg": write("x/a.jpg", jpeg(65_500, 65_500)),
    "no end.png": write("x/a.png", png(4000, 1000, rows=bytes(4001 * 1000))[:-2000]),
    "another format.png": write("x/a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "fifo.csv": special("x.csv", fifo),
    "an endless line.csv": special("x.csv", lambda path: endless(path, b"1")),
    "half a million columns.csv": write("x.csv", b"1," * 500_000 + b"1\n"),
    "columns of one name.csv": write("x.csv", b"a," * 60_000 + b"a\n"),
    "a long name.csv": write("x.csv", b"a," + b"b" * 130_000 + b"\n1,2\n3,x\n"),
    "five million rows.parquet": special("x.parquet", lambda path: rows(path)),
    "pickle.parquet": write("x.parquet", pickled),
    "fashion that unfolds": special("fashion", lambda path: fashion(path)),
}


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def endless(path, begin):
    with open(path, "wb") as file:
        file.write(begin)
        file.truncate(3 << 30)


def rows(path, n=5_000_000):
    """Many numbers in some kilobytes: after the first two, zeros."""
    import pyarrow as pa
    import pyarrow.parquet

    a = np.zeros(n)
    a[:2] = 1, 2
    table = {"a": a} if n > 99 else {"a": a, "k": [str(i % 2) for i in range(n)]}
    pyarrow.parquet.write_table(pa.table(table), path)


def fashion(path):
    path.mkdir()
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        head = b"\x1f\x8b\x08" + bytes(6) + b"\xff"
        (path / name).write_bytes(head + unfolding(b"", 4095) + bytes(8))


@pytest.mark.processes
def test_no_hostile_file_is_executed_hangs_or_takes_more_than_it_may(tmp_path):
    """Read as data sets and as observations."""
    made = {}
    for i, (name, make) in enumerate(SAMPLES.items()):
        (tmp_path / str(i)).mkdir()
        path = make(tmp_path / str(i))
        made[name] = path
    request = tmp_path / "request.json"
    request.write_text(json.dumps({name: str(path) for name, path in made.items()}))

    done = children.run([sys.executable, __file__, request], cwd=tmp_path, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    for name, found in figures.items():
        print(f"{name:32} {found['seconds']:5.2f} s {found['grown'] / MIB:6.1f} MiB  ", end="")
        print(found["messages"][0][-70:])

    assert len(SAMPLES) >= 20 and figures.keys() == SAMPLES.keys()
    assert not list(tmp_path.rglob("executed"))
    for name, found in figures.items():
        for message in found["messages"]:
            assert message.startswith("ValueError: "), (name, message)
            assert "\n" not in message and message.endswith("."), (name, message)
        assert found["grown"] < 2 * CAP, (name, found)
        assert found["seconds"] < 5, (name, found)


def main(request):
    """Read each file in a child under a limit; print what came of it."""
    import resource

    # Whatever is loaded at the first use.
    for suffix in ("npy", "npz"):
        path = request.parent / f"tiny.{suffix}"
        np.save(path, TINY) if suffix == "npy" else np.savez(path, images=TINY)
        datasets.load(path)
    Image.fromarray(TINY[0]).save(request.parent / "tiny.png")
    images.read(request.parent / "tiny.png")

    rows(request.parent / "tiny.parquet")
    with contextlib.suppress(ValueError):
        datasets.load(request.parent / "tiny.parquet")

    figures = {}
    for name, path in json.loads(request.read_text()).items():
        receive, send = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(send, json.dumps(_read(name, path, resource)).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as file:
            figures[name] = json.loads(file.read())
        os.waitpid(pid, 0)
    print(json.dumps(figures))


def _read(name, path, resource):
    import fastscore.memory

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + CAP,) * 2)
    assert fastscore.memory.available() <= CAP
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    if name.startswith("fashion"):
        os.environ["FASTSCORE_FASHION_MNIST"], path = path, "fashion"

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024   # noqa: E731
    begin, before = time.perf_counter(), peak()
    messages = []
    for read, source in _readers(path):
        try:
            read(source)
            messages.append("it was read")
        except Exception as error:
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            messages.append(f"{kind}: {error}")
    return {
        "messages": messages,
        "seconds": time.perf_counter() - begin,
        "grown": peak() - before,
    }


def _readers(path):
    """Whatever reads such a file, and under which name."""
    if path == "fashion":
        return [(datasets.load, path), (datasets.open, path)]
    picture = path.endswith((".png", ".jpg"))
    data = str(Path(path).parent) if picture else path
    readers = [(datasets.load, data), (datasets.open, data)]
    if picture or path.endswith(".npy"):
        readers += [(lambda p: observations.load_image(p, None), path)]
    return readers


def pictures(path, n):
    path.mkdir()
    for i in range(n):
        Image.fromarray(np.full((4, 4), 100 + i, np.uint8)).save(path / f"{i}.png")
    return path


def test_what_systems_leave_in_folders_is_not_looked_at(tmp_path):
    path = pictures(tmp_path / "x", 3)
    for name in ("._1.png", ".DS_Store", "Thumbs.db", "._cover.tiff", "desktop.ini"):
        (path / name).write_bytes(b"\0\5\26\7")
    (path / ".ipynb_checkpoints").mkdir()
    (path / ".ipynb_checkpoints" / "1-checkpoint.png").write_bytes(b"")
    (path / "back").symlink_to(path)
    assert len(datasets.load(path)[0]) == len(datasets.open(path)) == 3


def test_names_that_are_no_text_are_names(tmp_path):
    path = pictures(tmp_path / "x", 2)
    odd = os.fsdecode(b"\xff\xfe.png")
    (path / "1.png").rename(path / odd)
    source = datasets.open(path, in_memory=False)
    values = datasets.load(path)[0]
    assert torch.equal(source.read(torch.arange(2)), values)
    (path / odd).write_bytes(b"none")
    with pytest.raises(ValueError, match="is not a readable PNG or JPEG image") as error:
        datasets.load(path)
    # As every stream of Python's prints it.
    print(str(error.value).encode(errors="backslashreplace").decode())


def test_a_data_set_whose_name_is_no_text_is_one_sentence(tmp_path):
    odd = str(pictures(tmp_path / os.fsdecode(b"\xff"), 2))
    for name, options in (("data", {"data": odd}), ("out", {"out": Path(odd)})):
        with pytest.raises(ValueError, match=f"train: {name} must be text that UTF-8 can hold"):
            TrainConfig(**options)


@pytest.mark.parametrize("n", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_folder_of_many_files_is_listed_in_seconds(tmp_path, n):
    for k in range(10):
        (tmp_path / str(k)).mkdir()
        for i in range(n // 10):
            os.close(os.open(tmp_path / str(k) / f"{i}.png", os.O_CREAT))
    begin = time.process_time()
    files = images.pictures_of(tmp_path)
    took = time.process_time() - begin
    print(f"{len(files)} files listed in {took:.2f} s of processor time")
    assert len(files) == n and files == sorted(files)
    assert took < 5 * n / 100_000


# Small damage: read, or one sentence


def intact(folder):
    """A small file of every kind, by its name."""
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 9, 8)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    np.save(folder / "x.npy", grey)
    np.savez(folder / "x.npz", images=grey, labels=np.arange(3))
    np.savez_compressed(folder / "z.npz", images=grey, labels=np.arange(3))
    Image.fromarray(grey[0]).save(folder / "x.png", exif=exif)
    Image.fromarray(grey.transpose(1, 2, 0)).save(folder / "y.png", transparency=(1, 2, 3))
    Image.fromarray(grey[0]).save(folder / "x.jpg", exif=exif)
    lines = [f"{a},{b},{i % 2}" for i, (a, b) in enumerate(rng.standard_normal((9, 2)))]
    (folder / "x.csv").write_text("\n".join(["a,b,k", *lines]))
    rows(folder / "x.parquet", 9)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(data, rng):
    """Cut, or up to three bytes or bits changed."""
    found = bytearray(data)
    how = rng.integers(4)
    if how == 0:
        return bytes(found[: rng.integers(len(found))])
    for _ in range(rng.integers(1, 4)):
        i = rng.integers(len(found))
        found[i] = (found[i] ^ (1 << rng.integers(8)), rng.integers(256), 255)[how - 1]
    return bytes(found)


@pytest.mark.parametrize("n", [30, pytest.param(500, marks=pytest.mark.slow(1))])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_one_sentence(tmp_path, n):
    """By every reader, whole and as they are wanted; seed 0."""
    (tmp_path / "intact").mkdir()
    (tmp_path / "x").mkdir()
    rng, counts = np.random.default_rng(0), collections.Counter()
    for name, data in intact(tmp_path / "intact").items():
        path = tmp_path / "x" / name
        source = str(path.parent if path.suffix in (".png", ".jpg") else path)
        source += ":label=k" * (path.suffix in (".csv", ".parquet"))
        for _ in range(n):
            path.write_bytes(damaged(data, rng))
            for in_memory in (True, False):
                try:
                    found = datasets.open(source, in_memory=in_memory)
                    assert found.read(torch.arange(len(found))).isfinite().all()
                    counts["read"] += 1
                except ValueError as error:
                    message = str(error)
                    assert "\n" not in message and message.endswith("."), (name, message)
                    assert len(message) < 600, (name, message)
                    counts["refused"] += 1
        path.unlink()
    print(dict(counts))
    assert min(counts.values()) > n


# Files that cannot be read, and may be left out


def with_damage(path, n=6):
    pictures(path, n)
    (path / "2.png").write_bytes(b"none")
    (path / "4.png").write_bytes((path / "4.png").read_bytes()[:40])
    os.mkfifo(path / "5b.png")
    return path


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("budget", [0, 2])
def test_one_damaged_file_too_many_is_refused_by_name_and_number(tmp_path, in_memory, budget):
    path = with_damage(tmp_path / "x")
    with pytest.raises(ValueError) as error:
        source = datasets.open(path, in_memory=in_memory, skip_corrupt=budget)
        source.read(torch.arange(len(source)))
    message = str(error.value)
    assert re.search(
        r"2\.png is not a readable PNG or JPEG image \(\w+\); 3 of the 7 files in .*x cannot be "
        r"read \(skip_corrupt=3 leaves them out\)\.$",
        message,
    )
    assert "\n" not in message


@pytest.mark.parametrize("in_memory", [True, False])
def test_damaged_files_are_left_out_within_the_budget(tmp_path, in_memory):
    path = with_damage(tmp_path / "x")
    with pytest.warns(
        UserWarning, match=r"3 of 7 files cannot be read and are left out: 2.png, 4.png, 5b.png\."
    ):
        source = datasets.open(path, in_memory=in_memory, skip_corrupt=3)
    grey = (source.read(torch.arange(len(source)))[:, 0, 0, 0] * 255).round().int().tolist()
    assert grey == [100, 101, 103, 105]


def test_what_is_refused_for_what_it_is_is_not_left_out(tmp_path):
    """A budget for damage does not pass over images of another size."""
    path = pictures(tmp_path / "x", 3)
    Image.new("L", (5, 5), 255).save(path / "9.png")
    with pytest.raises(ValueError, match="all images must have one size"):
        datasets.open(path, in_memory=True, skip_corrupt=3)


def test_a_run_leaves_out_damaged_files_as_asked(tmp_path):
    path = with_damage(tmp_path / "x")
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 4, "steps": 2}
    config = TrainConfig(**options, data=str(path), out=tmp_path / "run", skip_corrupt=3)
    with pytest.warns(UserWarning, match="are left out"):
        list(fit(config))
    with pytest.warns(UserWarning, match="are left out"):
        assert len(splits.part(run_folder.read_config(tmp_path / "run")[0], "training")[0]) == 4
    with pytest.raises(ValueError, match="3 of the 7 files"):
        fit(TrainConfig(**options, data=str(path), out=tmp_path / "other"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
