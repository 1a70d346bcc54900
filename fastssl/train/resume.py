"""Runs and checkpoints: which part of a run is saved, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastssl.train import checkpoint, parallel
from fastssl.train.evaluate import Health
from fastssl.train.learner import Learner
from fastssl.train.run import Run
from fastssl.train.step import Step


def describe(run: Run, learners: Sequence[Learner], examples: int) -> dict[str, Any]:
    """What decides a run's losses, besides the data: a checkpoint fits only a run with the same values."""
    methods = {
        learner.name: {"class": type(learner.method).__name__, "impl": learner.method.impl, **learner.method.options}
        for learner in learners
    }
    return {
        "examples": examples, "batch_size": run.batch_size, "steps": run.steps, "optimizer": run.optimizer,
        "clip": run.clip, "learning_rate": {learner.name: learner.rate for learner in learners},
        "weight_decay": {learner.name: learner.decay for learner in learners}, "layer_decay": run.layer_decay,
        "amp": run.amp, "chunk_size": run.chunk_size, "seed": run.seed, "methods": methods,
    }  # fmt: skip


def save(path: Path, about: dict[str, Any], learners: Sequence[Learner]) -> None:
    """Saves a run that `describe` has described, as it is between two steps."""
    state = {
        "run": about,
        "weights": {learner.name: learner.method.state_dict() for learner in learners},
        "optimizers": {learner.name: learner.optimizer.state_dict() for learner in learners},
        "history": {learner.name: [asdict(step) for step in learner.history] for learner in learners},
    }
    checkpoint.save(state, path)


def restore(path: Path, about: dict[str, Any], learners: Sequence[Learner]) -> None:
    """Puts back what `save` saved."""
    state = parallel.in_first_process(lambda: checkpoint.load(path))
    if not isinstance(state, dict) or state.keys() != {"run", "weights", "optimizers", "history"}:
        raise ValueError(f"{path} is no checkpoint of a training run")
    for name, value in about.items():
        if (saved := state["run"].get(name)) != value:
            raise ValueError(f"{path} is of a run with {name} {saved}, got {value}")
    for learner in learners:
        name = learner.name
        try:
            learner.method.load_state_dict(state["weights"][name])
            learner.optimizer.load_state_dict(state["optimizers"][name])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
        for step in state["history"][name]:
            learner.history.append(Step(**{**step, "health": step["health"] and Health(**step["health"])}))
