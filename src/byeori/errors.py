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
