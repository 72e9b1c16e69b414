"""The one exception for a user's mistake, and the sentences for what a system refuses."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


class UserError(ValueError):
    """One sentence: which file or option, what was found, what was expected, what to do."""


def of_files(error: OSError) -> str:
    """The sentence for a full disk, or for a file that may not be read or written."""
    if error.errno in FULL:
        return f"{error.filename or 'a file'}: can't be written ({error.strerror}); make room."
    why = f"can't be read or written ({error.strerror})"
    return f"{error.filename or 'a file'}: {why}; change its permissions or choose another place."


def is_of_memory(error: Exception) -> bool:
    """Whether there was not enough of it, on the device (torch.OutOfMemoryError, by its name) or here."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "can't allocate memory" in str(error)
