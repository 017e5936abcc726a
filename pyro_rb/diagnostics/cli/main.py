# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""The commands, and what becomes of their errors: :func:`main`."""

import logging
import os
import sys
import traceback
import warnings
from contextlib import contextmanager
from typing import Any, Iterator, Optional, Sequence

import torch

import pyro_rb
from pyro_rb.diagnostics.cli.commands import run_command
from pyro_rb.diagnostics.cli.options import PROGRAM, parse
from pyro_rb.diagnostics.run.messages import one_line


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Runs the command line.

    :param list argv: Arguments. Default: ``sys.argv[1:]``.
    :returns: The exit status: 0, or 1 if ``check`` finds a bias, or 2 after an error, or 130
        after Ctrl-C. What was measured until then is printed and written.
    :rtype: int
    """
    options = parse(list(sys.argv[1:] if argv is None else argv))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of any alphabet, in any terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        with _current_directory_first(), _device(options.device), _short_messages():
            status = run_command(options)
        return _fail("interrupted", status) if status == 130 else status
    except BrokenPipeError:  # the reader of a pipe, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        if options.traceback:
            traceback.print_exc()
        # Errors of our own say what is wrong; their type would add nothing.
        ours = type(error) in (ValueError, ImportError) and _raised_here(error)
        text = " ".join(str(error).split()) if ours else one_line(error)
        return _fail(text + ("" if ours else " (--traceback shows where)"), 2)


@contextmanager
def _device(name: str) -> Iterator[None]:
    """Makes new tensors on a device. Where they are made there anyway, a context would cost time."""
    try:
        device = torch.device(name)
        is_default = torch.zeros((), device=device).device == torch.zeros(()).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if is_default:
        yield
        return
    with device:
        yield


@contextmanager
def _current_directory_first() -> Iterator[None]:
    path = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = path


@contextmanager
def _short_messages() -> Iterator[None]:
    """
    Warnings of our own are for the user: without a line of our code. That Pyro guesses
    ``max_plate_nesting``, once for each loss, is not.
    """
    usual, guesses = warnings.showwarning, logging.getLogger("pyro.infer.elbo")
    level = guesses.level

    def show(message: Any, category: Any, filename: str, *rest: Any, **kwargs: Any) -> None:
        if filename.startswith(_PACKAGE):
            print(f"{PROGRAM}: warning: {message}", file=sys.stderr)
        else:
            usual(message, category, filename, *rest, **kwargs)

    warnings.showwarning = show
    guesses.setLevel(logging.WARNING)
    try:
        yield
    finally:
        warnings.showwarning = usual
        guesses.setLevel(level)


_PACKAGE = os.path.dirname(os.path.abspath(pyro_rb.__file__))


def _raised_here(error: BaseException) -> bool:
    """Whether the error was raised by this package, and not by the user's model."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    return where is not None and where.tb_frame.f_code.co_filename.startswith(_PACKAGE)


def _fail(text: str, status: int) -> int:
    print(f"{PROGRAM}: {'' if status == 130 else 'error: '}{text}", file=sys.stderr)
    return status
