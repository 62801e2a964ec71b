"""Which process of which job this is, from options and from what clusters put into the environment."""

from __future__ import annotations

import pytest

from llamax.errors import UserError
from llamax.mesh.processes import PORT, PORTS, Processes, find_processes, first_host

TOLD = {"LLAMAX_COORDINATOR": "10.0.0.1:8476", "LLAMAX_PROCESSES": "4", "LLAMAX_PROCESS": "2"}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-010,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "CUDA_VISIBLE_DEVICES": "0,1",
}


def test_a_plain_process_starts_nothing():
    assert find_processes({}) is None
    assert find_processes({"JOB_COMPLETION_INDEX": "3", "PATH": "/bin"}) is None  # workers of a sweep, say
    assert find_processes({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert find_processes({**SLURM, "LLAMAX_PROCESSES": "1"}) is None


def test_a_batch_script_is_one_process_whatever_it_has_reserved():
    script = {"SLURM_JOB_ID": "1234", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[007-010]"}
    assert find_processes(script) is None


def test_variables_and_options():
    assert find_processes(TOLD) == Processes("10.0.0.1:8476", 4, 2)
    found = find_processes({**TOLD, "LLAMAX_PEER_SECONDS": "7.5"}, process=0, bind="0.0.0.0", start_seconds=9.0)
    assert found == Processes("10.0.0.1:8476", 4, 0, bind="0.0.0.0", peer_seconds=7.5, start_seconds=9.0)
    assert (found.host, found.port) == ("10.0.0.1", 8476)
    assert Processes("[fd00::2]:8476", 2, 0).host == "fd00::2"


def test_an_indexed_job_knows_its_index():
    pod = {"LLAMAX_COORDINATOR": "run-0-0.run:8476", "LLAMAX_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
    assert find_processes(pod) == Processes("run-0-0.run:8476", 4, 3)
    assert find_processes({**pod, "LLAMAX_PROCESS": "1"}) == Processes("run-0-0.run:8476", 4, 1)


def test_a_slurm_step_of_several_tasks():
    found = find_processes(SLURM)
    assert found == Processes(f"gpu007:{PORT + 2 * 1234}", 4, 3, "SLURM step 1234.0", local_device=1)
    assert find_processes({**SLURM, "CUDA_VISIBLE_DEVICES": "0"}).local_device is None  # it was given its own
    assert find_processes({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}).local_device is None  # it has the whole node
    here = find_processes({**SLURM, "SLURM_STEP_NUM_NODES": "1"})
    assert here.host == "127.0.0.1"
    assert find_processes({**SLURM, "LLAMAX_COORDINATOR": "gpu007:9000"}).coordinator == "gpu007:9000"


def test_steps_of_a_job_at_a_time_have_ports_of_their_own():
    ports = {find_processes({**SLURM, "SLURM_STEP_ID": str(step)}).port for step in range(50)}
    assert len(ports) == 50
    assert all(PORT <= port < PORT + 2 * PORTS <= 65534 and port % 2 == 0 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node001", "node001"),
        ("node001,host2", "node001"),
        ("node[001-0015],host2", "node001"),
        ("a[007,010-12]b,c", "a007b"),
        ("rack-1[3]", "rack-13"),
    ],
)
def test_the_first_of_a_list_of_nodes(nodes: str, first: str):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"LLAMAX_PROCESSES": ""}, r"needs --processes \(LLAMAX_PROCESSES\) too; give all three"),
        ({"LLAMAX_COORDINATOR": "", "LLAMAX_PROCESS": ""}, r"needs --coordinator .* and --process "),
        ({"LLAMAX_PROCESS": "4"}, r"process 4 of 4: processes are numbered from 0 to 3"),
        ({"LLAMAX_PROCESS": "one"}, r"LLAMAX_PROCESS='one' is not a whole number"),
        ({"LLAMAX_COORDINATOR": "10.0.0.1"}, r"coordinator '10.0.0.1': give HOST:PORT"),
        ({"LLAMAX_COORDINATOR": "10.0.0.1:65535"}, r"PORT \+ 1 free"),
        ({"LLAMAX_PEER_SECONDS": "-1"}, r"LLAMAX_PEER_SECONDS=-1: give a positive number of seconds"),
        ({"LLAMAX_START_SECONDS": "soon"}, r"LLAMAX_START_SECONDS='soon' is not a number"),
    ],
)
def test_what_cannot_be_a_job(change: dict[str, str], message: str):
    with pytest.raises(UserError, match=message):
        find_processes({**TOLD, **change})
