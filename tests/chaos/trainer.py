"""A run in a process of its own that is heard epoch by epoch, and started again when killed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

_EPOCH = re.compile(r"epoch +(\d+)/")


class Trainer:
    """`esper-ray train CONFIG`, its lines with the times at which they came."""

    def __init__(self, config: Path) -> None:
        self._config = config
        self.lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self.start()

    def start(self) -> None:
        """Start, or start again: the newest checkpoint is found by itself."""
        command = [sys.executable, "-m", "esper_ray", "train", str(self._config)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        self._reader = threading.Thread(target=self._read, args=(self.process,))
        self._reader.start()

    def wait_for_epoch(self, least: int, since: float = 0.0, timeout_s: float = 300) -> float:
        """Until an epoch from `least` on is reported after `since`; when it was."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for at, line in self.lines:
                    told = _EPOCH.match(line)
                    if told and int(told[1]) >= least and at > since:
                        return at
                if time.monotonic() > deadline or not self._reader.is_alive():
                    raise AssertionError(f"epoch {least} did not come:\n{self.told()}")
                self._changed.wait(0.5)

    def wait_for_line(self, part: str, since: float, timeout_s: float = 300) -> float:
        """Until a line that holds `part` comes after `since`; when it did."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                for at, line in self.lines:
                    if part in line and at > since:
                        return at
                if time.monotonic() > deadline or not self._reader.is_alive():
                    raise AssertionError(f"{part!r} did not come:\n{self.told()}")
                self._changed.wait(0.5)

    def kill(self) -> None:
        """SIGKILL, and wait until its last line is read."""
        self.process.kill()
        self.process.wait(30)
        self._reader.join(30)

    def finish(self, timeout_s: float = 300) -> None:
        """Wait for success."""
        self.process.wait(timeout_s)
        self._reader.join(30)
        assert self.process.returncode == 0, self.told()

    def told(self) -> str:
        return "\n".join(line for _, line in self.lines[-60:])

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip()))
                self._changed.notify_all()
        process.stderr.close()
