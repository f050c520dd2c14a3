"""The vLLM versions whose seams were checked. Stands here once; imports nothing."""

#: From (inclusive) and up to (exclusive).
SUPPORTED = ("0.26", "0.34")


def release(version: str) -> tuple[int, int]:
    """``"0.32.1+cpu"`` -> (0, 32). Raises ValueError for what is no version."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or minor)


def supported(version: str) -> bool:
    """Whether this vLLM version lies in :data:`SUPPORTED`; development builds without a version do not."""
    try:
        return release(SUPPORTED[0]) <= release(version) < release(SUPPORTED[1])
    except ValueError:
        return False
