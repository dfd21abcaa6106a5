from __future__ import annotations

import re
import shlex

import pytest

from mae_jax.config import load_config
from tests.launch.conftest import LAUNCH, ROOT

README = LAUNCH / "README.md"
PLACEHOLDERS = {"REGISTRY": "europe-docker.pkg.dev/lab", "BUCKET": "lab", "PROJECT": "lab"}


def commands(program: str) -> list[str]:
    """Return the commands of the README that call a program of launch/, up to a pipe."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" | ")[0].strip() for line in lines if f"launch/{program}" in line]


@pytest.mark.parametrize(
    ("program", "count"), [("local.sh", 2), ("tpu_pod.sh", 1), ("render.sh", 2), ("slurm.sh", 1)]
)
def test_commands_are_accepted(stage, program, count):
    found = commands(program)
    assert len(found) == count
    (stage.folder / "launch").symlink_to(LAUNCH)
    for command in found:
        for name, value in PLACEHOLDERS.items():
            command = re.sub(rf"(?<![$\w]){name}\b", value, command)
        command = command.replace("  #", " #").partition(" #")[0]
        dry_run = "" if program == "render.sh" else " --dry-run"
        if program == "slurm.sh":
            command = re.sub(r"sbatch\s+--nodes=4", "bash", command)
        ended = stage.run(
            *("bash", "-c", command + dry_run),
            PROJECT="lab",
            TPU_NAME="mae",
            TPU_ZONE="us-east5-b",
            TPU_TYPE="v6e-64",
        )
        assert (ended.returncode, ended.stderr) == (0, ""), command
        assert ended.stdout


@pytest.mark.parametrize("program", ["local.sh", "tpu_pod.sh", "render.sh", "slurm.sh"])
def test_data_that_are_named_are_of_a_source_that_reads_a_path(program):
    """The configs' own is TFDS, which takes neither a folder of images nor prepared shards."""
    for command in commands(program):
        words = [word for word in shlex.split(command) if word.startswith("--config")]
        values = dict(word.split("=", 1) for word in words)
        fields = {k.removeprefix("--config."): v for k, v in values.items() if k != "--config"}
        config = load_config(values["--config"], fields)
        if "data.path" in fields:
            assert config.data.source in ("folder", "prepared"), command


@pytest.mark.parametrize("page", ["launch/README.md", "docs/scaling.md", "SECURITY.md"])
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target
