#!/usr/bin/env python3
"""ferrotron's training step beside PyTorch's, on the same models and the same machine, in turns. Optional; needs torch.

    pip install torch
    python benches/peers/run.py
    python benches/peers/run.py --models tiny --dtypes f32 --threads 1 2 --rounds 5

A round runs each program once, in a process of its own, one after the other and never both; who begins changes from round to round.
For each model, format and number of threads a line tells tokens per second of either, as median over the rounds with the least and
the most, and the ratio of the medians (above 1: ferrotron is faster). `clock` is what a watch sees, and what counts on a quiet machine.
`free` is by processor time, which others on the machine disturb less; with one thread it is fair, with several PyTorch's count their
waiting in it (see peers_torch.py).

PyTorch is faster where malloc does not give memory back and where its BLAS takes its AVX-512 path on AMD processors, too:

    echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' > path.c && cc -shared -fPIC -o path.so path.c
    LD_PRELOAD=$PWD/path.so MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \\
        python benches/peers/run.py
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent


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
    options = parser.parse_args()
    if options.program is None:
        subprocess.run(["cargo", "bench", "--quiet", "--bench", "step", "--no-run"], cwd=HERE, check=True)
    for model in options.models:
        for dtype in options.dtypes:
            for threads in options.threads if options.device == "cpu" else [1]:
                compare(options, model, dtype, threads)


def compare(options, model, dtype, threads):
    common = ["--model", model, "--dtype", dtype, "--threads", str(threads), "--steps", str(options.steps),
              "--seconds", str(options.seconds), "--device", options.device,
              *(["--rows", str(options.rows)] if options.rows else []), *(["--time", str(options.time)] if options.time else [])]
    program = [str(pathlib.Path(options.program).resolve())] if options.program else ["cargo", "bench", "--quiet", "--bench", "step", "--"]
    ours = [*program, "--json", "--ranks", "1", *common]
    theirs = [sys.executable, str(HERE / "peers_torch.py"), *common, *(["--compile"] if options.compile else [])]
    seen = {"ferrotron": [], "torch": []}
    for turn in range(options.rounds):
        for command in (ours, theirs) if turn % 2 == 0 else (theirs, ours):
            result = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
            line = json.loads(result.stdout.strip().splitlines()[0])
            seen[line["peer"]].append(line)
    sizes = {peer: lines[0]["rows"] * lines[0]["time"] for peer, lines in seen.items()}
    assert len(set(sizes.values())) == 1, f"not the same step: {sizes}"
    print(f"{model} {dtype} {seen['torch'][0]['rows']} x {seen['torch'][0]['time']} threads {threads}")
    for name, key in (("clock", "tokens_per_s"), ("free", "tokens_per_s_free")):
        rates = {peer: [line[key] for line in lines] for peer, lines in seen.items()}
        ratio = statistics.median(rates["ferrotron"]) / statistics.median(rates["torch"])
        texts = [f"{peer} {statistics.median(r):.0f} ({min(r):.0f} to {max(r):.0f})" for peer, r in rates.items()]
        print(f"    {name:5}  {'  '.join(texts)} tok/s  ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
