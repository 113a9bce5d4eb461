"""Flips, shifts and crops: what is drawn for an image depends on its key alone."""

import numpy as np
import pytest
import torch

from fastscore import datasets, likelihood, random
from fastscore.cli import run_folder, splits
from fastscore.cli.config import TrainConfig
from fastscore.cli.fit import fit
from fastscore.datasets.augment import AUGMENT, augment

B, C, H, W = 9, 2, 5, 7
X = torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(0))


def drawn(seed, step, sample):
    return random.words(4, seed=seed, step=step, stream=AUGMENT, offset=4 * sample).tolist()


def shifted(image, down, right, mirrored):
    """Pixel by pixel, as the docstring says."""
    out = torch.empty_like(image)
    for y in range(H):
        for x in range(W):
            column = W - 1 - x if mirrored else x
            place = min(max(y - down, 0), H - 1), min(max(column - right, 0), W - 1)
            out[:, y, x] = image[:, place[0], place[1]]
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_shifts_and_flips_are_those_of_the_words(flip, k):
    found = augment(X, flip=flip, shift=k, seed=5, step=3, first_sample=4)
    for n in range(B):
        w = drawn(5, 3, 4 + n)
        move = [((2 * k + 1) * word >> 32) - k for word in w[1:3]]
        assert torch.equal(found[n], shifted(X[n], *move, flip and w[0] % 2 == 1))


@pytest.mark.parametrize("crop", [1, 3, 5])
def test_crops_are_those_of_the_words(crop):
    found = augment(X, crop=crop, seed=5, step=3)
    for n in range(B):
        top, left = ((side - crop + 1) * w >> 32 for side, w in zip((H, W), drawn(5, 3, n)[1:3]))
        assert torch.equal(found[n], X[n, :, top : top + crop, left : left + crop])


def test_parts_of_a_batch_agree_with_the_whole():
    options = {"flip": True, "shift": 2, "seed": 1, "step": 8}
    whole = augment(X, first_sample=10, **options)
    parts = [augment(X[a:b], first_sample=10 + a, **options) for a, b in ((0, 4), (4, 5), (5, 9))]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, augment(X, first_sample=10, **(options | {"step": 9})))


def test_every_shift_is_as_frequent_as_any_other():
    """49 places for 20,000 images, seed 0: chi-square of 48 degrees, false alarms 1e-6."""
    n = 20_000
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 4, 4] = 1
    found = augment(x.expand(n, 1, 9, 9), shift=3, seed=0).flatten(1).argmax(1)
    counts = torch.bincount(found, minlength=81).view(9, 9)[1:8, 1:8].double()
    assert counts.sum() == n
    chi_square = float(((counts - n / 49) ** 2 / (n / 49)).sum())
    assert chi_square < 112   # scipy.stats.chi2.isf(1e-6, 48) = 112.7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shift": 5}, r"shift must be an int in 0\.\.4; got 5"),
        ({"shift": -1}, r"shift must be an int in 0\.\.4"),
        ({"crop": 6}, r"crop must be an int in 1\.\.5; got 6"),
        ({"crop": 3, "shift": 1}, "give either shift or crop"),
        ({"flip": 1}, "flip must be True or False; got 1"),
        ({"x": torch.rand(4, 3)}, r"x must be images \(B, C, H, W\); got \(4, 3\)"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=f"augment: {message}"):
        augment(**({"x": X, "seed": 0} | options))


def test_fit_varies_what_it_trains_on_and_nothing_else(tmp_path, monkeypatch):
    """The batches of a run: those of the data, through augment and dequantize by their keys."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 6, 6)).astype(np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 5, "steps": 3, "held_out": 4}
    options |= {"data": str(tmp_path / "x.npy"), "seed": 3}
    config = TrainConfig(**options, out=tmp_path / "run", flip=True, shift=2, grey_levels=256)

    from fastscore.cli import fit as module

    seen, objective = [], module.objective

    def recorded(*args, **options):
        seen.append(args[3])
        return objective(*args, **options)

    monkeypatch.setattr(module, "objective", recorded)
    list(fit(config))

    images, _ = splits.part(config, "training")
    source = datasets.open(images)
    for step, x, _ in datasets.batches(source, 5, seed=3, steps=3):
        x = augment(x, flip=True, shift=2, seed=3, step=step)
        x = likelihood.dequantize(x, 256, seed=3, step=step)
        assert torch.equal(seen[step], x)
    stored, _ = run_folder.read_config(tmp_path / "run")
    assert (stored.flip, stored.shift, stored.grey_levels) == (True, 2, 256)
    with pytest.raises(ValueError, match="has shift 2, which --resume cannot change; got 1"):
        fit(TrainConfig(out=tmp_path / "run", resume=True, shift=1))


def test_fit_crops_anywhere_and_elsewhere_the_middle_stands_for_the_image(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 7, 9)).astype(np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    options = {"width": 8, "depth": 1, "levels": 2, "batch_size": 5, "steps": 3, "held_out": 4}
    config = TrainConfig(**options, data=str(tmp_path / "x.npy"), out=tmp_path / "run", crop=4)

    from fastscore.cli import fit as module

    seen, objective = [], module.objective

    def recorded(*args, **options):
        seen.append(args[3])
        return objective(*args, **options)

    monkeypatch.setattr(module, "objective", recorded)
    list(fit(config))

    whole = datasets.load(tmp_path / "x.npy")[0]
    training, apart = datasets.split(12, 4)
    for step, x, _ in datasets.batches(datasets.open(whole[training]), 5, seed=0, steps=3):
        assert torch.equal(seen[step], augment(x, crop=4, seed=0, step=step))
    stored, shape = run_folder.read_config(tmp_path / "run")
    assert shape == (1, 4, 4) and stored.crop == 4
    assert torch.equal(splits.part(stored, "held_out")[0], whole[apart][:, :, 1:5, 2:6])
    with pytest.raises(ValueError, match=r"images of at least 8 x 8 pixels; got \(1, 7, 9\)"):
        fit(TrainConfig(data=str(tmp_path / "x.npy"), out=tmp_path / "other", crop=8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shift": 1, "crop": 3}, "train: give either shift or crop"),
        ({"shift": -1}, "train: shift must be at least 0; got -1"),
        ({"grey_levels": 1}, "train: grey_levels must be 0 or at least 2"),
        ({"skip_corrupt": -1}, "train: skip_corrupt must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
