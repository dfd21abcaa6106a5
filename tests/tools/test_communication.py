from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mae_jax.tools import communication
from mae_jax.tools.communication import Machine, exchanged, images_to_hide, table
from tests.helpers import ROOT


def test_an_all_reduce_passes_the_links_twice_but_for_the_share_of_each_device():
    two = Machine("two", "H100", 2, link=10.0)
    assert two.seconds({"all-reduce": 100}) == 2 * 100 / 2 / 10
    assert two.seconds({"all-gather": 100}) == 100 / 2 / 10
    assert two.seconds({"all-gather": 60, "reduce-scatter": 40}) == 100 / 2 / 10
    four = Machine("four", "H100", 4, link=10.0)
    assert four.seconds({"all-reduce": 100}) == pytest.approx(2 * 75 / 10)


def test_between_nodes_a_device_sends_its_part_alone():
    machine = Machine("2 x 2", "H100", 4, link=10.0, node=2, network=5.0)
    within, across = 100 / 2 / 10, (100 / 2) / 2 / 5
    assert machine.seconds({"all-gather": 100}) == pytest.approx(within + across)
    one_node = Machine("2", "H100", 2, link=10.0, node=2, network=5.0)
    assert one_node.seconds({"all-gather": 100}) == within


def test_vectors_are_reduced_and_matrices_are_gathered_and_scattered():
    params = {
        "kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32),
        "odd": jax.ShapeDtypeStruct((3, 5), jnp.float32),
        "bias": jax.ShapeDtypeStruct((8,), jnp.float32),
    }
    kernel, rest = 4 * 48, 4 * (15 + 8)
    nothing = {"all-gather": 0, "reduce-scatter": 0}
    assert exchanged(params, 1) == {"all-reduce": kernel + rest, **nothing}
    assert exchanged(params, 4) == {
        "all-reduce": rest,
        "all-gather": 2 * kernel,  # forward and backward
        "reduce-scatter": kernel,
    }


def test_a_batch_that_computes_as_long_hides_the_communication():
    assert images_to_hide(3.0, flops=2.0, rate=4.0) == 6
    assert images_to_hide(3.1, flops=2.0, rate=4.0) == 7


def test_published_speeds_agree_with_each_other():
    links = {machine.name: machine.link for machine in communication.MACHINES}
    # "All-reduce bandwidth per Pod" of 256 chips, from the same pages.
    assert links["TPU v5e"] == 51.2e12 / 256
    assert links["TPU v6e"] == 102.4e12 / 256


@pytest.mark.slow
def test_the_documentation_has_this_table():
    text = (ROOT / "docs" / "scaling.md").read_text()
    assert "\n".join(table(communication.CONFIGS, 0.5)) in text


def test_wrong_flags_are_refused(capsys):
    for argv, message in [
        (["--mfu=2"], "--mfu: expected a share, above 0 and at most 1, got 2"),
        (["--mfu=0"], "--mfu: expected a share, above 0 and at most 1, got 0"),
        (["vit_g"], "--config=vit_g: no such file"),
        (["--mfu=a"], "argument --mfu: invalid float value: 'a'"),
    ]:
        assert communication.main(argv) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
