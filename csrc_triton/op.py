"""An operation that torch knows by name, and the short way to it.

What torch.library registers goes through the dispatcher several times a call, which costs the host more than a small
kernel takes. Eager calls on plain tensors go straight to the same forward and backward by an autograd.Function; under
torch.compile, fake tensors, dispatch modes and functorch, and for tensor subclasses, the registered operation is called.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)


class Op:
    """`Op("name", forward)`: forward is annotated as torch.library.custom_op wants it, and mutates nothing."""

    def __init__(self, name: str, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.registered = torch.library.custom_op(f"csrc_triton::{name}", forward, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._function: type[torch.autograd.Function] | None = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """The one gradient of both ways, as torch.library has it: backward(ctx, *grads), setup_context(ctx, inputs, output)."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:  # with ctx: without it every call binds its arguments to a signature
            output = self._undifferentiated(args)
            setup_context(ctx, args, output)
            return output

        body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function = type(self.forward.__name__, (torch.autograd.Function,), body)

    def _undifferentiated(self, args: Sequence[Any]) -> Any:
        """The forward, whose own operations nobody differentiates: they go past autograd, as the registered one's do."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.forward(*args)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not _eager(args):
            return self.registered(*args)
        if not (torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args)):
            return self._undifferentiated(args)
        # Without a gradient of its own: the registered operation says so when one is asked for.
        return self.registered(*args) if self._function is None else self._function.apply(*args)


def op(name: str) -> Callable[[Callable[..., Any]], Op]:
    """The decorator that makes an Op of its forward."""
    return lambda forward: Op(name, forward)


def _eager(args: Sequence[Any]) -> bool:
    """Whether nothing watches or rewrites operations, and all tensors are plain ones."""
    return (
        not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(x) in PLAIN for x in args if isinstance(x, torch.Tensor))
    )
