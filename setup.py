"""Builds the one extension module, `dsno_kernels._C`; everything else stands in pyproject.toml.

torch is never imported, so the wheel fits every torch version and builds in isolation. Object files
have their own flags: `csrc/cpu/isa/*.cpp` is compiled once for each instruction set,
`csrc/cuda/*.cu` by nvcc, the rest once.

Environment:
    DSNO_KERNELS_BUILD_CUDA   auto (default): CUDA where nvcc is found; 1: required; 0: never
    CUDA_HOME                 where CUDA stands; without it PATH, then /usr/local/cuda
    TORCH_CUDA_ARCH_LIST      "8.0;8.6;9.0+PTX"
    NVCC_FLAGS, CXXFLAGS      appended to the compilers' flags;  CXX: the C++ compiler
    MAX_JOBS                  parallel compilations; default min(cores, memory / 4 GiB)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mavx2"]
# One row an instruction set; csrc/cpu/dispatch.cpp chooses among them at run time.
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8"],
}
DEFAULT_ARCHS = "8.0;8.6;9.0+PTX"


def fail(message: str) -> NoReturn:
    raise SystemExit(f"dsno_kernels: {message}")


class Job(NamedTuple):
    """A compilation of `source` to `output`; the headers it read are listed in `output`.d."""

    source: Path
    output: Path
    command: list[str]


class Cuda(NamedTuple):
    nvcc: str
    version: str
    archs: str
    flags: list[str]


def find_cxx() -> str:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in candidates:
        if shutil.which(name.split()[0]):
            return name
    fail(f"no C++17 compiler found (looked for {', '.join(candidates)}); install gcc or set CXX")


def find_nvcc() -> str | None:
    """A set CUDA_HOME decides alone; else PATH, then the usual folder."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gencode_flags(archs: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;8.6;9.0+PTX": device code for each, PTX where asked."""
    flags = []
    for arch in re.split(r"[;,\s]+", archs.strip(" ;,")):
        match = re.fullmatch(r"(\d+)\.(\d[a-f]?)(\+PTX)?", arch)
        if match is None:
            fail(
                f"TORCH_CUDA_ARCH_LIST holds {arch!r}; "
                "accepted: entries like 8.0, 9.0a or 9.0+PTX, joined by ';'"
            )
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def find_cuda() -> Cuda | None:
    wanted = os.environ.get("DSNO_KERNELS_BUILD_CUDA", "auto")
    if wanted not in ("auto", "1", "0"):
        fail(f"DSNO_KERNELS_BUILD_CUDA={wanted!r}; accepted: auto, 1, 0")
    if wanted == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        where = os.environ.get("CUDA_HOME") or "PATH and /usr/local/cuda"
        if wanted == "1":
            fail(
                f"DSNO_KERNELS_BUILD_CUDA=1, but nvcc was not found in {where}; "
                "install the CUDA toolkit, set CUDA_HOME, or unset DSNO_KERNELS_BUILD_CUDA"
            )
        print(f"dsno_kernels: building without the CUDA C++ kernels: nvcc was not found in {where}")
        return None
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", report)
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    flags = [
        "-O3",
        "-std=c++17",
        "-cudart=static",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-Xfatbin=-compress-all",
    ]
    if os.environ.get("CXX"):
        flags.append(f"-ccbin={os.environ['CXX']}")
    flags += gencode_flags(archs) + os.environ.get("NVCC_FLAGS", "").split()
    return Cuda(nvcc, found[1] if found else "unknown", archs, flags)


def accepts(cxx: str, flags: list[str], scratch: Path) -> bool:
    probe = scratch / "probe.cpp"
    probe.write_text("#include <cstddef>\nint main() { return 0; }\n")
    command = [*cxx.split(), "-Werror", *flags, "-c", str(probe), "-o", str(scratch / "probe.o")]
    return subprocess.run(command, capture_output=True).returncode == 0


def default_jobs() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = 8 << 30
    return max(1, min(cores, memory >> 32))


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def run_ninja(
    ninja: str, jobs: list[Job], link: list[str], output: Path, inputs: list[str], folder: Path
) -> None:
    """Build incrementally: ninja compares commands, sources and the headers in the depfiles."""
    lines = [
        "ninja_required_version = 1.3",
        "rule run",
        "  command = $cmd",
        "  deps = gcc",
        "  depfile = $out.d",
    ]
    lines += ["  description = $out", "rule link", "  command = $cmd", "  description = link $out"]
    for job in jobs:
        lines.append(f"build {ninja_escape(str(job.output))}: run {ninja_escape(str(job.source))}")
        lines.append("  cmd = " + " ".join(job.command).replace("$", "$$"))
    objects = " ".join(ninja_escape(str(job.output)) for job in jobs)
    lines.append(
        f"build {ninja_escape(str(output))}: link {objects} | {' '.join(map(ninja_escape, inputs))}"
    )
    lines.append("  cmd = " + " ".join(link).replace("$", "$$"))
    write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")
    if subprocess.run([ninja, "-C", str(folder), "-j", str(default_jobs())]).returncode:
        fail("the extension could not be compiled; the compiler's message stands above")


def run_pool(jobs: list[Job], link: list[str]) -> None:
    """Build everything, several files at a time, on machines without ninja."""

    def run(command: list[str]) -> int:
        print(" ".join(command), flush=True)
        return subprocess.run(command).returncode

    with ThreadPoolExecutor(default_jobs()) as pool:
        failed = any(list(pool.map(run, [job.command for job in jobs])))
    if failed or run(link):
        fail("the extension could not be compiled; the compiler's message stands above")


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")


class BuildExtension(build_ext):
    """Compiles `dsno_kernels._C` file by file."""

    def build_extension(self, ext: Extension) -> None:
        cuda, cxx = find_cuda(), find_cxx()
        folder = ROOT / "build" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        isas = self.instruction_sets(cxx, folder)
        self.write_config(folder, cxx, cuda, isas)
        jobs = self.cxx_jobs(cxx, cuda, isas, folder) + (
            self.cuda_jobs(cuda, folder) if cuda else []
        )

        # Only the module's entry point is visible, not the static CUDA runtime or std's templates.
        exports = folder / "exports.map"
        write_if_changed(exports, "{ global: PyInit__C; local: *; };\n")
        objects = [str(job.output) for job in jobs]
        built = folder / target.name
        if cuda:
            linker = [cuda.nvcc, "-shared", "-cudart=static", "-nodlink"]
            linker += [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
            options = [
                f"-Xlinker={option}"
                for option in (f"--version-script={exports}", "--exclude-libs=ALL", "-s")
            ]
        else:
            linker = [*cxx.split(), "-shared"]
            options = [f"-Wl,--version-script={exports}", "-Wl,--exclude-libs,ALL", "-s"]
        link = [*linker, "-o", str(built), *objects, *options, "-ldl"]

        ninja = find_ninja()
        if ninja:
            run_ninja(ninja, jobs, link, built, [str(exports)], folder)
        else:
            run_pool(jobs, link)
        # A running process may have the old file mapped: replace it, never write into it.
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(built, partial)
        os.replace(partial, target)

    @staticmethod
    def instruction_sets(cxx: str, folder: Path) -> dict[str, list[str]]:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return {"portable": []}
        return {name: flags for name, flags in ISA_FLAGS.items() if accepts(cxx, flags, folder)}

    @staticmethod
    def write_config(folder: Path, cxx: str, cuda: Cuda | None, isas: dict[str, list[str]]) -> None:
        compiler = subprocess.run(
            [*cxx.split(), "--version"], capture_output=True, text=True
        ).stdout.split("\n")[0]
        parts = [
            compiler,
            "CPU: " + " ".join(isas),
            f"CUDA: {cuda.version} for {cuda.archs}" if cuda else "no CUDA",
        ]
        values = {
            "DSNO_BUILD_INFO": "; ".join(parts),
            "DSNO_CUDA_VERSION": cuda.version if cuda else "",
            "DSNO_CUDA_ARCHS": cuda.archs if cuda else "",
        }
        lines = [f'#define {name} "{value}"' for name, value in values.items()]
        write_if_changed(folder / "build_config.h", "#pragma once\n" + "\n".join(lines) + "\n")

    @staticmethod
    def cxx_jobs(
        cxx: str, cuda: Cuda | None, isas: dict[str, list[str]], folder: Path
    ) -> list[Job]:
        import pybind11

        includes = [
            sysconfig.get_path("include"),
            pybind11.get_include(),
            str(folder),
            str(ROOT / "csrc"),
        ]
        bindings = ROOT / "python_bindings"
        base = [*CXX_FLAGS, *os.environ.get("CXXFLAGS", "").split()]
        base += [f"-isystem{path}" for path in includes[:2]] + [
            f"-I{path}" for path in includes[2:]
        ]
        base += ["-DDSNO_KERNELS_CUDA"] if cuda else []
        # The tests of the packaging build without the CPU kernels, to be quick.
        base += ["-DDSNO_KERNELS_CPU"] if (bindings / "bind_cpu.cpp").exists() else []
        base += [f"-DDSNO_WITHOUT_{name.upper()}" for name in ISA_FLAGS if name not in isas]
        rows: list[tuple[Path, str, list[str]]] = []
        for source in sorted([*(ROOT / "csrc" / "cpu").glob("*.cpp"), *bindings.glob("*.cpp")]):
            if cuda or source.name != "bind_cuda.cpp":
                rows.append((source, source.stem, []))
        for source in sorted((ROOT / "csrc" / "cpu" / "isa").glob("*.cpp")):
            rows += [
                (source, f"{source.stem}.{isa}", [f"-DDSNO_ISA={isa}", *flags])
                for isa, flags in isas.items()
            ]
        jobs = []
        for source, stem, flags in rows:
            output = folder / f"{stem}.o"
            command = [*cxx.split(), *base, *flags, "-MMD", "-MF", f"{output}.d"]
            jobs.append(Job(source, output, [*command, "-c", str(source), "-o", str(output)]))
        return jobs

    @staticmethod
    def cuda_jobs(cuda: Cuda, folder: Path) -> list[Job]:
        jobs = []
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            output = folder / f"{source.stem}.cuda.o"
            command = [
                cuda.nvcc,
                *cuda.flags,
                "-MMD",
                "-MF",
                f"{output}.d",
                "-c",
                str(source),
                "-o",
                str(output),
            ]
            jobs.append(Job(source, output, command))
        return jobs


class BuildPython(build_py):
    """Ships the CUDA device code inside the package, for run-time compilation with NVRTC."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "dsno_kernels" / "csrc"
            folder.mkdir(parents=True, exist_ok=True)
            for header in sorted((ROOT / "csrc" / "cuda").glob("*.cuh")):
                shutil.copyfile(header, folder / header.name)


if sys.platform.startswith("linux"):
    extensions = [Extension("dsno_kernels._C", sources=[])]
else:
    print(
        "dsno_kernels: the compiled kernels are for Linux; "
        f"{sys.platform} gets the PyTorch reference"
    )
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension, "build_py": BuildPython})
