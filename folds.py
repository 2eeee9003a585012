"""Several models for one data set: each is trained on all but a fold of the training data, and chosen on this fold.

    member(settings, 2)                    # the settings of the second model: an ordinary run in a folder of its own
    together(settings, data, members)      # what the checkpoint of all of them holds: they answer with their mean

The figure of each model on its fold says how well it answers samples that it was not trained on; their mean is that of
all training samples, and its spread says how far to trust it. (A cross-validation ensemble: Krogh and Vedelsby 1995,
"Neural Network Ensembles, Cross Validation, and Active Learning".)
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tasks
from checkpoint import LAST, Contents, Members, load_checkpoint, member_weight, save_checkpoint
from config import Settings
from messages import UserError, figure_text
from progress import Progress, RunData
from schema import read
from tasks import Task


def of_folds(settings: Settings) -> bool:
    """Whether a run trains the models of all folds, one after another."""
    return settings.folds is not None and settings.fold is None


def member(settings: Settings, fold: int) -> Settings:
    """The settings of the model of a fold, counted from 1."""
    folder = Path(settings.checkpoint_dir, f"fold_{fold}")
    return dataclasses.replace(settings, fold=fold, checkpoint_dir=str(folder))


def save_place(
    settings: Settings, data: dict[str, Any], members: Sequence[dict] = (), test: Mapping[str, Any] = {}, **more: Any
) -> None:
    """Write what a run of several models is resumed from: each model is resumed from its own folder.

    data: the description of all training data, see data_utils.load_splits.
    """
    nothing = {"model": {}, "model_args": {}, "epoch": 0, "step": 0, "best": {}}
    about = {"settings": settings.to_dict(), "data": data, "members": list(members), "test": dict(test), **more}
    save_checkpoint(Path(settings.checkpoint_dir, LAST), nothing | about)


class Place(Contents):
    """What a run of several models is resumed from."""

    data: RunData
    members: Members
    test: dict[str, float | str | None]


def check_place(checkpoint: dict[str, Any], path: str | Path) -> list[str]:
    """Check that a run of several models can be resumed from the checkpoint of this path.

    Returns:
        of its models' runs, as far as they have begun, the folders of their logs below log_dir.

    Raises:
        UserError: it cannot.
    """
    try:
        read(checkpoint, Place, "")
        settings = Settings.from_dict(checkpoint["settings"])
        if checkpoint["model"] or not (of_folds(settings) or settings.select == "auto"):
            raise UserError(f"it holds the mean of several models; the run is resumed from {LAST}")
    except UserError as error:
        raise UserError(f"{path} cannot be resumed: {error}") from error
    places = (f"fold_*/{LAST}", f"select/*/fold_*/{LAST}")
    folder, begun = Path(path).parent, []
    for last in (last for place in places for last in sorted(folder.glob(place))):
        if "progress" in (one := load_checkpoint(last)):
            logs = Path(*last.relative_to(folder).parts[:-2])  # those of a fold lie in log_dir itself
            begun.append(str(logs / Progress.from_dict(one["progress"]).run_name))
    return begun


def together(
    settings: Settings, data: dict[str, Any], kept: Sequence[tuple[dict[str, Any], dict[str, Any]]]
) -> dict[str, Any]:
    """The contents of the checkpoint of all models.

    Args:
        data: the description of all training data.
        kept: the checkpoint of each model, and the log's line of its epoch.
    """
    checkpoints = [checkpoint for checkpoint, _ in kept]
    known = [tasks.from_description(one["data"]["task"], "a fold's task") for one in checkpoints]
    task = tasks.from_description(data["task"]).of_members(known)
    return {
        "model": {member_weight(i, name): w for i, one in enumerate(checkpoints) for name, w in one["model"].items()},
        "model_args": checkpoints[0]["model_args"],
        "settings": settings.to_dict(),
        "data": data | {"task": tasks.describe(task)},
        "epoch": sum(one["epoch"] for one in checkpoints),
        "step": sum(one["step"] for one in checkpoints),
        "best": {},
        "members": [
            {"fold": fold, "task": one["data"]["task"], "best": line, "num_samples": one["data"]["split_sizes"]["val"]}
            for fold, (one, line) in enumerate(kept, 1)
        ],
    }


def estimate(task: Task, members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The headline metric of each model on its own fold: 'values' (None where it is undefined), 'mean' and 'std'."""
    values = [one["best"].get(f"val_{task.headline}") for one in members]
    found = [value for value in values if isinstance(value, (int, float))]
    return {
        "metric": task.headline,
        "values": values,
        "mean": statistics.mean(found) if found else None,
        "std": statistics.stdev(found) if len(found) > 1 else None,
    }


def estimate_text(found: dict[str, Any]) -> str:
    """'0.9134, standard deviation 0.0213 over 5 folds'."""
    mean, std = figure_text(found["mean"]), figure_text(found["std"])
    return f"{mean}, standard deviation {std} over {len(found['values'])} folds"


def table(task: Task, members: Sequence[dict[str, Any]]) -> str:
    """A line for each model: its epoch, and its figure on its own fold."""
    title = f"validation {task.headline.replace('_', ' ')}"
    lines = [f"fold  epoch  {title}  samples"]
    for one in members:
        figure = figure_text(one["best"].get(f"val_{task.headline}"))
        lines.append(f"{one['fold']:>4}  {one['best']['epoch']:>5}  {figure:>{len(title)}}  {one['num_samples']:>7}")
    return "\n".join(lines)
