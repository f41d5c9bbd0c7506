"""The loaded base of one run for the next run of the same process, without a trace of the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gft_lite.policy.base import Policy
from gft_lite.recipe.sections import PolicySettings


class KeptBase:
    """Holds at most one base, which a policy takes and returns at its end.

    A base that is not returned, or not as it was loaded, is loaded again.
    """

    def __init__(self) -> None:
        self._base: Any = None  # None also while a policy has it.
        self._inputs: dict[str, Any] = {}
        self._loaded: list[Any] = []

    @property
    def is_empty(self) -> bool:
        """True if no base is kept."""
        return self._base is None

    def fits(self, settings: PolicySettings) -> bool:
        """True if `take` would return the kept base."""
        return self._base is not None and self._inputs == settings.loading_inputs

    def take(self, settings: PolicySettings, load: Callable[[], Any]) -> Any:
        """The kept base if it was loaded with equal settings, else a new one from `load`."""
        base = self._base if self.fits(settings) else None
        self._base = None
        if base is None:
            base = load()
            self._inputs, self._loaded = settings.loading_inputs, _state(base)
        return base

    def put_back(self, policy: Policy) -> bool:
        """Keep the base of a policy that is not used any more, without adapters.

        Returns False for a base that is not kept: it was not taken here, or it has changed, as some
        initialisations of an adapter do it.
        """
        if not self._loaded or self._base is not None:
            return False
        base = policy.model.unload()
        base.gradient_checkpointing_disable()
        base.disable_input_require_grads()
        base.set_attn_implementation(policy.settings.attention)
        base.eval()
        base.zero_grad(set_to_none=True)
        if _state(base) == self._loaded:
            self._base = base
        return self._base is not None

    def drop(self) -> None:
        """Release the base's memory."""
        self._base, self._inputs, self._loaded = None, {}, []


def _state(base: Any) -> list[Any]:
    """What a policy could leave behind: weights, buffers, modules, hooks, configuration."""
    modules = [
        (name, type(module), module.training, *_hooks(module))
        for name, module in base.named_modules()
    ]
    tensors = Counter(
        (name, tensor.dtype, tensor.shape, tensor.device, checksum(tensor))
        for name, tensor in (*base.named_parameters(), *base.named_buffers())
    )
    config = base.config
    return [modules, tensors, config.to_dict(), config._attn_implementation]


def _hooks(module: torch.nn.Module) -> list[int]:
    """The numbers of a module's hooks."""
    kinds = ("forward", "forward_pre", "backward", "backward_pre")
    return [len(getattr(module, f"_{kind}_hooks")) for kind in kinds]


def checksum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor, which any other rounding of a weight changes."""
    data = tensor.detach().flatten().view(torch.uint8)
    if data.numel() % 8 == 0 and data.storage_offset() % 8 == 0:
        data = data.view(torch.int64)
    return int(data.sum())
