"""The sanity test of DPPO: Sec. 5 and App. C of arXiv:2602.04879.

    python -m dppo_jax.main --config=configs/paper/sanity.py

All problems are ones that the start model solves in 20 % to 80 % of 40 tries
(1,460 of MATH, which are yours to find), so a stable algorithm must solve
nearly all of them in the end. bfloat16 throughout, to have a mismatch of
sampling and training. Another algorithm follows a colon: `sanity.py:minirl`.
Rows of docs/algorithms.md have the numbers of this test. Mesh, micro-batches
and chunks are ours; nobody has run it here.
"""

from configs import default
from dppo_jax import tasks


def get_config(algorithm: str = 'dppo_binary_tv'):
  """64 prompts x 8, a context of 8,000 tokens, 4 updates."""
  config = default.get_config(algorithm)
  config.unlock()
  config.task = tasks.config(
      'jsonl',
      train_path='data/math_solvable.jsonl',
      test_path='data/aime_2024.jsonl',
      scorer='boxed_math',
      chat_template=True,
  )
  config.scoring.num_workers = 16
  config.model.name = 'deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B'
  config.model.dtype = config.sampling.dtype = 'bfloat16'
  config.model.remat = 'full'
  config.max_prompt_length = 1024
  config.max_completion_length = 8000 - 1024
  config.num_prompts, config.group_size = 64, 8
  config.total_steps = 3500
  config.learner.num_minibatches = 4
  config.learner.num_microbatches = 16
  config.learner.chunk_size = 1024
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = 'constant'
  config.eval.update({
      'every': 16,
      'num_prompts': 30,
      'num_samples': 32,
      'temperature': 0.6,
      'top_p': 0.95,
  })
  # Eight devices.
  config.mesh.update(data=1, fsdp=8)
  config.lock()
  return config
