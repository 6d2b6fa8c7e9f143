"""Prompts in the words of a tokenizer's chat template."""

import json

import numpy as np
import pytest

from dppo_jax import tasks
from dppo_jax.tasks import base
from dppo_jax.tasks import prompts
from dppo_jax.tasks import scoring

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

# The form of ChatML; refuses a conversation that does not end with the user.
TEMPLATE = """
{%- for message in messages %}
{%- if loop.last and message.role != 'user' %}
{{- raise_exception('the user speaks last') }}
{%- endif %}
{{- '<bos> ' if loop.first }}{{- message.role + ' : ' + message.content }}
{{- ' <end> ' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant :' }}{% endif %}
"""
WORDS = ['<pad>', '<bos>', '<end>', 'system', 'user', 'assistant', ':',
         'be', 'kind', 'one', 'two', '?', '!']


def of_words(text, added):
  """A tokenizer of words that makes `text` of a text $A, unless told not to."""
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
      {word: i for i, word in enumerate(WORDS)}, unk_token='<pad>'
  ))
  words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  words.post_processor = tokenizers.processors.TemplateProcessing(
      single=text, special_tokens=[(added, WORDS.index(added))]
  )
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=words, pad_token='<pad>', eos_token='<end>',
      chat_template=TEMPLATE,
  )


@pytest.fixture(scope='module')
def tokenizer():
  """Words; puts <bos> before a text unless told not to."""
  return of_words('<bos> $A', '<bos>')


@pytest.fixture
def starting(tokenizer):
  """The same, which knows what it puts before a text."""
  tokenizer.bos_token = '<bos>'
  yield tokenizer
  tokenizer.bos_token = None


@pytest.fixture
def bare(tokenizer):
  """The same without a template."""
  tokenizer.chat_template = None
  yield tokenizer
  tokenizer.chat_template = TEMPLATE


def task(*questions, chat=base.Chat(), **options):
  rows = [{'prompt': q, 'answer': '1'} for q in questions]
  return base.Task(rows, rows, scoring.exact, chat=chat, **options)


def prepared(tokenizer, *questions, max_prompt_length=16, **options):
  done = prompts.prepare(
      task(*questions, **options), tokenizer,
      max_prompt_length=max_prompt_length,
  )
  return [row['prompt'] for row in done.train]


def words(ids):
  return ' '.join(WORDS[i] for i in ids)


def test_a_prompt_is_a_message_of_the_user_and_the_assistant_is_next(tokenizer):
  [text] = prepared(tokenizer, 'one ?')
  assert text == '<bos> user : one ? <end> assistant :'


def test_a_system_prompt_comes_first(tokenizer):
  [text] = prepared(tokenizer, 'one ?', chat=base.Chat('be kind'))
  assert text == (
      '<bos> system : be kind <end> user : one ? <end> assistant :'
  )


CONVERSATION = [
    {'role': 'user', 'content': 'one ?'},
    {'role': 'assistant', 'content': 'two'},
    {'role': 'user', 'content': '!'},
]


def test_a_prompt_may_be_a_conversation(tokenizer):
  assert prepared(tokenizer, CONVERSATION) == [
      '<bos> user : one ? <end> assistant : two <end> user : ! <end> '
      'assistant :'
  ]


def test_without_a_template_one_message_is_its_text(bare):
  assert prepared(bare, CONVERSATION[:1], 'two', chat=None) == ['one ?', 'two']
  with pytest.raises(ValueError, match='user, assistant, user; set config.task.'
                     'chat_template=True'):
    prepared(bare, CONVERSATION, chat=None)


def test_the_other_fields_of_a_row_stay(tokenizer):
  done = prompts.prepare(task('one'), tokenizer, max_prompt_length=16)
  assert done.test == done.train
  assert done.train[0]['answer'] == '1'


def test_without_chat_nothing_is_copied(tokenizer):
  plain = task('one', chat=None)
  assert prompts.prepare(plain, tokenizer, max_prompt_length=1) == plain


def test_the_templates_special_tokens_are_not_doubled(tokenizer):
  done = prompts.prepare(task('one ?'), tokenizer, max_prompt_length=10)
  options = dict(num_prompts=1, max_prompt_length=10, add_special_tokens=False)
  [tested] = prompts.evaluation_batches(done.test, tokenizer, **options)
  learned = next(
      prompts.PromptIterator(done.train, tokenizer, seed=0, **options)
  )
  for batch in (tested, learned):
    tokens, mask = batch.prompts
    assert words(tokens[mask]) == '<bos> user : one ? <end> assistant :'
    assert batch.texts == ['<bos> user : one ? <end> assistant :']
  # A raw prompt gets what the tokenizer puts before every text.
  raw = prompts.encode(['one ?'], tokenizer, max_prompt_length=3)
  assert words(raw.tokens[0]) == '<bos> one ?'


def test_a_tokenizer_without_a_template_is_named(bare):
  with pytest.raises(ValueError, match='chat_template=True, but the tokenizer'):
    prepared(bare, 'one')


def test_what_a_template_refuses_is_named_in_one_line(tokenizer):
  with pytest.raises(ValueError, match='a conversation of user, assistant: '
                     'the user speaks last') as error:
    prepared(tokenizer, CONVERSATION[:2])
  assert '\n' not in str(error.value)


def test_two_system_messages_are_refused(tokenizer):
  messages = [{'role': 'system', 'content': '!'}, *CONVERSATION]
  assert prepared(tokenizer, messages)[0].startswith('<bos> system : ! <end>')
  with pytest.raises(ValueError, match='system message of its own'):
    prepared(tokenizer, messages, chat=base.Chat('be kind'))


def test_a_system_prompt_needs_a_template():
  with pytest.raises(ValueError, match="'be kind' needs .*chat_template=True"):
    base.chat_options(False, 'be kind')


def test_long_prompts_are_left_out_on_request(tokenizer):
  # <bos> user : one ? <end> assistant : are 8 tokens, with "two" 9.
  texts = prepared(
      tokenizer, 'one ?', 'one two ?', max_prompt_length=8,
      drop_long_prompts=True,
  )
  assert texts == ['<bos> user : one ? <end> assistant :']
  # Raw: the <bos> that the tokenizer adds counts.
  assert prepared(
      tokenizer, 'one ?', 'one two ?', chat=None, max_prompt_length=3,
      drop_long_prompts=True,
  ) == ['one ?']
  with pytest.raises(ValueError, match='All 1 train prompts .*=7; raise it'):
    prepared(tokenizer, 'one ?', max_prompt_length=7, drop_long_prompts=True)


def test_json_lines_take_messages_and_go_through_the_template(
    tokenizer, tmp_path
):
  for name in ('train', 'test'):
    lines = [{'prompt': 'one ?', 'answer': 1},
             {'prompt': CONVERSATION, 'answer': 2}]
    (tmp_path / name).write_text('\n'.join(map(json.dumps, lines)))
  built = tasks.build(
      'jsonl', train_path=f'{tmp_path}/train', test_path=f'{tmp_path}/test',
      chat_template=True, system_prompt='be kind',
  )
  done = prompts.prepare(built, tokenizer, max_prompt_length=21)
  start = '<bos> system : be kind <end> user : one ? <end> assistant :'
  assert [row['prompt'] for row in done.train] == [
      start, f'{start} two <end> user : ! <end> assistant :'
  ]
  encoded = prompts.encode(
      [row['prompt'] for row in done.train], tokenizer, max_prompt_length=21,
      add_special_tokens=False,
  )
  np.testing.assert_array_equal(encoded.mask.sum(-1), [13, 21])


@pytest.mark.parametrize('prompt', [
    [], [{'role': 'user'}], [{'role': 'user', 'content': 1}], ['one'], {},
])
def test_json_lines_refuse_what_is_no_conversation(tmp_path, prompt):
  path = tmp_path / 'bad.jsonl'
  path.write_text(json.dumps({'prompt': prompt, 'answer': 1}))
  with pytest.raises(ValueError, match='line 1: prompt .* list of messages'):
    tasks.build('jsonl', train_path=str(path), test_path=str(path))


def test_json_lines_hand_any_answer_to_your_own_verifier(tmp_path):
  own = tmp_path / 'own.py'
  own.write_text('import json\n'
                 'def f(text, answer): return text in json.loads(answer)["a"]')
  for name in ('train', 'test'):
    (tmp_path / name).write_text('{"prompt": "?", "answer": {"a": ["x", "y"]}}')
  built = tasks.build(
      'jsonl', train_path=f'{tmp_path}/train', test_path=f'{tmp_path}/test',
      verifier=f'{own}:f',
  )
  [row] = built.train
  assert row['answer'] == '{"a": ["x", "y"]}'
  assert built.score('y', row['answer']) and not built.score('z', row['answer'])


@pytest.mark.parametrize('text, tokens', [
    ('one ?', '<bos> one ?'),
    ('<bos> one ?', '<bos> one ?'),
    ('<bos> <bos> one ?', '<bos> <bos> one ?'),
    ('one <bos> <bos>', '<bos> one <bos> <bos>'),
])
def test_a_text_that_has_its_first_token_gets_no_second(starting, text, tokens):
  batch = prompts.encode([text], starting, max_prompt_length=8)
  assert words(batch.tokens[0][batch.mask[0]]) == tokens


def test_a_tokenizer_that_adds_none_keeps_both_of_a_text(
    starting, monkeypatch
):
  monkeypatch.setattr(starting.backend_tokenizer, 'post_processor', None)
  batch = prompts.encode(['<bos> <bos> one'], starting, max_prompt_length=8)
  assert words(batch.tokens[0][batch.mask[0]]) == '<bos> <bos> one'


def test_a_tokenizer_that_ends_prompts_is_refused_without_a_template():
  ending = of_words('$A <end>', '<end>')

  def open_(add_special_tokens):
    return prompts.PromptIterator(
        task('one ?').train,
        ending,
        num_prompts=1,
        max_prompt_length=8,
        seed=0,
        add_special_tokens=add_special_tokens,
    )

  with pytest.raises(ValueError, match="puts its end '<end>' behind every"):
    open_(True)
  read = next(open_(False)).prompts
  assert words(read.tokens[0][read.mask[0]]) == 'one ?'


@pytest.mark.parametrize('prompt', ['1', ''])
def test_a_tokenizer_may_begin_with_its_end_and_know_digits_only(prompt):
  fast = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab={'<end>': 0, '1': 1}, merges=[]
  ))
  fast.post_processor = tokenizers.processors.TemplateProcessing(
      single='<end> $A', special_tokens=[('<end>', 0)]
  )
  digits = transformers.PreTrainedTokenizerFast(
      tokenizer_object=fast,
      bos_token='<end>',
      eos_token='<end>',
      pad_token='<end>',
  )
  read = next(prompts.PromptIterator(
      task(prompt).train, digits, num_prompts=1, max_prompt_length=8, seed=0
  )).prompts
  assert read.tokens[0][read.mask[0]].tolist() == [0, *map(int, prompt)]
