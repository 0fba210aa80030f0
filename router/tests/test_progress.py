"""Progress of start-up: a bar where someone watches, lines where something collects."""

import os
import pty
import subprocess
import sys

CODE = """
from bros_router import logs
from bros_router.config import LogConfig
from bros_router.progress import StartupProgress
logs.configure(LogConfig())
progress = StartupProgress()
for done in range(0, 1001):
    progress.update("downloading", done, 1000)
progress.update("loading", 0, 0)
progress.update("loading", 50, 200)
progress.update("loading", 200, 200)
progress.update("loading", 200, 200)
progress.close()
progress.close()
"""


def test_lines_are_few_and_say_the_first_and_last_state_of_each_phase():
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    shown = [(line.split("] ")[1].split()[0], line.split("percent=")[1]) for line in ended.stderr.splitlines()]
    assert shown == [("downloading", "0"), ("downloading", "100"), ("loading", "0"), ("loading", "100")]


def test_bar_is_drawn_on_a_terminal_and_removed():
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", CODE], stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    drawn = b""
    try:
        while data := os.read(controller, 65536):
            drawn += data
    except OSError:  # Linux's end of file for a terminal that nobody has open any more
        pass
    os.close(controller)
    assert process.wait(timeout=60) == 0
    text = drawn.decode()
    assert "loading" in text
    assert "100%" in text
    assert "percent=" not in text
    assert text.rstrip().endswith("\x1b[2K")  # the last line was cleared
