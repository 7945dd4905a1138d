"""The wheel: what is inside, what it links to, and how the build behaves with and without nvcc."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dsno_kernels.backends._launch import driver_too_old, uncovered_capability

ROOT = Path(__file__).parents[1]
PARTS = ("csrc", "python_bindings", "dsno_kernels", "setup.py", "pyproject.toml", "MANIFEST.in")
DOCUMENTS = ("README.md", "LICENSE")
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("g++"), reason="needs Linux and g++"
)


def copy_of_the_source(folder: Path, device_code_only: bool) -> Path:
    """The source without builds; `device_code_only` leaves out the CPU kernels, which cost time."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", *(["cpu*"] if device_code_only else []))
    for part in (*PARTS, *DOCUMENTS):
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=ignore)
        elif source.exists():
            shutil.copy(source, folder / part)
    if device_code_only:
        (folder / "python_bindings" / "bind_cpu.cpp").unlink(missing_ok=True)
        (folder / "dsno_kernels" / "backends" / "cpu.py").touch()
    return folder


def build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"]
    return subprocess.run(
        [*command, "--wheel-dir", str(folder / "dist"), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
    )


def unpack(folder: Path) -> Path:
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked" / "dsno_kernels"


def extension_of(package: Path) -> Path:
    (module,) = package.glob("_C.*.so")
    return module


def output_of(*command: str | Path) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module")
def cuda_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of a build with CUDA, for the default architectures."""
    folder = copy_of_the_source(tmp_path_factory.mktemp("cuda"), device_code_only=True)
    built = build_wheel(folder, DSNO_KERNELS_BUILD_CUDA="1", TORCH_CUDA_ARCH_LIST="")
    assert built.returncode == 0, built.stdout + built.stderr
    return unpack(folder)


@needs_nvcc
def test_the_wheel_holds_device_code_for_every_architecture(cuda_package: Path) -> None:
    module = extension_of(cuda_package)
    assert ".nv_fatbin" in output_of("readelf", "-S", "-W", module)
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("cuobjdump comes with triton, which is not installed")
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    assert set(re.findall(r"sm_\d+", output_of(cuobjdump, "--list-elf", module))) == {
        "sm_80",
        "sm_86",
        "sm_90",
    }
    assert set(re.findall(r"sm_\d+", output_of(cuobjdump, "--list-ptx", module))) == {"sm_90"}


@needs_nvcc
def test_the_extension_links_neither_torch_nor_cuda(cuda_package: Path) -> None:
    needed = re.findall(r"NEEDED.*\[(.*)\]", output_of("readelf", "-d", extension_of(cuda_package)))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libdl.so.2"}
    system |= {"libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2"}
    assert set(needed) <= system


@needs_nvcc
def test_only_the_entry_point_is_exported(cuda_package: Path) -> None:
    exported = output_of("nm", "-D", "--defined-only", extension_of(cuda_package)).split()
    assert exported[2::3] == ["PyInit__C"]


@needs_nvcc
def test_the_wheel_ships_device_code_and_types(cuda_package: Path) -> None:
    shipped = {path.name for path in (cuda_package / "csrc").iterdir()}
    assert shipped == {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cuh")}
    assert (cuda_package / "py.typed").exists()
    assert (cuda_package / "_C.pyi").exists()
    tables = Path("backends") / "triton" / "tables"
    assert {path.name for path in (cuda_package / tables).iterdir()} == {
        path.name for path in (ROOT / "dsno_kernels" / tables).iterdir()
    }


@needs_nvcc
def test_the_extension_imports_without_a_gpu_and_says_what_it_holds(cuda_package: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); import _C;"
        "print(_C.cuda_version, _C.cuda_archs, len(_C.cuda_truncated_fft_kernels()),"
        "_C.cuda_driver_version())"
    )
    words = output_of(sys.executable, "-c", code, cuda_package).split()
    assert re.fullmatch(r"\d+\.\d+", words[0])
    assert words[1] == "8.0;8.6;9.0+PTX"
    assert int(words[2]) > 0


def test_without_nvcc_the_rest_is_built_and_a_line_says_so(tmp_path: Path) -> None:
    folder = copy_of_the_source(tmp_path, device_code_only=True)
    built = build_wheel(folder, DSNO_KERNELS_BUILD_CUDA="auto", CUDA_HOME=str(tmp_path / "none"))
    assert built.returncode == 0, built.stdout + built.stderr
    text = built.stdout + built.stderr
    assert text.count("building without the CUDA C++ kernels: nvcc was not found") == 1
    code = "import sys; sys.path.insert(0, sys.argv[1]); import _C; print(repr(_C.cuda_version))"
    assert output_of(sys.executable, "-c", code, unpack(folder)).strip() == "''"


def test_cuda_required_without_nvcc_fails_in_one_sentence(tmp_path: Path) -> None:
    folder = copy_of_the_source(tmp_path, device_code_only=True)
    built = build_wheel(folder, DSNO_KERNELS_BUILD_CUDA="1", CUDA_HOME=str(tmp_path / "none"))
    text = built.stdout + built.stderr
    assert built.returncode != 0
    assert "DSNO_KERNELS_BUILD_CUDA=1, but nvcc was not found" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DSNO_KERNELS_BUILD_CUDA", "yes", "accepted: auto, 1, 0"),
        ("CXX", "no-such-compiler", "no C++17 compiler found"),
        pytest.param(
            "TORCH_CUDA_ARCH_LIST", "Ampere", "accepted: entries like 8.0", marks=needs_nvcc
        ),
    ],
)
def test_bad_build_settings_are_one_line_errors(
    name: str, value: str, message: str, tmp_path: Path
) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(tmp_path)]
    environment = {**os.environ, name: value}
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert built.returncode != 0
    assert message in built.stderr
    assert "Traceback" not in built.stderr


def test_the_build_never_imports_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['--version']; import setup"
    built = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    assert "0." in built.stdout


def test_the_package_imports_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['dsno_kernels._C'] = None; import torch, dsno_kernels as dk;"
        "x = torch.randn(2, 4, 3, 5); dk.truncated_rfft(x, 2, 1);"
        "from dsno_kernels.__main__ import main; main(['info'])"
    )
    text = output_of(sys.executable, "-c", code)
    assert "missing" in text
    assert "pip install -e ." in text


@pytest.mark.parametrize(
    ("capability", "archs", "covered"),
    [
        ((8, 0), "8.0;8.6;9.0+PTX", True),
        ((8, 9), "8.0;8.6;9.0+PTX", True),
        ((7, 5), "8.0;8.6;9.0+PTX", False),
        ((10, 0), "8.0;8.6;9.0+PTX", True),
        ((10, 0), "9.0", False),
        ((9, 0), "9.0a", True),
        ((8, 0), "8.6", False),
    ],
)
def test_compute_capability(capability: tuple[int, int], archs: str, covered: bool) -> None:
    assert (uncovered_capability(capability, archs) is None) == covered


@pytest.mark.parametrize(
    ("driver", "built", "works"),
    [(13000, "13.0", True), (12080, "13.0", False), (0, "13.0", False)],
)
def test_driver_version(driver: int, built: str, works: bool) -> None:
    assert (driver_too_old(driver, built) is None) == works
