"""`distill port --to mlx`: mlx-lm loads the folder and says what the student says."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.export import port
from tests.unit.port_sets import (
    CONVERSATIONS,
    FAMILIES,
    Divergence,
    as_requests,
    as_tools,
    prompt_ids,
    require_same_tokens,
    saved,
    student,
    trained_tokenizer,
)

mx = pytest.importorskip("mlx.core", reason="the extra `mlx` is absent")
mlx_lm = pytest.importorskip("mlx_lm", reason="the extra `mlx` is absent")
NEW = 8


def compared(family: str, folder: Path) -> int:
    """Tokens that mlx-lm's greedy generation shares with the student's."""
    from mlx_lm.generate import generate_step

    words = trained_tokenizer("qwen2" if family.startswith("qwen") else "smollm")
    made = student(family, words)
    if not folder.exists():
        port.run(port.PortConfig(saved(made, words, folder.with_suffix(".pt")), folder, "mlx"))
    model, tokenizer = mlx_lm.load(str(folder))
    count = 0
    for messages, tools in CONVERSATIONS[2:4]:
        prompt = prompt_ids(words, (messages, tools))
        assert prompt == list(
            tokenizer.apply_chat_template(
                as_requests(messages), tools=as_tools(tools) or None, add_generation_prompt=True
            )
        )
        found = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NEW)]
        count += require_same_tokens(made, prompt, found, tie=1e-3)
    return count


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "yarn rope, own factor"])
def test_mlx_lm_generates_the_students_tokens_from_chats_with_tools(family: str, tmp_path: Path) -> None:
    assert compared(family, tmp_path / "out") >= NEW


def test_a_wrong_rope_theta_is_seen_through_mlx(tmp_path: Path) -> None:
    compared("llama", tmp_path / "out")
    config = tmp_path / "out/config.json"
    config.write_text(config.read_text().replace("10000.0", "100.0"))
    with pytest.raises(Divergence):
        compared("llama", tmp_path / "out")
