# SPDX-License-Identifier: MIT
"""Loading an optimizer's state with every bit of it.

`load_state_dict` gives each tensor the dtype of its parameter, also one that the optimizer keeps in another: NAdam's
`mu_product` is float32 whatever the parameter is. Cast to 16 bits, or stepped on in 64, it has other bits than in a run
that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["load_optimizer"]


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `state_dict` gave into an optimizer, on its parameters' devices and in the dtypes that were saved.

    Raises:
        ValueError, KeyError, TypeError: as `load_state_dict`; it does not fit the optimizer's param groups.
    """
    import torch

    options = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for own, group in zip(options, optimizer.param_groups, strict=True):
        if own - set(group):
            raise ValueError(f"it has no option {min(own - set(group))!r}; is it another optimizer's?")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        loaded = optimizer.state.get(parameter, {})
        for name, value in saved["state"].get(number, {}).items():
            if isinstance(value, torch.Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.detach().to(loaded[name].device, copy=True)
