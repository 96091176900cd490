#!/usr/bin/env python3
"""ferrotron's training step beside that of others, on the same models and the same machine, in turns. Optional; PyTorch's needs torch.

    pip install torch
    python benches/peers/run.py
    python benches/peers/run.py --models tiny --dtypes f32 --threads 1 2 --rounds 5
    python benches/peers/run.py --dtypes f32 --threads 2 --peers torch candle burn llm.c --llm-c FOLDER

A round runs each program once, in a process of its own, one after the other and never two; who begins changes from round to round.
For each model, format and number of threads a line for each program tells tokens per second, as median over the rounds with the least
and the most, and the ratio of ferrotron's median to its own (above 1: ferrotron is faster). `clock` is what a watch sees, and what
counts on a quiet machine. `free` is by processor time, which others on the machine disturb less; with one thread it is fair. With
several it is too low for those who wait in a loop (PyTorch, llm.c) and too high for those who leave threads idle (candle, burn).
`memory` is the most of a process that was resident, on a GPU the most that was allocated there (ratio below 1: ferrotron takes less).

candle, burn and llm.c compute in f32 on the CPU only; their files here say what they do in a step, which is somewhat less than
ferrotron and PyTorch do. The first two are built by cargo, the last by gcc from llm.c's sources in FOLDER.

PyTorch is faster where malloc does not give memory back and where its BLAS takes its AVX-512 path on AMD processors, too:

    echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > path.c && cc -shared -fPIC -o path.so path.c
    LD_PRELOAD=$PWD/path.so MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \\
        python benches/peers/run.py
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILT_BY_CARGO = ["candle", "burn"]
TIMES = {"tiny": 256, "gpt2-124m": 64, "llama-1b": 2048}
MEASURES = [("clock", "tokens_per_s", 1, "tok/s"), ("free", "tokens_per_s_free", 1, "tok/s"), ("memory", "memory_peak_bytes", 2**20, "MiB")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "gpt2-124m"])
    parser.add_argument("--dtypes", nargs="+", default=["f32", "bf16"], help="bf16 is autocast in PyTorch")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--time", type=int, help="tokens a sequence, in place of the model's own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a round, at most")
    parser.add_argument("--seconds", type=float, default=30, help="of a round, about")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU, with one thread")
    parser.add_argument("--rows", type=int, help="sequences a step, in place of the model's own")
    parser.add_argument("--program", help="the built benchmark of ferrotron, in place of cargo's")
    parser.add_argument("--compile", action="store_true", help="PyTorch through torch.compile; needs a C++ compiler")
    parser.add_argument("--peers", nargs="+", choices=["torch", *BUILT_BY_CARGO, "llm.c"], default=["torch"])
    parser.add_argument("--llm-c", metavar="FOLDER", help="llm.c's sources")
    options = parser.parse_args()
    if "llm.c" in options.peers and options.llm_c is None:
        parser.error("llm.c needs --llm-c")
    for peer in set(BUILT_BY_CARGO).intersection(options.peers):
        environment = os.environ | dict(RUSTFLAGS="-C target-cpu=native")
        subprocess.run(["cargo", "build", "--quiet", "--release", "--target-dir", "target"], cwd=HERE / peer, env=environment, check=True)
    if options.program is None:
        subprocess.run(["cargo", "bench", "--quiet", "--bench", "step", "--no-run"], cwd=HERE, check=True)
    for model in options.models:
        for dtype in options.dtypes:
            for threads in options.threads if options.device == "cpu" else [1]:
                compare(options, model, dtype, threads)


def compare(options, model, dtype, threads):
    common = ["--model", model, "--dtype", dtype, "--threads", str(threads), "--steps", str(options.steps),
              "--seconds", str(options.seconds), "--device", options.device,
              "--time", str(options.time or TIMES[model]), *(["--rows", str(options.rows)] if options.rows else [])]
    peers = [peer for peer in options.peers if peer == "torch" or (dtype, options.device) == ("f32", "cpu")]
    commands = {peer: command(options, peer) + common for peer in ["ferrotron", *peers]}
    seen = {peer: [] for peer in commands}
    for turn in range(options.rounds):
        order = list(commands)
        for peer in order[turn % len(order):] + order[: turn % len(order)]:
            seen[peer].append(run(commands[peer], options.device))
    sizes = {peer: lines[0]["rows"] * lines[0]["time"] for peer, lines in seen.items()}
    assert len(set(sizes.values())) == 1, f"not the same step: {sizes}"
    print(f"{model} {dtype} {seen['ferrotron'][0]['rows']} x {seen['ferrotron'][0]['time']} threads {threads}")
    for peer, lines in seen.items():
        texts = []
        for name, key, unit, words in MEASURES:
            middle, ours = (statistics.median(line[key] for line in some) / unit for some in (lines, seen["ferrotron"]))
            spread = f"({min(line[key] for line in lines) / unit:.0f} to {max(line[key] for line in lines) / unit:.0f})"
            texts.append(f"{name} {middle:.0f} {spread} {words}" + ("" if peer == "ferrotron" else f" ratio {ours / middle:.2f}"))
        print(f"    {peer:9}  {', '.join(texts)}", flush=True)


def command(options, peer):
    if peer == "ferrotron":
        built = [str(pathlib.Path(options.program).resolve())] if options.program else None
        return [*(built or ["cargo", "bench", "--quiet", "--bench", "step", "--"]), "--json", "--ranks", "1"]
    if peer == "torch":
        return [sys.executable, str(HERE / "peers_torch.py"), *(["--compile"] if options.compile else [])]
    if peer == "llm.c":
        return [sys.executable, str(HERE / "llm_c.py"), "--sources", str(pathlib.Path(options.llm_c).resolve())]
    return [str(HERE / peer / "target/release" / f"peer-{peer}")]


def run(words, device):
    """The line that a program prints. On a CPU its memory is what the system saw of the largest of its processes."""
    with subprocess.Popen(words, cwd=HERE, stdout=subprocess.PIPE, text=True) as child:
        text = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise subprocess.CalledProcessError(child.returncode, words)
    line = json.loads(text.strip().splitlines()[0])
    if device == "cpu":
        line["memory_peak_bytes"] = usage.ru_maxrss * 1024
    return line


if __name__ == "__main__":
    main()
