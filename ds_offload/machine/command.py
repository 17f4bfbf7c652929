"""A command of the system, asked for what it prints."""

from __future__ import annotations

import subprocess


def command_output(*command: str) -> str | None:
    """Standard output of a command; None where it is not installed or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
