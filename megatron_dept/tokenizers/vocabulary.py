"""Which ids of a tokenizer a source keeps (V_k of the DEPT paper, arXiv 2410.05021).

Legend: `V` the tokenizer's ids, `v` those of one source.
"""

import numpy as np

from megatron_dept.common.errors import DataError
from megatron_dept.tokenizers.base import Ids, Tokenizer


def required_ids(tokenizer: Tokenizer) -> Ids:
    """Sorted int64: ids that every vocabulary keeps, the specials and, where the tokenizer has them, all 256 bytes.

    With them any text can be scored and any document ended under any source's vocabulary.
    """
    if not tokenizer.has_byte_fallback:
        return np.unique(tokenizer.special_ids)
    return np.unique(np.concatenate([tokenizer.byte_ids, tokenizer.special_ids]))


def source_vocabulary(counts: Ids, tokenizer: Tokenizer) -> Ids:
    """V_k, sorted int64 [v]: the ids with `counts` (int64 [V], of the training split) above 0, and `required_ids`.

    `DataError` where `counts` is not of this tokenizer's size.
    """
    if counts.shape != (tokenizer.vocab_size,):
        raise DataError(
            f"token counts of shape {counts.shape} do not fit {tokenizer.path} with {tokenizer.vocab_size} ids; "
            "preprocess the source with this tokenizer"
        )
    return np.union1d(np.flatnonzero(counts), required_ids(tokenizer)).astype(np.int64)
