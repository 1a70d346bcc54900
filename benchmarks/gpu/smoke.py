"""One call of every operation against float64, in every precision, with NaN in all memory that is not yet written.

What a kernel does to the GPU must not hide what the next one does: the calls run in a worker, and where that dies,
hangs or loses the GPU, another one goes on after the call that it ended with. Most of the time goes to compiling, which
several of them do at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.ops import machine
from fastssl.reference import OPS, OpSpec, Sample
from tests.accuracy import (
    assert_as_accurate_as_eager,
    evaluate,
    natural_sizes,
    public,
    relative_error,
    tensors_of,
    truth_and_eager,
    unreduced,
    values,
    weighted_error,
)

Case = tuple[str, str]  # operation, precision
PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SECONDS = 60.0


def cases(names: list[str] | None = None) -> list[Case]:
    """float32 first: it tells formulas from rounding."""
    found = [(name, precision) for precision, dtype in PRECISIONS.items() for name, spec in OPS.items()
             if dtype in spec.dtypes and (precision != "tf32" or spec.multiplies)]  # fmt: skip
    return [case for case in found if not names or case[0] in names]


def sample_of(spec: OpSpec, dtype: torch.dtype, device: str, tiny: bool = False) -> Sample:
    """The largest; or the smallest that has elements."""
    sized = [(sum(x.numel() for x in tensors_of(sample)), sample) for sample in spec.samples(dtype, device)]
    choose = min if tiny else max
    return choose((pair for pair in sized if pair[0] or len(sized) == 1), key=lambda pair: pair[0], default=sized[0])[1]


def check(case: Case, device: str, tiny: bool = False) -> dict[str, Any]:
    """What to report of one call: its relative error, and a note where it is wrong or raises."""
    name, precision = case
    spec, dtype = OPS[name], PRECISIONS[precision]
    result = {"kind": "smoke", "op": name, "precision": precision, "sample": "", "error": 0.0, "note": ""}
    before = torch.get_float32_matmul_precision()
    try:
        on_cpu = unreduced(spec, sample_of(spec, dtype, "cpu", tiny))
        result["sample"] = on_cpu.label
        truth, eager = truth_and_eager(spec, on_cpu)
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.use_deterministic_algorithms(True)  # which also fills new tensors with NaN
        found = evaluate(public(spec), unreduced(spec, sample_of(spec, dtype, device, tiny)))
        if spec.check is None:
            floating = [(x, y) for x, y in zip(found, truth, strict=True) if y.is_floating_point() and y.any()]
            result["error"] = max((relative_error(x, y) for x, y in floating if y.isfinite().all()), default=0.0)
        if precision == "tf32" and spec.check is None:
            _assert_near(spec, on_cpu, found, truth)
        else:
            assert_as_accurate_as_eager(spec, on_cpu, found, (truth, eager))
    except Exception as error:
        result["note"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision(before)
    return result


def _assert_near(spec: OpSpec, sample: Sample, found: tuple, truth: tuple) -> None:
    """Within bfloat16's rounding of what is summed up, of which TF32's is an eighth."""
    sizes = natural_sizes(spec, sample, truth)
    for i, (x, y, (weight, size)) in enumerate(zip(found, truth, sizes, strict=True)):
        error, bound = weighted_error(x, y, weight), torch.finfo(torch.bfloat16).eps * size
        assert error <= bound, f"{'value' if i < len(values(truth, sample)) else 'gradient'}: {error:.3g} > {bound:.3g}"


def _work(todo: list[Case], device: str, tiny: bool, results: Connection) -> None:
    for case in todo:
        result = check(case, device, tiny)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception as error:
                result["note"] = result["note"] or f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                result["lost"] = True  # the GPU, to this process
        results.send(result)
        if result.get("lost"):
            return


def run(
    todo: list[Case],
    device: str,
    tiny: bool,
    results: Path,
    work: Callable[..., None] = _work,
    seconds: float = _SECONDS,
    method: str = "spawn",
) -> int:
    """Appends a line for every case to `results`; returns how many failed."""
    context, failed = multiprocessing.get_context(method), 0
    while todo:
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(todo, device, tiny, sender))
        worker.start()
        sender.close()  # that of the worker is the last
        alive = True
        while todo and alive:
            result, alive = _next(receiver, worker, seconds), True
            if isinstance(result, str):
                name, precision = todo[0]
                result = {
                    "kind": "smoke",
                    "op": name,
                    "precision": precision,
                    "sample": "",
                    "error": 0.0,
                    "note": result,
                }
                alive = False
            todo, alive = todo[1:], alive and not result.get("lost")
            failed += bool(result["note"])
            with results.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(
                f"{result['op']:30} {result['precision']:9} {result['error']:.1e} {result['note'] or 'right'}",
                flush=True,
            )
        worker.kill()
        worker.join(10)  # or as long as the GPU's driver holds it
    return failed


def _next(receiver: Connection, worker: Any, seconds: float) -> dict[str, Any] | str:
    """The worker's next result, or what became of it."""
    if not receiver.poll(seconds):
        return f"hangs: nothing for {seconds:.0f} s"
    try:
        return receiver.recv()
    except EOFError:
        worker.join()
        return f"ended its process with {worker.exitcode}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help="all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tiny", action="store_true", help="the smallest inputs, for tools that slow everything down")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="that share out the calls")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="of a call, its compilation included")
    arguments = parser.parse_args(argv)
    machine.require(arguments.device)
    todo = cases(arguments.op)
    arguments.results.write_text(json.dumps({"kind": "calls", "number": len(todo)}) + "\n")
    with ThreadPoolExecutor(arguments.workers) as pool:
        shares = [todo[n :: arguments.workers] for n in range(arguments.workers)]
        settings = {"device": arguments.device, "tiny": arguments.tiny, "seconds": arguments.seconds}
        failed = sum(pool.map(lambda share: run(share, results=arguments.results, **settings), shares))
    print(f"{len(todo) - failed} of {len(todo)} calls are right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
