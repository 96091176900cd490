#!/usr/bin/env python3
"""Plants the bugs of cuda/mutations.toml into the kernels, one at a time, and sees whether the tests notice.

    scripts/mutate_kernels.py              all of them
    scripts/mutate_kernels.py norm -k 3    those of norm.cu; of these only the third

A mutation is caught when the parity tests of its file fail on the emulator. One that says `performance = true` changes no result; it must
be seen by the counters (tests/counters.rs). With `production = true` it shows only beyond 2^31 elements, and tests/production.rs must
notice. The exit code is 1 if any mutation goes unnoticed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib

import kernels

FOLDER = kernels.ROOT / "target" / "mutations"


def test_binary(name):
    """The test program, built if need be."""
    command = ["cargo", "test", "--release", "--locked", "--test", name, "--no-run", "--message-format=json"]
    built = subprocess.run(command, cwd=kernels.ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    artifacts = [json.loads(line) for line in built.splitlines()]
    return next(a["executable"] for a in artifacts if a.get("executable") and a["target"]["name"] == name)


def mutated(mutation):
    """The sources, with the bug in them."""
    path = kernels.SOURCES / mutation["file"]
    text, find = path.read_text(), mutation["find"]
    places = text.count(find)
    wanted = mutation.get("occurrence", 1)
    if places < wanted or (places > 1 and "occurrence" not in mutation):
        sys.exit(f"{mutation['file']}: {places} places have {find!r}; mutations.toml means number {wanted}")
    start = -1
    for _ in range(wanted):
        start = text.index(find, start + 1)
    return text[:start] + mutation["replace"] + text[start + len(find):]


def program(mutation):
    """The test program that must notice."""
    return "counters" if mutation.get("performance") else "production" if mutation.get("production") else "parity"


def plant(compiler, mutation, folder):
    """Writes PTX of all kernels to `folder`, those of the mutated sources made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kernels.PTX, folder)
    sources = folder / "sources"
    shutil.copytree(kernels.SOURCES, sources, ignore=shutil.ignore_patterns("ptx"))
    (sources / mutation["file"]).write_text(mutated(mutation))
    # A bug in a header is in all files that include it, directly or not; its tests are named by the mutation.
    names = [pathlib.Path(mutation["file"]).stem] if mutation["file"].endswith(".cu") else mutation["files"]
    for name in names:
        (folder / f"{name}.sm_80.ptx").write_text(compiler.ptx(name, "compute_80", sources))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="only the mutations of this file, without its ending")
    parser.add_argument("-k", type=int, help="only the k-th of them")
    arguments = parser.parse_args()
    mutations = tomllib.loads((kernels.SOURCES / "mutations.toml").read_text())["mutation"]
    if arguments.file:
        mutations = [m for m in mutations if pathlib.Path(m["file"]).stem == arguments.file]
    if arguments.k:
        mutations = mutations[arguments.k - 1:arguments.k]
    compiler = kernels.Compiler(kernels.toolchain())
    programs = {name: test_binary(name) for name in {program(mutation) for mutation in mutations}}
    missed = 0
    for number, mutation in enumerate(mutations, 1):
        folder = FOLDER / str(number)
        plant(compiler, mutation, folder)
        by = program(mutation)
        words = [] if by == "counters" else mutation["tests"]
        environment = os.environ | {"FERROTRON_PTX": str(folder)}
        done = subprocess.run([programs[by], *words], cwd=kernels.ROOT, env=environment, capture_output=True, text=True)
        if "running 0 tests" in done.stdout:
            sys.exit(f"no test of {by} has any of {words} in its name")
        reasons = [line for line in (done.stdout + done.stderr).splitlines() if any(word in line for word in ("order", "seed", "checked", "rose", "fell", "ideal", "bytes at", "still zero"))]
        verdict = "caught" if done.returncode else "MISSED"
        missed += done.returncode == 0
        print(f"{verdict}  {mutation['file']}: {mutation['what']}" + (f"\n        {reasons[0].strip()[:180]}" if reasons and done.returncode else ""), flush=True)
        shutil.rmtree(folder)
    print(f"{len(mutations) - missed} of {len(mutations)} mutations are caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
