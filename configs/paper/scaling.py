"""The scaling experiments of DPPO: App. E, Table 1 of arXiv:2602.04879.

    python -m dppo_jax.main --config=configs/paper/scaling.py:dense_base

A column of that table for each name, with Binary-TV; the paper's other
algorithms follow a comma, `scaling.py:moe_base,cispo`. Sizes and learning rate
are the paper's; its data are a filtered part of DAPO-Math, about 13,000
problems, where this reads all of open-r1's copy from the hub. Weight decay,
betas and gradient clipping are not stated there and stay as in default.py;
mesh, types, slots, micro-batches, chunks and the projections that LoRA adapts
are ours. Nobody has run these here: tests build and trace them, docs/scale.md
says what they would hold on each device.
"""

from configs import default
from dppo_jax import tasks

# The paper's thresholds and cap, App. E; those of the algorithms' own rows are
# from its sanity test.
ALGORITHMS = {
    'dppo_binary_tv': {'threshold': 0.2},
    'dppo_binary_kl': {'threshold': 0.05},
    'grpo_clip_higher': {'threshold_low': 0.2, 'threshold_high': 0.27},
    'cispo': {},
}
LORA_THRESHOLD = 0.15  # Of Binary-TV in that column.
_MOE = {
    'model': 'Qwen/Qwen3-30B-A3B-Base',
    'max_completion_length': 16384,
    'num_prompts': 256,
    'group_size': 16,
    'num_minibatches': 8,  # Of 32 prompts.
    'num_microbatches': 8,
    'total_steps': 200,
    'eval_every': 5,
    # 256 devices. Four is all that key and value heads can be split into.
    'mesh': {'data': 1, 'fsdp': 64, 'tensor': 4, 'expert': 1},
}
COLUMNS = {
    'moe_base': _MOE,
    'moe_base_r3': _MOE | {'router_replay': True},
    'moe_thinking': _MOE | {'model': 'Qwen/Qwen3-30B-A3B', 'total_steps': 250},
    'dense_base': {
        'model': 'Qwen/Qwen3-8B-Base',
        'max_completion_length': 8000,
        'num_prompts': 128,
        'group_size': 8,
        'num_minibatches': 4,  # Of 32 prompts.
        'num_microbatches': 16,
        'total_steps': 1300,
        'eval_every': 10,
        # 64 devices.
        'mesh': {'data': 1, 'fsdp': 16, 'tensor': 4, 'expert': 1},
    },
    'moe_base_lora': _MOE | {
        'max_completion_length': 8000,
        'num_prompts': 128,
        'group_size': 8,
        'num_minibatches': 8,  # Of 16 prompts.
        'num_microbatches': 2,
        'total_steps': 900,
        'eval_every': 10,
        'learning_rate': 1e-5,
        'lora': {'rank': 32, 'alpha': 64.0, 'targets': ('q', 'k', 'v', 'o')},
        # 64 devices.
        'mesh': {'data': 1, 'fsdp': 16, 'tensor': 4, 'expert': 1},
    },
}


def get_config(which: str = 'dense_base'):
  """The config of `column` or `column,algorithm`."""
  column, _, algorithm = which.partition(',')
  algorithm = algorithm or 'dppo_binary_tv'
  for name, known in ((column, COLUMNS), (algorithm, ALGORITHMS)):
    if name not in known:
      raise ValueError(
          f'scaling.py has no {name!r}, only {", ".join(known)}.'
      )
  sizes = COLUMNS[column]
  config = default.get_config(algorithm)
  config.unlock()
  config.divergence.update(ALGORITHMS[algorithm])
  if 'lora' in sizes:
    config.lora = sizes['lora']
    if algorithm == 'dppo_binary_tv':
      config.divergence.threshold = LORA_THRESHOLD
  config.loss.ratio_cap = 5.0
  config.task = tasks.config('math', **tasks.math.preset('dapo_math_17k'))
  config.scoring.num_workers = 16
  config.model.name = sizes['model']
  config.model.dtype = config.sampling.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.model.router_replay = sizes.get('router_replay', False)
  config.max_prompt_length = 1024
  for name in ('max_completion_length', 'num_prompts', 'group_size',
               'total_steps'):
    config[name] = sizes[name]
  config.learner.num_minibatches = sizes['num_minibatches']
  config.learner.num_microbatches = sizes['num_microbatches']
  config.learner.chunk_size = 2048
  # A quarter of the completions at a time: lengths differ by a lot.
  config.sampling.num_slots = config.num_prompts * config.group_size // 4
  config.optimizer.learning_rate = sizes.get('learning_rate', 1e-6)
  config.optimizer.schedule = 'constant'
  config.eval.update({
      'every': sizes['eval_every'],
      'num_prompts': 30,
      'num_samples': 32,
      'temperature': 0.7,
      'top_p': 0.95,
  })
  config.mesh.update(sizes['mesh'])
  config.lock()
  return config
