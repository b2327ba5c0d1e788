"""Settings from files and flags."""

from __future__ import annotations

import pytest

pytest.importorskip("jsonargparse", reason="the train extra is not installed")

from nmsparse_ext.recipes.catalog import RECIPES
from nmsparse_ext.recipes.config import TrainConfig, lambda_for_size, parse_config, plain
from nmsparse_ext.recipes.digits_resnet import DigitsConfig


def parse(*arguments):
    return parse_config(DigitsConfig, arguments, name="digits-resnet")


def test_defaults():
    assert parse() == DigitsConfig()


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('lr = 0.5\nepochs = 7\nskip = ["fc", "conv1"]\npattern = "1:4"\n')
    config = parse("--config", str(file), "--epochs", "2", "--method=ste", "--lambda_w", "1e-3")
    assert (config.lr, config.epochs, config.skip, config.pattern) == (0.5, 2, ["fc", "conv1"], "1:4")
    assert (config.method, config.lambda_w) == ("ste", 1e-3)


def test_switches(tmp_path):
    config = parse("--resume", "--out", str(tmp_path), "--no-progress", "--tensorboard", "false")
    assert config.resume
    assert not config.progress
    assert not config.tensorboard
    assert parse("--no-test", "--resume=false").test is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "x"], "epochs"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--lr", "-1"], "lr must not be negative, got -1"),
        (["--warmup", "1"], "warmup must be a share of the run"),
        (["--method", "magic"], "method"),
        (["--pattern", "5:4"], "5:4"),
        (["--unknown", "1"], "unknown"),
        (["--resume"], "resume needs out"),
        (["--test_share", "1.5"], "test_share must lie between 0 and 1, got 1.5"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_method_is_checked_without_the_parser():
    with pytest.raises(ValueError, match="method must be one of dense, ste, sr-ste, static, got 'x'"):
        TrainConfig(method="x")  # type: ignore[arg-type]


def test_unknown_entry_of_the_file_is_named(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("learning_rate = 0.5\n")
    with pytest.raises(ValueError, match="learning_rate"):
        parse("--config", str(file))


def test_plain_types(tmp_path):
    assert plain(DigitsConfig(out=tmp_path))["out"] == str(tmp_path)
    assert "out" not in DigitsConfig(out=tmp_path).settings()
    assert "lr" in DigitsConfig().settings()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [(100_000, 6e-5), (124e6, 6e-5), (300e6, 2e-4), (774e6, 6e-5), (7e9, 2e-4)],
)
def test_lambda_by_size(parameters, expected):
    assert lambda_for_size(int(parameters)) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_a_config_and_a_task(name):
    recipe = RECIPES[name]
    assert parse_config(recipe.config, [], name=name) == recipe.config()
    assert recipe.task.__doc__
