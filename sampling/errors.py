"""What stops a command on purpose: each class is one exit status of the command line."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NOT_WRITABLE = (*FULL, *FORBIDDEN)
"""What the system says of a disk that takes no more, for a reason that the user can mend."""


class UserError(ValueError):
    """The user's input is wrong (exit status 2); it names field, value, rule and remedy."""


class NotExportable(UserError):
    """No diffusers folder can hold the model and be sampled as it is sampled here."""


class RunFailed(RuntimeError):
    """The work failed in a way that we foresaw (exit status 1), such as a non-finite loss."""


class Resumable(RuntimeError):
    """The run stopped early and the same command continues it (exit status 75)."""
