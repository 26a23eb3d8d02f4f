"""Every error a user can meet.

ByeoriError            one sentence: what is wrong, where, what to do; the command line exits with 2
├── ConfigError        a setting, a flag, or a combination of them
├── DataError          a file of rows, or a row in it
├── TemplateError      a prompt template, or a row that does not fit it
│   └── TooLongError   a row whose answer and fixed words do not fit into cutoff_len
├── ModelError         a base model, its tokenizer, or an adapter
├── CheckpointError    a checkpoint or an output folder
├── TrainingError      a run that cannot go on
└── HubError           the Hugging Face Hub
"""

import os

# Names a file that one process of a group makes when it tells the user why the run ends.
SAID = "BYEORI_SAID"


# The exit code of a process whose run is to be started again from its last checkpoint (sysexits.h: EX_TEMPFAIL).
AGAIN = 75


def may_speak() -> bool:
    """Whether this process is to say why the run ends: the first one of its group that asks."""
    path = os.environ.get(SAID)
    if path is None:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except OSError:
        return False
    return True


class ByeoriError(Exception):
    """Base of the tree. The message is written for the person at the terminal."""


class ConfigError(ByeoriError):
    """A setting, a flag, or a combination of them."""


class DataError(ByeoriError):
    """A file of rows, or a row in it."""


class TemplateError(ByeoriError):
    """A prompt template, or a row that does not fit it."""


class TooLongError(TemplateError):
    """A row whose answer and fixed words do not fit into cutoff_len."""


class ModelError(ByeoriError):
    """A base model, its tokenizer, or an adapter."""


class CheckpointError(ByeoriError):
    """A checkpoint or an output folder."""


class TrainingError(ByeoriError):
    """A run that cannot go on."""


class HubError(ByeoriError):
    """The Hugging Face Hub."""
