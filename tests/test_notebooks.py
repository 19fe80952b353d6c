"""The notebooks: they run from top to bottom, and what they say is so. They are kept without outputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_documents import ROOT, execute

FOLDER = ROOT / "examples" / "notebooks"
# Run behind the last cell, with the notebook's own names.
CHECKS = {
    "accelerate": """
import onnxruntime

certificate = result.point.certificate
assert (certificate.guarantee, certificate.max_risk, certificate.images) == ("disagreement", 0.05, 150)
assert result.test.macs_saved > 0.2
assert (before == labels[photos]).mean() > 0.9
(logits,) = onnxruntime.InferenceSession(folder / "model.onnx").run(
    None, {"images": normalised(images[photos]).numpy()}
)
assert (unchanged.labels == logits.argmax(axis=1)).all()
assert len(answer.labels) == 8
""",
    "compare_methods": """
import numpy as np

right = {}
for name, arm in results.arms.items():
    with np.load(folder / "run" / "arms" / name / "logits.npz") as file:
        right[name] = file["test_logits"][-1].argmax(axis=-1) == file["test_labels"]
    assert right[name].mean() == arm.exits[-1].accuracy > 0.5
assert {"erde", "kd", "ce"} <= set(rows)
assert [(pair.first, pair.second) for pair in pairs] == [("erde", "kd"), ("erde", "ce"), ("kd", "ce")]
for pair in pairs:
    first, second = right[pair.first], right[pair.second]
    assert pair.only_first_right == (first & ~second).sum()
    assert pair.only_second_right == (second & ~first).sum()
    low, high = pair.accuracy_interval
    assert low <= first.mean() - second.mean() <= high
""",
    "recalibrate": """
splits = session.manifest.provenance["splits"]
assert splits["certify"]["fingerprint"] == known.certify.fingerprint()  # so none of these trained the network
assert not at_home.drifted
assert elsewhere.drifted
assert not quiet.drifted
assert slipped.drifted
certificate = renewed.manifest.point(None).certificate
assert (certificate.max_risk, certificate.images) == (0.05, 300)
old, new = measured(session), measured(renewed)
assert old["without exits"] == new["without exits"]
assert new["MACs saved"] > 0.2
""",
}


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return list(notebook["cells"])


def test_notebooks_are_listed_and_hold_no_outputs() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(CHECKS)
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in CHECKS:
        assert f"({name}.ipynb)" in listed
        first, *_ = cells(name)
        assert first["source"][0].startswith("# ")
        for cell in cells(name):
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    parts = ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]
    execute([sys.executable, "-c", "\n\n".join([*parts, CHECKS[name]])], tmp_path)
