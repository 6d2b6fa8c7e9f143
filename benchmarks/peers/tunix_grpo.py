"""A step of Tunix: its `GRPOLearner` with its own sampler, on a JAX CPU.

    python benchmarks/peers/tunix_grpo.py --size=tiny --lengths=geometric \
        --microbatches=8,16,32

Needs google-tunix, not dppo_jax. A micro-batch is whole groups of 8. All
completions are sampled at once, the sampler's cache is no longer than it must
be, activations are kept, and no reference policy is computed (beta = 0). Its
packed rows are left out: each counts as one step of the accumulation, whose
number is fixed, so no packed rollout of varying lengths makes one update.
"""

import argparse
from collections.abc import Iterator
import pathlib
import sys

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster as rl_cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks.peers import work


class Stopping(llama3.Llama3):
  """Ends a completion with the same probability after every token.

  While it samples, that is with a cache: the learner's logits are left alone,
  which is less work. Padding is never drawn, Tunix would take it for the end.
  """

  def __init__(self, config: llama3.ModelConfig, stop: float, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    self.stop = stop

  def __call__(self, input_tokens, positions, cache, attention_mask):
    logits, new_cache = super().__call__(
        input_tokens, positions, cache, attention_mask
    )
    if cache is None:
      return logits, new_cache
    logits = logits.at[..., work.PAD_ID].set(-jnp.inf)
    logits = logits.at[..., work.EOS_ID].set(-jnp.inf)
    if self.stop:
      odds = np.log(self.stop / (1 - self.stop))
      end = jax.nn.logsumexp(logits, axis=-1) + odds
      logits = logits.at[..., work.EOS_ID].set(end)
    return logits, new_cache


class Numbers:
  """A tokenizer whose words are the numbers of the tokens."""

  def encode(self, text: str) -> list[int]:
    return [int(word) for word in text.split()]

  def decode(self, ids: list[int]) -> str:
    return ' '.join(map(str, ids))

  def bos_id(self) -> None:
    return None

  def eos_id(self) -> int:
    return work.EOS_ID

  def pad_id(self) -> int:
    return work.PAD_ID


def make_model(size: work.Size, stop: float) -> Stopping:
  """Random weights, those too that Tunix starts at zero."""
  config = llama3.ModelConfig(
      num_layers=size.layers,
      vocab_size=size.vocab,
      embed_dim=size.width,
      hidden_dim=size.inner,
      num_heads=size.heads,
      head_dim=size.width // size.heads,
      num_kv_heads=size.key_heads,
      rope_theta=10_000,
      norm_eps=1e-6,
      weight_tying=True,
  )
  model = Stopping(config, stop, nnx.Rngs(0))
  rng = np.random.RandomState(0)
  draw = lambda x: x if x.ndim < 2 else jnp.asarray(
      0.02 * rng.standard_normal(x.shape), jnp.float32
  )
  nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
  return model


def make_learner(
    args: argparse.Namespace,
    model: Stopping,
    rollout: base_rollout.RolloutConfig,
    steps: work.Steps,
    *,
    microbatch: int,
) -> grpo_learner.GRPOLearner:
  """Its trainer, and a reward that notes lengths."""
  mesh = jax.make_mesh(
      (1, 1), ('fsdp', 'tp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  roles = rl_cluster_lib.Role
  cluster = rl_cluster_lib.RLCluster(
      actor=model,
      tokenizer=Numbers(),
      cluster_config=rl_cluster_lib.ClusterConfig(
          role_to_mesh=dict.fromkeys(
              (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh
          ),
          rollout_config=rollout,
          training_config=rl_cluster_lib.RLTrainingConfig(
              actor_optimizer=optax.chain(
                  optax.clip_by_global_norm(work.MAX_GRAD_NORM),
                  optax.adamw(
                      work.LEARNING_RATE, weight_decay=work.WEIGHT_DECAY
                  ),
              ),
              max_steps=args.warmup + args.steps + 1,
              eval_every_n_steps=1_000_000,
              mini_batch_size=work.NUM_PROMPTS,
              train_micro_batch_size=microbatch // work.GROUP_SIZE,
              rollout_micro_batch_size=work.NUM_PROMPTS,
              compute_logps_micro_batch_size=work.NUM_PROMPTS,
          ),
      ),
  )

  def reward(prompts, completions, **_):
    tokens = [np.fromstring(x, np.int32, sep=' ') for x in completions]
    # The end token was drawn too, but is not handed on.
    steps.drew(min(len(x) + 1, work.MAX_LENGTH) for x in tokens)
    return [work.reward(x) for x in tokens]

  return grpo_learner.GRPOLearner(
      rl_cluster=cluster,
      reward_fns=reward,
      algo_config=grpo_learner.GRPOConfig(
          num_generations=work.GROUP_SIZE, num_iterations=1, beta=0.0,
          epsilon=0.2,
      ),
  )


def run(args: argparse.Namespace, *, microbatch: int) -> work.Steps:
  """Steps of one setting, the warm-up first."""
  size = work.SIZES[args.size]
  rollout = base_rollout.RolloutConfig(
      max_tokens_to_generate=work.MAX_LENGTH,
      max_prompt_length=work.PROMPT_LENGTH,
      kv_cache_size=work.PROMPT_LENGTH + work.MAX_LENGTH,
      temperature=1.0,
      top_p=1.0,
      top_k=None,
  )
  steps = work.Steps()
  learner = make_learner(
      args, make_model(size, work.STOP[args.lengths]), rollout, steps,
      microbatch=microbatch,
  )
  prompts = [Numbers().decode(x) for x in work.make_prompts(size.vocab)]

  def batches() -> Iterator[dict[str, list[str]]]:
    """A batch is asked for when the step before has ended."""
    for step in range(args.warmup + args.steps):
      # Otherwise every step draws with the same key.
      rollout.seed = 1000 * args.seed + step
      steps.mark()
      yield {'prompts': prompts}
    steps.mark()

  learner.train(batches())
  updates = learner.rl_cluster.actor_trainer.train_steps
  assert updates == args.warmup + args.steps, updates
  return steps


def main():
  args = work.parser(__doc__).parse_args()
  for microbatch in args.microbatches:
    if microbatch % work.GROUP_SIZE:
      raise SystemExit(
          f'A micro-batch of {microbatch} completions is not whole groups of '
          f'{work.GROUP_SIZE}.'
      )
  work.measure(
      'tunix', args, [{'microbatch': x} for x in args.microbatches], run,
      ('google-tunix', 'jax', 'jaxlib', 'flax', 'optax', 'numpy'),
  )


if __name__ == '__main__':
  main()
