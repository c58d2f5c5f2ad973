"""mamba_ssm's and causal_conv1d's CUDA kernels, forward only and for one architecture.

    python -m benchmarks.peers_build fetch FOLDER           where there is a network
    python -m benchmarks.peers_build build FOLDER [--arch 9.0]   where there are nvcc and a GPU
    PYTHONPATH=FOLDER python -m benchmarks.run --suite gpu ...

`fetch` takes source distributions through pip. `build` puts selective_scan_cuda, causal_conv1d_cuda
and the Python of mamba_ssm (whose reference scan others are compared with) into the folder. The
backward kernels take minutes to compile and are left out: calling them raises an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """A source distribution: its binding and kernels, and templates that are left out."""

    requirement: str
    module: str
    folder: str
    sources: tuple[str, ...]
    left_out: dict[str, str]  # function template -> its first argument's type

    @property
    def archive(self) -> str:
        """The name that pip gives its file."""
        name, _, version = self.requirement.partition("==")
        return f"{name.replace('-', '_')}-{version}.tar.gz"


PACKAGES = (
    Package(
        requirement="mamba-ssm==2.3.2.post1",
        module="selective_scan_cuda",
        folder="csrc/selective_scan",
        sources=(
            "selective_scan.cpp",
            "selective_scan_fwd_fp32.cu",
            "selective_scan_fwd_fp16.cu",
            "selective_scan_fwd_bf16.cu",
        ),
        left_out={"selective_scan_bwd_cuda": "SSMParamsBwd"},
    ),
    Package(
        requirement="causal-conv1d==1.6.2.post1",
        module="causal_conv1d_cuda",
        folder="csrc",
        sources=("causal_conv1d.cpp", "causal_conv1d_fwd.cu"),
        left_out={
            "causal_conv1d_bwd_cuda": "ConvParamsBwd",
            "causal_conv1d_channellast_bwd_cuda": "ConvParamsBwd",
            "causal_conv1d_update_cuda": "ConvParamsBase",
        },
    ),
)
# The packages' own, from their setup.py, but for the C++ standard, which is PyTorch's.
NVCC = (
    *("-O3", "--use_fast_math", "--expt-relaxed-constexpr"),
    *("--expt-extended-lambda", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__"),
    *("-U__CUDA_NO_BFLOAT16_OPERATORS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"),
    *("-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__"),
)


def fetch(folder: Path) -> None:
    """Download the source distributions into a folder."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "-d", str(folder), *(one.requirement for one in PACKAGES)]
    skip = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}
    if subprocess.run(command, env={**os.environ, **skip}).returncode != 0:
        raise SystemExit("pip could not fetch the source distributions: see above")


def unpack(package: Package, folder: Path) -> Path:
    """A package's sources under folder/build, made ready; returns the folder of its kernels."""
    archive = folder / package.archive
    if not archive.exists():
        raise SystemExit(f"{archive.name} is not in {folder}: run `peers_build fetch` first")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "build", filter="data")
    root = folder / "build" / package.archive.removesuffix(".tar.gz")
    binding = root / package.folder / package.sources[0]
    stubs = [stub(name, kind) for name, kind in package.left_out.items()]
    binding.write_text("\n".join([binding.read_text(), *stubs]))
    python = root / "mamba_ssm"
    if python.is_dir():
        shutil.copytree(python, folder / python.name, dirs_exist_ok=True)
    return binding.parent


def stub(name: str, kind: str) -> str:
    """A definition of a function template that is declared and has no kernel."""
    return (
        "template <typename input_t, typename weight_t>\n"
        f"void {name}({kind} &, cudaStream_t) {{\n"
        f'    TORCH_CHECK(false, "{name} was left out of this build");\n'
        "}\n"
    )


def build(folder: Path, architecture: str) -> None:
    """Compile the fetched sources with nvcc; the modules are put into the folder itself."""
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is None or shutil.which("nvcc") is None:
        raise SystemExit(
            "nvcc, or a PyTorch with CUDA, was not found: build where the CUDA toolkit is installed"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = architecture
    for package in PACKAGES:
        sources = unpack(package, folder)
        target = folder / "build" / package.module
        target.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(
            name=package.module,
            sources=[str(sources / one) for one in package.sources],
            extra_include_paths=[str(sources)],
            extra_cflags=["-O3"],
            extra_cuda_cflags=list(NVCC),
            build_directory=str(target),
            is_python_module=False,
        )
        shutil.copy(target / f"{package.module}.so", folder)
        print(f"{package.module} is built for {architecture}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers_build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("step", choices=("fetch", "build"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", default="9.0", help="compute capability to build for")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.step == "fetch":
        fetch(given.folder)
    else:
        build(given.folder.resolve(), given.arch)


if __name__ == "__main__":
    main()
