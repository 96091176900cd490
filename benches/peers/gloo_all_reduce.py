#!/usr/bin/env python3
"""Times gloo, PyTorch's collectives for the CPU: an all-reduce of f32 between processes of this machine. One JSON line.

    python benches/peers/gloo_all_reduce.py --ranks 4 --mebibytes 64

Compare with `cargo bench --bench collectives` in the same minutes: both print the median of rounds.
"""
import argparse
import json
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def rank_main(rank: int, ranks: int, elements: int, rounds: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    x = torch.ones(elements)
    seconds = []
    for _ in range(rounds + 2):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_reduce(x)
        seconds.append(time.perf_counter() - begin)
        x.fill_(1.0)
    if rank == 0:
        median = statistics.median(seconds[2:])
        print(json.dumps(dict(peer="gloo", ranks=ranks, bytes=4 * elements, median_ms=1e3 * median, torch=torch.__version__)))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--port", type=int, default=29617)
    options = parser.parse_args()
    elements = options.mebibytes * 2**20 // 4
    mp.spawn(rank_main, args=(options.ranks, elements, options.rounds, options.port), nprocs=options.ranks)


if __name__ == "__main__":
    main()
