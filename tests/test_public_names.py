"""What is public is listed, and what joins the list is told to the users."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastscore

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    path = ROOT / "build_support" / "public_names.py"
    spec = importlib.util.spec_from_file_location("public_names", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_is_current(script):
    remedy = (
        "python build_support/public_names.py --write, and a line in CHANGELOG.md for each new name"
    )
    assert script.LIST.read_text() == script.listing(), remedy


def test_the_changelog_names_every_public_name():
    """In code: `sampling.langevin`, `langevin(steps=...)`, or in a row of names such as `models`.

    NCSN, NCSNv2.
    """
    code = " ".join(re.findall(r"`[^`]+`", (ROOT / "CHANGELOG.md").read_text()))
    told = set(re.findall(r"\w+", code))
    names = (ROOT / "tests" / "public_names.txt").read_text().split()
    assert not [name for name in names if name.split(".")[-1] not in told]


def test_a_name_that_is_gone_is_an_error():
    """No aliases: whoever has an old name is told by Python."""
    for module, names in GONE.items():
        assert not [name for name in names if hasattr(getattr(fastscore, module, fastscore), name)]


GONE = {
    "": (
        "instance_norm_plus_dual",
        "conditional_instance_norm_plus_dual",
        "group_norm_modulate_dual",
    ),
    "conversions": (
        "score_to_noise",
        "v_to_denoiser",
        "score_of_noise",
        "score_of_v",
        "check_kind",
    ),
    "schedules": ("to_epsilon", "to_step_lr", "snr_to_epsilon", "epsilon_to_snr", "check_ladder"),
    "losses": ("METHODS", "DISTRIBUTIONS"),
    "sampling": ("SAMPLERS",),
    "nn": (
        "ConditionalBatchNorm2d",
        "ConditionalVarianceNorm2d",
        "VarianceNorm2d",
        "ConditionalNoneNorm2d",
        "NoneNorm2d",
    ),
}
