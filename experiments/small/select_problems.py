"""Writes the problems that the start model can solve, but not always.

    python experiments/small/select_problems.py

Of the problems of `dppo_jax.tasks.arithmetic`, in an order that a seed gives,
those that 40 completions solve between 20 and 80 % of the time: 1,460 of the
training ones, as many as the sanity test of arXiv:2602.04879 has, and 128 of
the held-out ones.
"""

import itertools
import json
import pathlib
import random
import sys

from absl import app
import jax
import tqdm

# experiments/ is not installed.
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

# ruff: noqa: E402
from dppo_jax import evaluate
from dppo_jax import sampling
from dppo_jax.models import load
from dppo_jax.tasks import arithmetic
from dppo_jax.tasks import prompts
from dppo_jax.tasks.scoring import Scorer
from dppo_jax.tasks.verify import make_verify_fn
from experiments.small import config as small

WANTED = {'train': 1460, 'test': 128}
SAMPLES = 40
LOWEST, HIGHEST = 0.2, 0.8
AT_A_TIME = 100


def shares(rows, key):
  """Yields each problem with the share of its completions that is right."""
  name = small.HERE / 'model'
  model, tokenizer = load.from_pretrained(name), load.load_tokenizer(name)
  verify = make_verify_fn(tokenizer, Scorer(arithmetic.score))
  sample = evaluate.make_sample(sampling.make_sampler(
      model.replace(params=None),
      group_size=SAMPLES,
      max_completion_length=20,
      eos_ids=prompts.end_ids(tokenizer),
      pad_id=tokenizer.pad_token_id,
      temperature=1.0,
  ))
  for number in itertools.count():
    part = rows[number * AT_A_TIME : (number + 1) * AT_A_TIME]
    if len(part) < AT_A_TIME:
      return
    [batch] = prompts.evaluation_batches(
        part, tokenizer, num_prompts=AT_A_TIME, max_prompt_length=4
    )
    _, samples = evaluate.make_evaluate_fn(
        sample=sample,
        batch=batch,
        num_samples=SAMPLES,
        verify=verify,
        key=jax.random.fold_in(key, number),
    )(model.params)
    rewards = samples['rewards'].reshape(AT_A_TIME, SAMPLES)
    yield from zip(part, rewards.mean(axis=1).tolist(), strict=True)


def main(_):
  for split, wanted in WANTED.items():
    rows = arithmetic.problems(split)
    random.Random(0).shuffle(rows)
    kept, seen = [], 0
    with tqdm.tqdm(total=wanted, desc=split) as bar:
      for row, share in shares(rows, jax.random.key(0)):
        seen += 1
        if LOWEST <= share <= HIGHEST and len(kept) < wanted:
          kept.append(row)
          bar.update()
        if len(kept) == wanted:
          break
    if len(kept) < wanted:
      sys.exit(f'Only {len(kept)} of {seen} {split} problems are kept.')
    print(f'{split}: {wanted} of the first {seen} problems.')
    path = small.HERE / f'{split}.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in kept))


if __name__ == '__main__':
  app.run(main)
