"""A step of TRL: its `GRPOTrainer` with `generate` of transformers, on a CPU.

    python benchmarks/peers/trl_grpo.py --size=tiny --lengths=geometric \
        --microbatches=8,16,32

Needs trl and a CPU build of torch, not dppo_jax. All completions are sampled by
one call, activations are kept (TRL recomputes them by default), and no
reference policy is computed (beta = 0).
"""

import argparse
import functools
import pathlib
import sys
import tempfile

# benchmarks/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
import datasets
import tokenizers
import torch
import transformers
import trl

from benchmarks.peers import work


class Stopping(transformers.LogitsProcessor):
  """Ends a completion with the same probability after every token.

  A coin for each row and one column that is written: less than any change of
  the model would cost.
  """

  def __init__(self, stop: float):
    self.stop = stop

  def __call__(self, input_ids, scores):
    ends = torch.rand(len(scores)) < self.stop
    scores[:, work.PAD_ID] = -torch.inf
    scores[:, work.EOS_ID] = torch.where(ends, 1e9, -torch.inf)
    return scores


class Timer(transformers.TrainerCallback):
  """Marks the ends of optimizer steps."""

  def __init__(self, steps: work.Steps):
    self.steps = steps

  def on_train_begin(self, *_, **__):
    self.steps.mark()

  def on_step_end(self, *_, **__):
    self.steps.mark()


def make_model(size: work.Size, stop: float) -> transformers.LlamaForCausalLM:
  """Random weights."""
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
      vocab_size=size.vocab,
      hidden_size=size.width,
      intermediate_size=size.inner,
      num_hidden_layers=size.layers,
      num_attention_heads=size.heads,
      num_key_value_heads=size.key_heads,
      head_dim=size.width // size.heads,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      max_position_embeddings=4096,
      bos_token_id=None,
      eos_token_id=work.EOS_ID,
      pad_token_id=work.PAD_ID,
  ))
  # TRL has no option for it.
  model.generate = functools.partial(
      model.generate, logits_processor=[Stopping(stop)]
  )
  return model


def make_tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
  """Its words are the numbers of the tokens."""
  words = {str(x): x for x in range(vocab)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=tokenizer,
      pad_token=str(work.PAD_ID),
      eos_token=str(work.EOS_ID),
      padding_side='left',
  )


def make_trainer(
    args: argparse.Namespace, steps: work.Steps, folder: str, *, microbatch: int
) -> trl.GRPOTrainer:
  """Its trainer, and a reward that notes lengths."""
  size = work.SIZES[args.size]
  num_steps = args.warmup + args.steps
  num_parts = work.BATCH // microbatch

  def reward(completion_ids, **_):
    steps.drew(map(len, completion_ids))
    return [work.reward(x) for x in completion_ids]

  prompts = work.make_prompts(size.vocab, work.NUM_PROMPTS * num_steps)
  return trl.GRPOTrainer(
      model=make_model(size, work.STOP[args.lengths]),
      processing_class=make_tokenizer(size.vocab),
      reward_funcs=reward,
      train_dataset=datasets.Dataset.from_dict(
          {'prompt': [' '.join(map(str, x)) for x in prompts]}
      ),
      callbacks=[Timer(steps)],
      args=trl.GRPOConfig(
          output_dir=folder,
          seed=args.seed,
          use_cpu=True,
          bf16=False,
          gradient_checkpointing=False,
          dataloader_pin_memory=False,
          report_to='none',
          save_strategy='no',
          logging_strategy='no',
          disable_tqdm=True,
          max_steps=num_steps,
          per_device_train_batch_size=microbatch,
          gradient_accumulation_steps=num_parts,
          num_generations=work.GROUP_SIZE,
          max_completion_length=work.MAX_LENGTH,
          temperature=1.0,
          top_p=1.0,
          top_k=0,
          beta=0.0,
          epsilon=0.2,
          loss_type='grpo',
          learning_rate=work.LEARNING_RATE,
          lr_scheduler_type='constant',
          weight_decay=work.WEIGHT_DECAY,
          max_grad_norm=work.MAX_GRAD_NORM,
      ),
  )


def run(args: argparse.Namespace, *, microbatch: int) -> work.Steps:
  """Steps of one setting, the warm-up first."""
  steps = work.Steps()
  with tempfile.TemporaryDirectory() as folder:
    trainer = make_trainer(args, steps, folder, microbatch=microbatch)
    trainer.train()
  assert trainer.state.global_step == args.warmup + args.steps
  dtypes = {x.dtype for x in trainer.model.parameters()}
  assert dtypes == {torch.float32}, dtypes
  return steps


def main():
  args = work.parser(__doc__).parse_args()
  work.measure(
      'trl', args, [{'microbatch': x} for x in args.microbatches], run,
      ('trl', 'torch', 'transformers', 'accelerate', 'numpy'),
  )


if __name__ == '__main__':
  main()
