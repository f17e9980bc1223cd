"""What Apple's GPUs refuse, for computers without one."""

from __future__ import annotations

import torch


class OnApple(torch.Tensor):
    """A tensor that refuses what one on Apple's GPU refuses."""

    @classmethod
    def __torch_function__(cls, function: object, types: object, arguments: tuple = (), named: dict | None = None) -> object:
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        done = super().__torch_function__(function, types, arguments, named)
        return done.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else done
