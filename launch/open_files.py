"""The limit of files that this process may have open: it is often 1,024, and a run may have more ranks."""

import resource

_OTHERS = 64  # that this process has open in any case. Chosen by hand.


def allow(count: int) -> None:
    """Raises the limit so that ``count`` more files can be open, as far as this user may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHERS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
