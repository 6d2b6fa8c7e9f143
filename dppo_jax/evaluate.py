"""Held-out accuracy: avg@k and the unbiased pass@k.

    python -m dppo_jax.evaluate --config=configs/tv_topk.py --workdir=DIR

prints a JSON object on its last line. Sampling settings are separate from those
of training.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dppo_jax import processes
from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.tasks.verify import VerifyFn
from dppo_jax.types import PyTree


def pass_at_k(*, num_samples: int, num_correct: int, k: int) -> float:
  """Chance that k of n samples hold a correct one, without bias.

  1 - C(n - c, k) / C(n, k), Sec. 2.1 of arXiv:2107.03374.

  Args:
    num_samples: n.
    num_correct: c.
    k: at most n.
  """
  if k > num_samples:
    raise ValueError(f'k={k} is more than num_samples={num_samples}.')
  wrong = num_samples - num_correct
  return 1.0 - math.comb(wrong, k) / math.comb(num_samples, k)


def summarize(rewards: np.ndarray) -> dict[str, float]:
  """Scalars from rewards [prompts, samples]; a reward of 1 is correct."""
  num_samples = rewards.shape[1]
  correct = np.sum(rewards >= 1.0, axis=1)
  metrics = {f'eval/avg@{num_samples}': float(np.mean(rewards))}
  k = 1
  while k <= num_samples:
    per_prompt = [
        pass_at_k(num_samples=num_samples, num_correct=int(c), k=k)
        for c in correct
    ]
    metrics[f'eval/pass@{k}'] = float(np.mean(per_prompt))
    k *= 2
  return metrics


class Evaluation(NamedTuple):
  """Held-out evaluation of parameters on the learner's mesh."""

  run: Callable[[PyTree], tuple[dict[str, float], dict[str, Any]]]
  # From shapes of the parameters that have shardings.
  lower: Callable[[PyTree], jax.stages.Lowered]
  # Shapes -> those of the parameters where they are sampled with.
  there: Callable[[PyTree], PyTree]
  copies: bool  # Whether these are copies.
  apart: bool  # Whether they are on other devices.

  def __call__(self, params: PyTree) -> tuple[dict[str, float], dict[str, Any]]:
    return self.run(params)


def make_evaluate_fn(
    *,
    sampler: Callable[..., sampling.Completions],
    batch: PromptBatch,
    num_samples: int,
    verify: VerifyFn,
    key: jax.Array,
    mesh: Any = None,
) -> Callable[[PyTree], tuple[dict[str, float], dict[str, Any]]]:
  """A function from parameters to held-out metrics.

  Every call uses the same prompts and the same key, so two calls differ by
  their parameters only.

  Args:
    sampler: from `sampling.make_sampler`, with group_size = num_samples.
    batch: N prompts and their answers.
    num_samples: completions per prompt.
    verify: completions to texts and rewards.
    key: typed PRNG key.
    mesh: whose devices share the prompts; some are sampled from twice, and
      counted once, where N is no multiple of them.

  Returns:
    `evaluate_fn(params) -> (metrics, samples)`; samples are lists `prompts`,
    `completions`, `answers` and `rewards`, in the order of the prompts: of this
    process's rows, which are all N * num_samples if there is no other. And
    `evaluate_fn.lower(params)`, its program, lowered.
  """
  prompts, rows, own = batch.prompts, None, np.arange(len(batch.texts))
  if mesh is not None:
    rows = sharding.batch(mesh)
    shards = sharding.num_row_shards(mesh)
    size = -(-len(own) // shards) * shards
    padded = jax.tree.map(
        lambda x: np.resize(x, (size, *x.shape[1:])), prompts
    )
    prompts = processes.place(padded, rows, size)
    own = np.intersect1d(own, processes.share(rows, size).own)
  keys = sampling.row_keys(key, len(prompts.tokens) * num_samples)
  texts, answers = (
      [values[i] for i in own for _ in range(num_samples)]
      for values in (batch.texts, batch.answers)
  )
  own = processes.of_groups(own, num_samples)

  @functools.partial(jax.jit, out_shardings=rows)
  def sample(params, prompts, keys):
    completions = sampler(params, prompts, keys)
    return completions.tokens, completions.mask, completions.truncated

  def evaluate_fn(params):
    tokens, mask, truncated = processes.rows_of(
        sample(params, prompts, keys), own
    )
    decoded, rewards = verify(
        tokens=tokens, mask=mask, truncated=truncated, answers=answers
    )
    scores, lengths, cut_off = (
        processes.collect(x, own, len(batch.texts) * num_samples)
        for x in (rewards, mask.sum(-1), truncated)
    )
    metrics = summarize(scores.reshape(-1, num_samples))
    metrics['eval/length_mean'] = float(np.mean(lengths))
    metrics['eval/truncated'] = float(np.mean(cut_off))
    return metrics, {
        'prompts': texts,
        'completions': decoded,
        'answers': answers,
        'rewards': rewards,
    }

  evaluate_fn.lower = lambda params: sample.lower(params, prompts, keys)
  return evaluate_fn


if __name__ == '__main__':
  from dppo_jax import main

  main.run_evaluate()
