"""TensorBoard's event files, written at once: what cannot be written is an error of whoever writes it."""

from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import scalar

from deepseek_jax.checkpoint.files import writing


class EventFile:
    """A new file of events in a folder; TensorBoard then hides what earlier files there have from a step on.

    The library's own writer has a thread for its file. Where the disk is full that thread dies, and the next call
    waits for it for ever.

    Args:
        folder: of one TensorBoard run; made if absent.
        purge_step: the first step to hide.

    Raises:
        OSError: the file cannot be written, with its folder.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        self._folder = folder
        # Files are named by the second: the number keeps two resumes within one second apart, and in order.
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{len(list(folder.glob('events*'))):04d}")
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
            self._writer.write_event(Event(step=purge_step, session_log=start))
            self._writer.flush()

    def add(self, values: Mapping[str, float], step: int, time: float) -> None:
        """Add a step's scalars by their tags; they outlive a kill of the process from the moment this returns."""
        found = [value for tag, number in values.items() for value in scalar(tag, number).value]
        with writing(self._folder):
            self._writer.write_event(Event(wall_time=time, step=step, summary=Summary(value=found)))
            self._writer.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()
