"""Sampled tokens to text to rewards."""

from collections.abc import Callable
from typing import Any

import numpy as np

# (tokens [B, L], mask [B, L], truncated [B], answers of length B)
#   -> (texts of length B, rewards [B] float32)
VerifyFn = Callable[..., tuple[list[str], np.ndarray]]


def make_verify_fn(tokenizer: Any, scorer: Any) -> VerifyFn:
  """A host function that decodes completions and scores them.

  A completion that hit the length limit gets reward 0 without being looked at:
  it might have gone on.

  Args:
    tokenizer: from transformers.
    scorer: a `scoring.Scorer`.
  """

  def verify(*, tokens, mask, truncated, answers):
    rows = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    ended = ~np.asarray(truncated, bool)
    rewards = np.zeros(len(texts), np.float32)
    # Also with nothing to score: processes add up their counts in this call.
    rewards[ended] = scorer.score(*(
        [x for x, seen in zip(column, ended, strict=True) if seen]
        for column in (texts, answers)
    ))
    return texts, rewards

  return verify
