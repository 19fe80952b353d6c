"""The whole chain in phases, each of which leaves its result in the run folder and is skipped when it is there.

    train -> distill -> export -> calibrate -> evaluate

Every file appears in one step, so a run that was killed at any moment continues with ``resume``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from erde.evaluation.results import Results
from erde.evaluation.run_folder import RESULTS
from erde.recipe.schema import Config
from erde.runs.calibrating import calibrate
from erde.runs.evaluating import evaluate
from erde.runs.exporting import export
from erde.runs.folder import Run
from erde.runs.opening import open_run
from erde.runs.training import distill, train
from erde.training import parallel

PHASES: dict[str, Callable[[Run], None]] = {
    "train": train,
    "distill": distill,
    "export": export,
    "calibrate": calibrate,
    "evaluate": evaluate,
}
# Several processes can share these; the first one does the rest alone.
TRAINING = ("train", "distill")


def run(
    config: Config, folder: str | Path, *, resume: bool = False, until: str = "evaluate"
) -> Results | None:
    """Run the chain into ``folder``, up to and including the phase ``until``; the results if it is the last.

    Raises:
        UserError: bad input; a folder that holds another run, or a run and no ``resume``.
    """
    with open_run(config, Path(folder), resume) as opened:
        for name, phase in PHASES.items():
            if name not in TRAINING:
                is_first = parallel.is_first()
                parallel.finish()
                if not is_first:
                    return None
            started = time.perf_counter()
            opened.log.write("phase", name=name)
            phase(opened)
            opened.seconds[name] = round(time.perf_counter() - started, 2)
            if name == until:
                break
        return Results.read(opened.folder / RESULTS) if until == "evaluate" else None
