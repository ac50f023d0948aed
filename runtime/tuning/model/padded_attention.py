"""Attention of padded rows: transformers' own, without its look at the padding.

Does not know rows or batches. Start at `with_masks`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def with_masks() -> Iterator[None]:
    """Within: SDPA always gets its mask, in this process.

    By default transformers asks the device whether a batch is padded at all, to leave the mask out, and each
    pass then waits for the one before.
    """
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def made(*, allow_is_causal_skip: bool = False, **kwargs: Any) -> Any:
        return sdpa_mask(allow_is_causal_skip=False, **kwargs)

    AttentionMaskInterface.register("sdpa", made)
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", sdpa_mask)
