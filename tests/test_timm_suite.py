"""timm's own test file, from the source distribution of the timm that is installed, on every model of the family.

Its parametrization knows timm's models only, so its test functions are called here, name by name. TIMM_SDIST names the
unpacked source distribution: `pip download timm==VERSION --no-binary timm --no-deps`, then unpack.
"""

import importlib
import os
import sys

import pytest
import timm

QUICK = ("container_light_nano", "container_nano", "container_mixer")


def marked(names):
    """One member of each kind by default; all others take their time under -m slow."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


FAMILY = timm.list_models("container*")
NAMES = marked(FAMILY)
FREE_FAMILY = [name for name in FAMILY if not timm.get_pretrained_cfg(name).fixed_input_size]
FREE = marked(FREE_FAMILY)

pytestmark = pytest.mark.filterwarnings("ignore")  # timm's tests warn as they like


@pytest.fixture(scope="module")
def timm_tests():
    folder = os.environ.get("TIMM_SDIST")
    if folder is None:
        pytest.skip("TIMM_SDIST does not name timm's unpacked source distribution")
    with open(os.path.join(folder, "timm", "version.py")) as file:
        assert timm.__version__ in file.read(), "the source distribution is of another version"
    # As a module of its folder alone, since `tests` is also the name of ours.
    sys.path.insert(0, os.path.join(folder, "tests"))
    try:
        return importlib.import_module("test_models")
    finally:
        sys.path.pop(0)


def call(timm_tests, test, *args):
    """Runs a test of timm's; a skip of its own ("Fixed input size model > limit") would hide a defect here."""
    try:
        getattr(timm_tests, test)(*args)
    except pytest.skip.Exception as skip:
        pytest.fail(f"timm's {test} skipped: {skip}")


@pytest.mark.parametrize(
    "name",
    [
        name if name.split(".")[0] in ("container_light", *QUICK) else pytest.param(name, marks=pytest.mark.slow)
        for name in timm.list_models("container*", include_tags=True)
    ],
)
def test_default_cfgs(timm_tests, name):
    call(timm_tests, "test_model_default_cfgs", name, 1, "meta")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "test",
    [
        "test_model_forward",
        "test_model_forward_torchscript",
        "test_model_forward_features",
        "test_model_forward_intermediates_features",
        "test_model_forward_intermediates",
        "test_model_forward_fx",
        "test_model_forward_fx_torchscript",
    ],
)
def test_forward(timm_tests, test, name):
    call(timm_tests, test, name, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("test", ["test_model_backward", "test_model_backward_fx"])
def test_backward(timm_tests, test, name):
    call(timm_tests, test, name, 2)


@pytest.mark.parametrize("name", NAMES)
def test_prune_intermediate_layers_contract(timm_tests, name):
    call(timm_tests, "test_prune_intermediate_layers_contract", name)


@pytest.mark.parametrize("name", NAMES)
def test_headless_checkpoint_reload(timm_tests, name):
    call(timm_tests, "test_headless_checkpoint_reload", name, {})


@pytest.mark.parametrize("name", NAMES)
def test_head_hidden_size(timm_tests, name):
    call(timm_tests, "test_head_hidden_size", name, {} if name in FREE_FAMILY else dict(img_size=64))


# These create the model at its own size and feed it a smaller image, so a size-bound model cannot take them.
@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("test", ["test_reset_classifier_keeps_pool", "test_features_only_grad_checkpointing_backward"])
def test_head_and_checkpointing(timm_tests, test, name):
    call(timm_tests, test, name)


@pytest.mark.parametrize("name", FREE)
def test_prune_intermediate_layers_last_feature(timm_tests, name):
    call(timm_tests, "test_prune_intermediate_layers_last_feature", name, False)


@pytest.mark.parametrize("name", NAMES)
def test_stop_early_final_norm(timm_tests, name):
    call(timm_tests, "test_forward_intermediates_stop_early_final_norm", name, {})
