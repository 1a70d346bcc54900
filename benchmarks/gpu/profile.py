"""One step of an operation: the time of each of its kernels; or bare, for a profiler around this process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ops import machine, registry

_WARM_UP = 3


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op")
    parser.add_argument("size", type=lambda text: tuple(map(int, text.split("x"))))
    parser.add_argument("mode", choices=registry.MODES)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--bare", action="store_true", help="CUDA's profiler on for the step alone")
    arguments = parser.parse_args(argv)
    machine.require(arguments.device)
    benchmark, mode = registry.load()[arguments.op], registry.MODES[arguments.mode]
    contestant = benchmark.contestants(arguments.size, arguments.mode, ())["fastssl"]
    torch.set_float32_matmul_precision(contestant.precision)
    function, inputs = contestant.make(), benchmark.inputs_on(arguments.device, arguments.size, mode.dtype)
    for _ in range(_WARM_UP):
        benchmark.step(function, inputs)
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    if arguments.bare:
        if on_gpu:
            torch.cuda.cudart().cudaProfilerStart()
        benchmark.step(function, inputs)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        return 0
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        benchmark.step(function, inputs)
        if on_gpu:
            torch.cuda.synchronize()
    averages = [(x, x.self_device_time_total if on_gpu else x.self_cpu_time_total) for x in profiler.key_averages()]
    averages = sorted((pair for pair in averages if pair[1] > 0), key=lambda pair: -pair[1])
    total = sum(seconds for _, seconds in averages)
    print(f"{arguments.op} {arguments.size} {arguments.mode}: {total / 1e3:.3f} ms")
    lines = []
    for average, microseconds in averages[:15]:
        print(f"{microseconds / 1e3:9.3f} ms {microseconds / total:6.1%} {average.count:5d} x {average.key[:90]}")
        what = {"kind": "kernel", "op": arguments.op, "size": "x".join(map(str, arguments.size)), "kernel": average.key}
        lines.append(what | {"calls": average.count, "milliseconds": microseconds / 1e3, "share": microseconds / total})
    if arguments.results:
        arguments.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
