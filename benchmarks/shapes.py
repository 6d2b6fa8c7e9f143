"""Models of two sizes with random weights, and what they are called with."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import work
from dppo_jax.models import causal_lm
from dppo_jax.models import layers
from dppo_jax.models import llama
from dppo_jax.types import Prompts

PROMPT_LENGTH = work.PROMPT_LENGTH
EOS_ID, PAD_ID = work.EOS_ID, work.PAD_ID


@dataclasses.dataclass(frozen=True)
class Stopping(causal_lm.CausalLM):
  """Ends a completion with the same probability after every token."""

  stop: float = 0.0  # 0 never ends one.

  def head(self, params, hidden):
    """With the logit of the end token that makes it so likely.

    Logits of random weights are normal, of one scale everywhere: the sum of
    their exponentials is nearly the same for all tokens, and not computed.
    """
    logits = super().head(params, hidden)
    end = -np.inf
    if self.stop:
      variance = causal_lm.INIT_SCALE**2 * self.config.hidden_size
      odds = self.stop / (1 - self.stop)
      end = np.log(odds * (self.config.vocab_size - 1)) + variance / 2
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids == EOS_ID, jnp.float32(end), logits)


def architecture(size: work.Size) -> layers.ModelConfig:
  """Of a Llama."""
  return layers.ModelConfig(
      model_type='llama', vocab_size=size.vocab, hidden_size=size.width,
      intermediate_size=size.inner, num_hidden_layers=size.layers,
      num_attention_heads=size.heads, num_key_value_heads=size.key_heads,
      head_dim=size.width // size.heads, rope_theta=10_000.0, rms_norm_eps=1e-6,
      tie_word_embeddings=True, max_position_embeddings=4096,
  )


def make_model(size: str, *, mean: float) -> causal_lm.CausalLM:
  """A Llama of some size, without parameters; see `end_id` for mean 0."""
  config = architecture(work.SIZES[size])
  if not mean:
    return causal_lm.CausalLM(config, llama)
  return Stopping(config, llama, stop=1 / mean)


def end_id(mean: float) -> int:
  """The token that ends a completion; with mean 0 what no token is.

  So what decodes a fixed length need not hide the end token in its logits,
  which no real model does.
  """
  return EOS_ID if mean else -1


def make_prompts(num_prompts: int, vocab: int) -> Prompts:
  """Random tokens, without padding."""
  rng = np.random.RandomState(0)
  tokens = rng.randint(2, vocab, (num_prompts, PROMPT_LENGTH), np.int32)
  return Prompts(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))


def make_inputs(model: causal_lm.CausalLM, num_prompts: int):
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
