"""Experiment trackers: TensorBoard, Weights & Biases and Trackio.

The package of each one is an extra, imported when a run reports to it.
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mlx_openelm.errors import OpenELMError

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "mlx-openelm"


class Tracker(Protocol):
    """One service that keeps numbers and texts by step."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def log_text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


def require_trackers(names: Sequence[str]) -> None:
    """Raise OpenELMError if a tracker is unknown or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise OpenELMError(
                f"`report_to` is {name!r}; choose {', '.join(TRACKERS)}."
            )
        if find_spec(name) is None:
            raise OpenELMError(
                f"`report_to` is {name}, which is not installed; "
                f"pip install 'mlx-openelm[{name}]'."
            )


class Trackers:
    """All trackers of a run. One that fails is noted and left out; the run continues.

    Args:
        folder: of the run; TensorBoard's files go into its folder tensorboard.
        config: the options of the run.
        first_step: the step to continue from; records of later steps are replaced.

    Raises:
        OpenELMError: a package is not installed, or a tracker cannot start.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        config: Mapping[str, Any],
        first_step: int,
        on_failure: Callable[[str], None],
    ) -> None:
        require_trackers(names)
        self._on_failure = on_failure
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            try:
                with _stdout_to_stderr():
                    self._trackers[name] = _start(name, folder, config, first_step)
            except Exception as error:
                self.close()
                raise OpenELMError(f"{name} could not start: {error}") from error

    def log(self, group: str, record: Mapping[str, Any]) -> None:
        """Send the finite numbers of a record with its "step", named `group/key`."""
        numbers = {
            f"{group}/{key}": float(value)
            for key, value in record.items()
            if key not in ("step", "steps")
            and isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
        }
        if numbers and "step" in record:
            self._each(lambda tracker: tracker.log(record["step"], numbers))

    def log_text(self, step: int, name: str, text: str) -> None:
        self._each(lambda tracker: tracker.log_text(step, name, text))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                with _stdout_to_stderr():
                    act(tracker)
            except Exception as error:  # any error: a tracker must not stop the run
                del self._trackers[name]
                self._on_failure(f"{name} failed and gets no more metrics: {error}")


def _start(
    name: str, folder: Path, config: Mapping[str, Any], first_step: int
) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", first_step)
    if name == "wandb":
        import wandb

        # A resumed run is a new one in the same group.
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.name,
            group=folder.name,
            config=dict(config),
        )
        return HostedRun(run, wandb)
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=folder.name,
        group=folder.name,
        config=dict(config),
        resume="allow" if first_step else "never",
        embed=False,
    )
    return HostedRun(run, trackio)


class TensorBoard:
    """Event files, written by the package tensorboard itself."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event = Event
        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)  # drops the steps from here on
        self._writer.add_event(Event(step=first_step + 1, session_log=start))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=n, simple_value=v) for n, v in numbers.items()]
        self._add(step, Summary(value=values))

    def log_text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add(step, text_pb(name, text))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, summary: Any) -> None:
        event = self._event(step=step, wall_time=time.time(), summary=summary)
        self._writer.add_event(event)
        self._writer.flush()


class HostedRun:
    """A run of wandb, or of trackio, which has the same interface."""

    def __init__(self, run: Any, module: Any) -> None:
        self._run, self._module = run, module

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        table = self._module.Table(columns=["step", "text"], data=[[step, text]])
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        self._run.finish()


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect the output of a tracker to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
