"""Runs and checkpoints: which part of a run is saved, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from fastssl.train import checkpoint, fsdp, parallel
from fastssl.train.checkpoint import check_tensors
from fastssl.train.data.loader import tensors_of
from fastssl.train.evaluate import Health
from fastssl.train.learner import Learner
from fastssl.train.optimizers import state_like
from fastssl.train.run import Run
from fastssl.train.step import Step

T = TypeVar("T")
_PARTS = ("weights", "optimizers", "scalers", "history")


def describe(run: Run, learners: Sequence[Learner], data: Any) -> dict[str, Any]:
    """What decides a run's losses, besides the data's values: a checkpoint fits only a run with the same."""
    example = [tuple(x.shape[1:]) for x in tensors_of(data)]
    methods = {
        learner.name: {"class": type(learner.method).__name__, "impl": learner.method.impl, **learner.method.options}
        for learner in learners
    }
    return _plain({
        "methods": methods, "examples": len(data), "example": example, "batch_size": run.batch_size, "steps": run.steps,
        "optimizer": run.optimizer, "clip": run.clip,
        "learning_rate": {learner.name: learner.rate.peak for learner in learners},
        "weight_decay": {learner.name: learner.decay.first for learner in learners},
        "final_weight_decay": {learner.name: learner.decay.last for learner in learners},
        "layer_decay": run.layer_decay, "amp": run.amp, "chunk_size": run.chunk_size, "seed": run.seed,
    })  # fmt: skip


def _plain(value: Any) -> Any:
    """What torch.load takes from a file that nobody vouches for: numpy's numbers as Python's, other objects as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else repr(value)


def save(path: Path, about: dict[str, Any], learners: Sequence[Learner]) -> None:
    """Saves a run that `describe` has described, as it is between two steps. All processes must call this; the first
    one writes."""
    state = {
        "run": about,
        "weights": {learner.name: fsdp.whole(learner.method.state_dict()) for learner in learners},
        "optimizers": {learner.name: fsdp.whole(_states(learner)) for learner in learners},
        "scalers": {learner.name: learner.scaler.state_dict() for learner in learners},
        "history": {learner.name: [asdict(step) for step in learner.history] for learner in learners},
    }
    parallel.in_first_process(lambda: checkpoint.save(parallel.on_cpu(state), path))


def _states(learner: Learner) -> dict[str, dict[str, Tensor]]:
    """What the optimiser keeps, by the parameters' names: their order differs where some are shared out."""
    states = learner.optimizer.state
    return {name: states[p] for name, p in learner.method.named_parameters() if p in states}


def restore(path: Path, about: dict[str, Any], learners: Sequence[Learner]) -> None:
    """Puts back what `save` saved. All of it is looked at before any of it is used.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or not of this run; no method has changed then.
    """
    state = parallel.in_first_process(lambda: checkpoint.load(path))
    names = [learner.name for learner in learners]
    _check_dict(state, ["run", *_PARTS], f"{path} is no checkpoint of a training run: it")
    _check_dict(state["run"], about, f"{path} is no checkpoint of a training run: run")
    for field, value in about.items():
        if not _equal(saved := state["run"][field], value):
            raise ValueError(f"{path} is of a run with {field} {saved}, got {value}")
    for field in _PARTS:
        _check_dict(state[field], names, f"{path} is damaged: {field}")
    histories = {}
    for learner in learners:
        name, states, history = (learner.name, *(state[field][learner.name] for field in ("optimizers", "history")))
        check_tensors(state["weights"][name], learner.method.state_dict(), f"{path} does not fit {name}: weights")
        if not isinstance(history, list) or not 1 <= len(history) <= learner.run.steps:
            raise ValueError(f"{path} does not fit {name}: history must be a list of 1 to {learner.run.steps} steps")
        scaler = state["scalers"][name]
        _check_dict(scaler, learner.scaler.state_dict(), f"{path} does not fit {name}: scalers")
        if not all(type(number) in (int, float) and number >= 0 for number in scaler.values()):
            raise ValueError(f"{path} does not fit {name}: scalers must be numbers that are not negative, got {scaler}")
        histories[name] = [
            _record(Step, step, f"{path} does not fit {name}: history, step {i}") for i, step in enumerate(history)
        ]
        parameters = {key: p for key, p in learner.method.named_parameters() if p.requires_grad}
        if not isinstance(states, dict) or not states or not states.keys() <= parameters.keys():
            raise ValueError(f"{path} does not fit {name}: optimizers must have states of the method's parameters")
        for key, kept in states.items():
            like = state_like(learner.optimizer, parameters[key])
            check_tensors(kept, like, f"{path} does not fit {name}: optimizers, {key}")
    if len({len(history) for history in histories.values()}) > 1:
        raise ValueError(f"{path} is damaged: history must have as many steps of each method")
    for learner in learners:
        weights, states = state["weights"][learner.name], state["optimizers"][learner.name]
        kept = learner.method.state_dict()
        learner.method.load_state_dict({key: fsdp.as_share_of(x, kept[key]) for key, x in weights.items()})
        names = {p: key for key, p in learner.method.named_parameters()}
        order = [p for group in learner.optimizer.param_groups for p in group["params"]]
        placed = {
            place: {what: _kept_of(p, x) for what, x in states[names[p]].items()}
            for place, p in enumerate(order)
            if names[p] in states
        }
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": placed, "param_groups": groups})
        if learner.scaler.is_enabled():
            learner.scaler.load_state_dict(state["scalers"][learner.name])
        learner.history[:] = histories[learner.name]


def _kept_of(parameter: Tensor, x: Tensor) -> Tensor:
    """What an optimiser keeps of a parameter, shared out and laid out in memory as this is: PyTorch's fused optimisers
    go through both in the order of memory, and checkpoints move between runs with channels last and without."""
    x = fsdp.as_share_of(x, parameter)
    return torch.empty_like(parameter).copy_(x) if x.dim() > 0 and x.shape == parameter.shape else x


def _check_dict(value: Any, names: Any, what: str) -> None:
    if not isinstance(value, dict) or value.keys() != set(names):
        found = list(value) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{what} must be a dict of {', '.join(map(str, names))}, got {found}")


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except RuntimeError:  # of a tensor with several numbers
        return False


def _record(kind: type[T], saved: Any, what: str) -> T:
    """The dataclass that `asdict` has made a dict of."""
    hints = get_type_hints(kind)
    _check_dict(saved, hints, what)
    values = {}
    for name, hint in hints.items():
        value = saved[name]
        if hint == Health | None and value is not None:
            value = _record(Health, value, f"{what}, {name}")
        if not isinstance(value, hint):
            raise ValueError(f"{what}, {name} must be {getattr(hint, '__name__', hint)}, got {value!r}")
        values[name] = value
    return kind(**values)
