"""Every error that the library raises for its user's sake.

    SpectralDiffusionError
    ├── InputError         the user's input is wrong: a photo, a token, a setting, a file that is not what it claims to be
    │   ├── PhotoError     no usable photos
    │   ├── BaseError      the base cannot be found, read or used
    │   └── AdapterError   an adapter file is damaged or does not fit
    │       └── BandError  bands overlap, lie outside a layer, or none is left
    ├── StorageError       a file could not be written; what stood there before is untouched
    └── TrainingError      the training cannot go on (the loss is not a number); the last good state is kept

Each message is one sentence or two: what is wrong, where, and what to do.
"""

from __future__ import annotations


class SpectralDiffusionError(Exception):
    """Base of all errors with a message meant for the user."""


class InputError(SpectralDiffusionError):
    """The user's input is wrong; the message names the file or field and the remedy."""


class PhotoError(InputError):
    """A concept has no usable photos."""


class BaseError(InputError):
    """The base cannot be found, read or used."""


class FamilyError(InputError):
    """Nothing in a file tells which family of bases it was made for."""


class AdapterError(InputError):
    """An adapter is damaged, hostile, or does not fit what it is put on."""


class BandError(AdapterError):
    """Bands overlap, lie outside a layer, or none is left."""


class StorageError(SpectralDiffusionError):
    """A file could not be written; what stood there before is untouched."""


class TrainingError(SpectralDiffusionError):
    """The training cannot go on; the last good state is kept."""


def sentence_on(error: Exception, where: str = "") -> str:
    """Return what to say of an error that was not raised for the user's sake; `where` tells how to learn where it happened."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".: ")
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which need not be imported for it
        return f"Memory does not suffice ({what}); close what else uses the GPU, or choose the CPU as device."
    return f"Something unexpected went wrong ({what}){where}."
