"""Several runs at once: corrections against values by hand, one base for all, and PEFT's combinations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import byeori
from byeori import cli
from byeori.artifacts import layout
from byeori.errors import GateError
from byeori.evaluate import several
from byeori.evaluate.intervals import holm, p_value, paired_interval, t_quantile
from byeori.evaluate.report_numbers import rows_of
from byeori.model import load
from tiny_models import short_sft


@pytest.fixture(scope="module")
def other(tiny_model: Path, title_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "other"
    return short_sft(tiny_model, title_rows, folder, max_steps=4, learning_rate=1e-2, seed=7)


def run(adapters: list[Path], rows: Path, output: Path, **settings: Any) -> Any:
    common: dict[str, Any] = {"dtype": "float32", "max_new_tokens": 8, "max_rows": 6, "few_shots": 0}
    return byeori.compare(**{"adapter": adapters, "data_path": rows, "output_dir": output, **common, **settings})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- corrections ------------------------------------------------------------------------------------------------


def test_p_values_against_closed_forms() -> None:
    # Student's t has closed forms for 1 and 2 degrees: F = 1/2 + atan(t) / pi and 1/2 + t / (2 sqrt(2 + t^2))
    two, three = np.array([1.0, 4.0]), np.array([1.0, 2.0, 6.0])
    t = 2.5 / (two.std(ddof=1) / 2**0.5)
    assert p_value(two) == pytest.approx(1 - 2 * np.arctan(t) / np.pi, abs=1e-12)
    t = 3.0 / (three.std(ddof=1) / 3**0.5)
    assert p_value(three) == pytest.approx(1 - t / np.sqrt(2 + t**2), abs=1e-12)
    # tables of t: 2.228 at 10 degrees, 2.042 at 30, two-sided 0.05
    assert t_quantile(10) == pytest.approx(2.2281, abs=1e-4)
    assert t_quantile(30) == pytest.approx(2.0423, abs=1e-4)
    assert t_quantile(30, 0.99) == pytest.approx(2.7500, abs=1e-4)


def test_p_values_of_special_rows() -> None:
    assert p_value(np.zeros(40)) == 1.0
    assert p_value(np.array([3.0])) == 1.0
    assert p_value(np.full(40, 100.0)) < 1e-6
    assert 0.0 < p_value(np.full(4, 100.0)) < 1.0  # every row became right, which is no certainty
    assert p_value(np.array([1.0, np.nan, 4.0])) == p_value(np.array([1.0, 4.0]))


def test_holm_by_hand() -> None:
    # ordered 0.01, 0.03, 0.04 times 3, 2, 1 are 0.03, 0.06, 0.04, of which the last may not be below the one before it
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_false_claims_are_as_rare_as_said() -> None:
    """In families of six comparisons without any difference, about one in 20 claims one; uncorrected far more do."""
    generator = np.random.default_rng(0)
    claimed = uncorrected = 0
    for _ in range(400):
        models = generator.normal(size=(4, 30))
        values = {str(index): {"chrf": row.tolist()} for index, row in enumerate(models[1:])}
        base = {name: {"chrf": models[0].tolist()} for name in values}
        pairs = several.pairs_of(base, values)
        assert len(pairs) == 6
        claimed += any(several.sign_of(pair, "chrf") for pair in pairs)
        uncorrected += any(pair["difference"]["chrf"]["p"] < 0.05 for pair in pairs)
    assert claimed / 400 < 0.08
    assert uncorrected / 400 > 0.15


def test_names_of_runs() -> None:
    assert several.names(["a/run", "b/run/", "base"], "stack") == ["run", "run-2", "base-run", "stack"]


def test_a_run_that_is_doubted_is_not_called_better() -> None:
    base = {name: {"chrf": [0.0 + row % 3 for row in range(30)]} for name in ("honest", "leaked")}
    tuned = {
        "honest": {"chrf": [20.0 + row % 4 for row in range(30)]},
        "leaked": {"chrf": [90.0 + row % 5 for row in range(30)]},
    }
    runs = {name: {"findings": [{"undermines": name == "leaked"}]} for name in tuned}
    result = {"rows": 30, "heading": "chrF", "measure": "chrf", "runs": runs, "pairs": several.pairs_of(base, tuned)}
    said = several.sentence(result)
    assert said.startswith(
        "The score of leaked is no proof that the task was learned; the report says why. In chrF, honest"
    )
    assert "honest is better than base" in said and "leaked scores higher than honest" in said
    assert [line[-1] for line in several.table(result)] == ["better", "higher score", "higher score"]


# ---- the command ------------------------------------------------------------------------------------------------


def test_two_runs_equal_their_own_comparisons(
    trained: Path, other: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    whole = load.load_model
    monkeypatch.setattr(load, "load_model", lambda *given, **how: opened.append(given) or whole(*given, **how))
    both = run([trained, other], title_rows, tmp_path / "both")
    assert len(opened) == 1  # one base
    names = [trained.name, other.name]
    assert list(both.metrics["runs"]) == names
    for name, adapter in zip(names, (trained, other), strict=True):
        alone = run([adapter], title_rows, tmp_path / f"alone-{name}")
        assert lines(alone.rows) == lines(tmp_path / "both" / name / layout.ROWS)
        assert both.metrics["runs"][name]["difference"] == alone.metrics["difference"]
        assert (tmp_path / "both" / name / layout.REPORT).is_file()
    one, two = ([row["tuned"]["loss"] for row in lines(tmp_path / "both" / name / layout.ROWS)] for name in names)
    pairs = {(pair["first"], pair["second"]): pair["difference"]["loss"] for pair in both.metrics["pairs"]}
    assert list(pairs) == [("base", names[0]), ("base", names[1]), (names[0], names[1])]
    expected = paired_interval(np.array(two) - np.array(one), 1 - 0.05 / 3)
    found = pairs[names[0], names[1]]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(tuple(expected))
    assert [pair["p_holm"] for pair in pairs.values()] == holm([pair["p"] for pair in pairs.values()])
    page = both.report.read_text(encoding="utf-8")
    assert f'href="{other.name}/report.html"' in page
    assert (
        lines(both.rows)[0]["runs"][other.name]["output"]
        == lines(tmp_path / "both" / other.name / layout.ROWS)[0]["tuned_output"]
    )


def test_equal_runs_do_not_differ(trained: Path, title_rows: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(trained, twin)
    result = run([trained, twin], title_rows, tmp_path / "report")
    pair = result.metrics["pairs"][-1]
    assert (pair["first"], pair["second"]) == (trained.name, "twin")
    for difference in pair["difference"].values():
        assert (difference["mean"], difference["p"], difference["p_holm"]) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["stack", "average"])
def test_the_combination_equals_that_of_peft(
    kind: str, trained: Path, other: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = run([trained, other], title_rows, tmp_path / "report", combine=kind)
    assert list(result.metrics["runs"]) == [trained.name, other.name, kind]
    seen = {name: rows_of(of_run, "trained_on") for name, of_run in result.metrics["runs"].items()}
    assert seen[kind] == sorted({*seen[trained.name], *seen[other.name]}) != []  # it was trained on what they were
    assert "The training rows are not here" not in str(result.metrics)
    assert len(result.metrics["pairs"]) == 6
    folder = tmp_path / "report" / f"{kind}-adapter"

    def loaded() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    ids = torch.arange(5, 25)[None]
    peft = PeftModel.from_pretrained(loaded(), str(trained), adapter_name="a")
    peft.load_adapter(str(other), "b")
    how, weight = ("cat", 1.0) if kind == "stack" else ("linear", 0.5)
    peft.add_weighted_adapter(["a", "b"], [weight, weight], "c", combination_type=how)
    peft.set_adapter("c")
    ours = PeftModel.from_pretrained(loaded(), str(folder))
    torch.testing.assert_close(ours(ids).logits, peft(ids).logits, rtol=1e-5, atol=1e-5)
    answer = run([folder], title_rows, tmp_path / "again")  # the folder is an adapter like any other
    assert lines(answer.rows) == lines(tmp_path / "report" / kind / layout.ROWS)


def test_stacking_adds_the_updates_of_rslora_too(
    tiny_model: Path, title_rows: Path, trained: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    scaled = short_sft(tiny_model, title_rows, tmp_path / "rs", max_steps=3, learning_rate=1e-2, use_rslora=True)
    run([scaled, trained], title_rows, tmp_path / "report", combine="stack")

    def update(folder: Path) -> torch.Tensor:
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        before = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
        return merged.model.layers[0].self_attn.q_proj.weight.detach() - before

    expected = update(scaled) + update(trained)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(update(tmp_path / "report" / "stack-adapter"), expected, rtol=1e-4, atol=1e-5)


def test_a_stopped_comparison_of_runs_continues(
    trained: Path, other: Path, title_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from byeori.support.journal import Journal

    whole = run([trained, other], title_rows, tmp_path / "whole")
    add, count = Journal.add, [0]

    def stops(self: Journal, name: str, item: Any) -> None:
        count[0] += 1
        if count[0] == 30:
            raise KeyboardInterrupt
        add(self, name, item)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stops)
        with pytest.raises(KeyboardInterrupt):
            run([trained, other], title_rows, tmp_path / "stopped")
    kept = (tmp_path / "stopped" / f"{layout.ROWS}.part").read_text(encoding="utf-8")
    assert f'"{other.name} tuned' in kept
    assert f'"{other.name} base' not in kept  # what the base answers is computed once
    again = run([trained, other], title_rows, tmp_path / "stopped")
    assert again.metrics == whole.metrics
    assert not (tmp_path / "stopped" / f"{layout.ROWS}.part").exists()


def test_the_gate_reads_the_numbers_of_each_run(trained: Path, other: Path, title_rows: Path, tmp_path: Path) -> None:
    given = {"max_rows": 6, "max_new_tokens": 4}
    met = [f"{trained.name}.loss.low > -1000", f"{other.name}.chrf.base >= 0", "rows == 6"]
    met += [f"{name}.lead.copy.chrf.low > -1000" for name in (trained.name, other.name)]
    run([trained, other], title_rows, tmp_path / "met", fail_unless=met, **given)
    with pytest.raises(GateError, match=rf"{other.name}\.loss\.mean > 1000"):
        run([trained, other], title_rows, tmp_path / "b", fail_unless=f"{other.name}.loss.mean > 1000", **given)
    assert (tmp_path / "b" / layout.REPORT).is_file()
    with pytest.raises(byeori.ConfigError, match=r"there is no measure 'othr\.chrf'"):
        run([trained, other], title_rows, tmp_path / "c", fail_unless="othr.chrf.low > 0")
    with pytest.raises(byeori.ConfigError, match=r"there is no measure 'othr\.chrf'"):
        run([trained, other], title_rows, tmp_path / "c", fail_unless="othr.lead.copy.chrf.low > 0")


def test_what_cannot_be_compared_or_combined(
    trained: Path, tiny_model: Path, title_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(byeori.ConfigError, match="needs at least two adapters"):
        run([trained], title_rows, tmp_path / "x", combine="stack")
    words = ["compare", str(trained), str(trained), str(title_rows), "--output_dir", str(tmp_path / "x")]
    assert cli.main(words) == 2
    assert "is an adapter and not rows" in capsys.readouterr().err
    moved = tmp_path / "another-base"
    shutil.copytree(tiny_model, moved)
    model = AutoModelForCausalLM.from_pretrained(moved)
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(moved)
    elsewhere = short_sft(moved, title_rows, tmp_path / "elsewhere")
    with pytest.raises(byeori.ConfigError, match="runs are compared on one base"):
        run([trained, elsewhere], title_rows, tmp_path / "x")
    narrow = short_sft(tiny_model, title_rows, tmp_path / "narrow", lora_r=4)
    with pytest.raises(byeori.ConfigError, match="needs adapters of one rank"):
        run([trained, narrow], title_rows, tmp_path / "x", combine="average")
    dora = short_sft(tiny_model, title_rows, tmp_path / "dora", use_dora=True)
    with pytest.raises(byeori.ConfigError, match="has DoRA's magnitudes"):
        run([trained, dora], title_rows, tmp_path / "x", combine="stack")
    turned = short_sft(tiny_model, title_rows, tmp_path / "turned", template="{title}\n\n{document}")
    with pytest.raises(byeori.DataError, match="read different answers"):
        run([trained, turned], title_rows, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_templates_that_differ_are_each_asked_by_their_own(
    trained: Path, tiny_model: Path, title_rows: Path, tmp_path: Path
) -> None:
    worded = short_sft(tiny_model, title_rows, tmp_path / "worded", template="Title of {document}: {title}")
    result = run([trained, worded], title_rows, tmp_path / "report")
    alone = run([worded], title_rows, tmp_path / "alone")
    assert result.metrics["runs"]["worded"]["base"] == alone.metrics["base"]
