"""timm's ModelEmaV3, under its name: `fastssl.patch("timm")` puts it in the place of timm's; and its PatchEmbed, which
`fastssl.patch` leaves alone: it gains something only where it is told which patches are visible."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastssl._checks import check_flag, check_positive_number, check_share, check_size
from fastssl.nn import EMA, PatchEmbed

__all__ = ["ModelEmaV3", "PatchEmbed"]


class ModelEmaV3(EMA):
    """timm's moving average of a model, with its arguments, and its state_dict. Every update is one pass over memory.

    16-bit parameters and buffers are kept in float32, as in `EMA`, where timm rounds them at random.

    Args:
        model, decay: as of `EMA`.
        min_decay: the least decay during the warm-up.
        update_after_step: updates up to this one are copies.
        use_warmup: let the decay be min(decay, 1 - (1 + k / warmup_gamma)^-warmup_power) for update
            k = step - update_after_step - 1; where `update` is given no step, it is decay.
        warmup_gamma, warmup_power: of the warm-up.
        device: where the moving average is; None: where the model is.
        dtype: what the model is converted to; None: its own.
        stochastic_rounding, stochastic_rounding_seed, foreach: without effect.
        exclude_buffers: copy all buffers, and average none.

    Raises:
        TypeError, ValueError: as `EMA`, or if another argument is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
    ) -> None:
        if dtype is not None and isinstance(model, nn.Module):
            model = copy.deepcopy(model).to(dtype)
        super().__init__(model, decay=decay)
        self._non_persistent_buffers_set.add("step")  # timm saves none
        self.min_decay = check_share("min_decay", min_decay)
        self.update_after_step = check_size("update_after_step", update_after_step)
        self.use_warmup = check_flag("use_warmup", use_warmup)
        self.warmup_gamma = check_positive_number("warmup_gamma", warmup_gamma)
        self.warmup_power = check_positive_number("warmup_power", warmup_power)
        self.device, self.dtype = device, dtype
        self.exclude_buffers = check_flag("exclude_buffers", exclude_buffers)
        if device is not None:
            self.module.to(device)

    def get_decay(self, step: int | None = None) -> float:
        """The decay of the update after that many steps of the student."""
        if step is None:
            return self.decay
        since = step - self.update_after_step - 1
        if since <= 0:
            return 0.0
        if not self.use_warmup:
            return self.decay
        return max(min(1 - (1 + since / self.warmup_gamma) ** -self.warmup_power, self.decay), self.min_decay)

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Make the moving average a copy of the model."""
        averaged, copied = self._pairs(model)
        for target, source in averaged + copied:
            target.copy_(source)

    def _pairs(self, model: nn.Module) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        averaged, copied = super()._pairs(model)
        if self.exclude_buffers:
            buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))
            parameters = {id(x) for x in self.module.parameters()}
            averaged, copied = [pair for pair in averaged if id(pair[0]) in parameters], buffers
        return [(target, source.to(target.device)) for target, source in averaged], copied

    def _momentum_now(self, step: int | None) -> float:
        return self.get_decay(step)

    def extra_repr(self) -> str:
        return f"decay={self.decay}, use_warmup={self.use_warmup}"


VERSIONS = "1.0.20", "1.1"
REPLACES = {"timm.utils.model_ema.ModelEmaV3": ModelEmaV3}
