"""A disk that is full: files of this process cannot grow beyond a few bytes."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(size=100):
    """No file becomes larger than `size` bytes: the system refuses to write more.

    Python ignores the signal that comes with it, so that what writes gets EFBIG.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
