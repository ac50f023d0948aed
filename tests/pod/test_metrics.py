"""metrics_server.py as controllers start it, without a container."""

import sys
from pathlib import Path

from tests.pod.processes import FILES, started


def test_metrics_server_leaves_its_port_to_the_training_process(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started([sys.executable, str(FILES / "tfs/metrics_server.py")], log) as process:
        assert process.wait(60) == 0
    assert "the training process itself answers" in log.read_text()
