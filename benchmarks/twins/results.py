"""The results of twin runs, as figures that the table, the plots and the report share, and as lines of a CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.twins.agreement import TIMES, UNITS, Agreement
from benchmarks.twins.losses import Cost
from benchmarks.twins.memory import Memory
from fastssl.train import Step

MIB, GIB = 2**20, 2**30


class Line(NamedTuple):
    """One figure.

    Attributes:
        part: "run", "loss alone", "sweep" or "by chunks".
    """

    part: str
    method: str
    batch_size: int
    impl: str
    quantity: str
    value: float | str


@dataclass(frozen=True)
class Timing:
    """The cost of training steps: medians in seconds, peaks in bytes, NaN where unknown.

    Steps whose memory was measured are not timed, nor is the first, which allocates the optimiser's state.

    Attributes:
        after: of the teacher and the queue.
    """

    step: float
    loss: float
    after: float
    step_bytes: float
    loss_bytes: float

    @classmethod
    def of(cls, steps: Sequence[Step]) -> Timing:
        timed = [step for step in steps[1:] if step.peak_bytes is None] or steps
        seconds = (median(getattr(step, name) for step in timed) for name in _SECONDS)
        peaks = ([getattr(step, name) for step in steps if getattr(step, name) is not None] for name in _PEAKS)
        return cls(*seconds, *(max(peak, default=math.nan) for peak in peaks))


def step_ratio(history: Mapping[str, Sequence[Step]]) -> float:
    """The median of naive's time over fastssl's in the same step: whatever slows the machine for a while slows both."""
    pairs = list(zip(history["naive"], history["fastssl"], strict=True))
    timed = [pair for pair in pairs[1:] if pair[0].peak_bytes is None] or pairs
    return median(naive.seconds / ours.seconds for naive, ours in timed)


_SECONDS = "seconds", "loss_seconds", "after_seconds"
_PEAKS = "peak_bytes", "loss_peak_bytes"


@dataclass(frozen=True)
class Result:
    """One method, trained both ways.

    Attributes:
        tests: the share that a test found, by test and by encoder: that of either implementation, "random" weights, and
            "supervised", the same encoder trained with labels.
        step_ratio: naive's time over fastssl's.
        masking: seconds of MAE's kernels for masked images, by implementation; empty for other methods.
        costs: of the loss alone, by contestant.
        memory: of the loss on growing batches, by implementation.
        limit: bytes that those might take.
    """

    method: str
    data: str
    batch_size: int
    losses: Mapping[str, list[float]]
    timing: Mapping[str, Timing]
    step_ratio: float
    agreement: Agreement
    tests: Mapping[str, Mapping[str, float]]
    masking: Mapping[str, float]
    costs: Mapping[str, Cost]
    memory: Mapping[str, list[Memory]]
    limit: float

    def kernels(self, impl: str) -> dict[str, float]:
        """Seconds of a step outside the encoder, by what they were spent on."""
        timing = self.timing[impl]
        return {"loss": timing.loss, "masking": self.masking.get(impl, 0.0), "teacher and queue": timing.after}

    def largest(self, impl: str, budget: float) -> int:
        """The largest batch tried whose loss fits; 0 where none does."""
        return max((m.batch_size for m in self.memory[impl] if m.bytes <= budget), default=0)

    def is_largest_tried(self, impl: str, budget: float) -> bool:
        return self.memory[impl][-1].bytes <= budget

    def lines(self) -> Iterator[Line]:
        def line(impl: str, quantity: str, value: float | str, part: str = "run") -> Line:
            return Line(part, self.method, self.batch_size, impl, quantity, value)

        for impl, timing in self.timing.items():
            yield from _timed("run", self.method, self.batch_size, impl, timing)
            if impl in self.masking:
                yield line(impl, "masking seconds", self.masking[impl])
            yield line(impl, "share of step outside the encoder", sum(self.kernels(impl).values()) / timing.step)
            yield line(impl, "first loss", self.losses[impl][0])
            yield line(impl, "last loss", self.losses[impl][-1])
            for quantity, errors in self.agreement.errors.items():
                yield line(impl, f"relative error of {quantity}", errors[impl])
        for quantity, errors in self.agreement.errors.items():
            yield line("", f"tolerance of {quantity}", TIMES * errors["naive"] + UNITS)
        yield line("", "naive step time over fastssl's", self.step_ratio)
        yield line("", "largest difference of the curves, share of the loss", self.agreement.largest)
        yield line("", "largest difference of their running means", self.agreement.drift)
        yield line("", "agrees", "no" if self.agreement.complaints else "yes")
        for test, shares in self.tests.items():
            for who, share in shares.items():
                yield line(who, test, share)
        for contestant, cost in self.costs.items():
            yield line(contestant, "seconds", cost.note or cost.seconds, "loss alone")
            yield line(contestant, "peak bytes", cost.note or cost.bytes, "loss alone")
        for impl, measured in self.memory.items():
            for memory in measured:
                quantity = "peak bytes in a process of its own"
                yield Line("loss alone", self.method, memory.batch_size, impl, quantity, memory.bytes)


@dataclass(frozen=True)
class Point:
    """Both ways at one batch size of a sweep. `step_ratio` is naive's time over fastssl's."""

    method: str
    batch_size: int
    timing: Mapping[str, Timing]
    step_ratio: float

    def lines(self) -> Iterator[Line]:
        for impl, timing in self.timing.items():
            yield from _timed("sweep", self.method, self.batch_size, impl, timing)
        yield Line("sweep", self.method, self.batch_size, "", "naive step time over fastssl's", self.step_ratio)

    @property
    def loss_ratio(self) -> float:
        return self.timing["naive"].loss / self.timing["fastssl"].loss


@dataclass(frozen=True)
class Huge:
    """A batch that is trained on in chunks.

    Attributes:
        command: of each implementation.
        memory: of a step.
        limit: bytes that it was allowed to take.
    """

    method: str
    command: Mapping[str, str]
    memory: Mapping[str, Memory]
    limit: float

    def lines(self) -> Iterator[Line]:
        for impl, memory in self.memory.items():
            yield Line("by chunks", self.method, memory.batch_size, impl, "peak bytes of a step", memory.bytes)


@dataclass
class Results:
    """All of a run.

    Attributes:
        machine: its description.
        other_processes_cores: the most that other processes kept busy while a method was trained.
        failures: why there is no result, by the name of what failed.
        budget: bytes.
    """

    command: str
    machine: Mapping[str, Any]
    steps: int
    seed: int
    budget: float
    methods: list[Result] = field(default_factory=list)
    sweep: list[Point] = field(default_factory=list)
    huge: list[Huge] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    other_processes_cores: float = 0.0

    @property
    def complaints(self) -> list[str]:
        """One line for everything that failed or disagreed."""
        disagreed = [f"{r.method} disagrees: {line}" for r in self.methods for line in r.agreement.complaints]
        return disagreed + [f"{name} failed: {why}" for name, why in self.failures.items()]


class Writer:
    """A CSV that grows line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._append("w", [Line._fields])

    def add(self, found: Result | Point | Huge) -> None:
        self._append("a", found.lines())

    def _append(self, mode: str, lines: Iterable[Sequence[Any]]) -> None:
        with open(self.path, mode, newline="") as file:
            csv.writer(file).writerows(lines)


def _timed(part: str, method: str, batch_size: int, impl: str, timing: Timing) -> Iterator[Line]:
    names = {
        "step": "step seconds", "loss": "loss seconds", "after": "teacher and queue seconds",
        "step_bytes": "peak bytes of a step", "loss_bytes": "peak bytes of its loss",
    }  # fmt: skip
    for name, quantity in names.items():
        yield Line(part, method, batch_size, impl, quantity, getattr(timing, name))
