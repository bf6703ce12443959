"""What stops a command on purpose: each class is one exit status of the command line."""

import errno

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""What the system says when a disk takes no more; anything else is no user's to mend."""


class UserError(ValueError):
    """The user's input is wrong (exit status 2); it names field, value, rule and remedy."""


class RunFailed(RuntimeError):
    """The work failed in a way that we foresaw (exit status 1), such as a non-finite loss."""


class Resumable(RuntimeError):
    """The run stopped early and the same command continues it (exit status 75)."""
