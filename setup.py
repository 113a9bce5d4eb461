"""What pyproject.toml cannot say: one optional abi3 extension, built by build_support/native.py."""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402


class BuildNative(build_ext):
    def run(self):
        self.outcome = {
            "mode": "none",
            "cpp": "FASTSCORE_BUILD=none",
            "cuda": "FASTSCORE_BUILD=none",
        }
        try:
            if native.mode() == "none":
                self.extensions = []
            else:
                native.find_torch()
                native.choose_nvcc(native.mode())   # a wrong setting is an error in every mode
        except native.BuildError as error:
            sys.exit(f"error: {error}")
        folders = [Path(self.build_lib) / "fastscore"]
        if self.inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT / "fastscore")
        for old in (file for folder in folders for file in folder.glob("_C*.so")):
            old.unlink()   # an extension that this build does not make must not be packed or loaded
        super().run()
        for folder in folders:
            native.record(folder / "_build_info.json", self.outcome)

    def build_extension(self, ext):
        try:
            output = Path(self.get_ext_fullpath(ext.name))
            self.outcome = native.compile_extension((ROOT / "build" / "native").resolve(), output)
        except native.BuildError as error:
            if native.mode() != "auto":
                sys.exit(f"error: {error}")
            reason = str(error).rstrip(".")   # the sentence goes on where it is shown
            self.outcome = {"mode": "auto", "cpp": reason, "cuda": reason}
            self.warn(f"fastscore is installed without its C++ kernels: {error}")


# kernels/ lies beside it.
packages = sorted({*find_packages(include=["fastscore", "fastscore.*"]), "fastscore.kernels"})
sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.c*"))]
setup(
    packages=packages,
    ext_modules=[Extension("fastscore._C", sources, py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
