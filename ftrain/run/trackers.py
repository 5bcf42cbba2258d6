"""Where the numbers of a run go besides its own folder: TensorBoard, trackio, Weights & Biases, SwanLab, MLflow.

Each is used where it is installed and asked for by name; the run's own metrics.jsonl is always written.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Log = Callable[[int, Mapping[str, float]], None]
"""Takes the number of a step and its numbers."""


@contextmanager
def tensorboard(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """Event files in `folder/tensorboard`. ValueError without the package."""
    del name
    writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", str(dict(config)))

    def log(step: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def trackio(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """A local trackio project called `ftrain`. ValueError without the package."""
    package = _package("trackio", "trackio")
    package.init(project="ftrain", name=f"{folder.name}-{name}", config=dict(config))
    try:
        yield lambda step, numbers: package.log(dict(numbers), step=step)
    finally:
        package.finish()


@contextmanager
def wandb(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the folder. ValueError without the package."""
    run = _package("wandb", "wandb").init(project="ftrain", name=name, dir=str(folder), config=dict(config))
    try:
        yield lambda step, numbers: run.log(dict(numbers), step=step)
    finally:
        run.finish()


@contextmanager
def swanlab(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """A run of SwanLab. ValueError without the package."""
    package = _package("swanlab", "swanlab")
    package.init(project="ftrain", experiment_name=name, logdir=str(folder / "swanlab"), config=dict(config))
    try:
        yield lambda step, numbers: package.log(dict(numbers), step=step)
    finally:
        package.finish()


@contextmanager
def mlflow(folder: Path, name: str, config: Mapping[str, Any]) -> Iterator[Log]:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in the folder. ValueError without the package."""
    del folder
    package = _package("mlflow", "mlflow")
    package.set_experiment("ftrain")
    with package.start_run(run_name=name):
        package.log_params({key: str(value)[:500] for key, value in config.items()})
        yield lambda step, numbers: package.log_metrics(dict(numbers), step=step)


TRACKERS: Mapping[str, Callable[[Path, str, Mapping[str, Any]], AbstractContextManager[Log]]] = {
    "tensorboard": tensorboard,
    "trackio": trackio,
    "wandb": wandb,
    "swanlab": swanlab,
    "mlflow": mlflow,
}


def require_trackers(names: tuple[str, ...]) -> None:
    """ValueError for a tracker that is unknown, before anything is made."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"--track {name!r} is not one of {', '.join(TRACKERS)}")


def _package(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as absent:
        raise ValueError(
            f"--track {name} needs a package that is not installed ({absent}): pip install {name}"
        ) from absent
