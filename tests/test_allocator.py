"""The allocator's thresholds: asked for once, by whoever owns the process."""

from __future__ import annotations

import platform

from conchkernel.allocator import ENVIRONMENT, keepLargeBuffers


def test_glibc_takes_the_thresholds():
    """On glibc both calls succeed; elsewhere it is no error that there are none."""
    assert keepLargeBuffers() is (platform.libc_ver()[0] == "glibc")


def test_the_environment_says_the_same():
    """Children are told by variables."""
    assert set(ENVIRONMENT) == {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
