"""The demo's one decision; its steps are the commands, which have tests of their own."""

from __future__ import annotations

import pytest

from byeori import demo


@pytest.mark.parametrize(("speed", "epochs"), [(419e9, 3), (127e9, 1)])
def test_a_slow_processor_trains_one_epoch_and_says_so(
    speed: float, epochs: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "measured_peak", lambda dtype: speed)
    assert demo._epochs() == epochs
    assert ("One epoch instead of three: this processor multiplies at 127 GFLOP/s" in capsys.readouterr().err) == (
        epochs == 1
    )
