"""Which of a few documented candidates suits the data: each is trained for a short while on folds of the training data.

    for one in candidates(settings, sources, train): ...  # names, and the settings that each of them changes
    row(candidate, metric, ...)                           # its mean over the folds, its spread, its time
    better_half(rows, task)                               # those that are worth the other folds
    best(rows, task)                                      # the first that is as good as the highest mean

Test data are not looked at: the runs of folds are never tested. The candidates are in config.CANDIDATES.
"""

import dataclasses
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

import folds
from checkpoint import Candidate, SelectionRow
from config import CANDIDATES, FIELDS, SHORT_SERIES, Settings, flag_of, has_effect
from messages import UserError, figure_text
from tasks import LAST_EPOCH, Task

FOLDS = 3  # of the training data, unless --folds says how many
FEW = 3  # candidates that are all trained on all folds; of more, the better half may go on after the first fold
FOLDER = "select"  # of the candidates' runs, in the folder of the run
TOKENS = {"stem", "series_window", "series_stride"}  # one of them given says what the tokens are
OWN = ("file", "flag", "given", "recipe", "init_from")  # where a setting comes from that all candidates keep


def candidates(settings: Settings, sources: Mapping[str, str], train: Dataset) -> list[Candidate]:
    """The candidates for these settings; of those that come to the same, the one that changes the fewest settings.

    Args:
        sources: where each setting comes from.
        train: the training data; of series, their lengths decide which candidates there are.

    Raises:
        UserError: there is no choice, since what was given decides everything.
    """
    given = {name for name, source in sources.items() if source in OWN}
    given |= TOKENS if given & TOKENS else set()
    kind = settings.dataset_type if settings.dataset_type in CANDIDATES else "others"
    known = CANDIDATES["short series" if are_short(settings, train) else kind]
    found, seen = [], []
    for name, values in known.items():
        changes = {key: value for key, value in values.items() if key not in given}
        changed = dataclasses.replace(settings, **changes)
        effective = {key: value for key, value in vars(changed).items() if has_effect(changed, key)}
        if effective not in seen:
            seen.append(effective)
            found.append({"name": name, "settings": changes})
        elif len(changes) < len(found[same := seen.index(effective)]["settings"]):
            found[same] = {"name": name, "settings": changes}
    return checked(found)


def are_short(settings: Settings, train: Dataset) -> bool:
    """Whether the training data are series of fewer than SHORT_SERIES steps, by their median."""
    return settings.dataset_type == "sequences" and bool(np.median(train.lengths) < SHORT_SERIES)


def check_changes(found: Sequence[Candidate], given: Collection[str]) -> None:
    """Check that what is given to a resumed choice is not among what the candidates change.

    Raises:
        UserError: it is, and would take the place of what is chosen.
    """
    chosen = {name for one in found for name in one["settings"]}
    for name in sorted(chosen.intersection(given)):
        if FIELDS[name].metadata["on_resume"] != "free":
            raise UserError(f"{name}: cannot be given on resume, --select auto is choosing it; start again with it")


def checked(found: list[Candidate]) -> list[Candidate]:
    """The candidates, if there are at least two."""
    if len(found) < 2:
        raise UserError("select: what was given leaves nothing to choose between; leave some of it out, or --select")
    return found


def short_run(settings: Settings, candidate: Candidate, fold: int) -> Settings:
    """The settings of a candidate's run on a fold, which ends after a share of the epochs.

    Its figure is that of its last epoch, unless a score was named that picks one.
    """
    chosen = dataclasses.replace(settings, **candidate["settings"])
    folder = Path(settings.checkpoint_dir, FOLDER, candidate["name"])
    return folds.member(
        dataclasses.replace(
            chosen,
            select="none",
            folds=settings.folds or FOLDS,
            num_epochs=max(1, round(settings.select_share * chosen.num_epochs)),
            select_by=settings.select_by or LAST_EPOCH,
            early_stopping_patience=0,
            checkpoint_dir=str(folder),
            log_dir=str(Path(settings.log_dir, FOLDER, candidate["name"])),
        ),
        fold,
    )


def metric_of(settings: Settings, task: Task) -> str:
    """What candidates are compared by."""
    return settings.select_by if settings.select_by not in (None, LAST_EPOCH) else next(iter(task.higher_is_better))


def row(candidate: Candidate, metric: str, runs: Sequence[tuple[dict[str, Any], float]]) -> SelectionRow:
    """What a candidate came to, of its run on each fold: the line of the log, and seconds."""
    lines = [line for line, _ in runs]
    values = [line[f"val_{metric}"] for line in lines]
    found = [value for value in values if value is not None]
    return {
        **candidate,
        "metric": metric,
        "mean": statistics.mean(found) if found else None,
        "std": statistics.stdev(found) if len(found) > 1 else None,
        "n": len(values),
        "loss": statistics.mean(line["val_loss"] for line in lines),
        "seconds": sum(seconds for _, seconds in runs),
        "chosen": False,
    }


def ranked(rows: Sequence[SelectionRow], task: Task) -> list[SelectionRow]:
    """The best mean first; of equal ones that with the lower loss, then the first."""

    def score(one: SelectionRow) -> tuple[float, float]:
        sign = 1 if task.higher_is_better[one["metric"]] else -1
        return (-math.inf if one["mean"] is None else sign * one["mean"]), -one["loss"]

    return sorted(rows, key=score, reverse=True)


def better_half(rows: Sequence[SelectionRow], task: Task) -> set[str]:
    """Names of the candidates that are worth more folds after the first one."""
    return {one["name"] for one in ranked(rows, task)[: math.ceil(len(rows) / 2)]}


def best(rows: Sequence[SelectionRow], task: Task) -> tuple[SelectionRow, str]:
    """(of those that were trained on the most folds, the first one that is as good as the best: less than a standard
    error below its mean, which is the rule of Breiman et al. 1984 for the size of a tree; why it is this one). The
    error is that of the mean over the folds, from the deviations of all candidates."""
    most = max(one["n"] for one in rows)
    rows = [one for one in rows if one["n"] == most]
    top = ranked(rows, task)[0]
    deviations = [one["std"] for one in rows if one["std"] is not None]
    error = math.sqrt(statistics.mean(std**2 for std in deviations) / most) if deviations else 0.0
    near = [one for one in rows if one["mean"] is not None and abs(one["mean"] - top["mean"]) < error]
    if not near or near[0] is top:
        return top, "the best"
    return near[0], f"the first that is less than a standard error ({figure_text(error)}) behind the best"


def run_heading(candidates: Sequence[Candidate], metric: str) -> str:
    return f"fold  {'candidate':<{_width(candidates)}}  {_title(metric)}  seconds"


def run_line(one: SelectionRow, fold: int, candidates: Sequence[Candidate]) -> str:
    """The line of a candidate's run on a fold, of the row of this run alone."""
    value, width = figure_text(one["mean"]), len(_title(one["metric"]))
    return f"{fold:>4}  {one['name']:<{_width(candidates)}}  {value:>{width}}  {one['seconds']:>7.1f}"


def heading(candidates: Sequence[Candidate], metric: str) -> str:
    return f"{'candidate':<{_width(candidates)}}  {_title(metric)}     std   n  seconds"


def line(one: SelectionRow, candidates: Sequence[Candidate]) -> str:
    mean, std, width = figure_text(one["mean"]), figure_text(one["std"]), len(_title(one["metric"]))
    return f"{one['name']:<{_width(candidates)}}  {mean:>{width}}  {std:>6}  {one['n']:>2}  {one['seconds']:>7.1f}"


def _title(metric: str) -> str:
    return f"validation {metric.replace('_', ' ')}"


def _width(candidates: Sequence[Candidate]) -> int:
    return max(len("candidate"), *(len(one["name"]) for one in candidates))


def flags_of(candidate: Candidate) -> str:
    """The flags that stand for a candidate: '--stem conv --epochs 40'."""
    words = []
    for name, value in candidate["settings"].items():
        if value == FIELDS[name].default:
            continue
        flag = flag_of(name)
        words.append(flag if value is True else f"--no_{flag[2:]}" if value is False else f"{flag} {value:g}"
                     if isinstance(value, float) else f"{flag} {value}")  # fmt: skip
    return " ".join(words) or "the settings as they are"
