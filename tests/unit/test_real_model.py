"""Where the tests on a real model and the benchmarks find it."""

from __future__ import annotations

import pytest

from benchmarks import real_model
from gft_lite.utils.errors import UserError


def test_a_named_folder_is_used_and_one_without_a_model_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("GFT_LITE_REAL_MODEL", str(tmp_path))
    with pytest.raises(UserError, match="GFT_LITE_REAL_MODEL: must be the folder of a model"):
        real_model.find_real_model()
    (tmp_path / "config.json").write_text("{}")
    assert real_model.find_real_model() == tmp_path


def test_a_converted_model_is_found_again_and_nothing_to_convert_is_an_error(monkeypatch, tmp_path):
    monkeypatch.delenv("GFT_LITE_REAL_MODEL", raising=False)
    monkeypatch.setattr(real_model, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match=r"no real model is here\. Run `make env-test`"):
        real_model.find_real_model(tmp_path)
    assert not list(tmp_path.iterdir())
    folder = tmp_path / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    assert real_model.find_real_model(tmp_path) == folder
