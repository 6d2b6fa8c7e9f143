"""From rows of text to arrays: tokenizing, batching, shuffling, resuming.

N prompts of P tokens, padded on the left so that all completions start at the
same position. P is always `max_prompt_length`: one shape, one compilation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import hashlib
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from dppo_jax import processes
from dppo_jax import types
from dppo_jax.tasks import base

# More than any run reads.
_NUM_EPOCHS = 1_000_000
# All prompts are tokenized once before training starts, so that one which is
# too long is found now and not after a night.
_CHECK_AT_ONCE = 1_000


class PromptBatch(NamedTuple):
  """Prompts as the compiled step takes them, and as people read them.

  Of several processes each has the texts and answers of its own rows only.
  """

  prompts: types.Prompts  # [N, P], NumPy arrays unless they were placed.
  texts: list[str]  # N
  answers: list[str]  # N


def prepare(
    task: base.Task, tokenizer: Any, *, max_prompt_length: int
) -> base.Task:
  """The task with every prompt as the text that the model will continue.

  Args:
    task: its prompts are texts or lists of messages.
    tokenizer: of transformers, with a chat template if the task wants one.
    max_prompt_length: P; a task that drops long prompts drops those above.

  Returns:
    the task, whose prompts are texts. Where a template made them they hold its
    special tokens already: encode them with `add_special_tokens=False`.

  Raises:
    ValueError: rows are no sequence, or one lacks a prompt or an answer; the
      tokenizer has no template, the template refuses a prompt, a conversation
      has none to go through, or every prompt is too long.
  """
  if task.chat is not None and not getattr(tokenizer, 'chat_template', None):
    raise ValueError(
        'config.task.chat_template=True, but the tokenizer of this model has '
        'no chat template. Use a model that was tuned on conversations, or '
        'chat_template=False.'
    )
  sources = {}
  for split in ('train', 'test'):
    rows = _as_texts(getattr(task, split), task.chat, tokenizer, split=split)
    if task.drop_long_prompts:
      rows = _drop_long(
          rows,
          tokenizer,
          split=split,
          max_prompt_length=max_prompt_length,
          add_special_tokens=task.chat is None,
      )
    sources[split] = rows
  return task._replace(**sources)


def _as_texts(
    source: base.Source,
    chat: base.Chat | None,
    tokenizer: Any,
    *,
    split: str,
) -> base.Source:
  """Rows whose prompts are texts; the source itself if they are already."""
  if chat is None and all(
      isinstance(row['prompt'], str) for row in _checked_rows(source, split)
  ):
    return source
  return [
      row | {'prompt': _text(row, chat, tokenizer)}
      for row in _checked_rows(source, split)
  ]


def _checked_rows(source: base.Source, split: str) -> Iterator[dict[str, Any]]:
  """The rows, or a ValueError that says what one needs."""
  needed = (
      'a row is {"prompt": ..., "answer": ...}, and a prompt a text or a list '
      'of messages {"role": ..., "content": ...}'
  )
  if isinstance(source, Mapping) or not all(
      hasattr(source, method) for method in ('__len__', '__getitem__')
  ):
    raise ValueError(
        f'{split} of the task is a {type(source).__name__}; make it a list of '
        f'rows, or what has len() and an index like one: {needed}.'
    )
  for i in range(len(source)):
    row = source[i]
    if not isinstance(row, Mapping):
      raise ValueError(
          f'{split}[{i}] of the task is a {type(row).__name__}; {needed}.'
      )
    for field in ('prompt', 'answer'):
      if field not in row:
        raise ValueError(
            f'{split}[{i}] of the task has no {field!r}, but '
            f'{", ".join(map(repr, row)) or "nothing"}; {needed}.'
        )
    prompt = row['prompt']
    if not (isinstance(prompt, str) or base.is_conversation(prompt)):
      raise ValueError(
          f'{split}[{i}] of the task has as prompt a {type(prompt).__name__}, '
          f'{base.shown(str(prompt))}; {needed}.'
      )
    for text in base.texts(prompt):
      base.require_unicode(f'{split}[{i}] of the task: prompt', text)
    yield row


def _text(row: dict[str, Any], chat: base.Chat | None, tokenizer: Any) -> str:
  messages = row['prompt']
  if isinstance(messages, str):
    messages = [{'role': 'user', 'content': messages}]
  roles = [message['role'] for message in messages]
  if chat is None:
    if roles == ['user']:
      return messages[0]['content']
    raise ValueError(
        f'A prompt is a conversation of {", ".join(roles)}; set '
        'config.task.chat_template=True to put it into words.'
    )
  if chat.system_prompt:
    if 'system' in roles:
      raise ValueError(
          'A prompt has a system message of its own; leave '
          'config.task.system_prompt empty.'
      )
    messages = [{'role': 'system', 'content': chat.system_prompt}, *messages]
  try:
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
  except ImportError:
    raise
  except Exception as error:  # Templates are programs; Jinja has many errors.
    raise ValueError(
        f'The chat template refuses a conversation of '
        f'{", ".join(m["role"] for m in messages)}: '
        f'{" ".join(str(error).split()).rstrip(".")}.'
    ) from error


def _drop_long(
    source: base.Source,
    tokenizer: Any,
    *,
    split: str,
    max_prompt_length: int,
    add_special_tokens: bool,
) -> list[dict[str, Any]]:
  rows = [source[i] for i in range(len(source))]
  kept = []
  for start in range(0, len(rows), _CHECK_AT_ONCE):
    part = rows[start : start + _CHECK_AT_ONCE]
    ids = _tokenize(
        [row['prompt'] for row in part], tokenizer, add_special_tokens
    )
    kept += [
        row
        for row, row_ids in zip(part, ids, strict=True)
        if len(row_ids) <= max_prompt_length
    ]
  if not kept:
    raise ValueError(
        f'All {len(rows)} {split} prompts have more tokens than '
        f'config.max_prompt_length={max_prompt_length}; raise it.'
    )
  if len(kept) < len(rows):
    logging.info(
        'Dropped %d of %d %s prompts of more than %d tokens.',
        len(rows) - len(kept), len(rows), split, max_prompt_length,
    )
  return kept


def _tokenize(
  texts: Sequence[str],
  tokenizer: Any,
  add_special_tokens: bool,
  vocab_size: int | None = None,
) -> list[list[int]]:
  if not texts:
    return []
  rows = tokenizer(
    list(texts), verbose=False, add_special_tokens=add_special_tokens
  )['input_ids']
  for text, row in zip(texts, rows, strict=True):
    if vocab_size is not None and max(row, default=0) >= vocab_size:
      raise ValueError(
        f'prompt {base.shown(text)} holds '
        f'{tokenizer.convert_ids_to_tokens(max(row))!r}, token {max(row)} of '
        f'the tokenizer, and the model embeds {vocab_size} only (vocab_size of '
        'its config). Take it out of the prompt or the chat template.'
      )
  start = getattr(tokenizer, 'bos_token_id', None)
  if not add_special_tokens or start is None:
    return rows
  # A text that a template made elsewhere begins with one already. Two that it
  # has itself are two to a tokenizer that adds none.
  if not tokenizer.num_special_tokens_to_add():
    return rows
  return [row[1:] if row[:2] == [start, start] else row for row in rows]


def encode(
  texts: Sequence[str],
  tokenizer: Any,
  *,
  max_prompt_length: int,
  source_name: str = '',
  add_special_tokens: bool = True,
  vocab_size: int | None = None,
) -> types.Prompts:
  """Tokenizes prompts and pads them on the left.

  Args:
    texts: N prompts.
    tokenizer: of transformers, with a pad token.
    max_prompt_length: P.
    source_name: where the prompts come from, for messages.
    add_special_tokens: False for texts that a chat template made, which have
      them already.
    vocab_size: tokens that the model embeds; a tokenizer may have others.

  Returns:
    tokens [N, P] int32 and mask [N, P] bool, NumPy arrays.

  Raises:
    ValueError: a prompt has more than P tokens, none, or one that the model
      does not embed.
  """
  rows = _tokenize(texts, tokenizer, add_special_tokens, vocab_size)
  shape = (len(rows), max_prompt_length)
  tokens = np.full(shape, tokenizer.pad_token_id, np.int32)
  mask = np.zeros(shape, bool)
  for i, row in enumerate(rows):
    _check_length(texts[i], len(row), max_prompt_length, source_name)
    tokens[i, max_prompt_length - len(row) :] = row
    mask[i, max_prompt_length - len(row) :] = True
  return types.Prompts(tokens, mask)


def _check_length(text: str, length: int, limit: int, source_name: str):
  if 0 < length <= limit:
    return
  prefix = f'{source_name}: ' if source_name else ''
  if length == 0:
    raise ValueError(
      f'{prefix}prompt {base.shown(text)} has no tokens; there is nothing to '
      'continue.'
    )
  raise ValueError(
    f'{prefix}prompt {base.shown(text)} has {length} tokens, more than '
    f'max_prompt_length={limit}; raise config.max_prompt_length, shorten the '
    'prompt, or leave it out with config.task.drop_long_prompts=True, if the '
    'task has that.'
  )


def _checked(
  rows: base.Source,
  tokenizer: Any,
  *,
  max_prompt_length: int,
  add_special_tokens: bool,
  vocab_size: int | None,
) -> str:
  """Refuses prompts of no tokens or too many, and says of how many.

  Returns:
    a digest of prompts, and of answers that are texts, which tells them from
    others.
  """
  digest, num_long, longest = hashlib.sha256(), 0, ('', 1)
  for start in range(0, len(rows), _CHECK_AT_ONCE):
    stop = min(start + _CHECK_AT_ONCE, len(rows))
    some = [rows[i] for i in range(start, stop)]  # Which may read a file.
    texts = [row['prompt'] for row in some]
    ids = _tokenize(texts, tokenizer, add_special_tokens, vocab_size)
    for row, text, length in zip(some, texts, map(len, ids), strict=True):
      if not length:
        _check_length(text, length, max_prompt_length, 'To learn from')
      num_long += length > max_prompt_length
      longest = max(longest, (text, length), key=lambda x: x[1])
      digest.update(_bytes(text, row['answer']))
  _check_length(
    *longest,
    max_prompt_length,
    f'{num_long:,} of {len(rows):,} to learn from are too long, the longest',
  )
  return digest.hexdigest()[:16]


def _require_open_end(tokenizer: Any, prompt: str) -> None:
  """Raises a ValueError if an end token would stand behind each prompt.

  Seen by one of them: of other texts the tokenizer may know no token, and what
  it begins with, which may be its end token, would stand alone.
  """
  ends, bare = (_tokenize([prompt], tokenizer, x)[0] for x in (True, False))
  end = getattr(tokenizer, 'eos_token_id', None)
  if bare and ends[-1:] == [end] != bare[-1:]:
    raise ValueError(
      f'The tokenizer of this model puts its end {tokenizer.eos_token!r} '
      'behind every text, so completions would follow an end. Take that out '
      'of its files (add_eos_token in tokenizer_config.json, post_processor '
      'in tokenizer.json), or use config.task.chat_template=True.'
    )


def _bytes(prompt: str, answer: Any) -> bytes:
  """What a digest knows of a row."""
  return repr((prompt, answer if isinstance(answer, str) else None)).encode()


def check_same_rows(prompts: 'PromptIterator', held_out: PromptBatch) -> None:
  """Raises a ValueError on all processes if one has read other rows.

  Its file may be an older one, or half a copy.

  Args:
    prompts: to learn from.
    held_out: all that is evaluated on.
  """
  digest = hashlib.sha256()
  for row in zip(held_out.texts, held_out.answers, strict=True):
    digest.update(_bytes(*row))
  found = processes.differences({
      'held-out': f'{len(held_out.texts)} of digest {digest.hexdigest()[:16]}',
      'training': prompts.describe_rows(),
  })
  for x in found:
    raise ValueError(
        f'Process {x.process} reads other {x.name} rows than process 0 '
        f'({x.value}; process 0 {x.of_first}). Give the task of all of them, '
        'config.task, the same data.'
    )


def end_ids(
  tokenizer: Any, stop: Sequence[str] = (), others: Sequence[int] = ()
) -> tuple[int, ...]:
  """Tokens that end a completion: end tokens, and all that hold a stop.

  Args:
    tokenizer: of transformers, with an end token.
    stop: texts, for example a line feed, which many tokens may hold, or a
      special token. One that only several tokens together spell does not end a
      completion.
    others: end tokens that the model names, see `ModelConfig.eos_token_ids`.

  Raises:
    ValueError: no token holds a stop.
  """
  ids = {tokenizer.eos_token_id, *others}
  if not stop:
    return tuple(sorted(ids))
  rows = [[i] for i in range(len(tokenizer))]
  texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
  special = tokenizer.get_added_vocab()
  for wanted in stop:
    found = {i for i, text in enumerate(texts) if wanted and wanted in text}
    if wanted in special:
      found.add(special[wanted])
    if not found:
      raise ValueError(
        f'No token of the tokenizer holds config.stop {wanted!r}; use a '
        'shorter text, which a single token holds.'
      )
    ids |= found
  return tuple(sorted(ids))


def evaluation_batches(
  source: base.Source,
  tokenizer: Any,
  *,
  num_prompts: int,
  max_prompt_length: int,
  batch_size: int | None = None,
  add_special_tokens: bool = True,
  vocab_size: int | None = None,
) -> list[PromptBatch]:
  """The same prompts each time: rows spread evenly over the source.

  Args:
    source: rows, usually `task.test`.
    tokenizer: of transformers.
    num_prompts: how many rows to take.
    max_prompt_length: P.
    batch_size: N; all in one batch if not given. The last batch is shorter if
      `num_prompts` is not a multiple.
    add_special_tokens: see `encode`.
    vocab_size: see `encode`.

  Raises:
    ValueError: fewer rows than `num_prompts`, or a prompt that is too long.
  """
  if not 0 < num_prompts <= len(source):
    raise ValueError(
      f'There are {len(source)} prompts to evaluate on, not num_prompts='
      f'{num_prompts} (config.eval.num_prompts of a run); use 1 to '
      f'{len(source)}.'
    )
  rows = [source[i * len(source) // num_prompts] for i in range(num_prompts)]
  batch_size = batch_size or num_prompts
  return [
    _make_batch(
      rows[i : i + batch_size],
      tokenizer,
      max_prompt_length=max_prompt_length,
      add_special_tokens=add_special_tokens,
      vocab_size=vocab_size,
    )
    for i in range(0, num_prompts, batch_size)
  ]


def _make_batch(
  rows: Sequence[dict[str, str]], tokenizer: Any, **options
) -> PromptBatch:
  texts = [row['prompt'] for row in rows]
  answers = [row['answer'] for row in rows]
  prompts = encode(texts, tokenizer, **options)
  return PromptBatch(prompts, texts, answers)


class PromptIterator:
  """Endless batches of prompts, in another order each epoch.

  The order follows from `seed` alone. No row is dropped: a batch may begin in
  one epoch and end in the next. Of several processes each reads only its rows
  of a batch, which is the same for any number of them.
  """

  def __init__(
    self,
    source: base.Source,
    tokenizer: Any,
    *,
    num_prompts: int,
    max_prompt_length: int,
    seed: int,
    share: processes.Share | None = None,
    place: Callable[[types.Prompts], types.Prompts] = lambda prompts: prompts,
    add_special_tokens: bool = True,
    vocab_size: int | None = None,
  ):
    """Checks all prompts, then opens the pipeline.

    Args:
      source: rows, usually `task.train`.
      tokenizer: of transformers.
      num_prompts: N, prompts in a batch, of all processes.
      max_prompt_length: P.
      seed: of the order, the same on all processes.
      share: this process's rows of a batch; all of them if not given.
      place: from NumPy arrays of the rows that it holds, to what the compiled
        step takes.
      add_special_tokens: see `encode`.
      vocab_size: see `encode`.

    Raises:
      ValueError: a size that makes no sense, a prompt that is too long, or a
        tokenizer that ends prompts.
    """
    import grain  # Slow to import; only the training loop needs it.

    if num_prompts < 1:
      raise ValueError(f'num_prompts={num_prompts} must be at least 1.')
    if not len(source):
      raise ValueError('There are no prompts: the source has 0 rows.')
    self._source = source
    self._share = share or processes.Share(*[np.arange(num_prompts)] * 2)
    self._place = place
    self._tokenizer = tokenizer
    self._encoding = {
      'max_prompt_length': max_prompt_length,
      'add_special_tokens': add_special_tokens,
      'vocab_size': vocab_size,
    }
    if add_special_tokens:
      _require_open_end(tokenizer, source[0]['prompt'])
    digest = _checked(source, tokenizer, **self._encoding)
    # What the order depends on; a position means nothing without it.
    self._identity = {
      'num_rows': len(source),
      'num_prompts': num_prompts,
      'seed': seed,
      'rows': digest,
    }
    # Batches of numbers of rows: who does not hold a row does not read it.
    rows = grain.MapDataset.range(len(source))
    # Not endless: the length of an endless one overflows.
    epochs = rows.shuffle(seed=seed).repeat(_NUM_EPOCHS)
    batches = epochs.batch(num_prompts, batch_fn=list)
    # No threads: `prefetch` reads a batch while a device works.
    self._batches = iter(
      batches.to_iter_dataset(grain.ReadOptions(num_threads=0))
    )
    # The position before a batch that was read ahead, and the batch.
    self._ahead: tuple[dict[str, Any], PromptBatch] | None = None

  def __iter__(self) -> 'PromptIterator':
    return self

  def __next__(self) -> PromptBatch:
    if self._ahead is None:
      return self._read()
    (_, batch), self._ahead = self._ahead, None
    return batch

  def prefetch(self) -> None:
    """Reads the batch that comes next, which is as if it had not been read."""
    if self._ahead is None:
      self._ahead = (self.get_state(), self._read())

  def describe_rows(self) -> str:
    """How many rows there are, and a digest that tells them from others."""
    return '{num_rows} of digest {rows}'.format_map(self._identity)

  def _read(self) -> PromptBatch:
    numbers = next(self._batches)
    rows = {i: self._source[numbers[i]] for i in self._share.held}
    texts = [row['prompt'] for row in rows.values()]
    own = [rows[i] for i in self._share.own]
    return PromptBatch(
      self._place(encode(texts, self._tokenizer, **self._encoding)),
      [row['prompt'] for row in own],
      [row['answer'] for row in own],
    )

  def get_state(self) -> dict[str, Any]:
    """The position between two batches; goes through JSON."""
    if self._ahead is not None:
      state, _ = self._ahead
      return state
    return {**self._identity, 'position': self._batches.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position; the next batch is then the one that followed it.

    Args:
      state: what `get_state` returned.

    Raises:
      ValueError: see `check_state`.
    """
    self.check_state(state)
    self._batches.set_state(state['position'])
    self._ahead = None

  def check_state(self, state: dict[str, Any]) -> None:
    """Raises a ValueError if who returned it had other rows or options."""
    for name, value in self._identity.items():
      # Older states have no digest.
      if state.get(name, value) != value:
        raise ValueError(
          f'The data position was saved with {name}={state[name]}, now it is '
          f'{value}; the same batches cannot follow. Keep {name}, that is the '
          "data of config.task, or start a new run in another --workdir."
        )
