"""Held-out accuracy: avg@k and the unbiased pass@k.

    python -m dppo_jax.evaluate --config=configs/tv_topk.py --workdir=DIR

prints a JSON object on its last line. Sampling settings are separate from those
of training.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import processes
from dppo_jax import sampling
from dppo_jax import sharding
from dppo_jax.tasks.prompts import PromptBatch
from dppo_jax.tasks.verify import VerifyFn
from dppo_jax.types import Prompts
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


class Program(NamedTuple):
  """What of held-out evaluation is compiled."""

  # (params, prompts, keys) -> what `make_sample` says.
  sample: Callable[..., tuple[jax.Array, ...]]
  # From shapes of the learner's parameters that have shardings.
  lower: Callable[[PyTree], jax.stages.Lowered]
  # Those shapes -> the shapes of the parameters where they are sampled with.
  there: Callable[[PyTree], PyTree]
  copies: bool  # Whether these are copies.
  apart: bool  # Whether they are on other devices.


class Evaluation(NamedTuple):
  """Held-out evaluation of parameters on the learner's mesh."""

  run: Callable[[PyTree], tuple[dict[str, float], dict[str, Any]]]
  program: Program

  def __call__(self, params: PyTree) -> tuple[dict[str, float], dict[str, Any]]:
    return self.run(params)


def make_sample(
    sampler: Callable[..., sampling.Completions], mesh: Any = None
) -> Callable[..., tuple[jax.Array, ...]]:
  """A jitted (params, prompts [N, P], keys [N * k]) -> what is sampled.

  Args:
    sampler: from `sampling.make_sampler`, with group_size = k.
    mesh: whose devices share the rows.

  Returns:
    of it, tokens [N * k, L] and their mask, truncated [N * k], and whether
    some log-prob is not finite [N * k].
  """

  @functools.partial(
      jax.jit, out_shardings=None if mesh is None else sharding.batch(mesh)
  )
  def sample(params, prompts, keys):
    completions = sampler(params, prompts, keys)
    fine = jnp.isfinite(completions.logprobs) | ~completions.mask
    return (
        completions.tokens, completions.mask, completions.truncated,
        ~jnp.all(fine, axis=-1),
    )

  return sample


def abstract_inputs(
    *, num_prompts: int, num_samples: int, prompt_length: int, mesh: Any
) -> tuple[Prompts, Any]:
  """Shapes of the prompts and keys that `make_evaluate_fn` calls with."""
  size = _padded(num_prompts, mesh)
  place = lambda dtype: jax.ShapeDtypeStruct(
      (size, prompt_length), dtype, sharding=sharding.batch(mesh)
  )
  keys = jax.eval_shape(
      lambda: sampling.row_keys(jax.random.key(0), size * num_samples)
  )
  return Prompts(place(np.int32), place(bool)), keys


def _padded(num_prompts: int, mesh: Any) -> int:
  """The next multiple of the devices that share rows."""
  shards = sharding.num_row_shards(mesh)
  return -(-num_prompts // shards) * shards


def make_evaluate_fn(
    *,
    sample: Callable[..., tuple[jax.Array, ...]],
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
    sample: from `make_sample`, of the same mesh.
    batch: N prompts and their answers.
    num_samples: completions per prompt.
    verify: completions to texts and rewards.
    key: typed PRNG key.
    mesh: whose devices share the prompts; some are sampled from twice, and
      counted once, where N is no multiple of them.

  Returns:
    `evaluate_fn(params) -> (metrics, samples)`; samples are lists `prompts`,
    `completions`, `answers` and `rewards`, in the order of the prompts: of this
    process's rows, which are all N * num_samples if there is no other. It
    raises a FloatingPointError if no completion has finite log-probs.
  """
  prompts, own = batch.prompts, np.arange(len(batch.texts))
  if mesh is not None:
    rows, size = sharding.batch(mesh), _padded(len(own), mesh)
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

  def evaluate_fn(params):
    tokens, mask, truncated, broken = processes.local_rows(
        sample(params, prompts, keys), own
    )
    count = len(batch.texts) * num_samples
    _check_finite(processes.collect(broken, own, count))
    decoded, rewards = verify(
        tokens=tokens, mask=mask, truncated=truncated, answers=answers
    )
    scores, lengths, cut_off = (
        processes.collect(x, own, count)
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

  return evaluate_fn


def _check_finite(broken: np.ndarray) -> None:
  """Says how many completions are noise; raises if all are."""
  if not broken.any():
    return
  message = (
      f'{broken.sum()} of {len(broken)} held-out completions were sampled from '
      'logits that are not finite. If config.sampling.dtype is float16, which '
      'ends at 65,504: bfloat16 has the range of float32.'
  )
  if broken.all():
    raise FloatingPointError(message)
  logging.warning(message)


if __name__ == '__main__':
  from dppo_jax import main

  main.run_evaluate()
