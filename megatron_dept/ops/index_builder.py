"""The sample index of one epoch: where each sample starts in a shuffled concatenation of documents.

Megatron's `build_sample_idx` for one epoch, the last partial sample dropped. The native builder is
`csrc/data/index_builder.cpp`; `build_sample_index_reference` is the same in numpy, what the tests compare against and
what runs where nothing is built.
"""

import importlib
import warnings
from functools import cache
from types import ModuleType

import numpy as np


@cache
def native_builder() -> ModuleType | None:
    """The compiled module, or None, with one warning in a process, where it is not built."""
    try:
        return importlib.import_module("megatron_dept.ops._index_builder")
    except ImportError as error:
        warnings.warn(
            f"the native index builder is not built ({error}); using the slower numpy one. "
            "Build it with: pip install --no-build-isolation -e .",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def build_sample_index(sizes: np.ndarray, document_order: np.ndarray, seq_length: int) -> np.ndarray:
    """Where each sample of an epoch starts, int64[n + 1, 2], n = (tokens - 1) // seq_length.

    `sizes` int32[documents] are tokens a document, `document_order` int64[k] names the documents concatenated. Row i is
    (index into `document_order`, token offset in that document) of token i * seq_length of the concatenation. Sample i
    is the seq_length + 1 tokens from row i on, so row i + 1 holds its last token, which the next sample starts with.

    Raises ValueError where an entry of `document_order` is no document, a size is negative, or there are fewer than
    seq_length + 1 tokens.
    """
    native = native_builder()
    if native is None:
        return build_sample_index_reference(sizes, document_order, seq_length)
    # The index file's sizes are unaligned in memory: copied here, 4 bytes a document, for the length of the call.
    aligned_sizes = np.require(sizes, np.int32, ["C", "ALIGNED"])
    aligned_order = np.require(document_order, np.int64, ["C", "ALIGNED"])
    index: np.ndarray = native.build_sample_index(aligned_sizes, aligned_order, seq_length)
    return index


def build_sample_index_reference(sizes: np.ndarray, document_order: np.ndarray, seq_length: int) -> np.ndarray:
    """`build_sample_index` in numpy: by binary search in the running sum of the ordered sizes."""
    if seq_length < 1:
        raise ValueError(f"seq_length must be positive, not {seq_length}")
    outside = (document_order < 0) | (document_order >= len(sizes))
    if outside.any():
        raise ValueError(
            f"document_order[{int(np.argmax(outside))}] is {document_order[outside][0]}, "
            f"outside the {len(sizes)} documents"
        )
    ordered = sizes[document_order].astype(np.int64)
    if (ordered < 0).any():
        document = document_order[ordered < 0][0]
        raise ValueError(f"sizes[{document}] is negative: {sizes[document]}")
    ends = np.cumsum(ordered)
    total = int(ends[-1]) if len(ends) else 0
    if total <= seq_length:
        raise ValueError(f"{total} tokens are too few for one sample of seq_length {seq_length} + 1")
    starts = np.arange((total - 1) // seq_length + 1, dtype=np.int64) * seq_length
    documents = np.searchsorted(ends, starts, side="right")
    return np.stack([documents, starts - (ends - ordered)[documents]], axis=1)
