"""Checkpoints that were made to harm: each is one sentence, soon, and nothing of it is executed."""

import collections
import io
import json
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastscore import regular
from fastscore.models import NCSNv2, load_official
from fastscore.models.checkpoint_files import read

CAP = 64 << 20   # bytes that reading may take beside what is there


@pytest.mark.processes
def test_hostile_checkpoints_run_nothing_and_take_neither_memory_nor_time(tmp_path):
    """Seconds are the processor's: a pipe and a hash without end are ended by an alarm instead."""
    script = Path(__file__).parent / "hostile.py"
    printed = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=400
    )
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert printed.returncode == 0 and len(rows) == 48, printed.stderr

    executed = [row["name"] for row in rows if row["ran"]]
    large = [row["name"] for row in rows if row["bytes"] > 2 * CAP]
    slow = [row["name"] for row in rows if row["seconds"] > 5]
    unsaid = [
        row
        for row in rows
        if not row["said"].startswith("ValueError: ") or "\n" in row["said"]
        or len(row["said"]) - len(str(tmp_path)) > 500
    ]   # fmt: skip
    print(
        f"{len(rows)} hostile checkpoints: {len(executed)} executed, {len(large)} over "
        f"{2 * CAP >> 20} MiB (most: {max(row['bytes'] for row in rows) >> 20} MiB), {len(slow)} "
        f"over 5 s (most: {max(row['seconds'] for row in rows):.2f} s), {len(unsaid)} not one "
        "sentence"
    )
    assert not executed and not large and not slow and not unsaid, (executed, large, slow, unsaid)


def saved(net):
    """Everything that published files have in them."""
    optimizer = torch.optim.Adam(net.parameters(), lr=np.float64(1e-3), betas=(0.9, 0.999))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = net.state_dict()
    return [state, optimizer.state_dict(), np.int64(3), 7, dict(state)]


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before-1.6"])
def test_files_of_tensors_are_read_as_they_are(tmp_path, new):
    net = NCSNv2(1, 4, [1.0, 0.1], 8)
    file = tmp_path / "x.pth"
    expected = saved(net)
    torch.save(expected, file, _use_new_zipfile_serialization=new)
    found = read(file)
    assert list(found[0]) == list(expected[0]) and found[3] == 7
    for part in (0, 4):
        assert all(torch.equal(found[part][k], t) for k, t in expected[part].items())
    assert found[0]._metadata == expected[0]._metadata

    several = {
        "shared": [expected[0]["begin_conv.weight"], expected[0]["begin_conv.weight"][1:]],
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(3.0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "whole": torch.arange(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "schedule": {"milestones": collections.Counter([3, 5, 5]), "seen": {1, 2}},
        "dtype": torch.bfloat16,
        "plain": (1, -5, 2**40, 1.5, None, True, "é", b"bytes", {3: [()]}),
    }
    torch.save(several, file, _use_new_zipfile_serialization=new)
    found = read(file)
    for name in ("plain", "size", "device", "schedule", "dtype"):
        assert found[name] == several[name]
    for name in ("transposed", "empty", "number", "half", "whole", "parameter"):
        assert torch.equal(found[name], several[name])
    assert all(map(torch.equal, found["shared"], several["shared"]))


def test_safetensors_of_weights_are_read(tmp_path):
    from safetensors.torch import save_file

    net = NCSNv2(1, 4, [1.0, 0.1], 8)
    save_file(net.state_dict(), tmp_path / "x.safetensors")
    found = load_official(
        tmp_path / "x.safetensors", nonlinearity="elu", rescaled=False, logit_transform=False
    )
    assert all(map(torch.equal, found.parameters(), net.parameters()))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before-1.6"])
def test_a_changed_byte_is_read_or_refused_in_one_sentence(tmp_path, new):
    """Some three hundred bytes, those of the pickle and the lists among them, and 40 lengths."""
    file = tmp_path / "x.pth"
    buffer = io.BytesIO()
    torch.save([{"a": torch.ones(3)}, {}], buffer, _use_new_zipfile_serialization=new)
    whole = buffer.getvalue()
    said = []
    for k in range(0, len(whole), max(1, len(whole) // 300)):
        changed = bytearray(whole)
        changed[k] ^= 0xFF
        said.append(tried(file, bytes(changed)))
    for k in range(40):
        said.append(tried(file, whole[: k * len(whole) // 40]))
    refused = [line for line in said if line is not None]
    print(f"{len(said)} changes: {len(refused)} refused, the others read")
    assert len(refused) > 40 and all("\n" not in line for line in refused)


def tried(file, data):
    file.write_bytes(data)
    try:
        read(file)
    except ValueError as error:
        return str(error)
    return None


def test_weights_that_are_no_numbers_are_refused():
    net = NCSNv2(1, 4, [1.0, 0.1], 8)
    for value, found in [
        (torch.full((1,), float("nan")), "has numbers that are not finite"),
        (torch.ones(1, dtype=torch.int64), "has torch.int64"),
        (torch.ones(1, dtype=torch.complex64), "has torch.complex64"),
    ]:
        state = net.state_dict() | {"end_conv.bias": value}
        with pytest.raises(ValueError, match=f"finite and floats; end_conv.bias {found}"):
            load_official(state)


def test_an_entry_of_another_case_is_another_entry_of_the_name(tmp_path):
    """torch.load takes either for the other."""
    torch.save({"a": torch.ones(3)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "a") as archive:
        archive.writestr("x/DATA.pkl", b"")
    with pytest.raises(ValueError, match="two entries of one name"):
        read(tmp_path / "x.pth")


def test_regular_files_have_a_bound(tmp_path):
    file = tmp_path / "x"
    file.write_bytes(b"12345")
    assert regular.read(file) == regular.read(file, 5) == b"12345"
    with pytest.raises(ValueError, match="must have at most 4 bytes; it has 5"):
        regular.read(file, 4)
    with pytest.raises(FileNotFoundError):
        regular.read(tmp_path / "y")


def test_a_changed_pickle_is_read_or_refused_in_one_sentence(tmp_path):
    """600 of them, in archives that are otherwise whole: operations replaced, left out, twice."""
    buffer = io.BytesIO()
    torch.save(saved(torch.nn.Linear(2, 3)), buffer)
    with zipfile.ZipFile(buffer) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in contents if name.endswith("/data.pkl"))

    rng = random.Random(0)
    seconds, said = [], []
    for _ in range(600):
        pickled = bytearray(contents[name])
        at = rng.randrange(len(pickled))
        change = rng.choice(("operation", "cut", "copy"))
        if change == "operation":
            pickled[at] = rng.choice(b"}]).(tqhRbsuaeNKMJGXcQ\x85\x86\x87\x8a")
        elif change == "cut":
            del pickled[at : at + rng.randrange(1, 6)]
        else:
            other = rng.randrange(len(pickled))
            pickled[at:at] = pickled[other : other + rng.randrange(1, 40)]
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w") as archive:
            for each, data in (contents | {name: bytes(pickled)}).items():
                archive.writestr(each, data)
        start = time.process_time()
        said.append(tried(tmp_path / "x.pth", whole.getvalue()))
        seconds.append(time.process_time() - start)

    refused = [line for line in said if line is not None]
    print(f"{len(said)} changed pickles: {len(refused)} refused, at most {max(seconds):.2f} s")
    assert len(refused) > 300 and all("\n" not in line for line in refused) and max(seconds) < 5
