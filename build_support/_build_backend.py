"""Setuptools' build back end, run where the installed torch can be found although builds are isolated."""

import importlib.util
import sys
import sysconfig

if importlib.util.find_spec("torch") is None:
    # An isolated build hides the packages of the interpreter; the extension must be built against its torch and no other.
    for name in ("purelib", "platlib"):
        path = sysconfig.get_path(name)
        if path not in sys.path:
            sys.path.append(path)

from setuptools.build_meta import *  # noqa: F403
