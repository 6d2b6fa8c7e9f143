"""Installs dppo_jax; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r"__version__ = '(.+)'", (HERE / 'dppo_jax' / '__init__.py').read_text()
)[1]

setuptools.setup(
    name='dppo_jax',
    version=VERSION,
    description=(
        'Reinforcement learning of language models inside a trust region that '
        'means something: DPPO and its baselines in JAX.'
    ),
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=setuptools.find_packages(include=['dppo_jax', 'dppo_jax.*']),
    package_data={'dppo_jax': ['assets/*/*']},
    python_requires='>=3.11',
    install_requires=[
        'absl-py>=2.1',
        'array-record>=0.8.1',
        'etils>=1.9.1',
        'flax>=0.12.8,<0.13',
        # TFDS needs it for builders inside a package, without saying so.
        'importlib-resources>=6.0',
        'grain>=0.2.13,<0.3',
        # Renders the chat templates of tokenizers.
        'jinja2>=3.1',
        # 0.10.2 is the newest for Python 3.11, 0.12 needs Python 3.12.
        'jax>=0.10.2,<0.13',
        'matplotlib>=3.9',
        'ml-collections>=1.1,<2',
        'numpy>=2.0',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.8,<0.13',
        'safetensors>=0.6',
        'tensorboardX>=2.6.2',
        'tensorflow-datasets>=4.9.10,<5',
        'tqdm>=4.66',
        # The first that says which field of a config has a wrong type.
        'transformers>=5.4,<6',
    ],
    extras_require={
        'cuda12': ['jax[cuda12]'],
        'cuda13': ['jax[cuda13]'],
        'gguf': ['gguf>=0.17'],
        # Older datasets and peft do not work with what transformers 5 needs.
        'hub': ['datasets>=4.2'],
        'parity': ['peft>=0.18', 'torch>=2.6'],
        'parquet': ['pyarrow>=16.0'],
        'reasoning-gym': ['pebble>=5.1', 'reasoning-gym>=0.1.23'],
        'test': [
            'gguf>=0.17',
            'hypothesis>=6.100',
            'ipython>=8.0',
            # The TPU compiler that belongs to the jax: plans are tested.
            'jax[tpu]',
            'math-verify>=0.9',
            'pebble>=5.1',
            'pyarrow>=16.0',
            'pytest>=8.0',
            'pytest-xdist>=3.6',
            'reasoning-gym>=0.1.23',
            'scipy>=1.14',
        ],
        'tpu': ['jax[tpu]'],
        'verifiers': ['math-verify>=0.9', 'pebble>=5.1'],
        'wandb': ['wandb>=0.18'],
        'dev': ['mypy>=1.11', 'pre-commit>=3.7', 'ruff>=0.13'],
    },
    classifiers=[
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
