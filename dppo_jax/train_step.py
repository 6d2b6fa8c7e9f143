"""One compiled step: learn from the last rollout, then sample the next.

The verifier is host Python between two calls, so no callback stands in the
program; the data are on-policy, there is one executable, and the sampler's
cache shares its memory with the learner's activations. `split_step.py` compiles
the same two halves as two programs.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dppo_jax import diagnostics
from dppo_jax import duals
from dppo_jax import learner
from dppo_jax import replay as replay_lib
from dppo_jax import sharding
from dppo_jax import trainable as trainable_lib
from dppo_jax.rollout import RolloutFn
from dppo_jax.rollout import SamplingAux
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import Threshold
from dppo_jax.types import TrainState

# train_step(state, scored, prompts) -> (state, rollout, metrics)
TrainStep = Callable[
    [TrainState, ScoredRollout, Prompts],
    tuple[TrainState, Rollout, dict[str, jax.Array]],
]


class Halves(NamedTuple):
  """What a step does, as pure functions.

  Attributes:
    learn: (state, scored) -> (state, metrics).
    merge: (params, frozen) -> the policy to sample from.
    sample: (policy, prompts, key, step, version, products) -> (rollout, aux);
      all but the first two are the state's after learning.
  """

  learn: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  merge: Callable[[PyTree, PyTree], PyTree]
  sample: Callable[..., tuple[Rollout, SamplingAux]]


def make_train_step(
    *, state_shardings: PyTree, mesh: Any, **functions: Any
) -> TrainStep:
  """The jitted step. Its state is donated and every sharding is pinned.

  Args:
    state_shardings: a `TrainState` of shardings.
    mesh: where everything else lives.
    **functions: of `make_halves`.
  """
  halves = make_halves(**functions)

  def train_step(state, scored, prompts):
    with jax.named_scope('learn'):
      state, metrics = halves.learn(state, scored)
    with jax.named_scope('sample'):
      rollout, aux = halves.sample(
          halves.merge(state.params, state.frozen),
          prompts,
          state.key,
          state.step,
          state.policy_version,
          state.products,
      )
    metrics['sample/decode_steps'] = aux.num_steps
    return state._replace(products=aux.products), rollout, metrics

  rows, everywhere = sharding.batch(mesh), sharding.replicated(mesh)
  return jax.jit(
      train_step,
      donate_argnums=0,
      in_shardings=(state_shardings, rows, rows),
      out_shardings=(state_shardings, rows, everywhere),
  )


def make_halves(
    *,
    learn: Callable[..., Any],
    rollout_fn: RolloutFn,
    threshold: Threshold | None,
    group_size: int,
    vocab_size: int,
    replay: replay_lib.Replay | None = None,
    trainable: trainable_lib.Trainable = trainable_lib.EVERYTHING,
) -> Halves:
  """Learning and sampling, each with what it measures and its random numbers.

  A scored rollout without a single sampled token (`blank`) teaches nothing: the
  state stays as it was. That starts a run, and it measures what sampling alone
  costs.

  Args:
    learn: from `learner.make_learner`.
    rollout_fn: from `rollout.make_rollout_fn`.
    threshold: the divergence's, for metrics; None where the rule does not
      take a token for outside that is above it.
    group_size: G.
    vocab_size: V.
    replay: from `replay.make_replay`; None learns from fresh rollouts alone.
    trainable: what is trained, and how it makes a policy.
  """

  @functools.partial(jax.jit, inline=True)  # Traced once, here and in `skip`.
  def learn_and_measure(state, scored, key):
    pool, replay_metrics = scored, {}
    if replay is not None:
      key, key_replay = jax.random.split(key)
      pool, replay_metrics = replay.mix(
          state.replay,
          scored,
          state._replace(params=trainable.join(state.params, state.frozen)),
          key_replay,
      )
    new_state, stats, metrics = learn(state, pool, key)
    if replay is not None:
      new_state = new_state._replace(replay=replay.push(state.replay, scored))
    metrics = learner.over_updates(metrics)
    metrics |= replay_metrics
    metrics |= diagnostics.token_metrics(stats, threshold=threshold)
    metrics |= diagnostics.rollout_metrics(
        rewards=scored.rewards,
        token_mask=scored.rollout.token_mask,
        truncated=scored.rollout.truncated,
        group_size=group_size,
    )
    metrics['policy/version'] = new_state.policy_version
    metrics['policy/age_max'] = state.policy_version - jnp.min(
        scored.rollout.policy_version
    )
    metrics['optimizer/nonfinite_in_a_row'] = new_state.nonfinite_in_a_row
    metrics |= diagnostics.record_metrics(scored.rollout)
    metrics['scatter'] = diagnostics.scatter(stats)
    metrics['masked_tokens'] = diagnostics.masked_token_counts(
        stats, vocab_size=vocab_size
    )
    return _moving(new_state._replace(step=state.step + 1)), metrics

  def skip(state, scored, key):
    """What learning returns, from nothing."""
    _, metrics = jax.eval_shape(learn_and_measure, state, scored, key)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    return _moving(state), jax.tree.map(zeros, metrics)

  # Each key is derived from the step it serves, so nothing needs carrying.
  def learn_part(state, scored):
    stream, _ = jax.random.split(state.key)
    moved, metrics = jax.lax.cond(
        jnp.any(scored.rollout.token_mask),
        learn_and_measure,
        skip,
        state,
        scored,
        jax.random.fold_in(stream, state.step),
    )
    state = moved._replace(
        frozen=state.frozen, reference=state.reference,
        products=state.products,
    )
    return state, metrics

  def sample_part(policy, prompts, key, step, version, products=()):
    _, stream = jax.random.split(key)
    key = jax.random.fold_in(stream, step)
    return rollout_fn(policy, prompts, key, version, products)

  return Halves(learn_part, trainable.merge, sample_part)


def init_state(
    params: PyTree,
    optimizer: Any,
    key: jax.Array,
    *,
    frozen: PyTree = (),
    with_reference: bool = False,
    dual: duals.Dual | None = None,
) -> TrainState:
  """The state before the first update.

  Args:
    params: what is trained.
    optimizer: an `optim.Optimizer`.
    key: typed PRNG key.
    frozen: what is not, see `trainable.Trainable.split`.
    with_reference: keep a frozen copy of the parameters, for penalties.
    dual: of the loss's constraint, if it has one.
  """
  # Not one shared zero: donation refuses the same buffer twice.
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=optimizer.transformation.init(params),
      key=key,
      policy_version=jnp.zeros((), jnp.int32),
      nonfinite_in_a_row=jnp.zeros((), jnp.int32),
      reference=jax.tree.map(jnp.copy, params) if with_reference else (),
      dual=() if dual is None else dual.init(),
      frozen=frozen,
  )


def state_shardings(state: TrainState, mesh: Any) -> TrainState:
  """Parameters and moments by rule, replay by rows, the rest replicated."""
  everywhere = sharding.replicated(mesh)
  in_slots = sharding.in_slots(mesh)
  return jax.tree.map(lambda _: everywhere, state)._replace(
      params=sharding.of_params(state.params, mesh),
      opt_state=sharding.of_params(state.opt_state, mesh),
      reference=sharding.of_params(state.reference, mesh),
      frozen=sharding.of_params(state.frozen, mesh),
      replay=jax.tree.map(
          lambda x: in_slots if x.ndim > 1 else everywhere, state.replay
      ),
  )


def blank(
    rollout_fn: RolloutFn,
    state: TrainState,
    prompts: Prompts,
    trainable: trainable_lib.Trainable = trainable_lib.EVERYTHING,
) -> ScoredRollout:
  """A `ScoredRollout` of zeros in the shapes that `rollout_fn` makes."""
  shapes, _ = jax.eval_shape(
      lambda state: rollout_fn(
          trainable.merge(state.params, state.frozen),
          prompts,
          state.key,
          state.policy_version,
          state.products,
      ),
      state,
  )
  rollout = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  batch = rollout.token_mask.shape[0]
  return ScoredRollout(rollout, jnp.zeros(batch, jnp.float32))


def _moving(state: TrainState) -> TrainState:
  """Without what never changes, which a conditional would copy."""
  return state._replace(frozen=(), reference=(), products=())
