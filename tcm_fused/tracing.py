"""How functions meet torch.compile, without importing the compiler."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_compiled(function: F) -> F:
    """torch.compile calls `function` once, when it traces, and does not look inside.

    As `torch.compiler.assume_constant_result`, which imports the compiler first: a second, and Triton.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


def eager_when_compiled(reason: str) -> Callable[[F], F]:
    """torch.compile runs the function as it is, between two graphs; with fullgraph=True it raises, and says why.

    As `torch.compiler.disable`, which imports the compiler first.
    """

    def decorate(function: F) -> F:
        @wraps(function)
        def eager(*arguments: Any, **keywords: Any) -> Any:
            if "torch._dynamo" in sys.modules:  # else nothing is compiled
                return torch.compiler.disable(function, reason=reason)(*arguments, **keywords)
            return function(*arguments, **keywords)

        # The compiler looks for these on a function. By name, since types know no attributes of functions.
        vars(eager).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
        return cast(F, eager)

    return decorate
