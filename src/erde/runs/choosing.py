"""``exits: auto``: which exits of a trained arm are kept, chosen once by measured time, before the arm is exported."""

from __future__ import annotations

import platform

import onnxruntime

from erde.calibration.exit_choice import choose_exits
from erde.calibration.settings import Settings
from erde.common import environment, progress
from erde.common.files import write_json
from erde.evaluation import run_folder
from erde.exporting.exit_times import measure_exits
from erde.networks.cost import network_cost
from erde.networks.network import keep_exits
from erde.runs.calibrating import reference_right
from erde.runs.folder import Run
from erde.runs.networks import network_as_trained


def choose_arms_exits(run: Run, arm: str) -> None:
    """Write ``exits.json`` of an arm, unless it is there: a choice stays, also where another one would be made now."""
    path = run.arm_folder(arm) / run_folder.EXITS
    if path.exists():
        return
    config, data = run.config, run.data
    network = network_as_trained(run, arm)
    names = network.exit_names[:-1]
    progress.say(f"{arm}: choose among {len(names)} exits")
    times, tune = measure_exits(
        network,
        data.mean,
        data.std,
        data.tune,
        opset=config.export.opset,
        threads=run.threads,
        seed=config.seed,
    )
    costs = [network_cost(keep_exits(network, [name]), data.input_size) for name in names]
    choice = choose_exits(
        tune,
        names,
        times,
        Settings(**dict(config.calibration)),
        threads=run.threads,
        machine=f"{environment.cpu_model()}, {platform.system()}, onnxruntime {onnxruntime.__version__}",
        reference_right=reference_right(config, run.folder)[0],
        first_shares=[cost.macs[0] / cost.no_exit_macs for cost in costs],
    )
    write_json(path, choice.model_dump(mode="json"))
    run.log.write("exits", arm=arm, kept=choice.chosen.exits, time_saved=choice.chosen.time_saved)
    progress.say(f"{arm}: {choice.line()}")
