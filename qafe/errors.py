"""Every error a user can cause or meet, as one tree.

QafeError
├── ConfigError       a setting has a value it cannot have, or a name that does not exist
├── MediaError        a frame, clip or video cannot be read
├── FaceError         no face, or not the right one, was found
├── ManifestError     a prepared dataset is not what its CSV files say
├── MachineError      the machine is in the way: open files, memory, a disk, a mount; see `machine_errors`
├── CheckpointError   weights do not fit the model, or the file is damaged
│   └── PrecisionError   a run would resume in another precision than it was started in
└── TrackingError     the MLflow server, run or registry cannot do what was asked

A message gives the rule, the value, the place and the next step. Commands print it as one line and
exit with status 2; ``--debug`` shows the trace.
"""


class QafeError(Exception):
    """Base of all errors that the caller can act on."""


class ConfigError(QafeError):
    """A setting has a value that it cannot have, or a name that does not exist."""


class MediaError(QafeError):
    """A frame, clip or video cannot be read."""


class FaceError(QafeError):
    """No face, or not the right one, was found in a video."""


class ManifestError(QafeError):
    """A prepared dataset is missing, or is not what its CSV files say."""


class MachineError(QafeError):
    """The machine is in the way, and neither a setting nor the data: open files, memory, a disk, a mount."""


class CheckpointError(QafeError):
    """Weights do not fit the model, or their file is damaged."""


class PrecisionError(CheckpointError):
    """A run would resume in another precision than it was started in, as on another kind of device."""


class TrackingError(QafeError):
    """The tracking server, a run or the registry cannot do what was asked."""
