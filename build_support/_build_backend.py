"""Setuptools' build back end, run where the installed torch can be found although builds are
isolated."""

import importlib.util
import site
import sys

if importlib.util.find_spec("torch") is None:
    # An isolated build hides the packages of the interpreter; the extension must be built against
    # its torch and no other. At the end of the path, so that what the build asked for still comes
    # first; with .pth files, since torch may be a checkout.
    for path in (
        *site.getsitepackages(),
        *([site.getusersitepackages()] if sys.prefix == sys.base_prefix else []),
    ):
        site.addsitedir(path)

from setuptools.build_meta import *  # noqa: F403
