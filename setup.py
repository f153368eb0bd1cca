"""dpo_jax: Direct Preference Optimization in JAX/Flax."""

import runpy

import setuptools

setuptools.setup(
  name="dpo_jax",
  version=runpy.run_path("dpo_jax/__init__.py")["__version__"],
  description="Direct Preference Optimization in JAX/Flax",
  license="MIT",
  python_requires=">=3.11",
  packages=setuptools.find_packages(include=["dpo_jax", "dpo_jax.*"]),
  # No other package has to fear for a name as common as `configs`.
  package_dir={"dpo_jax.configs": "configs"},
  package_data={"dpo_jax.report": ["page.html", "tables.html"]},
  entry_points={"console_scripts": ["dpo-jax = dpo_jax.cli:command"]},
  install_requires=[
    "datasets",
    "etils[epath]",
    "flax>=0.12",
    "fsspec",
    "gguf",
    "huggingface_hub",
    # 0.10 is the newest JAX for Python 3.11; 0.11 and 0.12 need 3.12.
    "jax>=0.10,<0.13",
    "jinja2",
    "loky",
    "matplotlib",
    "ml_collections",
    "numpy",
    "optax",
    "orbax-checkpoint>=0.11",
    "qwix",
    "safetensors",
    "scipy>=1.15",  # which takes seeds as generators
    "tokenizers",
    "tqdm",
    "transformers>=5",
  ],
  extras_require={
    "test": [
      *("pytest", "pytest-xdist", "ruff"),
      *("gcsfs", "ipykernel", "jupytext", "nbclient", "openai"),
    ],
    "judge": ["openai"],
    "notebooks": ["ipykernel", "ipywidgets", "jupytext", "nbclient"],
    "parity": ["torch==2.13.0", "peft"],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "gcs": ["gcsfs"],
    "plan": ["libtpu"],
    "log": ["tensorboard", "tensorboardX", "wandb"],
    "launch": ["submitit"],
    # The peers of scripts/bench.py, each in a virtual environment of its own.
    "bench-torch": [
      "torch==2.13.0",
      "trl==1.16.0",
      "peft==0.21.2",
      "accelerate==1.15.0",
      "datasets",
    ],
    "bench-jax": ["google-tunix==0.1.7"],
    "examples": ["scikit-learn", "vaderSentiment"],
  },
)
