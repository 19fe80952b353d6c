"""Run as a script: load a folder of images, see one epoch of it, and print peak memory and throughput as JSON.

Arguments: the folder, workers, batch size, image size, streaming (``always`` or ``never``).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def own_peak() -> int:
    """Of this process alone, in KiB: ``ru_maxrss`` may hold what the process that started this one had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    folder, workers, batch_size, image_size, streaming = sys.argv[1:]
    import torch

    from erde.data.batches import TrainBatches
    from erde.data.load import load_data
    from erde.recipe.schema import AugmentationConfig

    torch.set_num_threads(1)
    seconds = {}
    started = time.perf_counter()
    data = load_data(
        folder,
        image_size=int(image_size),
        tune_size=40,
        certify_size=40,
        test_size=40,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        streaming=streaming,
    )
    seconds["load"] = time.perf_counter() - started
    started = time.perf_counter()
    data.fingerprints()
    seconds["fingerprints"] = time.perf_counter() - started
    batches = TrainBatches(
        data.train,
        batch_size=int(batch_size),
        seed=0,
        augmentation=AugmentationConfig(resized_crop=(0.08, 1) if streaming == "always" else None),
        mean=data.mean,
        std=data.std,
        device=torch.device("cpu"),
        workers=int(workers),
    )
    started = time.perf_counter()
    for _ in batches.epoch(0):
        pass
    seconds["epoch"] = time.perf_counter() - started
    images = batches.steps * int(batch_size)
    del batches  # ends the workers, so that they are counted
    peaks = {
        "main": own_peak(),
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    }
    print(
        json.dumps(
            {
                "images": images,
                "images_per_second": round(images / seconds["epoch"]),
                "seconds": {name: round(value, 2) for name, value in seconds.items()},
                # Linux counts in KiB.
                "peak_mib": {name: round(value / 1024, 1) for name, value in peaks.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
