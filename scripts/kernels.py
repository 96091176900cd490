#!/usr/bin/env python3
"""Makes cuda/ptx/ from cuda/*.cu, and says what each kernel takes of a GPU. Needs Python 3 and no GPU.

    scripts/kernels.py               compile all kernels, write cuda/ptx/*.ptx and cuda/ptx/budget.json
    scripts/kernels.py norm rope     the same for these files only
    scripts/kernels.py --check       compile and assemble all, fail where what is committed differs

The compiler (NVRTC) and the assembler (ptxas) come from Python wheels, which are installed under target/ on first use.
"""

import argparse
import ctypes
import json
import pathlib
import re
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = ROOT / "cuda"
PTX = SOURCES / "ptx"
TOOLCHAIN = ROOT / "target" / "cuda-toolchain"
# CUDA 12.8 writes PTX 8.7, which drivers from R570 on read.
WHEELS = ["nvidia-cuda-nvrtc-cu12==12.8.93", "nvidia-cuda-nvcc-cu12==12.8.93"]
# Architecture of the PTX, and of the machine code that it is assembled for to be judged.
ARCHITECTURES = {"compute_80": "sm_80", "compute_90a": "sm_90a"}
# No contraction of a * b + c: each rounding is written in the source, so that the emulator and every GPU compute the same bits.
OPTIONS = ["--std=c++17", "--generate-line-info", "--fmad=false", "--extra-device-vectorization"]


def toolchain():
    """The folder of the wheels' packages, installed if need be."""
    python = TOOLCHAIN / "bin" / "python"
    marker = TOOLCHAIN / "installed.txt"
    if not (marker.exists() and marker.read_text().split() == WHEELS):
        print(f"installing {', '.join(WHEELS)} under {TOOLCHAIN.relative_to(ROOT)}", file=sys.stderr)
        venv.create(TOOLCHAIN, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *WHEELS], check=True)
        marker.write_text("\n".join(WHEELS))
    return next(TOOLCHAIN.glob("lib/python*/site-packages/nvidia"))


class Compiler:
    """NVRTC: CUDA C++ to PTX."""

    def __init__(self, packages):
        folder = packages / "cuda_nvrtc" / "lib"
        builtins = next(folder.glob("libnvrtc-builtins.so.12.*"))
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(folder / "libnvrtc.so.12"))

    def ptx(self, name, architecture, sources=SOURCES):
        headers = sorted(sources.glob("*.cuh"))
        texts = (ctypes.c_char_p * len(headers))(*[header.read_bytes() for header in headers])
        names = (ctypes.c_char_p * len(headers))(*[header.name.encode() for header in headers])
        program = ctypes.c_void_p()
        source = (sources / f"{name}.cu").read_bytes()
        self.must(self.library.nvrtcCreateProgram(
            ctypes.byref(program), source, f"cuda/{name}.cu".encode(), len(headers), texts, names))
        options = [option.encode() for option in [*OPTIONS, f"--gpu-architecture={architecture}"]]
        failed = self.library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = self.text(program, "ProgramLog")
        if failed or "warning" in log:
            sys.exit(f"{name}.cu for {architecture}:\n{log}")
        ptx = self.text(program, "PTX")
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        return tidy(ptx)

    def text(self, program, what):
        size = ctypes.c_size_t()
        self.must(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self.must(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.value.decode()

    def must(self, code):
        if code:
            self.library.nvrtcGetErrorString.restype = ctypes.c_char_p
            sys.exit(f"NVRTC: {self.library.nvrtcGetErrorString(code).decode()}")


def tidy(ptx):
    """PTX without debuggers' sections, and so without what refers to them: where a line was inlined."""
    text = re.sub(r"^\t?\.section\s+\.debug_\w+\s*\{.*?^\t?\}\n?", "", ptx, flags=re.S | re.M)
    text = re.sub(r", function_name .*$", "", text, flags=re.M)
    # Headers are given to the compiler by name alone, which it takes for files of the folder it runs in.
    text = re.sub(r'(\.file\s+\d+ )"(?:.*/)?([^/"]+)".*', r'\1"cuda/\2"', text)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"


def assemble(ptxas, path, target):
    """What ptxas says of each kernel: registers, bytes of stack, spills, shared and constant memory."""
    done = subprocess.run([ptxas, "-v", "-O3", f"-arch={target}", "-o", "/dev/null", path], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"ptxas {path.name} for {target}:\n{done.stderr[:2000]}")
    for line in done.stderr.splitlines():
        if "warning" in line.lower() or "Performance Loss" in line:
            sys.exit(f"ptxas {path.name} for {target}: {line}")
    kernels = {}
    entry = None
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            entry = kernels.setdefault(found[1], {})
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            entry |= {"stack": int(found[1]), "spills": int(found[2]) + int(found[3])}
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            entry |= {"registers": int(found[1]), "shared": int(shared[1]) if shared else 0}
    for kernel, use in kernels.items():
        if use["spills"] or use["stack"]:
            sys.exit(f"{kernel} for {target} spills registers: {use}. Let it hold less, or give a thread more registers.")
    return kernels


def table(kernels):
    """JSON with a line for each kernel."""
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(use)}" for name, use in kernels.items()) + "\n}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where what is committed differs")
    parser.add_argument("names", nargs="*", help="files in cuda/, without .cu; all by default")
    arguments = parser.parse_args()
    packages = toolchain()
    compiler, ptxas = Compiler(packages), packages / "cuda_nvcc" / "bin" / "ptxas"
    ptxas.chmod(0o755)
    everything = sorted(path.stem for path in SOURCES.glob("*.cu"))
    names = arguments.names or everything
    budget_file = PTX / "budget.json"
    committed = json.loads(budget_file.read_text()) if budget_file.exists() else {}
    budget = {target: dict(committed.get(target, {})) for target in ARCHITECTURES.values()}
    scratch = PTX if not arguments.check else ROOT / "target" / "ptx"
    scratch.mkdir(parents=True, exist_ok=True)
    differing = []

    def build(task):
        name, (architecture, target) = task
        ptx = compiler.ptx(name, architecture)
        path = scratch / f"{name}.{target}.ptx"
        old = PTX / path.name
        if arguments.check and (not old.exists() or old.read_text() != ptx):
            differing.append(f"cuda/ptx/{path.name}")
        path.write_text(ptx)
        return name, target, assemble(ptxas, path, target)

    with ThreadPoolExecutor(2) as pool:
        built = list(pool.map(build, [(name, item) for name in names for item in ARCHITECTURES.items()]))
    for target in budget:
        if names == everything:
            budget[target] = {}
        for _, _, kernels in (item for item in built if item[1] == target):
            budget[target] |= kernels
        budget[target] = dict(sorted(budget[target].items()))
    text = "{\n" + ",\n".join(f'"{target}": {table(kernels)}' for target, kernels in budget.items()) + "\n}\n"
    if arguments.check:
        for path in sorted(PTX.glob("*.ptx")):
            if path.stem.rsplit(".", 1)[0] not in everything:
                differing.append(f"cuda/ptx/{path.name} (no such source)")
        if budget_file.read_text() != text:
            differing.append("cuda/ptx/budget.json")
        if differing:
            sys.exit("not what the sources give; run scripts/kernels.py and commit: " + ", ".join(differing))
    else:
        budget_file.write_text(text)
    count = sum(len(use) for _, target, use in built if target == "sm_90a")
    print(f"{len(names)} files, {count} kernels for {' and '.join(ARCHITECTURES.values())}: no spills, no warnings")


if __name__ == "__main__":
    main()
