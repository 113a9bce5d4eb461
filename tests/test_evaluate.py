"""What samples are compared by: readers of real images, figures by hand, and pictures."""

import io

import numpy as np
import pytest
import torch

from fastscore import datasets
from fastscore.cli import evaluate, pictures, readers
from fastscore.cli.evaluate import Drawn, Real


class ByBrightness:
    """Sees class 0 in dark images and class 1 in bright ones; sure of what is far from 1/2."""

    def predict_proba(self, x):
        p = x.mean(1)
        return np.stack([1 - p, p], 1)

    def predict(self, x):
        return self.predict_proba(x).argmax(1)

    def score(self, x, labels):
        return float((self.predict(x) == labels).mean())


def even(*values):
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()


REAL = Real(even(0.0, 1.0), torch.tensor([0, 1]), even(0.05, 0.4), torch.tensor([0, 1]))


def test_figures_are_those_counted_by_hand():
    asked = torch.tensor([0, 0, 1, 1])
    drawn = {
        "guided": Drawn(even(0.05, 0.8, 0.95, 0.7), asked),
        "unconditional": Drawn(even(0.3, -5.0)),
    }
    result = evaluate.compare(drawn, REAL, ByBrightness())

    assert result["classifier_accuracy_held_out"] == 0.5
    guided, unconditional, held_out = (
        result[name] for name in ("guided", "unconditional", "held_out")
    )
    assert guided["recognised"] == 0.75 and guided["recognised_per_class"] == [0.5, 1.0]
    assert guided["sure"] == 0.5 and guided["per_class"] == [1, 3] and guided["n"] == 4
    # Two pixels a side: twice the difference of the brightness, 0.05, 0.2, 0.05 and 0.3.
    assert guided["nearest_training_distance"]["median"] == pytest.approx(0.1, abs=1e-6)
    assert guided["nearest_training_distance"]["min"] == pytest.approx(0.1, abs=1e-6)

    # Judged as it is seen, clamped to [0, 1].
    assert "recognised" not in unconditional and unconditional["per_class"] == [2, 0]
    assert unconditional["nearest_training_distance"]["min"] == 0
    assert held_out["recognised"] == 0.5 and held_out["recognised_per_class"] == [1.0, 0.0]


def test_a_report_has_a_column_for_each_set():
    drawn = {
        "guided": Drawn(even(0.05, 0.95), torch.tensor([0, 0])),
        "unconditional": Drawn(even(0.3)),
    }
    result = evaluate.compare(drawn, REAL, ByBrightness()) | {"weight": 1.5}
    lines = evaluate.markdown(result).splitlines()
    assert "| | guided, w = 1.5 | unconditional | held-out real images |" in lines
    assert "| recognised as the class asked for | 50.0 % | – | 50.0 % |" in lines
    assert "| the same of each class, % | 50, – | – | 100, 0 |" in lines
    assert all(line.count("|") == 5 for line in lines[2:])


def test_a_report_of_samples_alone_says_nothing_of_classes_asked_for():
    result = evaluate.report(even(0.05, 0.95), *REAL, ByBrightness())
    assert list(result) == ["classifier_accuracy_held_out", "samples", "held_out"]
    assert all("recognised" not in result[name] for name in ("samples", "held_out"))
    assert "recognised" not in evaluate.markdown(result)


@pytest.mark.parametrize(
    ("steps", "least"),
    [(50, 0.7), pytest.param(readers.STEPS, 0.97, marks=pytest.mark.slow(minutes=1))],
)
def test_digits_that_it_has_not_seen_are_read_rightly(monkeypatch, steps, least):
    """MNIST's: 98.2 % of 500 after all steps."""
    monkeypatch.setattr(readers, "STEPS", steps)
    images, labels = datasets.load("mnist")
    train, held_out = datasets.split(len(images), 500, seed=0)
    before = torch.get_rng_state()
    told = []
    reader = readers.reader(images[train], labels[train], lambda *each: told.append(each))

    found = reader.score(images[held_out].flatten(1).numpy(), labels[held_out].numpy())
    print(f"{100 * found:.1f} % right")
    assert found >= least
    assert len(told) == steps and torch.equal(before, torch.get_rng_state())
    assert (readers.seen(reader, images[held_out]) == labels[held_out]).double().mean() == found


@pytest.mark.parametrize("n", [7, 50, 101])
def test_each_image_is_read_at_most_once_in_an_epoch(n):
    torch.manual_seed(0)
    orders = readers._orders(n)
    epochs = [[next(orders) for _ in range(max(1, n // readers.BATCH))] for _ in range(2)]
    for epoch in epochs:
        rows = torch.cat(epoch)
        assert len(rows.unique()) == len(rows) == (n if n < 50 else n // 50 * 50)


@pytest.mark.parametrize("columns", [None, ["σ = 1", "σ = 0.1", "at last"]])
def test_labelled_pictures_show_each_pixel_and_all_of_their_words(tmp_path, columns):
    """The grid stands in the picture unchanged, 600 pixels wide or more; the border is empty."""
    from PIL import Image

    images = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "x.png"
    pictures.save_labelled(path, images, "a title of some length", ["0", "1"], columns)
    shown = np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("L"))

    small = pictures.grid(images, 3, scale=1)[..., 0]
    scale = -(-600 // small.shape[1])
    expected = small.repeat(scale, 0).repeat(scale, 1)
    top = 50 if columns is None else 75
    height, width = expected.shape
    assert shown.shape[1] >= 600
    assert np.array_equal(shown[top : top + height, 60 : 60 + width], expected)

    edge = np.concatenate([shown[:4].ravel(), shown[-4:].ravel(), shown[:, :4].ravel(),
                           shown[:, -4:].ravel()])
    assert edge.min() == 255
    # The title, the labels of the rows and those of the columns.
    assert shown[4:top].min() < 128 and shown[top:-20, 4:58].min() < 128
