"""A GPU that is only pretended: its tensors lie on the CPU, say they do not, and are refused beside others.

So it is seen on any computer what a GPU would not find where it is, and what a CPU would wait for; not how fast it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from spectral_diffusion.bases import base as bases

GPU = torch.device("cuda:0")
WAITS: Counter[str] = Counter()
"""How often the CPU had to wait for the GPU, by what it asked for."""
_GIGABYTE = 2**30
_ops = torch.ops.aten
_MIXES = {_ops.copy_.default, _ops.index.Tensor, _ops.index_put_.default, _ops._index_put_impl_.default}
"""What takes tensors of both places: numbers that choose others may lie on the CPU."""
_READS = {_ops._local_scalar_dense.default, _ops.equal.default, _ops.nonzero.default}
_leaving: list[torch.Tensor] = []  # what is on its way to the CPU; to torch itself all of it is there already


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; `there` is where its numbers really are."""

    there: torch.Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, there: torch.Tensor) -> OnGPU:
        shape = {"strides": there.stride(), "storage_offset": there.storage_offset(), "dtype": there.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, there.shape, **shape, device=there.device)
        tensor.there = there
        return tensor

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _done(operation, arguments, named or {})

    def to(self, *arguments: Any, **named: Any) -> torch.Tensor:
        copy = named.pop("copy", False)
        device, dtype, _, layout = torch._C._nn._parse_to(*_as_devices(arguments), **named)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copy, memory_format=layout or torch.preserve_format)
        _leaving.append(self)
        try:
            return _ops._to_copy(self, dtype=dtype, device=device, memory_format=layout)
        finally:
            _leaving.pop()

    def cpu(self, *arguments: Any) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


def _done(operation: Any, arguments: Any, named: dict[str, Any]) -> Any:
    """Return what `operation` gives, on the GPU where a GPU would have it there."""
    tensors = [leaf for leaf in tree_leaves((arguments, named)) if isinstance(leaf, torch.Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGPU)]
    on_cpu = [tensor for tensor in tensors if tensor.dim() and not isinstance(tensor, OnGPU)]
    device = named.get("device")
    if on_gpu and on_cpu and operation not in _MIXES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of {[tuple(t.shape) for t in tensors]}")
    if on_gpu and (operation in _READS or _leaving):
        WAITS[str(operation)] += 1
    if device is not None:
        named = named | {"device": torch.device("cpu")}
    given = operation(*tree_map(_really, arguments), **tree_map(_really, named))
    if _leaving:
        stays = False
    elif operation in _MIXES:
        stays = isinstance(arguments[0], OnGPU)
    else:  # what autograd fills in lies where its numbers come from
        stays = bool(on_gpu) or (device is not None and (device.type == "cuda" or torch._C._current_graph_task_id() != -1))
    if not stays:
        return given
    given = tree_map(lambda leaf: OnGPU(leaf) if isinstance(leaf, torch.Tensor) else leaf, given)
    return return_and_correct_aliasing(operation, arguments, named, given) if on_gpu else given


def _really(leaf: Any) -> Any:
    return leaf.there if isinstance(leaf, OnGPU) else leaf


class _Everywhere(TorchDispatchMode):
    """Sees what has no tensor on the GPU yet and asks for one there."""

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        return _done(operation, arguments, named or {})


def _as_devices(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of `Tensor.to` with a device and a type in the place of another tensor."""
    if arguments and isinstance(arguments[0], torch.Tensor):
        arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
    return tuple(GPU if str(one) == "cuda" else one for one in arguments)


def _to(tensor: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    return torch._C.TensorBase.to(tensor, *_as_devices(arguments), **named)


def _made(make: Callable[..., torch.Tensor], *arguments: Any, device: Any = None, **named: Any) -> torch.Tensor:
    tensor = make(*arguments, **named)
    return tensor if device is None else tensor.to(device)


_data = torch._C.TensorBase.data


def _set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Do what setting `tensor.data` does, for which torch asks that both be of one kind."""
    if isinstance(tensor, OnGPU) == isinstance(value, OnGPU):
        _data.__set__(tensor, value)
        if isinstance(value, OnGPU):
            tensor.there = value.there
    else:
        value = value.detach()
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, value)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention without the kernels that look for a GPU."""
    weights = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        weights = weights.masked_fill(torch.ones(weights.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -torch.inf)
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
    return weights.softmax(-1) @ value


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *arguments: Any, **named: Any):
        super().__init__("cpu", *arguments, **named)


@contextmanager
def pretended_gpu(base: bases.Base) -> Iterator[None]:
    """While entered, there is one GPU, and `load_base` loads `base`, which was read before."""
    functions = {
        torch.cuda: {
            "_lazy_init": lambda: None, "is_available": lambda: True, "empty_cache": lambda: None, "synchronize": lambda: None,
            "mem_get_info": lambda device=None: (20 * _GIGABYTE, 24 * _GIGABYTE),
            "memory_allocated": lambda device=None: _GIGABYTE, "max_memory_allocated": lambda device=None: 2 * _GIGABYTE,
            "memory_reserved": lambda device=None: _GIGABYTE,
            "reset_peak_memory_stats": lambda device=None: None, "get_per_process_memory_fraction": lambda device=None: 1.0,
        },
        torch: {
            "Generator": lambda device=None, make=torch.Generator: make(),
            "tensor": partial(_made, torch.tensor), "as_tensor": partial(_made, torch.as_tensor), "autocast": _Autocast,
        },
        torch.Tensor: {"data": property(_data.__get__, _set_data), "to": _to, "pin_memory": lambda tensor: tensor},
        torch.nn.functional: {"scaled_dot_product_attention": _attention},
        torch.optim.Optimizer: {"_accelerator_graph_capture_health_check": lambda optimizer: None},
        bases: {"read_base": lambda *arguments, **named: base},
    }  # fmt: skip
    with ExitStack() as stack:
        for place, fakes in functions.items():
            for name, fake in fakes.items():
                stack.enter_context(mock.patch.object(place, name, fake, create=True))
        stack.enter_context(_Everywhere())
        yield
