"""The pictures of the idea, drawn quickly: what each shows, as figures.

Seeds are fixed in the scripts.
"""

import importlib
import math
import re
import sys
from pathlib import Path

from fastscore.sampling.sample import SAMPLERS

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))


def run(name, folder):
    figures = importlib.import_module(name).main(folder, quick=True)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return figures


def test_learnt_vector_fields_resemble_the_truth(tmp_path):
    """Under a tenth of the divergence of the zero field after 250 steps."""
    figures = run("vector_fields", tmp_path)
    assert figures["exact"] < 0.1 and figures["sliced"] < 0.1


def test_the_exact_trace_grows_with_the_dimension_and_a_projection_does_not(tmp_path):
    """64 times the derivatives from d = 2 to 128.

    A factor of 5 remains whatever else the machine does.
    """
    times = run("trace_cost", tmp_path)
    growth = {name: t[128] / t[2] for name, t in times.items()}
    assert growth["exact"] > 5 * growth["sliced"]


def test_naive_score_matching_is_wrong_in_low_density_and_loses_the_weights(tmp_path):
    figures = run("low_density", tmp_path)
    assert (
        figures["error_high_density"] < 0.1
        and figures["error_low_density"] > 3 * figures["error_high_density"]
    )
    assert figures["weight"] < 0.7


def test_naive_score_matching_draws_no_images_and_annealing_does(tmp_path):
    """Held-out images lie about 1 from the nearest training image.

    After 400 updates samples lie below twice that, or near four times.
    """
    figures = run("images", tmp_path)
    assert figures["with"] < 2 * figures["held out"] < figures["without"] - 0.5


def test_noise_fills_the_gap_and_denoising_learns_the_noisy_density(tmp_path):
    figures = run("perturbed_fields", tmp_path)
    covered = list(figures["covered"].values())
    assert covered[0] < 0.3 and covered[-1] > 0.95 and covered == sorted(covered)
    assert figures["to_noisy"] < 0.1 and figures["to_clean"] > 5 * figures["to_noisy"]


def test_without_noise_every_point_ends_on_a_mode(tmp_path):
    figures = run("collapse", tmp_path)
    assert (
        figures["distance"] < 1e-3
        and sum(figures["points"]) == 400
        and min(figures["points"]) > 100
    )


def test_only_annealing_keeps_the_weights(tmp_path):
    """Five standard errors of a weight of 0.8 among 1,500 samples.

    Plain Langevin gives what falls to each mode from a uniform start.
    """
    figures, error = run("langevin", tmp_path), math.sqrt(0.8 * 0.2 / 1500)
    for name in ("data", "annealed", "annealed, learnt"):
        assert abs(figures[name] - 0.8) < 5 * error, figures
    assert figures["plain"] < 0.7


def test_the_gallery_shows_every_sampler_and_condition(tmp_path):
    """A page whose pictures are there, and rows of finite figures.

    Those of the mixture, whose score is exact, mean something even so.
    """
    rows = importlib.import_module("gallery").main(tmp_path / "docs", tmp_path / "runs", quick=True)
    page = (tmp_path / "docs" / "gallery.md").read_text()
    pictures = re.findall(r"\]\((gallery/[a-z]+\.png)\)", page)
    assert {Path(p).stem for p in pictures} == {
        "mixture",
        "mnist",
        "path",
        "digits",
        "classes",
        "conditions",
        "both",
        "colours",
    }
    assert all((tmp_path / "docs" / p).read_bytes().startswith(b"\x89PNG") for p in pictures)
    of = {
        part: {next(iter(row.values())): row for row in part_rows}
        for part, part_rows in rows.items()
    }
    samplers = {title.split(",")[0] for title in of["gallery_mixture"]}
    assert samplers == {*SAMPLERS, "predictor only", "the mixture itself"}
    assert len(of["gallery_mnist"]) == 4
    assert len(of["gallery_digits"]) == 11 and len(of["gallery_conditions"]) == 9
    assert all(title in page for part in of.values() for title in part if title != "class")
    # langevin and mala start at the other mode, where nothing is near the first to have a spread.
    told = [
        row for title, row in of["gallery_mixture"].items() if title not in ("langevin", "mala")
    ]
    values = [
        v
        for row in (*told, *rows["gallery_digits"], *rows["gallery_conditions"])
        for v in row.values()
        if isinstance(v, float)
    ]
    assert len(values) > 40 and all(map(math.isfinite, values))
    # 500 samples of the exact score of weight 0.8 in a tenth of the calls: five standard errors,
    # and what so coarse a ladder costs.
    assert (
        abs(of["gallery_mixture"]["consistent_annealed"]["weight of the first mode"] - 0.8)
        < 5 * math.sqrt(0.16 / 500) + 0.1
    )
    # Without noise the end is moved onto the data.
    assert (
        of["gallery_conditions"]["inpaint, likelihood flat"]["root mean square of A x - y"] < 1e-6
    )


def test_the_density_comes_back_from_a_learnt_score(tmp_path):
    """After 600 steps to a quarter of a nat by the flow.

    log p itself spreads by one over the samples of a component, and by log 4 over the components.
    The lines lead between the components, where the score has hardly been trained: over seeds of
    the training they are off by 0.2 to 0.9.
    """
    figures = run("density", tmp_path)
    assert figures["by the flow"] < 0.25 and figures["by the line"] < 1.4
