"""Models of two sizes with random weights, and what they are called with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dppo_jax.models import causal_lm
from dppo_jax.models import layers
from dppo_jax.models import llama
from dppo_jax.types import Prompts

PROMPT_LENGTH = 32
EOS_ID, PAD_ID = 1, 0
# layers, width, heads, key heads, inner width, vocabulary
SIZES = {
    'tiny': (4, 128, 4, 2, 384, 512),
    'small': (8, 512, 8, 4, 1408, 8192),
}


@dataclasses.dataclass(frozen=True)
class Geometric(causal_lm.CausalLM):
  """Ends a completion with the same probability after every token."""

  stop: float = 0.0  # 0 never ends one.

  def head(self, params, hidden):
    logits = super().head(params, hidden)
    others = logits.at[..., EOS_ID].set(-jnp.inf)
    if not self.stop:
      return others
    odds = np.log(self.stop / (1 - self.stop))
    end = jax.nn.logsumexp(others, axis=-1) + odds
    return logits.at[..., EOS_ID].set(end)


def make_model(size: str, *, mean: float) -> Geometric:
  """A Llama of some size, without parameters; mean 0 for no end."""
  depth, width, heads, key_heads, inner, vocab = SIZES[size]
  config = layers.ModelConfig(
      model_type='llama', vocab_size=vocab, hidden_size=width,
      intermediate_size=inner, num_hidden_layers=depth,
      num_attention_heads=heads, num_key_value_heads=key_heads,
      head_dim=width // heads, rope_theta=10_000.0, rms_norm_eps=1e-6,
      tie_word_embeddings=True, max_position_embeddings=4096,
  )
  return Geometric(config, llama, stop=1 / mean if mean else 0.0)


def make_prompts(num_prompts: int, vocab: int) -> Prompts:
  """Random tokens, without padding."""
  rng = np.random.RandomState(0)
  tokens = rng.randint(2, vocab, (num_prompts, PROMPT_LENGTH), np.int32)
  return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def make_inputs(model: Geometric, num_prompts: int):
  """Parameters, prompts and the key that draws completions, always the same.

  By `sampling.row_keys` of that key, so every script that asks for as many
  completions of the same mean and limit gets the same tokens.
  """
  prompts = make_prompts(num_prompts, model.config.vocab_size)
  return model.init(jax.random.key(0)), prompts, jax.random.key(1)


def operations(config, tokens, sampled, pairs) -> float:
  """Of a forward pass: read tokens, sampled ones, and visible pairs."""
  width, inner = config.hidden_size, config.intermediate_size
  queries = config.num_attention_heads * config.head_dim
  keys = config.num_key_value_heads * config.head_dim
  kernels = width * (2 * queries + 2 * keys) + 3 * width * inner
  of_layers = config.num_hidden_layers * (
      2 * kernels * tokens + 4 * queries * pairs
  )
  return of_layers + 2 * width * config.vocab_size * sampled
