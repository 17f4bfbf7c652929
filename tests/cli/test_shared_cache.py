"""Two processes that share a cache folder, and calibrate the same model at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ds_offload

# Each process waits, with its calibration made and not yet kept, until the other one is there, too.
CHILD = """
import os, sys, time
from pathlib import Path
from ds_offload import calibration
from ds_offload.cli.main import main

make = calibration.calibrate_loaded

def meet(*arguments, **options):
    made = make(*arguments, **options)
    folder = Path(os.environ["MEETING"])
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return made

calibration.calibrate_loaded = meet
sys.exit(main(["run", "--device", "cpu", "--max-new-tokens", "6", *sys.argv[1:]]))
"""


def test_both_answer_and_one_whole_calibration_is_kept(chat_model: str, tmp_path: Path) -> None:
    meeting, cache = tmp_path / "meeting", tmp_path / "cache"
    meeting.mkdir()
    root = str(Path(ds_offload.__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": root, "MEETING": str(meeting), "DS_OFFLOAD_CACHE": str(cache)}
    command = [sys.executable, "-c", CHILD, "--model", chat_model, "--prompt", "A lamp burned in the window."]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running = [start(), start()]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert all("calibrating" in err and "not kept" not in err for _, err in ended)
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert len(kept) == 1 and kept[0].suffix == ".safetensors"
    third = start()
    out, err = third.communicate(timeout=120)
    assert third.returncode == 0 and "calibrating" not in err
    assert {out for out, _ in ended} == {out} and out.strip()
