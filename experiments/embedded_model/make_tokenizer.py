"""The embedded model's tokenizer: bytes, and every number from 0 to 199.

A byte-level BPE, so any text can be encoded, whose merges make one token of
each number up to 199 and of the few phrases that worked steps use. One token a
number is what makes top-K of a few hundred tokens mean something: where the
model is unsure of a sum, the mass lies on many neighbouring numbers, not on ten
digits.
"""

import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
import transformers

LARGEST = 199
PAD, EOS = '<pad>', '<eos>'
# 'Ġ' is the byte-level alphabet's space.
PHRASES = (',Ġ', 'Ġ####Ġ')


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
  """Vocabulary: 2 specials, 256 bytes, 190 numbers, pieces of phrases."""
  vocabulary = {PAD: 0, EOS: 1}
  merges: list[tuple[str, str]] = []

  def add(token):
    vocabulary.setdefault(token, len(vocabulary))

  def merge(left, right):
    if left + right not in vocabulary:
      add(left + right)
      merges.append((left, right))

  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    add(byte)
  # Numbers in rising order: within '198' the pair '19' ranks before '98', so
  # the first two digits always merge first, except that '110' starts as
  # '1' + '10', which therefore needs a merge of its own.
  for number in range(10, 100):
    merge(*str(number))
  for number in range(100, LARGEST + 1):
    first, second, third = str(number)
    if int(first + second) <= int(second + third) or second == '0':
      merge(first + second, third)
    else:
      merge(first, second + third)
  for phrase in PHRASES:
    for end in range(2, len(phrase) + 1):
      merge(phrase[: end - 1], phrase[end - 1])

  bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
  bpe.pre_tokenizer = pre_tokenizers.Sequence([
      # Digits, or a run of anything else, so that '=7' and '5,' never merge.
      pre_tokenizers.Split(
          tokenizers.Regex(r'\d+|, | #### |[^\d]'), behavior='isolated'
      ),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ])
  bpe.decoder = decoders.ByteLevel()
  return transformers.PreTrainedTokenizerFast(
      tokenizer_object=bpe, pad_token=PAD, eos_token=EOS,
      clean_up_tokenization_spaces=False,
  )
