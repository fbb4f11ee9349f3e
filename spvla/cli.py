"""Shared command-line behaviour of ``python -m data | train | eval`` and ``spvla.serve``: jsonargparse over functions.

Every command takes ``--config file.yaml`` and ``--help``; list options take ``--tasks 0 1 2`` as well as YAML, and a bare
``--shadow`` says ``--shadow true``. Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130, and nothing
that was finished is lost.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_origin, get_type_hints

from spvla.errors import InputError
from spvla.machine import machine_fault

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    NonNegativeFloat: TypeAlias = float
    PositiveFloat: TypeAlias = float
    OpenUnitInterval: TypeAlias = float
else:  # annotations of commands: other numbers are refused when the command line is parsed
    from jsonargparse.typing import NonNegativeFloat as NonNegativeFloat
    from jsonargparse.typing import NonNegativeInt as NonNegativeInt
    from jsonargparse.typing import OpenUnitInterval as OpenUnitInterval
    from jsonargparse.typing import PositiveFloat as PositiveFloat
    from jsonargparse.typing import PositiveInt as PositiveInt


def _is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list or any(get_origin(a) is list for a in get_args(annotation))


def join_list_options(arguments: list[str], names: set[str]) -> list[str]:
    """``--tasks 0 1 2`` as ``--tasks=[0,1,2]`` for the options in ``names``; everything else as it is."""
    out: list[str] = []
    i = 0
    while i < len(arguments):
        option, i = arguments[i], i + 1
        if option.removeprefix("--") not in names or not option.startswith("--"):
            out.append(option)
            continue
        values: list[str] = []
        while i < len(arguments) and not arguments[i].startswith("--"):
            values.append(arguments[i])
            i += 1
        single_list = len(values) == 1 and values[0].startswith("[")
        out.append(f"{option}={values[0] if single_list else '[' + ','.join(values) + ']'}")
    return out


def spell_out_flags(arguments: list[str], names: set[str]) -> list[str]:
    """A bare ``--shadow`` as ``--shadow=true`` for the options in ``names``; everything else as it is."""
    out: list[str] = []
    for option, value in zip(arguments, [*arguments[1:], "--"], strict=True):
        bare = option.startswith("--") and option.removeprefix("--") in names and value.startswith("--")
        out.append(f"{option}=true" if bare else option)
    return out


FORMER_NAMES = {"policy": "vla", "policy_options": "vla_options", "scheduler": "gate"}


def rename_former_options(arguments: list[str], names: set[str]) -> list[str]:
    """Options that once had another name, as one of today's ``names``, with a warning; everything else as it is."""
    out: list[str] = []
    for argument in arguments:
        match = re.fullmatch(r"--(\w+)((?:[.=].*)?)", argument, re.DOTALL)
        former = match[1] if match else ""
        now = FORMER_NAMES.get(former, "")
        if match and now in names and former not in names:
            print(f"warning: --{former} is now --{now}", file=sys.stderr)
            argument = f"--{now}{match[2]}"
        out.append(argument)
    return out


def run(
    commands: Mapping[str, Callable[..., Any]] | Callable[..., Any],
    description: str,
    arguments: list[str] | None = None,
    prog: str | None = None,
) -> int:
    """Parse ``arguments`` (default: the process's), call the command and return the exit code.

    Args:
        commands: functions by the name that is the first argument, or the only one.
        description: for ``--help``.
        arguments: without the program's name.
        prog: the program's name in ``--help``; None: how Python was called.
    """
    from jsonargparse import auto_cli

    arguments = sys.argv[1:] if arguments is None else arguments
    command = commands if not isinstance(commands, Mapping) else commands.get(arguments[0]) if arguments else None
    if command is not None:
        hints = get_type_hints(command)
        arguments = rename_former_options(arguments, set(hints))
        arguments = join_list_options(arguments, {name for name, hint in hints.items() if _is_list(hint)})
        arguments = spell_out_flags(arguments, {name for name, hint in hints.items() if hint is bool})
    parts: Any = dict(commands) if isinstance(commands, Mapping) else commands
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if prog is None and spec is not None:
        prog = f"python -m {spec.name.removesuffix('.__main__')}"
    return guard(lambda: auto_cli(parts, args=arguments, as_positional=False, description=description, prog=prog))


def guard(call: Callable[[], Any]) -> int:
    """Run ``call``; bad input becomes one line and exit code 2, Ctrl-C exit code 130."""
    try:
        call()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; collecting, converting, distilling and closed loops continue when called again", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the output has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        fault = machine_fault(error)
        if fault is None:
            raise
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0
