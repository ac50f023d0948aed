"""Nodes from flags, and from the variables that clusters set."""

import pytest

from runtime.errors import ConfigError
from runtime.tuning.process.nodes import SINGLE_NODE, Nodes


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"JOB_COMPLETION_INDEX": "0"},  # an indexed Job of one pod
        {
            "RANK": "1",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "1",
            "MASTER_ADDR": "localhost",
        },  # a worker of torchrun
        {"PET_NNODES": "1", "PET_NODE_RANK": "0"},
    ],
)
def test_single_node_by_default(environ: dict[str, str]) -> None:
    assert Nodes.read(environ) == SINGLE_NODE
    assert SINGLE_NODE.torchrun_options() == ["--standalone"]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (  # Kubeflow Trainer, and torchrun's own
            {
                "PET_NNODES": "4",
                "PET_NODE_RANK": "3",
                "PET_MASTER_ADDR": "job-node-0-0.job",
                "PET_MASTER_PORT": "29400",
            },
            Nodes(4, 3, "job-node-0-0.job", 29400),
        ),
        (  # a PyTorchJob: pods, not processes
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"},
            Nodes(2, 1, "job-master-0", 23456),
        ),
        (  # an indexed Job, whose manifest sets count and address
            {"JOB_COMPLETION_INDEX": "1", "NNODES": "2", "MASTER_ADDR": "tune-0.tune"},
            Nodes(2, 1, "tune-0.tune", 29500),
        ),
    ],
)
def test_cluster_variables_are_read(environ: dict[str, str], expected: Nodes) -> None:
    assert Nodes.read(environ) == expected


def test_flags_win_over_variables() -> None:
    environ = {"PET_NNODES": "4", "PET_NODE_RANK": "3", "PET_MASTER_ADDR": "a", "PET_MASTER_PORT": "1"}
    assert Nodes.read(environ, count=2, rank=0, endpoint="b:29500") == Nodes(2, 0, "b", 29500)
    assert Nodes.read(environ, count=1) == SINGLE_NODE


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [("a", "a", 29500), ("a.b:7", "a.b", 7), ("10.0.0.1:7", "10.0.0.1", 7), ("fd00::1", "fd00::1", 29500),
     ("[fd00::1]:7", "fd00::1", 7), ("[fd00::1]", "fd00::1", 29500)],
)  # fmt: skip
def test_endpoints_in_every_form(endpoint: str, host: str, port: int) -> None:
    assert Nodes.read({}, count=2, rank=1, endpoint=endpoint) == Nodes(2, 1, host, port)


def test_ranks_of_a_node_follow_those_of_the_nodes_before() -> None:
    nodes = Nodes(2, 1, "a")
    assert list(nodes.ranks(4)) == [4, 5, 6, 7]
    assert nodes.torchrun_options() == [
        "--nnodes", "2", "--node-rank", "1", "--master-addr", "a", "--master-port", "29500",
        "--rdzv-conf", "timeout=10800",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "node rank is None of 2 nodes, expected 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "node rank is 2 of 2 nodes"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "have no rendezvous endpoint; give --rdzv-endpoint"),
        ({"NNODES": "two"}, "NNODES is 'two', expected a whole number"),
    ],
)
def test_missing_setting_is_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Nodes.read(environ)


def test_endpoint_with_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--rdzv-endpoint is 'a:b', expected HOST:PORT"):
        Nodes.read({}, count=2, rank=0, endpoint="a:b")
