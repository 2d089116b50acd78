"""Errors that end a command, each with the exit code the run-folder contract promises.

The message of every error says what (file, record, setting), where, the limit and the value
found, and what to do. `cli.main` prints the message and leaves with `exit_code`.
"""

from typing import ClassVar


class VLBeitError(Exception):
    """Something the user can act on. Subclasses differ only in their exit code."""

    exit_code: ClassVar[int] = 1


class DataBudgetError(VLBeitError):
    """More bad samples than `input.skip_budget` allows, or a source without a usable one."""

    exit_code = 65


class InputError(VLBeitError):
    """A file or folder that is missing, unreadable or not what it was when the run began."""

    exit_code = 66


class NonFiniteError(VLBeitError):
    """Loss or gradients stayed NaN or infinite."""

    exit_code = 70


class LostWorkerError(VLBeitError):
    """A rank or a loader worker died or stopped answering."""

    exit_code = 71


class SaveError(VLBeitError):
    """A checkpoint or log could not be written (disk full, file-size limit, no permission)."""

    exit_code = 73


class StopRequested(VLBeitError):
    """SIGTERM or SIGINT: the run saved its state; the same command goes on."""

    exit_code = 75


class UnsafeError(VLBeitError):
    """A file whose loading could run code or exhaust the machine, or a server open to strangers."""

    exit_code = 77


class ConfigError(VLBeitError):
    """A setting that is unknown, of the wrong type, out of range or in conflict with another."""

    exit_code = 78
