"""The step as two programs: one learns, one samples.

The same functions as in `train_step.py`, compiled apart, on the same devices or
each on its own. No call waits for what it starts: with devices of its own the
learner takes its next step while the sampler is still at work, as long as the
loop has older rollouts to learn from (`config.staleness`).
"""

import functools
from typing import Any, NamedTuple

import jax

from dppo_jax import memory
from dppo_jax import sharding
from dppo_jax import train_step as train_step_lib
from dppo_jax.types import Prompts
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import ScoredRollout
from dppo_jax.types import TrainState


def make_split_step(
    *, state_shardings: PyTree, mesh: Any, sampling_mesh: Any, **functions: Any
) -> 'SplitStep':
  """A `TrainStep` of two programs.

  Args:
    state_shardings: a `TrainState` of shardings.
    mesh: of the learner; the state and what it learns from live there.
    sampling_mesh: of the sampler: prompts come to it, and rollouts stay there.
    **functions: of `train_step.make_halves`; the rollout function is for
      parameters and prompts that are on `sampling_mesh`.
  """
  halves = train_step_lib.make_halves(**functions)
  everywhere = sharding.replicated(sampling_mesh)
  return SplitStep(
      learn=jax.jit(
          halves.learn,
          donate_argnums=0,
          in_shardings=(state_shardings, sharding.batch(mesh)),
          out_shardings=(state_shardings, sharding.replicated(mesh)),
      ),
      # Passes on what it need not compute, so it is not told where to.
      merge=jax.jit(halves.merge),
      sample=jax.jit(
          halves.sample,
          out_shardings=(sharding.batch(sampling_mesh), everywhere),
      ),
      mesh=mesh,
      sampling_mesh=sampling_mesh,
  )


class SplitStep(NamedTuple):
  """A step of two programs, to be called and to be compiled like one."""

  learn: Any
  merge: Any
  sample: Any
  mesh: Any
  sampling_mesh: Any

  def __call__(
      self, state: TrainState, scored: ScoredRollout, prompts: Prompts
  ) -> tuple[TrainState, Rollout, dict[str, jax.Array]]:
    """Starts learning, then sampling; the state is donated."""
    state, metrics = self.learn(state, scored)
    policy = sharding.bring(
        self.merge(state.params, state.frozen),
        mesh=self.mesh,
        sampling_mesh=self.sampling_mesh,
    )
    prompts = jax.device_put(prompts, sharding.batch(self.sampling_mesh))
    when = jax.device_put(_when(state), sharding.replicated(self.sampling_mesh))
    rollout, aux = self.sample(policy, prompts, *when)
    return state, rollout, metrics | {'sample/decode_steps': aux.num_steps}

  def lower(
      self, state: TrainState, scored: ScoredRollout, prompts: Prompts
  ) -> '_Lowered':
    """Both programs, from arrays or their shapes."""
    there = self.sampling_mesh
    policy = jax.eval_shape(self.merge, state.params, state.frozen)
    policy = jax.tree.map(
        sharding.placed, policy, sharding.of_params(policy, there)
    )
    place = lambda tree, where: jax.tree.map(
        functools.partial(sharding.placed, where=where), tree
    )
    when = place(_when(state), sharding.replicated(there))
    return _Lowered(
        self.learn.lower(state, scored),
        self.sample.lower(
            policy, place(prompts, sharding.batch(there)), *when
        ),
        weights=memory.per_device(policy),
        # Else the sampler has the very arrays of the state.
        copied=self.mesh != there or bool(state.frozen),
        apart=sharding.apart(self.mesh, there),
    )


class _Lowered(NamedTuple):
  learn: jax.stages.Lowered
  sample: jax.stages.Lowered
  weights: int  # Bytes per device of the sampler's copy.
  copied: bool  # Whether there is one.
  apart: bool  # Whether it is on other devices.

  def compile(self) -> '_Compiled':
    return _Compiled(
        self.learn.compile(),
        self.sample.compile(),
        weights=self.weights,
        copied=self.copied,
        apart=self.apart,
    )


class Memory(NamedTuple):
  """Bytes per device, under the names of XLA's own analysis."""

  argument_size_in_bytes: int
  temp_size_in_bytes: int
  output_size_in_bytes: int
  alias_size_in_bytes: int = 0


class _Compiled(NamedTuple):
  learn: jax.stages.Compiled
  sample: jax.stages.Compiled
  weights: int
  copied: bool
  apart: bool

  def memory_analysis(self) -> Memory | None:
    """Of both programs on a device, or of the fuller one if they are apart."""
    sizes = memory.of_step(self.learn), memory.of_step(self.sample)
    if not all(sizes):
      return None
    return combined(*sizes, self.weights * self.copied, apart=self.apart)


def combined(
    learn: dict[str, int], sample: dict[str, int], weights: int, *, apart: bool
) -> Memory:
  """What a device must have, from `memory.of_step` of each program.

  Args:
    learn: of the learner.
    sample: of the sampler; its arguments have the weights in them.
    weights: of the sampler's copy; 0 if it samples from the state itself.
    apart: whether each program has its own devices. Then the learner has the
      copy too, before it is sent, and the sampler the next one, while it still
      samples with the last.
  """
  if not apart:
    return Memory(
        learn['arguments'] + weights,
        max(learn['temporary'], sample['temporary']),
        learn['results'] + sample['results'],
    )
  return max(
      (
          Memory(x['arguments'] + weights, x['temporary'], x['results'])
          for x in (learn, sample)
      ),
      key=sum,
  )


def _when(state: TrainState):
  """What `Halves.sample` takes behind the prompts."""
  return state.key, state.step, state.policy_version
