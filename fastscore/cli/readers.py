"""Classifiers of clean real images: a second opinion on samples."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore import datasets

SMALL = 16   # of smaller images a perceptron sees as much as convolutions do
STEPS = 1200   # of the convolutional one; 98 % right on MNIST's held-out digits
BATCH = 50
_LR = 2e-3


def reader(
    images: Tensor,
    labels: Tensor,
    done: Callable[[int, float], object] = lambda step, loss: None,
    *,
    steps: int | None = None,
) -> Any:
    """A classifier trained on real images, with scikit-learn's predict, predict_proba and score.

    Images of 16 pixels a side or more are read by a small convolutional network that has seen them
    shifted by two pixels, smaller ones by a multilayer perceptron of scikit-learn.

    Args:
        images: (N, C, H, W) in [0, 1]. labels: int64 (N,).
        done: called done(step + 1, loss) after each step of the network.
        steps: of the network; `STEPS` unless given.
    """
    if convolutional(images):
        return _Convolutional(images, labels, done, STEPS if steps is None else steps)

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        # Capped at 200 iterations, with which it is as good as any.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = MLPClassifier((256,), alpha=1e-3, max_iter=200, random_state=0)
        return classifier.fit(images.flatten(1).cpu().numpy(), labels.numpy())


def convolutional(images: Tensor) -> bool:
    """Whether it is a convolutional network that reads such images."""
    return min(images.shape[2:]) >= SMALL


def seen(classifier: Any, samples: Tensor) -> Tensor:
    """The classes that a reader sees, int64 (N,)."""
    return torch.from_numpy(classifier.predict(samples.clamp(0, 1).flatten(1).cpu().numpy()))


class _Convolutional:
    def __init__(self, images, labels, done, steps):
        images, labels = images.cpu(), labels.cpu()
        self.shape = images.shape[1:]

        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            self.net = _network(self.shape, int(labels.max()) + 1)
            self._train(images, labels, done, steps)
        self.net.eval().requires_grad_(False)

    def _train(self, images, labels, done, steps):
        optimizer = torch.optim.Adam(self.net.parameters(), lr=_LR, fused=True)
        for step, rows in zip(range(steps), _orders(len(images))):
            for group in optimizer.param_groups:
                group["lr"] = _LR * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = datasets.augment(images[rows], shift=2, seed=0, step=step)
            loss = F.cross_entropy(self.net(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done(step + 1, float(loss.detach()))

    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        """The probability of each class, (N, K), of flattened images (N, d)."""
        x = torch.from_numpy(x).unflatten(1, self.shape)
        return torch.cat([self.net(part).softmax(1) for part in x.split(500)]).numpy()

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.predict_proba(x).argmax(1)

    def score(self, x: np.ndarray, labels: np.ndarray) -> float:
        """The fraction that it gets right."""
        return float((self.predict(x) == labels).mean())


def _orders(n):
    """Batches of each epoch, whole ones where there are enough images."""
    while True:
        order = torch.randperm(n)
        for start in range(0, max(1, n - BATCH + 1), BATCH):
            yield order[start : start + BATCH]


def _network(shape, classes):
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 24, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 48, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(48 * (height // 4) * (width // 4), 96),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(96, classes),
    ).to(memory_format=torch.channels_last)
