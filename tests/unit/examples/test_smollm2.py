"""The example's own parts: weights from GGUF, worked solutions, its configuration and what its script passes."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import yaml

from megatron_vcppo.config.load import load_config
from tests.helpers.source import ROOT

EXAMPLE = ROOT / "examples" / "smollm2"


def part(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_queries_and_keys_meet_as_before_in_transformers_order_of_rows() -> None:
    """GGUF's rotary embedding turns neighbors, transformers' the halves of a head: the scores must be the same."""
    num_heads, dim, hidden = 2, 6, 5
    random = np.random.default_rng(0)
    query, key = (random.normal(size=(num_heads * dim, hidden)) for _ in range(2))
    x, y = random.normal(size=(2, hidden))
    angles = np.arange(dim // 2) + 0.5

    def turned(first: np.ndarray, second: np.ndarray, position: int) -> tuple[np.ndarray, np.ndarray]:
        cos, sin = np.cos(position * angles), np.sin(position * angles)
        return first * cos - second * sin, second * cos + first * sin

    def neighbors(rows: np.ndarray, position: int) -> np.ndarray:
        heads = rows.reshape(num_heads, dim // 2, 2)
        return np.stack(turned(heads[..., 0], heads[..., 1], position), axis=-1).reshape(num_heads, dim)

    def halves(rows: np.ndarray, position: int) -> np.ndarray:
        heads = rows.reshape(num_heads, 2, dim // 2)
        return np.stack(turned(heads[:, 0], heads[:, 1], position), axis=1).reshape(num_heads, dim)

    convert = part("gguf_to_hf").halves_of_heads
    wanted = (neighbors(query @ x, 3) * neighbors(key @ y, 7)).sum(axis=1)
    got = (halves(convert(query, num_heads) @ x, 3) * halves(convert(key, num_heads) @ y, 7)).sum(axis=1)
    np.testing.assert_allclose(got, wanted)
    assert not np.allclose((halves(query @ x, 3) * halves(key @ y, 7)).sum(axis=1), wanted), "the order matters"


def test_names_of_tensors() -> None:
    name = part("gguf_to_hf").hf_name
    assert name("blk.11.attn_q.weight") == "model.layers.11.self_attn.q_proj.weight"
    assert name("token_embd.weight") == "model.embed_tokens.weight"


def test_a_worked_solution_adds_up() -> None:
    solution = part("make_data").worked_solution
    legs = {"ant": 6, "cow": 4, "bird": 2}
    lines = solution({"ant": 3, "cow": 2, "bird": 1}, legs).splitlines()
    assert lines == ["3 * 6 = 18", "2 * 4 = 8", "1 * 2 = 2", "18 + 8 = 26", "26 + 2 = 28", "#### 28"]
    assert solution({"cow": 5, "ant": 0}, legs).endswith("20 + 0 = 20\n#### 20")


def test_the_configuration_loads_and_leaves_room_for_its_responses() -> None:
    config = load_config(EXAMPLE / "smollm2.yaml", [])
    assert config.rollout.max_tokens < config.model.max_length
    assert config.prompts.system == part("try_export").SYSTEM, "the exported model is asked as it was trained"
    assert config.rollout.max_tokens == part("try_export").MAX_TOKENS
    written = yaml.safe_load((EXAMPLE / "smollm2.yaml").read_text())
    script = (EXAMPLE / "run.sh").read_text()
    for folder in (written["run"]["dir"], Path(written["model"]["hf"]).parent):
        assert f"={folder}\n" in script, "the script makes what the configuration reads"
    assert math.isclose(config.ppo.advantage.lam_critic, 1.0)
