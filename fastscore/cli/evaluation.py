"""What samples are worth: a classifier trained on real images, and the distance to the nearest training image."""

import warnings

import torch

SURE = 0.9


def reader(images, labels):
    """A classifier trained on real images, of scikit-learn: a second opinion that no sampler has seen."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)   # 200 rounds are what there shall be
        return MLPClassifier((256,), alpha=1e-3, max_iter=200, random_state=0).fit(images.flatten(1).cpu().numpy(), labels.numpy())


def seen(classifier, samples):
    """The classes that the reader sees, int64 (N,)."""
    return torch.from_numpy(classifier.predict(samples.clamp(0, 1).flatten(1).cpu().numpy()))


def report(samples, images, labels, held_out_images, held_out_labels, classifier=None):
    """Compare samples with held-out real images under one classifier (`reader(images, labels)`) and one training set.

    Returns a dict: classifier accuracy on held-out images; for samples and held-out images the fraction of which the
    classifier is at least 90 % sure, the number of images per class, and the median nearest-training-image distance.
    """
    flat = [t.flatten(1).cpu() for t in (images, samples.clamp(0, 1), held_out_images)]
    classifier = reader(images, labels) if classifier is None else classifier
    result = {"classifier_accuracy_held_out": float(classifier.score(flat[2].numpy(), held_out_labels.numpy()))}
    for name, x in (("samples", flat[1]), ("held_out", flat[2])):
        p = torch.from_numpy(classifier.predict_proba(x.numpy()))
        distance = torch.cdist(x, flat[0]).min(1).values
        result[name] = {
            "n": len(x),
            "sure": float((p.max(1).values >= SURE).double().mean()),
            "per_class": torch.bincount(p.argmax(1), minlength=p.shape[1]).tolist(),
            "nearest_training_distance": {
                "median": float(distance.median()),
                "p05": float(distance.quantile(0.05)),
                "min": float(distance.min()),
            },
        }
    return result


def markdown(result):
    """The report as a small table."""
    rows = [
        "| | samples | held-out real images |",
        "|---|---|---|",
        *(
            f"| {label} | {f(result['samples'])} | {f(result['held_out'])} |"
            for label, f in (
                ("number", lambda r: r["n"]),
                ("classifier at least 90 % sure", lambda r: f"{100 * r['sure']:.1f} %"),
                ("images per class", lambda r: ", ".join(map(str, r["per_class"]))),
                ("nearest training image, median", lambda r: f"{r['nearest_training_distance']['median']:.3f}"),
                ("nearest training image, 5th percentile", lambda r: f"{r['nearest_training_distance']['p05']:.3f}"),
                ("nearest training image, smallest", lambda r: f"{r['nearest_training_distance']['min']:.3f}"),
            )
        ),
    ]
    accuracy = 100 * result["classifier_accuracy_held_out"]
    return f"Classifier: {accuracy:.1f} % right on held-out real images.\n\n" + "\n".join(rows) + "\n"
