"""Where a process stands in its job: by flags, by variables, or by what started it."""

from __future__ import annotations

import socket

import pytest

from mae_jax import distributed, main
from mae_jax.distributed import Place, explicit_place, find_place
from mae_jax.errors import ConfigError
from tests.processes import by_slurm, free_port

ALL = ("--coordinator_address=10.0.0.1:99", "--num_processes=4", "--process_id=3")
VARIABLES = {
    "MAE_JAX_COORDINATOR_ADDRESS": "10.0.0.2:98",
    "MAE_JAX_NUM_PROCESSES": "2",
    "MAE_JAX_PROCESS_ID": "1",
    "MAE_JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:98",
}


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in (*VARIABLES, "OMPI_MCA_orte_hnp_uri", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def flags(*argv):
    return main.make_parser().parse(["--config=demo", *argv])


def test_nothing_told_is_no_place():
    assert explicit_place(flags(), {}) is None
    assert find_place(flags(), {}) is None


def test_flags_give_the_place():
    assert explicit_place(flags(*ALL, "--heartbeat_timeout=30"), {}) == Place(
        "10.0.0.1:99", 4, 3, heartbeat_timeout=30
    )


def test_variables_give_the_place_and_flags_win_over_them():
    assert explicit_place(flags(), VARIABLES) == Place("10.0.0.2:98", 2, 1, "0.0.0.0:98")
    assert explicit_place(flags("--process_id=0"), VARIABLES) == Place(
        "10.0.0.2:98", 2, 0, "0.0.0.0:98"
    )
    assert explicit_place(flags(*ALL), VARIABLES) == Place("10.0.0.1:99", 4, 3, "0.0.0.0:98")


def test_off_is_one_process_whatever_the_variables_say():
    assert find_place(flags("--distributed=off"), VARIABLES) is None


def test_a_job_of_one_process_is_no_job():
    told = flags("--coordinator_address=a:1", "--num_processes=1", "--process_id=0")
    assert find_place(told, {}) is None


@pytest.mark.parametrize(
    ("argv", "variables", "message"),
    [
        (("--distributed=on",), {}, "--distributed=on: expected --coordinator_address,"),
        (("--num_processes=2",), {}, "--coordinator_address: expected a value beside --num_proc"),
        (
            (),
            {"MAE_JAX_PROCESS_ID": "1"},
            "expected a value beside MAE_JAX_PROCESS_ID",
        ),
        (ALL[:2], {}, "--process_id: expected a value beside --coordinator_address"),
        ((*ALL, "--process_id=4"), {}, "--process_id: expected less than 4, got 4"),
        ((*ALL, "--process_id=-1"), {}, "--process_id: expected a whole number of at least 0"),
        ((*ALL, "--num_processes=0"), {}, "--num_processes: expected a whole number of at least 1"),
        (
            (),
            VARIABLES | {"MAE_JAX_NUM_PROCESSES": "two"},
            "MAE_JAX_NUM_PROCESSES: expected",
        ),
        ((*ALL, "--coordinator_address=host"), {}, "expected HOST:PORT, got 'host'"),
        ((*ALL, "--coordinator_address=host:0"), {}, "expected HOST:PORT, got 'host:0'"),
        (("--coordinator_bind_address=70000:",), {}, "--coordinator_bind_address: expected HOST:P"),
        (("--distributed=off", "--process_id=1"), {}, "--process_id: expected none with --distr"),
        (("--heartbeat_timeout=0",), {}, "--heartbeat_timeout: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(argv, variables, message):
    with pytest.raises(ConfigError) as refusal:
        find_place(flags(*argv), variables)
    assert message in str(refusal.value)


def test_a_wrong_place_is_refused_with_the_flags(monkeypatch):
    monkeypatch.setenv("MAE_JAX_NUM_PROCESSES", "2")
    with pytest.raises(ConfigError, match="expected a value beside MAE_JAX_NUM_PROCESSES"):
        main.parse(["--config=demo"])


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_what_slurm_started_is_found(monkeypatch, mode):
    variables = by_slurm(3)[2]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = find_place(flags(f"--distributed={mode}"), variables)
    address = f"localhost:{variables['JAX_COORDINATOR_PORT']}"
    assert place == Place(address, 3, 2, local_device_ids=(2,))
    assert find_place(flags("--distributed=off"), variables) is None
    assert find_place(flags(*ALL), variables) == Place("10.0.0.1:99", 4, 3)


def test_what_open_mpi_started_is_found(monkeypatch):
    for name, value in {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "8",
        "OMPI_COMM_WORLD_RANK": "5",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    place = find_place(flags(), {})
    assert (place.num_processes, place.process_id) == (8, 5)
    assert place.coordinator_address.startswith("10.96.0.1:")


def test_a_cluster_that_does_not_tell_the_place_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1531576320.0;tcp://10.96.0.1:34911")
    with pytest.raises(ConfigError, match="expected ompi to say where this process stands"):
        find_place(flags(), {})


def test_the_coordinator_listens_at_its_own_address_unless_told():
    assert distributed._listening_address(Place("127.0.0.1:99", 2, 0)) == "127.0.0.1:99"
    assert distributed._listening_address(Place("[::1]:99", 2, 0)) == "[::1]:99"
    assert distributed._listening_address(Place("10.1.2.3:99", 2, 0)) == "10.1.2.3:99"
    told = Place("10.1.2.3:99", 2, 0, bind_address="0.0.0.0:99")
    assert distributed._listening_address(told) == "0.0.0.0:99"


def test_a_name_that_no_other_machine_can_reach_is_noted(monkeypatch, capsys):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 99))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert distributed._listening_address(Place("node1:99", 2, 0)) == "127.0.1.1:99"
    assert "note: node1 is 127.0.1.1 on its own machine" in capsys.readouterr().err


def test_an_unknown_coordinator_is_refused():
    with pytest.raises(ConfigError, match="--coordinator_address: expected an address of process"):
        distributed._listening_address(Place("no-such-host.invalid:99", 2, 0))


def test_a_port_that_is_taken_is_refused():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"free port, got 127.0.0.1:{port}"):
            distributed._check_free(f"127.0.0.1:{port}")
    distributed._check_free(f"127.0.0.1:{free_port()}")
