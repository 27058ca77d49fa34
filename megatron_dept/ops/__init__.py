"""The face of csrc: native kernels and their references."""
