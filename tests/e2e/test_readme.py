"""The code that the README shows is run as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import pytest

from mae_jax.config import load_config
from tests.checkpoints import write_checkpoint
from tests.helpers import ROOT, environment

# All that may be imported beside the standard library and what these four need themselves.
GUARD = """
import sys

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is not needed here")

sys.meta_path.insert(0, Guard())
"""
BLOCKED = {"grain", "tensorflow_datasets", "PIL", "tqdm", "tensorboardX", "ml_collections", "torch"}
USE = """
import numpy as np, optax
images = np.random.default_rng(0).standard_normal((8, 28, 28, 1)).astype(np.float32)
labels = np.arange(8)
def loss(params):
    logits = Classifier().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
optimizer = optax.adam(1e-2)
state = optimizer.init(params)
first = None
value_and_grad = jax.jit(jax.value_and_grad(loss))
for _ in range(30):
    value, grads = value_and_grad(params)
    first = value if first is None else first
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
assert value < 0.5 * first, (first, value)
kernel = restored["encoder"]["patch_embed"]["kernel"]
print("kernel", kernel.shape, float(abs(kernel).sum()))
"""


@pytest.mark.slow
def test_encoder_is_restored_into_a_classifier_as_the_readme_says(tmp_path):
    text = (ROOT / "README.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "ocp" in b)
    # What `make demo` leaves, without the training.
    write_checkpoint(tmp_path / "runs" / "demo", load_config("demo"), steps=[1860])
    script = GUARD.format(blocked=BLOCKED) + block + textwrap.dedent(USE)
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "kernel (16, 64)" in result.stdout
