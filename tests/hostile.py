"""Hostile checkpoints, each read in a process of its own: python hostile.py FOLDER.

For each a line of JSON: its name, what was said, the processor's seconds, the memory that it took
at most, and whether its code ran.
"""

import hashlib
import io
import json
import os
import pickle
import signal
import struct
import sys
import time
import zipfile
from pathlib import Path

import torch

LIMIT = 40   # seconds, after which a child is ended


def gadgets(ran):
    """Pickles that run something, which makes the file `ran`."""
    path = os.fspath(ran).encode()
    code = f"open({os.fspath(ran)!r}, 'w')".encode()
    return {
        "os-system": b"cposix\nsystem\n(S'touch " + path + b"'\ntR.",
        "eval": b"c__builtin__\neval\n(V" + code + b"\ntR.",
        "exec": b"\x80\x02cbuiltins\nexec\nX" + struct.pack("<I", len(code)) + code + b"\x85R.",
        "new-object": b"\x80\x02csubprocess\nPopen\n]X\x05\x00\x00\x00touchaX"
        + struct.pack("<I", len(path))
        + path
        + b"a\x85\x81.",
        "state": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsNsb.",
    }


def archive(pickled, records=(), method=zipfile.ZIP_STORED):
    """A zip file as torch.save writes it."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method, compresslevel=1) as file:
        file.writestr("x/data.pkl", pickled)
        file.writestr("x/version", "3\n")
        for key, record in dict(records).items():
            file.writestr(key, record)
    return data.getvalue()


def tensors(shape=(3,), strides=None, count=3, record=12, name="a"):
    """The pickle of {name: tensor}, and the record of its storage."""

    class Stored:
        pass

    class Tensor:
        def __reduce__(self):
            size = tuple(shape)
            steps = (1,) * len(size) if strides is None else strides
            return (torch._utils._rebuild_tensor_v2, (Stored(), 0, size, steps, False, {}))

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Stored):
                return ("storage", torch.FloatStorage, "0", "cpu", count)
            return None

    data = io.BytesIO()
    writer = Writer(data, 2)
    writer.dump({name: Tensor()})
    # What a dictionary of hooks would be.
    return data.getvalue().replace(b"ctorch.storage\n", b"ctorch\n"), {"x/data/0": bytes(record)}


def legacy(pickled, keys=(), rest=b""):
    """As torch.save wrote it before 1.6."""
    from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

    parts = [MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}]
    plain = b"".join(pickle.dumps(part, 2) for part in parts)
    return plain + pickled + pickle.dumps(list(keys), 2) + rest


def endless():
    """A key whose hash takes 2^60 steps."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."


def nested():
    return b"\x80\x02" + b"]" * 290_000 + b"a" * 289_999 + b"."


def huge_directory():
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
    whole = bytearray(data.getvalue())
    whole[-10:-6] = struct.pack("<I", 2**31)
    return bytes(whole)


def overlapping():
    """One record under a thousand names."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps({}, 2))
        file.writestr("x/data/0", bytes(1 << 20))
        one = file.NameToInfo["x/data/0"]
        for k in range(1, 1000):
            other = zipfile.ZipInfo(f"x/data/{k}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(other, field, getattr(one, field))
            file.filelist.append(other)
    return data.getvalue()


def safetensors(header, data=b"", declared=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if declared is None else declared) + header + data


def sealed(header, data=b""):
    """With the digest that our own files carry, right."""
    blank = "0" * 64
    header = {"__metadata__": {"sha256": blank}} | header
    whole = safetensors(header, data)
    return whole.replace(blank.encode(), hashlib.sha256(whole).hexdigest().encode())


def samples(ran):
    """Of each: the end of its name, and its bytes, or what makes it.

    ran: what a gadget makes.
    """
    float32 = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    found = {f"gadget-{name}": (".pth", archive(code)) for name, code in gadgets(ran).items()}
    found |= {f"old-gadget-{name}": (".pth", legacy(code)) for name, code in gadgets(ran).items()}
    return found | {
        "gadget-alone": (".pth", gadgets(ran)["os-system"]),
        "36-terabytes": (".pth", archive(*tensors((10**13,), count=10**13))),
        "36-terabytes-legacy": (".pth", legacy(tensors((10**13,), count=10**13)[0], ["0"])),
        "storage-shorter-than-told": (".pth", archive(*tensors((10**6,), count=10**6))),
        "tensor-beyond-its-storage": (".pth", archive(*tensors((10**9,)))),
        "tensor-of-one-number": (
            ".pth",
            archive(*tensors((10**6, 3, 3, 3), (0, 0, 0, 0), name="begin_conv.weight")),
        ),
        "shape-that-overflows": (".pth", archive(*tensors((2**62, 2**62), (2**62, 1)))),
        "negative-stride": (".pth", archive(*tensors((3,), (-(10**9),)))),
        "bytearray": (
            ".pth",
            archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06" + bytes(5) + b"\x09\x85R."),
        ),
        "key-without-end": (".pth", archive(endless())),
        "key-without-end-legacy": (".pth", legacy(endless())),
        "lists-in-lists": (".pth", archive(nested())),
        "pickle-of-steps": (".pth", archive(b"\x80\x02" + b"N" * 15_000_000 + b".")),
        "zip-bomb": (".pth", archive(bytes(1 << 28), method=zipfile.ZIP_DEFLATED)),
        "zip-of-one-record": (".pth", overlapping()),
        "zip-directory": (".pth", huge_directory()),
        "traversal": (
            ".pth", archive(pickle.dumps({}, 2), {"x/../../../ran": b"x", "/ran": b"x"}),
        ),
        "pipe": (".pth", os.mkfifo),
        "device": (".pth", lambda path: path.symlink_to("/dev/zero")),
        "folder": (".pth", Path.mkdir),
        "terabyte-of-nothing": (".pth", lambda path: sparse(path, 10**12)),
        "header-of-terabytes": (".safetensors", safetensors({}, declared=2**45)),
        "header-bloat": (".safetensors", bloat(safetensors)),
        "header-overflow": (
            ".safetensors", safetensors({"a": float32 | {"shape": [2**63, 2**63]}}),
        ),
        "own-header-bloat": (".own", bloat(sealed)),
        "own-header-overflow": (".own", sealed({"a": float32 | {"shape": [2**40, 2**40]}})),
        "own-offsets": (".own", sealed({"a": float32 | {"data_offsets": [0, 2**40]}})),
        "own-pipe": (".own", os.mkfifo),
        "own-device": (".own", lambda path: path.symlink_to("/dev/zero")),
        "own-manifest": (".own", manifested),
        "run-config-of-lists": (".run", lambda path: run_of(path, b"a = " + b"[" * 10**5)),
        "run-config-of-no-images": (".run", lambda path: run_of(path, CONFIG % b'"x"')),
        "run-config-pipe": (".run", lambda path: run_of(path, None)),
        "run-of-wide-layers": (".run", lambda path: run_of(path, CONFIG % b"[1, 8, 8]")),
        "run-metrics-of-lists": (".metrics", lambda path: metrics_of(path, b"[" * 10**5)),
        "run-metrics-pipe": (".metrics", lambda path: metrics_of(path, None)),
        "own-save-of-lists": (".save", lambda path: saved(path, b"[" * 10**6)),
        "own-save-of-elsewhere": (".save", lambda path: saved(path, OUTSIDE)),
    }   # fmt: skip


def bloat(made):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return made({f"{k:040}": entry for k in range(200_000)})


OUTSIDE = json.dumps(
    {"step": 1, "files": {"../../x": {"bytes": 1, "sha256": ""}}, "logs": {}}
).encode()


def saved(path, manifest):
    """A run with one save, whose manifest is sealed."""
    folder = path / "step-000000001"
    folder.mkdir(parents=True)
    whole = b'["sha256", "' + b"0" * 64 + b'"' + b", " + manifest
    if manifest.startswith(b"{"):
        whole = b'{"sha256": "' + b"0" * 64 + b'", ' + manifest[1:]
    digest = hashlib.sha256(whole).hexdigest().encode()
    (folder / "manifest.json").write_bytes(whole.replace(b"0" * 64, digest))


# 250 MB of weights in each of six layers.
CONFIG = b"""
shape = %s
data = "digits"
steps = 1
width = 8000
format = 2
"""


def run_of(path, config):
    """A run folder with a sealed config, or a pipe in its place, and the weights of a point."""
    from fastscore.training import checkpoint, files

    path.mkdir()
    if config is None:
        os.mkfifo(path / "config.toml")
    else:
        head = f"# sha256 = {files.BLANK}\n".encode()
        (path / "config.toml").write_bytes(files.sealed(head + config))
    for name in ("weights", "state"):
        checkpoint.save(path / f"{name}.safetensors", {"first.weight": torch.ones(1)})


def metrics_of(path, lines):
    path.mkdir()
    if lines is None:
        os.mkfifo(path / "metrics.jsonl")
    else:
        (path / "metrics.jsonl").write_bytes(lines)


def sparse(path, size):
    with open(path, "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)


def manifested(path):
    """Of earlier versions: a digest beside the file, here in lists without end."""
    path.write_bytes(safetensors({}))
    Path(f"{path}.json").write_text("[" * 10**6)


def make(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


def peak():
    """Bytes of memory at most since `reset`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def attempt(path):
    """What reading it says."""
    from fastscore.cli import metrics, run_folder
    from fastscore.models import load_official
    from fastscore.training import checkpoint, saves

    readers = {
        ".own": checkpoint.load,
        ".save": saves.newest_intact,
        ".run": run_folder.open_run,
        ".metrics": metrics.read,
    }
    try:
        found = readers.get(path.suffix, load_official)(path)
    except ValueError as error:
        return f"ValueError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return f"returned a {type(found).__name__}"


def measured(path):
    """In a child, which is ended when its time is over."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(LIMIT)
        Path("/proc/self/clear_refs").write_text("5")
        before, start = peak(), time.process_time()
        said = attempt(path)
        row = {"said": said, "seconds": time.process_time() - start, "bytes": peak() - before}
        os.write(writer, json.dumps(row).encode()[:60_000])
        os._exit(0)

    os.close(writer)
    with open(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    lost = {"said": f"ended by signal {status & 127}", "seconds": LIMIT, "bytes": 0}
    return json.loads(text) if text else lost


def main(folder):
    # Before the children.
    import fastscore.models.official  # noqa: F401

    ran = folder / "ran"
    for name, (end, content) in samples(ran).items():
        path = folder / f"{name}{end}"
        make(path, content)
        size = path.stat().st_size if path.is_file() else 0
        row = {"name": name, "size": size, **measured(path), "ran": ran.exists()}
        ran.unlink(missing_ok=True)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
