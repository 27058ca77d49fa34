"""Property-based tests here draw the same examples every time and have no deadline: the first call pays for imports."""

from hypothesis import settings

settings.register_profile("dept", deadline=None, derandomize=True)
settings.load_profile("dept")
