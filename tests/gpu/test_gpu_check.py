"""Every part of tools/gpu_check.sh as a test: no row may fail. Skipped, with the part's reason, where it cannot run."""

from typing import Any

import pytest

from tools.gpu_check.__main__ import LOOK_TIMEOUT_S, run_part
from tools.gpu_check.child import call
from tools.gpu_check.parts import PART_TIMEOUT_S, PARTS, Part, reason_to_skip
from tools.gpu_check.rows import table

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(PART_TIMEOUT_S + 60)]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    modules = sorted({name for part in PARTS for name in part.modules})
    return call("tools.gpu_check.parts:look", LOOK_TIMEOUT_S, modules=modules)


@pytest.mark.parametrize("part", [pytest.param(part, id=part.name) for part in PARTS if part.name != "push"])
def test_no_row_fails(part: Part, found: dict[str, Any]) -> None:
    if why := reason_to_skip(part, found, "cuda"):
        pytest.skip(why)
    rows = run_part(part, found, "cuda", "full")
    assert not [row for row in rows if row.verdict == "FAIL"], "\n" + table(rows)
