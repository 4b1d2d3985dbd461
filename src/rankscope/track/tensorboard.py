"""TensorBoard: event files in GROUP/TRIAL, written by its own writer; extra `tensorboard`."""

import os
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.text.catalogue import Catalogue
from rankscope.track import Point, Tracker, flat


class Client(Tracker):
    """Event files in TENSORBOARD_LOGGING_DIR, as transformers' Trainer has it, or in the study's folder. A run is a
    writer, with one file for each session; TensorBoard reads them as one."""

    def __init__(self, folder: Path, text: Catalogue) -> None:
        given = os.environ.get("TENSORBOARD_LOGGING_DIR")
        self._folder = Path(given) if given else folder / "tensorboard"
        self.destination = given or "study"
        self.note = text("track.curves", command=f"tensorboard --logdir {shlex.quote(str(self._folder))}")

    def begin(self, name: str, run_id: str, group: str, config: Mapping[str, Any], again: bool) -> Any:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        writer = EventFileWriter(str(self._folder / group / name))
        _add(writer, hparams_pb(flat(config), trial_id=run_id), 0)
        return writer

    def log(self, run: Any, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        for _, step, metrics in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            _add(run, Summary(value=values), step)
        run.flush()

    def conclude(self, run: Any, sentence: str, pages: Sequence[Path]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        _add(run, text_pb("verdict", sentence), 0)
        for page in pages[:1]:
            _add(run, text_pb("report", page.with_name("report.md").read_text(encoding="utf-8")), 0)

    def finish(self, run: Any, summary: Point, status: str) -> None:
        """Write the status as text, and as the session's status on TensorBoard's HPARAMS page."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.log(run, [summary])
        _add(run, text_pb("status", status), summary.step)
        if status != "interrupted":  # TensorBoard keeps the first end that it sees
            ended = plugin_data_pb2.SessionEndInfo(
                status=api_pb2.STATUS_SUCCESS if status == "done" else api_pb2.STATUS_FAILURE, end_time_secs=time.time()
            )
            data = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=ended))
            _add(run, Summary(value=[Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=data)]), summary.step)
        run.close()


def _add(writer: Any, summary: Any, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
