"""The benchmark's own sums and files: what it says of others has to be right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "peers")]

import common  # noqa: E402
import contestants  # noqa: E402
import machine  # noqa: E402
import workloads  # noqa: E402

import losses  # noqa: E402


@pytest.mark.parametrize("system", ["", "Be brief. {braces} stay."])
def test_a_peer_prompts_as_byeori_does(system: str) -> None:
    from byeori.data import template

    row = {"system": system, "question": "Why {this}?", "chosen": "Because.", "rejected": "No."}
    ours = template.parse(workloads.PAIRS.read_text(encoding="utf-8")).segments({**row, "answer": row["chosen"]})
    text = "".join(segment.text for segment in ours if not segment.trained)
    assert common.pair_of(row)["prompt"] == text
    head, answers = workloads._texts(workloads.WORKLOADS["W4"])(row)
    assert (head, answers) == (text, ["Because.", "No."])


def test_the_reference_counts_where_it_was_computed_before() -> None:
    # 30 s for 300 tokens: a tenth of a second each; the second step has 200 of them
    run = contestants.Run(name="byeori", step_seconds=[9, 20], tokens=[100, 200], reference_seconds=30)
    assert run.seconds() == [pytest.approx(40)]
    assert run.rate() == pytest.approx(5)


def test_work_is_counted_by_weights_tokens_and_targets(tiny_model: Path) -> None:
    # a layer of the tiny Llama: q, o 32 x 32; k, v 32 x 16; gate, up, down 32 x 64; two norms; and one norm at the end
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    weights, head = machine.sizes_of(tiny_model)
    assert weights == 2 * layer + 32
    assert head == 32 * json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    sizes = machine.Sizes(weights=weights, head=head, peak=1.0)
    assert sizes.flops(10, 3, reference=False) == 4 * (10 * weights + 3 * head)
    assert sizes.flops(10, 3, reference=True) == 6 * (10 * weights + 3 * head)


def test_few_shot_rows_share_their_header(tiny_model: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "rows.jsonl", tmp_path / "made.jsonl"
    rows = [{"document": f"text {number}", "title": f"title {number}"} for number in range(workloads.HEADER_ROWS + 9)]
    workloads._write(source, rows)
    workloads.few_shot_rows(tiny_model, source, 5, target)
    made = workloads._rows(target)
    assert [row["completion"] for row in made] == [row["title"] for row in rows[workloads.HEADER_ROWS :][:5]]
    header = made[0]["prompt"].removesuffix(workloads._SHOT.format(document=f"text {workloads.HEADER_ROWS}"))
    assert "title 0\n" in header
    assert all(row["prompt"].startswith(header) for row in made)


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_every_contestant_has_a_script(command: str) -> None:
    for who in contestants.CONTESTANTS.values():
        if who.library != "byeori" and command in who.commands:
            assert (BENCHMARKS / "peers" / f"{command}_{who.library}.py").is_file()


def test_losses_that_differ_are_told() -> None:
    run = contestants.Run(name="trl-tuned", losses=[0.69, 0.6], target_tokens=[5, 5])
    for second, within in ((0.6 * (1 + 5e-5), True), (0.6 * (1 + 2e-4), False)):
        ours = contestants.Run(name="byeori", losses=[0.69, second], target_tokens=[5, 5])
        assert losses.loss_table("W3", ours, run)[1] is within
