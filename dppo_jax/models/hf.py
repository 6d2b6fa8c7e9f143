"""The transformers library, imported late and without its advertisements."""

import os
import types


def transformers() -> types.ModuleType:
  """Only files and text need it, and it is slow to import.

  Without torch it would announce at every import that models cannot be used;
  ours need none of them.
  """
  os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
  import transformers as module

  return module
