"""Recipes: what they say, and how a command line overrides them."""

import argparse

import pytest
import yaml
from conftest import ROOT

from container.training import number, parse_with_recipe
from train_imagenet import parse_args

FOLDER = ROOT / "container" / "training" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_sets_everything_and_its_head_says_what_it_is(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    paper = yaml.safe_load((FOLDER / "paper.yaml").read_text())
    assert set(paper) <= set(yaml.safe_load(text))
    for heading in ("command", "result", "hardware"):
        assert f"# {heading} " in text
    args = parse_args(["--recipe", name, "--device", "cuda"])
    for key, value in yaml.safe_load(text).items():
        assert getattr(args, key) == value and args.recipe == name


def test_paper_is_the_released_recipe():
    args = parse_args(["--data-dir", "imagenet"])
    assert args.recipe == "paper" and args.model == "container_light"
    assert (args.epochs, args.lr_base, args.weight_decay, args.warmup_epochs) == (300, 5e-4, 0.05, 5)
    assert (args.warmup_lr, args.min_lr, args.sched_on_updates) == (1e-6, 1e-5, False)
    assert (args.drop_path, args.smoothing, args.mixup, args.cutmix) == (0.1, 0.1, 0.8, 1.0)
    assert (args.aa, args.reprob, args.aug_repeats, args.ema_decay) == ("rand-m9-mstd0.5-inc1", 0.25, 3, 0.99996)


def test_flags_override_the_recipe():
    args = parse_args(["--data-dir", "imagenet", "--lr-base", "1e-3", "--scale", "0.5", "0.9", "--sched-on-updates"])
    assert (args.lr_base, args.scale, args.sched_on_updates, args.epochs) == (1e-3, [0.5, 0.9], True, 300)
    assert parse_args([]).recipe == "digits" and parse_args([]).aa is None
    assert parse_args(["--recipe", "modern", "--clip-grad", "0"]).clip_grad is None


# A list of lists of lists, in 300 bytes; written out, it would have a billion numbers.
BOMB = "other:\n- &z0 [1]\n" + "".join(f"- &z{i} [{','.join([f'*z{i - 1}'] * 9)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    "recipe, message",
    [
        ("epochs: many", "argument --epochs: invalid int value: 'many'"),
        ("epoch: 3", "recipe mine sets epoch, which is no argument"),
        ("epochs: [", "recipe mine is no YAML: while parsing a flow node"),
        ("", "recipe mine has no lines of KEY: VALUE"),
        ("3: epochs", "recipe mine has no lines of KEY: VALUE"),
        ("epochs: null", "recipe mine does not set epochs; a whole one is "),
        ("other: 1", "recipe mine does not set epochs; a whole one is "),
        ("epochs: [3, '--other', 5]", "recipe mine sets epochs to what is neither a value nor a list of values"),
        ("other: [[1]]", "recipe mine sets other to what is neither a value nor a list of values"),
        (BOMB, "recipe mine sets other to what is neither a value nor a list of values"),
        ("other: {a: {b: 1}}", "recipe mine sets other to what is neither a value nor a list of values"),
        ("#" * 2**20 + "\nepochs: 1", "mine.yaml has more than 1,048,576 bytes"),
        (None, "no recipe mine; there are paper"),
    ],
)
def test_a_wrong_recipe(tmp_path, capsys, recipe, message):
    (tmp_path / "paper.yaml").write_text("epochs: 1\nother: null")
    if recipe is not None:
        (tmp_path / "mine.yaml").write_text(recipe)
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--other", type=int)
    with pytest.raises(SystemExit):
        parse_with_recipe(parser, [], tmp_path, "mine")
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_a_recipe_leaves_out_may_be_a_flag(tmp_path):
    paper = yaml.safe_load((FOLDER / "paper.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({key: value for key, value in paper.items() if key != "epochs"}))
    mine = str(tmp_path / "mine.yaml")
    with pytest.raises(SystemExit):
        parse_args(["--recipe", mine])
    args, whole = parse_args(["--recipe", mine, "--epochs", "300"]), parse_args(["--recipe", "paper"])
    assert {**vars(args), "recipe": "paper"} == vars(whole)


@pytest.mark.parametrize(
    ("values", "inside", "outside"),
    [
        ("[0, 1]", ("0", "0.5", "1", "1e-9"), ("-1e-9", "1.1", "nan", "inf")),
        ("(0, 1)", ("0.5",), ("0", "1")),
        ("[1, inf)", ("1", "1e30"), ("0.9", "inf", "nan")),
    ],
)
def test_numbers_of_an_interval(values, inside, outside):
    read = number(float, values)
    assert [read(text) for text in inside] == [float(text) for text in inside]
    for text in outside:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not in "):
            read(text)
    with pytest.raises(ValueError, match="invalid literal"):
        number(int, "[0, 9]")("1.5")


def test_a_file_is_a_recipe_and_so_are_the_settings_of_a_run(tmp_path, capsys):
    args = parse_args(["--data-dir", "imagenet", "--lr-base", "0.1", "--channels-last", "--output", "x", "--dry-run"])
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(vars(args)))
    again = parse_args(["--recipe", str(tmp_path / "args.yaml"), "--epochs", "7"])
    changed = {key for key, value in vars(args).items() if getattr(again, key) != value}
    assert changed == {"recipe", "output", "dry_run", "epochs"} and again.epochs == 7 and again.output == "output"
    with pytest.raises(SystemExit):
        parse_args(["--recipe", "nowhere.yaml"])
    assert "no recipe nowhere.yaml; there are " in capsys.readouterr().err
