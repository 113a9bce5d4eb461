"""Data that are read as they are wanted: the same values whoever reads them, in whatever order."""

import os
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastscore import datasets, memory, random
from fastscore.cli import held_out, run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.datasets import order
from fastscore.training import checkpoint

TINY = {"width": 16, "depth": 1, "levels": 3, "batch_size": 8, "seed": 3}
N = 12


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return str(path)


def npy(path, array, **options):
    np.save(path, np.asarray(array, **options))
    return str(path)


def npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


GREY = pixels(N, 8, 6)
COLOUR = pixels(N, 8, 6, 3)
KINDS = {
    "folder, grey": lambda p: folder(p / "x", GREY),
    "folder, colour": lambda p: folder(p / "x", COLOUR),
    "folder, colours as grey": lambda p: folder(p / "x", COLOUR) + ":grey",
    "npy, uint8": lambda p: npy(p / "x.npy", GREY),
    "npy, channels last": lambda p: npy(p / "x.npy", COLOUR),
    "npy, channels first, rgb of grey": lambda p: npy(p / "x.npy", GREY[:, None]) + ":rgb",
    "npy, uint16, big endian": lambda p: npy(p / "x.npy", (GREY.astype(int) * 257).astype(">u2")),
    "npy, bool": lambda p: npy(p / "x.npy", GREY > 99),
    "npy, float32": lambda p: npy(p / "x.npy", (GREY / 255).astype(np.float32)),
    "npy, float32, channels last": lambda p: npy(p / "x.npy", (COLOUR / 255).astype(np.float32)),
    "npy, float64": lambda p: npy(p / "x.npy", GREY / 255),
    "npy, Fortran order": lambda p: npy(p / "x.npy", GREY, order="F"),
    "npy, white is said": lambda p: npy(p / "x.npy", GREY % 16) + ":max=15",
    "npz, with labels": lambda p: npz(p / "x.npz", images=GREY, labels=np.arange(N) % 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_by_numbers_is_what_is_loaded(tmp_path, kind):
    """To the bit: whole, in any order, twice, alone, in a part of a part."""
    name = KINDS[kind](tmp_path)
    images, labels = datasets.load(name)
    for in_memory in (True, False, None):
        source = datasets.open(name, in_memory=in_memory)
        assert len(source) == len(images) and source.shape == tuple(images.shape[1:])
        assert source.in_memory == (in_memory is not False or "Fortran" in kind)
        assert (source.labels is None) if labels is None else torch.equal(source.labels, labels)

        shuffled = torch.tensor([5, 0, 11, 5, 3])
        assert torch.equal(source.read(shuffled), images[shuffled])
        assert source.read(shuffled).dtype == torch.float32
        # Kernels follow strides, and so does rounding.
        assert source.read(shuffled).stride() == images[shuffled].stride()
        assert torch.equal(source.read(torch.arange(N)), images)
        assert all(torch.equal(source.read(torch.tensor([i]))[0], images[i]) for i in range(N))
        part = source.subset(torch.tensor([7, 2, 9, 4])).subset(torch.tensor([3, 1]))
        assert torch.equal(part.read(torch.tensor([0, 1])), images[[4, 2]])
        assert source.read(torch.tensor([], dtype=torch.int64)).shape == (0, *source.shape)


def test_a_compressed_archive_is_read_as_a_whole(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", images=GREY)
    source = datasets.open(tmp_path / "x.npz", in_memory=False)
    assert source.in_memory
    assert torch.equal(source.read(torch.arange(N)), datasets.load(tmp_path / "x.npz")[0])


@pytest.mark.parametrize("indices", [[-1], [0, N], [N + 5]])
def test_numbers_out_of_range_are_refused(tmp_path, indices):
    for in_memory in (True, False):
        source = datasets.open(KINDS["npy, uint8"](tmp_path), in_memory=in_memory)
        with pytest.raises(ValueError, match=rf"indices must lie in 0\.\.11; got {indices[-1]}"):
            source.read(torch.tensor(indices))
    with pytest.raises(ValueError, match="must be an int64 tensor"):
        source.read([0, 1])


@pytest.mark.parametrize("kind", ["folder, grey", "npy, uint8", "npz, with labels"])
def test_sources_can_be_pickled(tmp_path, kind):
    source = datasets.open(KINDS[kind](tmp_path), in_memory=False)
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(torch.arange(N)), source.read(torch.arange(N)))


def test_folders_are_classes_where_it_is_said(tmp_path):
    for i, image in enumerate(GREY):
        kind = tmp_path / "x" / ["cat", "dog", "ape"][i % 3] / "deep"
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(kind / f"{i:03d}.png")
    plain = datasets.load(tmp_path / "x")
    assert plain[1] is None
    images, labels = datasets.load(f"{tmp_path}/x:by-folder")
    assert torch.equal(images, plain[0]) and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for in_memory in (True, False):
        source = datasets.open(f"{tmp_path}/x:by-folder", in_memory=in_memory)
        assert torch.equal(source.labels, labels) and source.classes == ("ape", "cat", "dog")
        assert torch.equal(source.read(torch.arange(N)), images)
        part = source.subset(torch.tensor([9, 1]))
        assert part.labels.tolist() == [2, 0] and part.classes == source.classes

    Image.fromarray(GREY[0]).save(tmp_path / "x" / "z.png")
    with pytest.raises(ValueError, match=r"z\.png lies in no folder, which would be its class"):
        datasets.open(f"{tmp_path}/x:by-folder")
    array = KINDS["npy, uint8"](tmp_path) + ":by-folder"
    for in_memory in (True, False):
        with pytest.raises(ValueError, match=r"is no folder, whose folders are classes"):
            datasets.open(array, in_memory=in_memory)


# Other libraries' data sets


class Pairs:
    """As torch.utils.data and torchvision have them."""

    def __init__(self, wrap, targets=None):
        self.wrap = wrap
        self.reads = 0
        if targets is not None:
            self.targets = targets

    def __len__(self):
        return N

    def __getitem__(self, i):
        self.reads += 1
        return self.wrap(i)


MAPPED = {
    "tensors": lambda i: (torch.from_numpy(GREY[i] / 255).float()[None], i % 3),
    "tensors of bytes": lambda i: (torch.from_numpy(GREY[i])[None], torch.tensor(i % 3)),
    "arrays": lambda i: (GREY[i], np.int64(i % 3)),
    "pictures": lambda i: (Image.fromarray(GREY[i]), i % 3),
    "dicts": lambda i: {"image": Image.fromarray(GREY[i]), "label": i % 3},
    "lists": lambda i: [GREY[i], i % 3],
}


@pytest.mark.parametrize("kind", MAPPED)
def test_items_of_a_map_style_data_set_are_samples(kind):
    source = datasets.open(Pairs(MAPPED[kind]))
    shuffled = torch.tensor([5, 0, 11, 5])
    expected = torch.from_numpy(GREY / 255).float()[:, None]
    assert source.shape == (1, 8, 6) and not source.in_memory
    torch.testing.assert_close(source.read(shuffled), expected[shuffled], rtol=0, atol=1e-7)
    assert source.labels.tolist() == [i % 3 for i in range(N)]


def test_a_list_of_labels_spares_reading_every_item():
    data = Pairs(MAPPED["arrays"], targets=[i % 3 for i in range(N)])
    source = datasets.open(data)
    assert source.labels.tolist() == data.targets and data.reads < 4


def test_columns_are_asked_for_where_they_are_not_the_usual_ones():
    data = Pairs(lambda i: {"photo": GREY[i], "species": i % 3})
    with pytest.raises(ValueError, match=r"have the columns \['photo', 'species'\]; say which one"):
        datasets.open(data)
    source = datasets.open(data, columns=("photo", "species"))
    assert source.labels.tolist() == [i % 3 for i in range(N)]
    assert datasets.open(data, columns=("photo", None)).labels is None
    with pytest.raises(ValueError, match=r"columns must be among .*; got 'colour'"):
        datasets.open(data, columns=("colour", None))


class Image_:
    """What Hugging Face's `features` say of a column of pictures."""


class ClassLabel:
    pass


Image_.__name__ = "Image"


class Columns(Pairs):
    """As Hugging Face's data sets: `features`, and a column by its name."""

    features = {"id": None, "photo": Image_(), "species": ClassLabel()}

    def __getitem__(self, i):
        if i == "species":
            return [k % 3 for k in range(N)]
        return super().__getitem__(i)


def test_columns_are_known_by_their_types():
    data = Columns(lambda i: {"id": i, "photo": Image.fromarray(GREY[i]), "species": i % 3})
    source = datasets.open(data)
    # No picture is decoded for the labels.
    assert data.reads < 4
    assert source.labels.tolist() == [i % 3 for i in range(N)] and source.shape == (1, 8, 6)
    expected = torch.from_numpy(GREY[4] / 255).float()
    torch.testing.assert_close(source.read(torch.tensor([4]))[0, 0], expected, rtol=0, atol=1e-7)


def test_vectors_are_taken_as_they_are():
    vectors = np.random.default_rng(0).standard_normal((N, 5))
    source = datasets.open(torch.utils.data.TensorDataset(torch.from_numpy(vectors)))
    assert source.shape == (5,) and source.labels is None
    assert torch.equal(source.read(torch.arange(N)), torch.from_numpy(vectors).float())
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(torch.arange(3)), source.read(torch.arange(3)))


@pytest.mark.parametrize(
    "data, error, message",
    [
        (iter([1]), TypeError, "What only iterates has no numbers: give it to training_loop"),
        (3, TypeError, "source must be a name, a path"),
        ([], ValueError, "list holds no samples"),
        (["a", "b"], ValueError, "item 0 of list must be a picture, an array or a tensor"),
        ([GREY[0], GREY[1, :4]], ValueError, "all samples must have one shape"),
        ([torch.ones(1, 2, 2) * 3], ValueError, r"item 0 of list must have values in \[0, 1\]"),
        (torch.arange(3), ValueError, r"must be a float tensor \(N, \*\)"),
        ((torch.ones(3, 2), torch.ones(3)), ValueError, r"labels must be int64 \(3,\)"),
    ],
    ids=["iterator", "number", "empty", "text", "sizes", "range", "integers", "labels"],
)
def test_what_is_no_data_set_is_one_sentence(data, error, message):
    with pytest.raises(error, match=message) as raised:
        datasets.open(data).read(torch.arange(len(data)))
    assert "\n" not in str(raised.value)


# Batches


def test_batches_are_those_of_the_first_version():
    """Pinned: a run that was begun before goes on with the same images."""
    found = order.chosen(1000, 6, seed=5, step=7).tolist()
    w = random.words(6, seed=5, step=7, stream=1024)
    assert found == [int(word) * 1000 >> 32 for word in w]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_the_order_does_not_depend_on_workers_shares_or_where_samples_lie(tmp_path, workers):
    name = KINDS["folder, colour"](tmp_path)
    images, _ = datasets.load(name)
    options = {"seed": 3, "steps": 9, "first_step": 2}
    source = datasets.open(name, in_memory=False, workers=workers)
    whole = [(step, x) for step, x, _ in datasets.batches(source, 7, **options)]
    assert [step for step, _ in whole] == list(range(2, 9))
    for step, x in whole:
        assert torch.equal(x, images[order.chosen(N, 7, seed=3, step=step)])

    parts = ({"first_sample": 0, "count": 4}, {"first_sample": 4})
    shares = [datasets.batches(source, 7, **options, **part) for part in parts]
    for (_, x), (_, a, _), (_, b, _) in zip(whole, *shares):
        assert torch.equal(x, torch.cat([a, b]))


def test_batches_are_read_ahead_and_the_thread_ends_with_the_generator():
    started = threading.active_count()
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    ahead = order.ahead(items())
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # One in use, two that are ready, one that waits for a place.
    assert 3 <= len(made) <= 4
    ahead.close()
    assert threading.active_count() == started


def test_what_the_thread_raises_is_raised_where_its_batch_is_used():
    def items():
        yield 0
        raise ValueError("sample 3 cannot be read.")

    ahead = order.ahead(items())
    assert next(ahead) == 0
    with pytest.raises(ValueError, match="sample 3 cannot be read"):
        next(ahead)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastscore")]


def test_a_file_that_changes_while_a_run_reads_it_is_one_sentence(tmp_path):
    name = npy(tmp_path / "x.npy", GREY)
    source = datasets.open(name, in_memory=False)
    npy(tmp_path / "x.npy", GREY[:4])
    with pytest.raises(ValueError, match=r"x\.npy was changed while it was read"):
        source.read(torch.tensor([11]))


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_of_any_number_of_workers_takes_a_source_as_its_data_set(tmp_path, workers):
    source = datasets.open(KINDS["npz, with labels"](tmp_path), in_memory=False)
    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(
        source, batch_size=5, shuffle=True, num_workers=workers, generator=generator
    )
    images, labels = datasets.load(tmp_path / "x.npz")
    found = [torch.cat(parts) for parts in zip(*loader)]
    shuffled = [5, 4, 0, 9, 7, 8, 1, 10, 3, 11, 6, 2]   # of this seed
    assert torch.equal(found[0], images[shuffled]) and torch.equal(found[1], labels[shuffled])
    with pytest.raises(IndexError, match=r"must lie in 0\.\.11; got 12"):
        source[12]


def test_processes_of_one_machine_share_what_is_kept_in_memory(tmp_path, monkeypatch):
    name = KINDS["folder, colour"](tmp_path)
    nbytes = N * 8 * 6 * 3 * 4
    monkeypatch.setattr(memory, "available", lambda: 4 * 3 * nbytes)
    for processes, kept in (("", True), ("3", True), ("4", False), ("x", True), ("0", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert datasets.open(name).in_memory == kept


def test_what_memory_does_not_hold_is_refused_where_it_would_be_whole(tmp_path, monkeypatch):
    name = KINDS["folder, colour"](tmp_path)
    config = TrainConfig(data=name, out=tmp_path / "run")
    source = datasets.open(name, in_memory=False)
    monkeypatch.setattr(memory, "available", lambda: N * 8 * 6 * 3 * 4 - 1)
    with pytest.raises(ValueError, match=r"its 12 pictures, takes .* datasets\.open reads them as"):
        datasets.load(name)
    with pytest.raises(ValueError, match=r"what is training of it, as a whole, takes"):
        splits.part(config, "training", source)


# Runs


def streaming(monkeypatch):
    monkeypatch.setattr(datasets, "_kept", lambda in_memory, nbytes: bool(in_memory))


@pytest.mark.parametrize("kind", ["folder, grey", "npy, channels last", "npz, with labels"])
def test_a_run_that_streams_ends_with_the_weights_of_one_in_memory(tmp_path, monkeypatch, kind):
    name = KINDS[kind](tmp_path)
    options = {**TINY, "data": name, "held_out": 3, "steps": 5}
    list(fit(TrainConfig(**options, out=tmp_path / "whole")))
    streaming(monkeypatch)
    assert not splits.source(TrainConfig(**options)).in_memory
    list(fit(TrainConfig(**options, out=tmp_path / "streamed")))
    whole, streamed = (run_folder.read_weights(tmp_path / n) for n in ("whole", "streamed"))
    assert all(torch.equal(whole[k], streamed[k]) for k in whole)
    for name in ("training", "held_out"):
        records = [checkpoint.load(tmp_path / n / splits.FILE) for n in ("whole", "streamed")]
        assert torch.equal(records[0][name], records[1][name])
    assert not [t for t in threading.enumerate() if t.name.startswith("fastscore")]


def test_a_run_that_streams_goes_on_bit_for_bit_and_reads_no_file_twice(tmp_path, monkeypatch):
    streaming(monkeypatch)
    name = KINDS["folder, grey"](tmp_path)
    options = {**TINY, "data": name, "held_out": 3}
    list(fit(TrainConfig(**options, out=tmp_path / "whole", steps=6)))
    # A closed generator saves where it stands.
    run = fit(TrainConfig(**options, out=tmp_path / "run", steps=6))
    for _ in range(3):
        next(run)
    run.close()

    read = []
    digests = splits._read_digests

    def seen(data, rows):
        read.extend(rows.tolist())
        return digests(data, rows)

    monkeypatch.setattr(splits, "_read_digests", seen)
    os.utime(Path(name) / "004.png", ns=(1, 1))
    list(fit(TrainConfig(out=tmp_path / "run", resume=True)))
    assert read == [4]   # the one that was touched
    whole, parts = (run_folder.read_weights(tmp_path / n) for n in ("whole", "run"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_the_thread_that_reads_ahead_ends_with_a_run_that_fails(tmp_path, monkeypatch):
    """While its error, and with it every frame, is still at hand."""
    streaming(monkeypatch)
    name = KINDS["npy, uint8"](tmp_path)
    run = fit(TrainConfig(**TINY, data=name, out=tmp_path / "run", steps=100))
    next(run)

    def fails(*args, **options):
        raise ValueError("of the loss")

    monkeypatch.setattr("fastscore.cli.fit.objective", fails)
    with pytest.raises(ValueError, match="of the loss") as error:
        next(run)
    assert not [t for t in threading.enumerate() if t.name.startswith("fastscore")]
    del error


def test_a_file_that_changes_under_a_run_ends_it_in_one_sentence(tmp_path, monkeypatch):
    streaming(monkeypatch)
    name = KINDS["npy, uint8"](tmp_path)
    run = fit(TrainConfig(**TINY, data=name, out=tmp_path / "run", steps=100))
    next(run)
    npy(tmp_path / "x.npy", GREY[:9])
    with pytest.raises(ValueError, match=r"x\.npy was changed while it was read"):
        for _ in run:
            pass


@pytest.mark.parametrize("kind", ["folder, grey", "npy, uint8"])
def test_a_changed_data_set_is_noticed_where_it_streams(tmp_path, monkeypatch, kind):
    streaming(monkeypatch)
    name = KINDS[kind](tmp_path)
    list(fit(TrainConfig(**TINY, data=name, out=tmp_path / "run", steps=2)))
    if "npy" in kind:
        npy(tmp_path / "x.npy", 255 - GREY)
    else:
        Image.fromarray(255 - GREY[2]).save(Path(name) / "002.png")
    lost = "1 of its 12" if "folder" in kind else "12 of its 12"
    with pytest.raises(ValueError, match=f"must still hold the images .*; {lost} are gone"):
        fit(TrainConfig(out=tmp_path / "run", resume=True))


def test_the_prior_of_densities_is_that_of_all_pixels(monkeypatch):
    monkeypatch.setattr(held_out, "_BLOCK", 5)
    x = torch.rand(17, 2, 3, generator=torch.Generator().manual_seed(0)) + 100
    found = held_out.fitted(datasets.open(x))
    x = x.flatten(1).double()
    torch.testing.assert_close(found.means[0], x.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.variances[0], x.var(0), rtol=1e-10, atol=0)


def test_samples_are_found_again_as_often_as_they_are_there():
    """Against a dictionary of lists, on rows with many repetitions."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        kinds = rng.integers(0, 256, (rng.integers(1, 8), 16)).astype(np.uint8)
        rows = kinds[rng.integers(0, len(kinds), rng.integers(0, 12))]
        wanted = kinds[rng.integers(0, len(kinds), rng.integers(0, 12))]
        places = {}
        for i, row in reversed(list(enumerate(rows))):
            places.setdefault(bytes(row), []).append(i)
        expected = [places[r].pop() if places.get(r := bytes(row)) else -1 for row in wanted]
        assert splits._places(rows, wanted).tolist() == expected


# Memory that is free


def test_free_memory_is_the_least_of_machine_group_and_limits(tmp_path, monkeypatch):
    """What the system keeps of files is free: a run that streams fills it up to the bound."""
    machine = memory.available()
    assert 2**26 < machine < 2**50
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    files = {"memory.max": "900", "memory.current": "800"}
    files["memory.stat"] = "anon 100\nactive_file 300\ninactive_file 400\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert memory.available() == 900 - 800 + 700
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() > 2**26

    (tmp_path / "memory").mkdir()
    files = {"limit_in_bytes": "500", "usage_in_bytes": "450"}
    files["stat"] = "active_file 20\ninactive_file 30\n"
    for name, text in files.items():
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert memory.available() == 100
    with pytest.raises(ValueError, match=r"x takes 1\.0 GiB, more than the memory that is free"):
        memory.check(2**30, "x")
