#!/usr/bin/env python3
"""Tokens per second of the same training step in PyTorch, to hold ferrotron's own number against. Optional; needs only torch.

    pip install torch
    python benches/peers/peers_torch.py --model tiny --dtype f32 --threads 2
    python benches/peers/peers_torch.py --model gpt2-124m --dtype bf16 --threads 2 --compile
    python benches/peers/peers_torch.py --all --threads 2        both models, f32 and bf16, eager: four lines

Each configuration runs in a process of its own and prints one JSON line. A step is zero_grad, forward, cross-entropy, backward,
clipping to norm 1, fused AdamW, and reading the loss back: what ferrotron does in a step. Tokens are random, and do not matter.

    tiny        llama, 6 layers of width 384, 6 heads on 2, MLP 1024, vocabulary 257; 16 rows of 256 tokens a step
    gpt2-124m   GPT-2 small: 12 layers of width 768, 12 heads, vocabulary 50257, tied; 4 rows of 64 tokens a step
    llama-1b    Llama 3.2 1B: 16 layers of width 2048, 32 heads on 8, MLP 8192, vocabulary 128256, tied; 4 rows of 2048 tokens a step

The same as in benches/step.rs; run.py holds the two against each other.

--device cuda runs on the first GPU: attention is scaled_dot_product_attention, by its flash kernels where the format is bf16, eager or
with --compile. Time is the clock's there, up to the loss's arrival, and f32 products are in f32 (no TF32), as ferrotron's are.

--dtype bf16 keeps f32 weights and runs under torch.autocast(bfloat16); f32 computes in f32 throughout.
`tokens_per_s` is of the median step. A step during which other processes took a noticeable part of a core is thrown away
(`steps_disturbed`); if fewer than three calm ones remain, all are used, and `steps_calm` says so. `tokens_per_s_free` is tokens over
the processor time that the median step took, times the threads: the rate if nothing else ran. With several threads PyTorch's wait in
a loop for each other, which that counts as work: it is then less than what a free machine gives.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

MODELS = {
    "tiny": dict(kind="llama", layers=6, width=384, heads=6, kv_heads=2, hidden=1024, vocabulary=257, positions=256, rows=16, time=256),
    "gpt2-124m": dict(kind="gpt2", layers=12, width=768, heads=12, kv_heads=12, hidden=3072, vocabulary=50257, positions=1024, rows=4,
                      time=64),
    "llama-1b": dict(kind="llama", layers=16, width=2048, heads=32, kv_heads=8, hidden=8192, vocabulary=128256, positions=2048, rows=4,
                     time=2048, tied=True),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every model in f32 and bf16, one process each")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compile", action="store_true", help="torch.compile; needs a C++ compiler")
    parser.add_argument("--rows", type=int, help="sequences a step")
    parser.add_argument("--time", type=int, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=12, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts")
    parser.add_argument("--seconds", type=float, default=120, help="stop timing after that long")
    return parser.parse_args()


OPTIONS = arguments()
if OPTIONS.all:
    rest = [a for a in sys.argv[1:] if a != "--all"]
    for model in MODELS:
        for dtype in ("f32", "bf16") if model != "llama-1b" or OPTIONS.device == "cuda" else ():
            subprocess.run([sys.executable, __file__, *rest, "--model", model, "--dtype", dtype], check=True)
    sys.exit()
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(OPTIONS.threads)  # read when torch is loaded

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402


class Attention(nn.Module):
    def __init__(self, m):
        super().__init__()
        bias, self.heads, self.kv_heads, self.head = m["kind"] == "gpt2", m["heads"], m["kv_heads"], m["width"] // m["heads"]
        self.parts = [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]
        self.qkv = nn.Linear(m["width"], sum(self.parts), bias=bias)
        self.out = nn.Linear(m["width"], m["width"], bias=bias)

    def forward(self, x, rotary):
        q, k, v = (part.unflatten(-1, (-1, self.head)).transpose(1, 2) for part in self.qkv(x).split(self.parts, -1))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv_heads < self.heads)
        return self.out(y.transpose(1, 2).flatten(2))


def rotate(x, cosine, sine):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cosine - b * sine, b * cosine + a * sine), -1)


class Mlp(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.gated = m["kind"] == "llama"
        self.up = nn.Linear(m["width"], m["hidden"] * (2 if self.gated else 1), bias=not self.gated)
        self.down = nn.Linear(m["hidden"], m["width"], bias=not self.gated)

    def forward(self, x):
        if self.gated:
            gate, up = self.up(x).chunk(2, -1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, m):
        super().__init__()
        norm = (lambda: nn.RMSNorm(m["width"], eps=1e-5)) if m["kind"] == "llama" else (lambda: nn.LayerNorm(m["width"]))
        self.tokens = nn.Embedding(m["vocabulary"], m["width"])
        self.positions = nn.Embedding(m["positions"], m["width"]) if m["kind"] == "gpt2" else None
        self.layers = nn.ModuleList(nn.ModuleList((norm(), Attention(m), norm(), Mlp(m))) for _ in range(m["layers"]))
        self.norm, self.head = norm(), nn.Linear(m["width"], m["vocabulary"], bias=False)
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                nn.init.normal_(part.weight, std=0.02)
        if m["kind"] == "gpt2" or m.get("tied"):
            self.head.weight = self.tokens.weight
        half = m["width"] // m["heads"] // 2
        angles = torch.outer(torch.arange(float(m["positions"])), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, inputs, targets):
        time = inputs.shape[1]
        x, rotary = self.tokens(inputs), (self.cosine[:time], self.sine[:time])
        if self.positions is not None:
            x, rotary = x + self.positions.weight[:time], None
        for norm_a, attention, norm_b, mlp in self.layers:
            x = x + attention(norm_a(x), rotary)
            x = x + mlp(norm_b(x))
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def others_cpu_seconds():
    """CPU time that this machine has given to anything but this process since it started, as far as the system tells."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def main():
    torch.set_num_threads(OPTIONS.threads)
    m = MODELS[OPTIONS.model]
    rows, length = OPTIONS.rows or m["rows"], OPTIONS.time or m["time"]
    torch.manual_seed(0)
    gpu = OPTIONS.device == "cuda"
    if gpu:
        torch.backends.cuda.matmul.allow_tf32 = False
    model = Decoder(m | dict(positions=max(m["positions"], length))).to(OPTIONS.device)
    parameters = sum(p.numel() for p in model.parameters())
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if OPTIONS.compile else model

    def step():
        tokens = torch.randint(m["vocabulary"], (rows, length + 1), device=OPTIONS.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(OPTIONS.device, torch.bfloat16, enabled=OPTIONS.dtype == "bf16"):
            loss = run(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if gpu:
            torch.cuda.synchronize()
        return loss.item()

    losses = [step() for _ in range(OPTIONS.warmup)]
    calm, disturbed, processor, begin = [], [], [], time.perf_counter()
    while len(calm) < OPTIONS.steps and time.perf_counter() - begin < OPTIONS.seconds:
        others, start, processor_start = others_cpu_seconds(), time.perf_counter(), time.process_time()
        losses.append(step())
        took = time.perf_counter() - start
        processor.append(time.process_time() - processor_start)
        share = (others_cpu_seconds() - others) / took
        (calm if gpu or share < 0.08 + 0.02 / took else disturbed).append(took)  # the system's counters have steps of 10 ms
    times = calm if len(calm) >= 3 else calm + disturbed
    tokens, processor_s = rows * length, statistics.median(times if gpu else processor)
    threads = 1 if gpu else OPTIONS.threads
    memory = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(dict(
        peer="torch", version=torch.__version__, device=OPTIONS.device, model=OPTIONS.model, dtype=OPTIONS.dtype, compiled=OPTIONS.compile,
        threads=OPTIONS.threads, rows=rows, time=length, parameters=parameters, tokens_per_s=round(tokens / statistics.median(times), 1),
        tokens_per_s_best=round(tokens / min(times), 1), tokens_per_s_free=round(tokens * threads / processor_s, 1),
        processor_s=round(processor_s, 5), step_s=round(statistics.median(times), 5), steps_calm=len(calm),
        steps_disturbed=len(disturbed), memory_peak_bytes=memory,
        loss_first=round(losses[0], 4), loss_last=round(losses[-1], 4))), flush=True)


if __name__ == "__main__":
    main()
