"""Every error that a user can cause and fix.

ByeoriError            one sentence: what is wrong, where, what to do; the command line exits with 2
├── GateError          a comparison that does not meet a condition (--fail-unless); exits with 3
├── ConfigError        a setting, a flag, or a combination of them
├── DataError          a file of rows, or a row in it
├── TemplateError      a prompt template, or a row that does not fit it
│   └── TooLongError   a row whose answer and template text do not fit into cutoff_len
├── ModelError         a base model, its tokenizer, or an adapter
├── CheckpointError    a checkpoint or an output folder
├── TrainingError      a run that cannot continue
└── HubError           the Hugging Face Hub
"""

import errno
import os

# Environment variable: a file that the first process of a group to report an error creates.
SAID = "BYEORI_SAID"


# Exit code of a process whose run must be restarted from its last checkpoint (sysexits.h: EX_TEMPFAIL).
AGAIN = 75


# How PyTorch's allocators, CUDA's libraries and oneDNN (in products on a CPU) say that memory ran out.
_NO_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "could not create a primitive",
    "could not execute a primitive",
    "could not create a memory",
)


def no_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the GPU or of the machine ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    return said or isinstance(error, MemoryError)


def may_speak() -> bool:
    """Return whether this process reports why the run ends: the first of its group that asks does."""
    path = os.environ.get(SAID)
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


class ByeoriError(Exception):
    """Base of the tree. The message is written for the person at the terminal. exit_code: of the command line."""

    exit_code = 2


class GateError(ByeoriError):
    """A comparison that does not meet a condition."""

    exit_code = 3


class ConfigError(ByeoriError):
    """A setting, a flag, or a combination of them."""


class DataError(ByeoriError):
    """A file of rows, or a row in it."""


class TemplateError(ByeoriError):
    """A prompt template, or a row that does not fit it."""


class TooLongError(TemplateError):
    """A row whose answer and template text do not fit into cutoff_len."""


class ModelError(ByeoriError):
    """A base model, its tokenizer, or an adapter."""


class CheckpointError(ByeoriError):
    """A checkpoint or an output folder."""


class TrainingError(ByeoriError):
    """A run that cannot continue."""


class HubError(ByeoriError):
    """The Hugging Face Hub."""
