"""Command line, `wasi-peft inspect | estimate | profile | plan | prepare | run | merge | export`: parses and calls."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors import SafetensorError

from .comparing import estimate, profile
from .inspecting import inspect
from .making import export_model, merge, prepare, run
from .options import build_parser
from .planning import plan

# what comes of files and sizes that the user names; anything else is a fault of this package
USER_ERRORS = (
    ValueError, OSError, ImportError, SafetensorError, RecursionError, MemoryError, torch.OutOfMemoryError
)  # fmt: skip
COMMANDS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "inspect": inspect,
    "estimate": estimate,
    "profile": profile,
    "plan": plan,
    "prepare": prepare,
    "run": run,
    "merge": merge,
    "export": export_model,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, or 2 for what the user can set right."""
    try:
        parser = build_parser(COMMANDS)
        arguments = parser.parse_args(_words(sys.argv[1:] if argv is None else argv))
        if arguments.run is None:
            parser.print_help()
        else:
            with warnings.catch_warnings():  # what libraries tell each other is not for users
                warnings.simplefilter("ignore", FutureWarning)
                arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        print(f"wasi-peft: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def _words(argv: Sequence[str]) -> list[str]:
    """The arguments, those of a program that is to run kept from being taken for ours."""
    if argv[:1] == ["run"] and argv[1:2] not in (["-h"], ["--help"]):
        return ["run", "--", *argv[1:]]
    return list(argv)


if __name__ == "__main__":
    sys.exit(main())
