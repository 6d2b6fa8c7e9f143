"""The arrays everything agrees on.

B sequences (N prompts times G completions of each, completions of one prompt
next to each other), T predicted tokens, P prompt tokens, V vocabulary. Every
per-token array is [B, T] and aligned with `targets = tokens[:, 1:]`: index t is
about token t + 1. Said here once, relied on everywhere.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any

# Largest divergence at which a token may still push outwards; a pair is (low,
# high), for negative and for positive advantages.
Threshold = float | tuple[float, float]


def given(tree: PyTree) -> bool:
  """Whether an optional field holds arrays; () holds none."""
  return bool(jax.tree.leaves(tree))


class Prompts(NamedTuple):
  """A batch of prompts, padded on the left so that completions line up."""

  tokens: jax.Array  # [N, P] int32
  mask: jax.Array  # [N, P] bool, False on padding.


class Rollout(NamedTuple):
  """Completions and what the behaviour policy remembers about them."""

  tokens: jax.Array  # [B, T + 1] int32, prompt and completion, padded.
  segment_ids: jax.Array  # [B, T + 1] int32, 0 on padding.
  positions: jax.Array  # [B, T + 1] int32, counted from the prompt's start.
  token_mask: jax.Array  # [B, T] bool, sampled by the policy.
  behaviour_logprobs: jax.Array  # [B, T] float32, of what was really sampled.
  record: PyTree  # [B, T, ...], what the divergence asked to remember.
  policy_version: jax.Array  # [B] int32, optimizer updates of the sampler.
  truncated: jax.Array  # [B] bool, length limit hit without an end token.
  # [B, T, L, k], experts of the token read at t, which predicts token t + 1, in
  # each layer; () unless they are to be replayed.
  routing: PyTree = ()
  # [B, T] int32, of `TrainState.products`: the token read at t; () unless kept.
  entries: PyTree = ()


class Rows(NamedTuple):
  """What a policy reads, and what it is asked about it. All [B, T].

  A slot of a row reads one token and predicts one. In the rows of a rollout the
  next slot reads what was predicted; packed ones (packing.py) hold prompts and
  completions of several groups.
  """

  inputs: jax.Array  # int32
  targets: jax.Array  # int32
  positions: jax.Array  # int32, of the inputs.
  input_segments: jax.Array  # int32, a sequence sees itself; 0 on padding.
  target_segments: jax.Array  # int32, over which sequences are added up.
  token_mask: jax.Array  # bool, the target was sampled.
  routing: PyTree = ()  # [B, T, L, k], as `Rollout.routing`.
  # int32, the segment that this one continues and sees too; 0 for none. ()
  # where no segment continues another.
  prompt_segments: PyTree = ()
  entries: PyTree = ()  # [B, T] int32, as `Rollout.entries`.


class ScoredRollout(NamedTuple):
  """A rollout and what the verifier said of it."""

  rollout: Rollout
  rewards: jax.Array  # [B] float32
  replayed: PyTree = ()  # [B] bool, learned from before; () without a buffer.


class Divergence(NamedTuple):
  """How far the target policy stands from the behaviour policy, per token.

  `record(logits [..., V], tokens [...])` is called on the behaviour policy's
  logits while it samples; `measure(logits, tokens, recorded)` compares the
  target policy's logits with it and returns [...] float32. `threshold` is in
  the unit that `measure` returns.

  `direction(logits, tokens, recorded)`, where given, says whether raising the
  sampled token's probability moves further out (> 0) or back (< 0); otherwise
  the sign of the log-ratio does.
  """

  record: Callable[[jax.Array, jax.Array], PyTree]
  measure: Callable[[jax.Array, jax.Array, PyTree], jax.Array]
  threshold: Threshold
  direction: Callable[[jax.Array, jax.Array, PyTree], jax.Array] | None = None


class LossInputs(NamedTuple):
  """What a loss may look at. All [B, T]; or [n], if it is `by_token`."""

  logprobs: jax.Array  # float32, target policy; carries the gradient.
  behaviour_logprobs: jax.Array  # float32, of the policy that sampled.
  divergence: jax.Array  # float32, D(behaviour || target).
  trust_region: jax.Array  # bool, token may still push the policy; a float
  # in [0, 1] where the rule is soft.
  advantages: jax.Array  # float32
  token_mask: jax.Array  # bool
  segment_ids: jax.Array | None = None  # int32; one sequence a row if None.
  multiplier: jax.Array | None = None  # float32, price of the constraint.
  limit: float | None = None  # Of the constraint.


# Returns the loss of each token, 0 where the mask is False, and of the same
# shape the metrics `surrogate`, what is maximised of a kept token (ratio *
# advantage), `capped`, 1 where a ratio was truncated, and `gradient_weight`,
# |factor of grad log pi|; a loss under a constraint also `constraint`, a
# `duals.Constraint`. Of what else it returns, the means are logged as
# `loss/NAME`.
LossFn = Callable[[LossInputs], tuple[jax.Array, dict[str, jax.Array]]]


def of_shape(what: str, fn: Callable, value: PyTree, shape: tuple) -> PyTree:
  """`value`; refuses what NumPy's rules would stretch, and so change.

  Args:
    what: it is, for example 'advantage'.
    fn: that returned it; the factory that made it is named.
    value: an array, or a tree of such.
    shape: each must have.
  """
  for array in jax.tree.leaves(value):
    if jnp.shape(array) != tuple(shape):
      maker = getattr(fn, '__qualname__', str(fn)).partition('.')[0]
      raise ValueError(
          f'The {what} {maker!r} returns an array of shape {jnp.shape(array)}; '
          f'here it must be {tuple(shape)}, one number for each.'
      )
  return value


def by_token(fn: Callable) -> Callable:
  """Marks a loss or a rule that sees each token by itself.

  What it says of a token depends on nothing of other tokens, so it may be
  called with any tokens, [n] in place of [B, T]: chunk by chunk, where the
  logits are, which are then made once and not again for the gradient.
  """
  fn.by_token = True
  return fn


def is_by_token(fn: Callable) -> bool:
  """Whether a loss or a rule is marked so; what says nothing is not."""
  return getattr(fn, 'by_token', False)


class TrainState(NamedTuple):
  """Everything the compiled step carries from one call to the next."""

  step: jax.Array  # [] int32, rollouts learned from.
  params: PyTree  # What is trained: everything, a part of it, or adapters.
  opt_state: PyTree
  key: jax.Array  # typed PRNG key; the step folds `step` into it.
  policy_version: jax.Array  # [] int32, optimizer updates applied.
  nonfinite_in_a_row: jax.Array  # [] int32, updates skipped just now.
  reference: PyTree = ()  # The first `params`, where a penalty needs them.
  dual: PyTree = ()  # A `DualState`, where there is a constraint.
  replay: PyTree = ()  # A `replay.Buffer`, where rollouts are used again.
  # What kernels made of the tokens of the last rollout, [L, E, F] each, if an
  # update uses it again; see models/products.py.
  products: PyTree = ()
  frozen: PyTree = ()  # What was loaded and is not trained, see trainable.py.
