"""What cannot import the ports, the image's shell scripts, repeats them."""

import re
from pathlib import Path

from runtime import ports
from runtime.serving.settings import ServeConfig
from runtime.tuning.settings import TuningJob

DOCKER = Path(__file__).parents[1] / "docker"


def test_image_exposes_and_checks_the_ports_of_the_server() -> None:
    assert f"\nEXPOSE {ports.SERVING} {ports.CONTROLLER}\n" in (DOCKER / "Dockerfile").read_text()
    script = (DOCKER / "healthcheck.sh").read_text()
    assert re.findall(r"^port=\$\{PORT:-(\d+)\}", script, re.MULTILINE) == [str(ports.SERVING)]
    assert re.findall(r"inference_api\.py\) serving=1 port=(\d+)", script) == [str(ports.CONTROLLER)]


def test_settings_take_the_ports_as_defaults() -> None:
    assert ServeConfig.model_fields["port"].default == ports.SERVING
    assert TuningJob.model_fields["metrics_port"].default == ports.CONTROLLER
