"""Building and installing.

What the environment asks for is built and recorded, or refused in one sentence.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import children
import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402

SETTINGS = (
    "FASTSCORE_BUILD",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "PYTHONPATH",
)


def python(*arguments, cwd=ROOT, seconds=children.SECONDS, **environment):
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS} | {
        k: str(v) for k, v in environment.items()
    }
    return children.run([sys.executable, *arguments], cwd=cwd, env=environment, seconds=seconds)


def build_ext(folder, **environment):
    return python(
        "setup.py",
        "build_ext",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "temp",
        **environment,
    )


@pytest.fixture
def places(tmp_path):
    """An empty folder, a CUDA toolkit whose nvcc compiles nothing, and a torch that cannot be
    imported."""
    for name in ("EMPTY", "TOOLKIT/bin", "NO_TORCH"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "TOOLKIT/bin/nvcc").touch(mode=0o755)
    (tmp_path / "NO_TORCH/torch.py").write_text("raise ModuleNotFoundError('no torch')")
    return {name: tmp_path / name for name in ("EMPTY", "TOOLKIT", "NO_TORCH")}


@pytest.mark.processes
def test_without_a_compiler_auto_installs_the_reference_and_says_why(tmp_path, places):
    result = python(
        "setup.py",
        "build",
        "--build-base",
        tmp_path,
        "--build-lib",
        tmp_path / "lib",
        PATH=places["EMPTY"],
    )
    reason = (
        "no C++ compiler was found; install g++ or clang++ (or set CXX) and install fastscore again"
    )
    assert result.returncode == 0, result.stderr
    (warning,) = (line for line in result.stderr.splitlines() if "without its C++ kernels" in line)
    assert warning.endswith(f"fastscore is installed without its C++ kernels: {reason}.")
    assert json.loads((tmp_path / "lib/fastscore/_build_info.json").read_text()) == {
        "mode": "auto",
        "cpp": reason,
        "cuda": reason,
    }
    program = """if True:
        import torch, fastscore
        x, key = torch.zeros(3), {"seed": 1, "step": 2}
        print(fastscore.__file__)
        noisy = fastscore.perturb(x, 2.0, backend="reference", **key)
        print(torch.equal(fastscore.perturb(x, 2.0, **key), noisy))
        try:
            fastscore.perturb(x, 2.0, backend="cpp", **key)
        except ValueError as error:
            print(error)
    """
    where, equal, message = python(
        "-c", program, cwd=tmp_path, PYTHONPATH=tmp_path / "lib"
    ).stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path) and equal == "True"
    assert message == (
        "backend 'cpp' was requested for a tensor on cpu but the extension is not built: "
        f"{reason}. Reinstall with FASTSCORE_BUILD=cpu."
    )


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"FASTSCORE_BUILD": "cpu", "PATH": "EMPTY"},
            "no C++ compiler was found; install g++ or clang++",
        ),
        (
            {"FASTSCORE_BUILD": "cuda", "CUDA_HOME": "EMPTY"},
            "no nvcc was found; install the CUDA toolkit or set CUDA_HOME",
        ),
        (
            {"FORCE_CUDA": "1", "CUDA_HOME": "EMPTY"},
            "no nvcc was found; install the CUDA toolkit or set CUDA_HOME",
        ),
        ({"FASTSCORE_BUILD": "gpu"}, "FASTSCORE_BUILD must be auto, none, cpu or cuda; got 'gpu'"),
        (
            {"FORCE_CUDA": "1", "CUDA_HOME": "TOOLKIT", "TORCH_CUDA_ARCH_LIST": "9.0;Hopper"},
            "'9.0' or '8.0;9.0+PTX'; got 'Hopper'",
        ),
        (
            {"PYTHONPATH": "NO_TORCH"},
            "needs PyTorch to be installed first: pip install 'torch>=2.10'",
        ),
    ],
    ids=["no-compiler", "no-nvcc", "force-cuda", "bad-mode", "bad-architecture", "no-torch"],
)
@pytest.mark.processes
def test_a_build_that_cannot_be_served_is_refused_in_one_sentence(
    tmp_path, places, environment, message
):
    result = build_ext(tmp_path, **{k: places.get(v, v) for k, v in environment.items()})
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 1 and len(errors) == 1 and message in errors[0], result.stderr
    assert errors[0].endswith(".") and ". " not in errors[0] and "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("_C*.so")) and not list(tmp_path.rglob("_build_info.json"))


@pytest.mark.processes
def test_none_needs_no_torch_and_leaves_no_older_extension(tmp_path, places):
    old = tmp_path / "lib/fastscore/_C.abi3.so"
    old.parent.mkdir(parents=True)
    old.touch()
    result = build_ext(tmp_path, FASTSCORE_BUILD="none", PYTHONPATH=places["NO_TORCH"])
    assert result.returncode == 0 and not old.exists(), result.stderr
    assert (
        json.loads((old.parent / "_build_info.json").read_text())["cpp"] == "FASTSCORE_BUILD=none"
    )


def test_auto_keeps_the_cpu_kernels_where_nvcc_fails(tmp_path, places, monkeypatch):
    def ninja(build, output, compiler, nvcc):
        if nvcc:
            raise native.BuildError("nvcc failed.")

    monkeypatch.setattr(native, "run_ninja", ninja)
    monkeypatch.setattr(native, "find_compiler", lambda: "c++")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(places["TOOLKIT"]))
    monkeypatch.setenv("FASTSCORE_BUILD", "auto")
    outcome = native.compile_extension(tmp_path, tmp_path / "_C.abi3.so")
    assert outcome["mode"] == "auto" and outcome["cpp"] is None
    assert "did not compile with" in outcome["cuda"] and outcome["architectures"] is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(native.BuildError, match="got 'Hopper'"):   # a wrong list is no failing nvcc
        native.compile_extension(tmp_path, tmp_path / "_C.abi3.so")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setenv("FASTSCORE_BUILD", "cuda")
    with pytest.raises(native.BuildError, match="nvcc failed"):
        native.compile_extension(tmp_path, tmp_path / "_C.abi3.so")


def test_architectures_become_machine_code_and_ptx(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a+PTX")
    codes = [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_90a,code=compute_90a",
    ]
    assert native.gencode() == [f"-gencode={code}" for code in codes]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    default = native.gencode()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")   # as torch reads it: unset
    assert native.gencode() == default and default[-1].endswith("code=compute_120")


@pytest.mark.processes
def test_an_isolated_build_finds_torch_behind_its_own_packages(tmp_path):
    """As pip isolates it.

    The interpreter's packages are off the path, the build's requirements in a folder of their own.
    """
    requires = re.search(r"requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text())[1]
    assert "setuptools" in requires and "torch" not in requires
    import setuptools

    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    program = """if True:
        import importlib.util, os, site, sys
        torch_lies_in = os.path.dirname(os.path.dirname(importlib.util.find_spec("torch").origin))
        installed = torch_lies_in, *site.getsitepackages(), site.getusersitepackages()
        sys.path = [p for p in sys.path if p not in installed]
        assert importlib.util.find_spec("torch") is None
        import _build_backend, setuptools, torch
        print(_build_backend.build_wheel.__name__, setuptools.__file__, torch.__file__, sep="\\n")
    """
    result = python(
        "-c", program, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "build_support")])
    )
    assert result.stdout.splitlines() == [
        "build_wheel",
        str(tmp_path / "setuptools/__init__.py"),
        torch.__file__,
    ], result.stderr


def test_every_kernel_is_compiled_for_each_instruction_set_and_none_for_this_machine_alone(
    tmp_path,
):
    native.write_ninja(tmp_path, tmp_path / "_C.abi3.so", "c++", None, torch, cpp_extension)
    text = (tmp_path / "build.ninja").read_text()
    assert "-march" not in text and "-mtune" not in text and "-ffast-math" not in text
    assert native.isas() == (
        ["baseline", "avx2", "avx512"] if "-DFASTSCORE_X86" in text else ["baseline"]
    )
    for source in (ROOT / "csrc").glob("*.cpp"):
        if source.stem not in native.REGISTER_ONLY:
            assert text.count(f"build {source.stem}.") == len(native.isas())


def needs_compiler():
    try:
        return native.find_compiler()
    except native.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source distribution, in a folder whose name has a space, out of the objects
    that an installation left here."""
    needs_compiler()
    folder = tmp_path_factory.mktemp("packaging")
    result = python("setup.py", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder)
    assert result.returncode == 0, result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "a b")
    (tree,) = (folder / "a b").iterdir()
    if (ROOT / "build/native").exists():
        shutil.copytree(ROOT / "build/native", tree / "build/native")
    command = (
        "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, tree,
    )
    result = python("-m", *command, seconds=800, FASTSCORE_BUILD="cpu")
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert re.fullmatch(r"fastscore-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        record = json.loads(file.read("fastscore/_build_info.json"))
    modules = {p.relative_to(ROOT) for p in (ROOT / "fastscore").rglob("*.py")}
    # The folder may be linked there.
    modules |= {Path("fastscore") / p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.py")}
    assert names == {p.as_posix() for p in modules} | {
        f"fastscore/{name}" for name in ("py.typed", "_C.abi3.so", "_build_info.json")
    }
    assert (
        record["cpp"] is None
        and record["cuda"] == "FASTSCORE_BUILD=cpu"
        and record["instruction_sets"] == native.isas()
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_installs_and_every_backend_serves(wheel, tmp_path):
    result = python(
        "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", tmp_path, wheel
    )
    assert result.returncode == 0, result.stderr
    program = (
        "import torch, fastscore._C, fastscore.cli.doctor as d; print(fastscore._C.__file__); "
        "raise SystemExit(d.main())"
    )
    result = python("-c", program, cwd=tmp_path, PYTHONPATH=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith(str(tmp_path)), result.stderr
    for name in ["cpp"] + ["triton"] * (importlib.util.find_spec("triton") is not None):
        assert f"{'denoising_loss':30} {name:10} yes  self-test ok" in result.stdout


@pytest.mark.processes
def test_without_triton_the_rest_works_and_a_request_is_refused():
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import torch, fastscore
        from fastscore.cli import doctor
        try:
            with fastscore.use_backend("triton"):
                fastscore.perturb(torch.zeros(3), 1.0, seed=0)
        except ValueError as error:
            print(error)
        raise SystemExit(doctor.main())
    """
    result = python("-c", program, TRITON_INTERPRET="1")
    message, *report = result.stdout.splitlines()
    assert (
        message
        == "backend 'triton' was requested for a tensor on cpu but triton is not installed. pip "
           "install triton."
    )
    assert (
        result.returncode == 0
        and f"  {'every op':30} triton     no   triton is not installed. pip install triton"
        in report
    )
