"""The experiment loggers of `report_to`: their names, whether they are installed, where they write.

transformers calls them, on rank 0. Does not import them. Start at `check`.
"""

import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runtime.config import nearest
from runtime.errors import ConfigError

PACKAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tensorboard": ("tensorboardX", "tensorboard"),
        "mlflow": ("mlflow",),
        "wandb": ("wandb",),
        "trackio": ("trackio",),
        "comet_ml": ("comet_ml",),
        "clearml": ("clearml",),
        "neptune": ("neptune",),
        "swanlab": ("swanlab",),
        "dvclive": ("dvclive",),
        "dagshub": ("dagshub",),
        "codecarbon": ("codecarbon",),
        "azure_ml": ("azureml",),
        "flyte": ("flytekit",),
        "kubeflow": (),  # its own standard library client; on wherever the cluster's variables are set
    }
)
"""transformers' names, and the packages of which each needs one."""


def known(names: Iterable[str], where: str) -> None:
    """Raise ConfigError for a name that is not a logger's."""
    for name in names:
        if name not in PACKAGES and name not in ("all", "none"):
            hint = nearest(name, PACKAGES) or f"; known: none, all, {', '.join(PACKAGES)}"
            raise ConfigError(f"{where}: 'report_to' holds {name!r}{hint}")


def check(training: Mapping[str, Any]) -> None:
    """Raise ConfigError when a logger that `report_to` names is not installed."""
    for name in training.get("report_to") or ():
        wanted = PACKAGES.get(name, ())
        if wanted and not any(importlib.util.find_spec(package) for package in wanted):
            missing = f"the package {wanted[0]} is not installed"
            remedy = f"pip install {wanted[0]}, or take it out of report_to"
            raise ConfigError(f"report_to is '{name}', but {missing}; {remedy}")


def environment(folder: Path) -> dict[str, str]:
    """Return the variables that have loggers write beside the adapter, not into the working directory."""
    return {
        "TENSORBOARD_LOGGING_DIR": str(folder / "runs"),
        "WANDB_DIR": str(folder),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder.absolute()}/mlflow.db",
    }
