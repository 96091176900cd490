#!/usr/bin/env python3
"""Tokens per second of a training step of llm.c's CPU program, train_gpt2.c, in f32. One JSON line. Needs gcc and llm.c's sources.

    git clone https://github.com/karpathy/llm.c
    python benches/peers/llm_c.py --sources llm.c --model gpt2-124m --threads 2

The program is compiled as llm.c's Makefile does it (-Ofast, -march=native, OpenMP), from a copy in which four numbers are changed: rows
and tokens of a step, and how much it validates and generates, which is nothing. It reads random weights and tokens that are written
here. What it does in a step: forward, cross-entropy, backward, AdamW; no clipping and no weight decay.

It knows only GPT-2, with an MLP of four times the width: `tiny` is a GPT-2 here, of the same layers, width, heads and vocabulary as
elsewhere, and 10.8 million parameters in place of 9.6.

`tokens_per_s` is of the median step by the program's own clock, `tokens_per_s_free` of the median step by processor time, times the
threads. A thread that waits for the other looks for work in a loop at first: that counts as processor time.
"""

import argparse
import array
import json
import os
import pathlib
import pty
import random
import re
import statistics
import subprocess
import tempfile
import time

MODELS = {
    "tiny": dict(layers=6, width=384, heads=6, vocabulary=257, padded=257, positions=256, rows=16, time=256),
    "gpt2-124m": dict(layers=12, width=768, heads=12, vocabulary=50257, padded=50304, positions=1024, rows=4, time=64),
}
FLAGS = ["-Ofast", "-march=native", "-fopenmp", "-DOMP", "-w"]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", required=True, type=pathlib.Path, help="the folder with train_gpt2.c")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--dtype", choices=["f32"], default="f32")
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", type=int, help="sequences a step")
    parser.add_argument("--time", type=int, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=12, help="timed steps, at most")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--seconds", type=float, default=120, help="begin no further step after that long")
    return parser.parse_args()


def compiled(sources, folder, rows, length):
    """The program, for steps of so many tokens."""
    text = (sources / "train_gpt2.c").read_text()
    for name, before, after in (("B", 4, rows), ("T", 64, length), ("val_num_batches", 5, 0), ("genT", 64, 0)):
        text, count = re.subn(rf"\bint {name} = {before};", f"int {name} = {after};", text)
        assert count == 1, f"another train_gpt2.c than expected: `int {name} = {before};` is in it {count} times"
    text, count = re.subn(r"step <= 40;", "step <= 1000000;", text)
    assert count == 1, "another train_gpt2.c than expected: it does not take 40 steps"
    (folder / "train.c").write_text(text)
    subprocess.run(["gcc", *FLAGS, f"-I{sources.resolve()}", "train.c", "-o", "train", "-lm"], cwd=folder, check=True)
    return folder / "train"


def write_weights(path, m):
    """A checkpoint: 256 integers, then f32 tensors. Weights are drawn from a block that is repeated; how many there are is returned."""
    layers, width, wide = m["layers"], m["width"], 4 * m["width"]
    block = array.array("f", (random.gauss(0, 0.02) for _ in range(1000003)))
    per_layer = [("one", width), ("zero", width), ("any", 3 * width * width), ("zero", 3 * width), ("any", width * width), ("zero", width),
                 ("one", width), ("zero", width), ("any", wide * width), ("zero", wide), ("any", width * wide), ("zero", width)]
    tensors = [("any", m["padded"] * width), ("any", m["positions"] * width), *((kind, layers * size) for kind, size in per_layer),
               ("one", width), ("zero", width)]
    header = [20240326, 3, m["positions"], m["vocabulary"], layers, m["heads"], width, m["padded"]]
    with open(path, "wb") as file:
        array.array("i", header + [0] * (256 - len(header))).tofile(file)
        for kind, size in tensors:
            repeated = {"any": block, "zero": array.array("f", [0]) * 4096, "one": array.array("f", [1]) * 4096}[kind]
            for start in range(0, size, len(repeated)):
                repeated[: size - start].tofile(file)
    return sum(size for _, size in tensors) - (m["padded"] - m["vocabulary"]) * width


def write_tokens(path, m, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        array.array("i", [20240520, 1, count] + [0] * 253).tofile(file)
        array.array("H", (random.randrange(m["vocabulary"]) for _ in range(count))).tofile(file)


def processor_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_peak(pid):
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text())[1])


def main():
    options = arguments()
    m = MODELS[options.model]
    rows, length = options.rows or m["rows"], options.time or m["time"]
    m = m | dict(positions=max(m["positions"], length))
    random.seed(7)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        program = compiled(options.sources, folder, rows, length)
        parameters = write_weights(folder / "gpt2_124M.bin", m)
        for part in ("train", "val"):
            write_tokens(folder / f"dev/data/tinyshakespeare/tiny_shakespeare_{part}.bin", m, rows * length + 1)
        # To a terminal the program writes each line when it has it.
        ours, theirs = pty.openpty()
        child = subprocess.Popen([program], cwd=folder, stdout=theirs, env=os.environ | dict(OMP_NUM_THREADS=str(options.threads)))
        os.close(theirs)
        begin, steps, lines = time.perf_counter(), [], os.fdopen(ours, errors="replace")
        last = 0.0
        for line in lines:
            if line.startswith("val loss"):
                last = processor_seconds(child.pid)
            if step := re.match(r"step \d+: train loss (\S+) \(took (\S+) ms\)", line):
                now = processor_seconds(child.pid)
                steps.append(dict(loss=float(step[1]), wall=float(step[2]) / 1e3, processor=now - last))
                last = now
                timed = len(steps) - options.warmup
                if timed >= options.steps or (timed > 0 and time.perf_counter() - begin > options.seconds):
                    break
        memory = memory_peak(child.pid)
        child.kill()
        child.wait()
    wall, processor = ([step[kind] for step in steps[options.warmup :]] for kind in ("wall", "processor"))
    tokens, step_s, processor_s = rows * length, statistics.median(wall), statistics.median(processor)
    print(json.dumps(dict(
        peer="llm.c", version="train_gpt2.c", device="cpu", model=options.model, dtype="f32", threads=options.threads, rows=rows,
        time=length, parameters=parameters, tokens_per_s=round(tokens / step_s, 1), tokens_per_s_best=round(tokens / min(wall), 1),
        tokens_per_s_free=round(tokens * options.threads / processor_s, 1), processor_s=round(processor_s, 5),
        step_s=round(step_s, 5), steps=len(wall), first_step_s=round(steps[0]["wall"], 5), memory_peak_bytes=memory,
        loss_first=round(steps[0]["loss"], 4), loss_last=round(steps[-1]["loss"], 4))), flush=True)


if __name__ == "__main__":
    main()
