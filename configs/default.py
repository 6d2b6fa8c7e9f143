"""Every option of a run and its default; other configs edit this one's result.

`--config=configs/default.py:grpo` runs any row of `dppo_jax.algorithms`. The
model and the task are the embedded ones: a Qwen3 of 1.2 M parameters that
samples integer arithmetic right about half of the time.
"""

import ml_collections

from dppo_jax import algorithms
from dppo_jax import optim
from dppo_jax import shaping
from dppo_jax import tasks


def get_config(algorithm: str = 'dppo_topk_tv') -> ml_collections.ConfigDict:
  """The config of one row of the table of algorithms."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  _what(config)
  _how(config, algorithm)
  _step(config)
  _where(config)
  config.lock()
  return config


def _what(config):
  """What is trained, on what."""
  config.model = {
      # Or a Hugging Face folder or hub name, a GGUF file, or a package of one.
      'name': 'embedded',
      'dtype': 'float32',  # Of the computation.
      # Of the parameters; bfloat16 keeps a float32 copy in the optimizer.
      'params_dtype': 'float32',
      # What the backward pass computes again: none, full (all but a layer's
      # input), or all but what products, dots_saveable or
      # dots_with_no_batch_dims_saveable keep, docs/scale.md.
      'remat': 'none',
      # Compile the learner's layers one by one: no copies into arrays of all of
      # them, but longer to compile. For accelerators, docs/scale.md.
      'unroll_layers': False,
      # Among the tokens of rows: by XLA, by a kernel (splash for TPU, cudnn for
      # NVIDIA), or auto, docs/models.md.
      'attention': 'auto',
      # Learn with the experts that were taken while sampling (R3).
      'router_replay': False,
  }
  # What of it is trained: everything, or adapters beside every such projection.
  config.lora = {
      'rank': 0,  # Of the adapters; 0 for none.
      'alpha': 32.0,  # kernel + alpha / rank * a @ b.
      'targets': ('q', 'k', 'v', 'o', 'gate', 'up', 'down'),
  }
  # (regular expression, factor of the learning rate) pairs, the first that is
  # found in `layers/3/attention/q/kernel` counts; 0 freezes: (('embed', 0.0),).
  config.learning_rates = ()
  config.task = tasks.config('arithmetic')
  config.scoring = {
      'num_workers': 0,  # Verifier processes; 0 scores in the main one.
      'timeout_s': 10.0,  # Of one verification in a worker; then reward 0.
  }


def _how(config, algorithm):
  """Divergence, trust region, anchor, loss, dual, advantage, normalizer.

  These come from the table; what is beside them applies to every row.
  """
  config.update(algorithms.config(algorithm))
  config.shaping = shaping.config('unshaped')
  config.extras = {
      'entropy_bonus': 0.0,
      'kl_coefficient': 0.0,  # Of kl(target || start model); 0 keeps no copy.
      'kl_estimator': 'k3',  # k1, k2, k3 or full.
      'kl_where': 'loss',  # Or reward.
      'router_balance': 0.0,  # Of a mixture of experts' balance loss.
  }
  config.mask_truncated = False  # True: such completions teach nothing.
  config.num_groups = 0  # To learn from, those with spread first; 0 for all.
  # True: groups whose rewards are all equal count in no denominator. With
  # num_groups below num_prompts that is DAPO's dynamic sampling.
  config.drop_groups_without_spread = False
  config.optimizer = optim.config(
      'adamw', learning_rate=3e-4, schedule='linear'
  )


def _step(config):
  """What a step does."""
  # One program learns and samples, or two do: fused or split, docs/scale.md.
  config.mode = 'fused'
  # A step: roll out num_prompts * group_size completions, then learn from them
  # in num_epochs * num_minibatches optimizer updates.
  config.total_steps = 100
  config.num_prompts = 32
  config.group_size = 8
  config.max_prompt_length = 4  # Tokens; longer prompts are refused.
  config.max_completion_length = 20  # Tokens; longer ones are truncated.
  config.stop = ()  # Texts; a token that holds one ends a completion, as eos.
  # Old data. A step learns from what was sampled with the weights of so many
  # steps ago; beside that, from groups of the rollouts before.
  config.staleness = 0
  config.replay = {
      'capacity': 0,  # Rollouts; 0 for no buffer.
      'ratio': 1.0,  # Replayed groups for each fresh one.
      'sampling': 'uniform',  # Or recent, or ess: largest effective samples.
      'max_age': 32,  # Optimizer updates; older data are not used.
  }
  config.sampling = {
      'temperature': 1.0,
      'top_p': 1.0,  # Training takes no other value, see checks.py.
      'top_k': 0,
      # Of what the sampler computes; the learner has model.dtype.
      'dtype': 'float32',  # Or bfloat16, float16.
      # Of what it keeps: a layer's weights, keys and values; '' as computed, or
      # int8 or float8_e4m3fn.
      'weights_dtype': '',
      'cache_dtype': '',
      # Of a token that is decoded to its completion: by XLA, by a kernel
      # (triton for NVIDIA), or auto, docs/models.md.
      'attention': 'auto',
      # Completions decoded at a time, over all devices: when one ends, the next
      # takes its slot. 0 decodes all at once, until the longest has ended.
      'num_slots': 0,
      # How often slots are halved as the last completions end. Saves time where
      # a step costs less for fewer rows; each compiles another loop.
      'num_halvings': 0,
      # Equal steps to each half: 2 go on with 3/4 in between, compiled as well.
      'halving_steps': 1,
      # Loops that decode all at once, with a cache that grows from one to the
      # next: without a kernel a step reads all of it. Each is compiled. 0: one
      # for each 128 tokens, at most 4; 1 with a kernel. Evaluation, too.
      'num_stages': 0,
      # Devices over which the sampler splits heads and experts; the others
      # share rows. 0 as in mesh below.
      'mesh': {'tensor': 0, 'expert': 0},
      # The last so many devices only sample, mesh below is over the others;
      # needs mode split. 0: the same devices learn and sample.
      'num_devices': 0,
  }
  config.learner = {
      'num_epochs': 1,
      'num_minibatches': 4,
      # Parts of a mini-batch, gradients added up; with packed rows as many as
      # the completions fill, at most so many. 0: about as few as fit.
      'num_microbatches': 1,
      # Slots of a packed row: completions next to each other, behind their
      # prompt. 0 for a row as long as the longest for each completion.
      'row_length': 0,
      # The update of the policy that sampled takes what weights made of each
      # token from the sampler. Needs one update a rollout, one program on one
      # device, a sampler in the model's dtype, and memory: see docs/scale.md.
      'reuse_forward': False,
      # How often packed rows are halved where a part of a mini-batch leaves the
      # other half empty, as the last may. Each compiles another learner.
      'num_halvings': 0,
      # Equal steps to each half: 2 take 3/4 in between, compiled as well.
      'halving_steps': 1,
      # Rows as sampled, with a prompt computed once for its group. A
      # mini-batch then consists of whole groups.
      'share_prompts': False,
      # Sampled tokens of a device whose logits exist at a time; 0: all.
      'chunk_size': 0,
  }
  config.max_nonfinite_updates = 8  # In a row; then the run stops.


def _where(config):
  """How it is evaluated, where it runs and what it writes."""
  config.eval = {
      'every': 20,  # Steps; also before the first and after the last.
      'num_prompts': 128,
      'num_samples': 8,  # k of avg@k, the largest k of pass@k.
      'temperature': 1.0,
      'top_p': 1.0,
      'top_k': 0,
      'num_slots': 0,  # As sampling.num_slots.
  }

  # Devices along each axis, -1 for the rest.
  config.mesh = {
      'data': -1,  # Rows; each has all parameters.
      'fsdp': 1,  # Rows; each has a part of every parameter.
      'tensor': 1,  # Heads, widths, vocabulary.
      'expert': 1,  # Experts.
      'sequence': 1,  # Tokens of the learner's rows, for long ones.
  }
  config.checkpoint_every = 20  # Steps; also after the last.
  config.keep_checkpoints = 3
  config.tensorboard = True
  # Compiled programs are kept here, so the next start is faster; '' for none.
  config.compilation_cache = '~/.cache/dppo_jax'
  config.profile_steps = 0  # So many are traced, to WORKDIR/profile.
  config.wandb = False
