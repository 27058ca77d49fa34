"""Whether the native kernels are there; the faces take the plain torch of `reference` where they are not."""


def native_kernels() -> bool:
    """Whether the kernels of csrc are built and in use."""
    return False
