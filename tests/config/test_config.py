"""The config: BASE chains, overrides, published keys, and what wrong input is answered with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
from conftest import ROOT
from yacs.config import CfgNode

from config.loading import load_config
from models import build_model
from utils import UsageError

TINY = ROOT / "experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml"
SPEC = "MODEL.SPEC."

# Groups and keys of the published EsViT files that nothing here reads, each with a value as it stands there.
PUBLISHED_UNUSED: dict[str, Any] = {
    "AMP": {"ENABLED": True, "MEMORY_FORMAT": "nchw"},
    "AUG": {"MIXUP_PROB": 1.0, "TIMM_AUG": {"USE_LOADER": True, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1"}},
    "CUDNN": {"BENCHMARK": True, "DETERMINISTIC": False, "ENABLED": True},
    "DATASET": {"DATASET": "imagenet", "ROOT": "", "TEST_SET": "val"},
    "DEBUG": {"DEBUG": False},
    "FINETUNE": {"FINETUNE": False},
    "LOSS": {"LABEL_SMOOTHING": 0.1, "LOSS": "softmax"},
    "OUTPUT_DIR": "OUTPUT/",
    "PRINT_FREQ": 500,
    "TEST": {"BATCH_SIZE_PER_GPU": 128, "MODEL_FILE": ""},
    "TRAIN": {"LR": 0.0005, "OPTIMIZER_ARGS": None, "WITHOUT_WD_LIST": ["bn", "bias"]},
    "WORKERS": 6,
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.PRETRAINED": "",
}


def write_yaml(folder: Path, content: str, name: str = "network.yaml") -> Path:
    file = folder / name
    file.write_text(content)
    return file


def value_of(config: CfgNode, dotted: str) -> Any:
    for part in dotted.split("."):
        config = config[part]
    return config


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Records of the project's logger, whatever `setup_logging` has done to it."""
    monkeypatch.setattr("utils.logger.propagate", True)
    caplog.set_level("INFO", logger="esvit")
    return caplog


# --------------------------------------------------------------------------- BASE


def test_bases_apply_first_to_last_and_the_file_on_top(tmp_path: Path) -> None:
    write_yaml(
        tmp_path, "MODEL: {SPEC: {WINDOW_SIZE: 1, DIM_EMBED: 1, PATCH_SIZE: 1, IN_CHANS: 1}}", "grandparent.yaml"
    )
    write_yaml(
        tmp_path, "BASE: grandparent.yaml\nMODEL: {SPEC: {WINDOW_SIZE: 2, DIM_EMBED: 2, PATCH_SIZE: 2}}", "first.yaml"
    )
    write_yaml(tmp_path, "MODEL: {SPEC: {WINDOW_SIZE: 3, DIM_EMBED: 3}}", "second.yaml")
    file = write_yaml(tmp_path, "BASE: [first.yaml, second.yaml]\nMODEL: {SPEC: {WINDOW_SIZE: 4}}")
    spec = load_config(file).MODEL.SPEC
    assert (spec.WINDOW_SIZE, spec.DIM_EMBED, spec.PATCH_SIZE, spec.IN_CHANS) == (4, 3, 2, 1)
    assert load_config(file, [SPEC + "WINDOW_SIZE", "5"]).MODEL.SPEC.WINDOW_SIZE == 5


def test_bases_are_beside_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write_yaml(tmp_path / "shared", "MODEL: {SPEC: {WINDOW_SIZE: 9}}", "far.yaml")
    write_yaml(tmp_path / "shared", "BASE: [far.yaml]", "near.yaml")
    file = write_yaml(tmp_path, "BASE: [shared/near.yaml]")
    assert load_config(file).MODEL.SPEC.WINDOW_SIZE == 9


def test_two_bases_may_share_one(tmp_path: Path) -> None:
    write_yaml(tmp_path, "MODEL: {SPEC: {WINDOW_SIZE: 9}}", "root.yaml")
    for name in ("left", "right"):
        write_yaml(tmp_path, "BASE: [root.yaml]", f"{name}.yaml")
    file = write_yaml(tmp_path, "BASE: [left.yaml, right.yaml]")
    assert load_config(file).MODEL.SPEC.WINDOW_SIZE == 9


@pytest.mark.parametrize("nothing", ["['']", "''", "[]", ""])
def test_empty_base_is_none(tmp_path: Path, nothing: str) -> None:
    file = write_yaml(tmp_path, f"BASE: {nothing}\nMODEL: {{SPEC: {{WINDOW_SIZE: 9}}}}")
    assert load_config(file).MODEL.SPEC.WINDOW_SIZE == 9


@pytest.mark.parametrize("length", [1, 2, 3])
def test_circle_of_bases(tmp_path: Path, length: int) -> None:
    for i in range(length):
        write_yaml(tmp_path, f"BASE: [{(i + 1) % length}.yaml]", f"{i}.yaml")
    with pytest.raises(UsageError, match=r"0\.yaml .*BASE"):
        load_config(tmp_path / "0.yaml")


def test_missing_base_names_who_asked(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "BASE: [absent.yaml]")
    with pytest.raises(UsageError, match=r"absent\.yaml does not exist \(.*BASE in .*network\.yaml\)"):
        load_config(file)


@pytest.mark.parametrize("base", ["5", "[5]", "{a: b}", "[[a.yaml]]"])
def test_base_that_is_no_path(tmp_path: Path, base: str) -> None:
    with pytest.raises(UsageError, match="BASE"):
        load_config(write_yaml(tmp_path, f"BASE: {base}"))


# --------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        (SPEC + "WINDOW_SIZE", "14", 14),
        (SPEC + "DROP_PATH_RATE", "0.1", 0.1),
        (SPEC + "DROP_PATH_RATE", "0", 0.0),
        (SPEC + "DROP_PATH_RATE", "1e-4", 1e-4),
        (SPEC + "QKV_BIAS", "False", False),
        (SPEC + "QKV_BIAS", "off", False),
        (SPEC + "DEPTHS", "[1, 2]", [1, 2]),
        (SPEC + "DEPTHS", "(1, 2)", [1, 2]),
        ("INPUT.MEAN", "[0, 0.5, 1]", [0.0, 0.5, 1.0]),
        ("INPUT.RANGE", "[0, 255]", [0.0, 255.0]),
        ("INPUT.RANGE", "[]", []),
        ("MODEL.IMAGE_SIZE", "96", [96, 96]),
        ("MODEL.IMAGE_SIZE", "[96, 64]", [96, 64]),
    ],
)
def test_override_in_the_type_of_its_key(key: str, text: str, value: Any) -> None:
    found = value_of(load_config(TINY, [key, text]), key)
    assert found == value
    items = zip(found, value) if isinstance(value, list) else [(found, value)]
    assert all(type(a) is type(b) for a, b in items)


def test_number_in_scientific_notation_in_a_yaml(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "MODEL: {SPEC: {DROP_PATH_RATE: 1e-4}}")
    assert load_config(file).MODEL.SPEC.DROP_PATH_RATE == 1e-4


def test_last_override_of_a_key_counts() -> None:
    overrides = [SPEC + "WINDOW_SIZE", "3", SPEC + "DIM_EMBED", "12", SPEC + "WINDOW_SIZE", "5"]
    spec = load_config(TINY, overrides).MODEL.SPEC
    assert (spec.WINDOW_SIZE, spec.DIM_EMBED) == (5, 12)


def test_defaults_count_where_neither_yaml_nor_override_speaks(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("MODEL: {SPEC: {DIM_EMBED: 24}}")
    defaults = [SPEC + "DIM_EMBED", "12", SPEC + "WINDOW_SIZE", "3", SPEC + "PATCH_SIZE", "2", SPEC + "PATCH_SIZE", "8"]
    spec = load_config(path, [SPEC + "WINDOW_SIZE", "5"], defaults).MODEL.SPEC
    assert (spec.DIM_EMBED, spec.WINDOW_SIZE, spec.PATCH_SIZE) == (24, 5, 8)


def test_override_of_a_group_leaves_its_other_keys() -> None:
    spec = load_config(TINY, ["MODEL.SPEC", "{WINDOW_SIZE: 3}"]).MODEL.SPEC
    assert (spec.WINDOW_SIZE, spec.DIM_EMBED) == (3, 96)


@pytest.mark.parametrize(
    "overrides", [["MODEL.SPEC.WINDOW_SIZE"], ["MODEL.SPEC.DIM_EMBED", "96", "MODEL.SPEC.WINDOW_SIZE"]]
)
def test_override_without_a_value(overrides: list[str]) -> None:
    with pytest.raises(UsageError, match=r"KEY VALUE.*'MODEL\.SPEC\.WINDOW_SIZE'"):
        load_config(TINY, overrides)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (SPEC + "WINDOW_SIZE", "7.5"),
        (SPEC + "WINDOW_SIZE", "7.0"),
        (SPEC + "WINDOW_SIZE", "True"),
        (SPEC + "WINDOW_SIZE", "seven"),
        (SPEC + "WINDOW_SIZE", ""),
        (SPEC + "DROP_PATH_RATE", "False"),
        (SPEC + "DROP_PATH_RATE", "high"),
        (SPEC + "QKV_BIAS", "1"),
        (SPEC + "DEPTHS", "2"),
        (SPEC + "DEPTHS", "[2, 2.5]"),
        (SPEC + "DEPTHS", "[2, [2]]"),
        (SPEC + "DEPTHS", "[2, 2"),
        ("MODEL.IMAGE_SIZE", "[1, 2, 3]"),
        ("MODEL.IMAGE_SIZE", "True"),
        ("INPUT.MEAN", "0.5"),
        ("INPUT.MEAN", "[0.5]"),
        ("INPUT.RANGE", "255"),
        ("INPUT.RANGE", "[255]"),
        ("INPUT.RANGE", "[255, 0]"),
        ("INPUT.RANGE", "[0, .inf]"),
        ("INPUT.RANGE", "[.nan, 1]"),
        ("INPUT.RANGE", "[0, 1, 2]"),
        ("MODEL.NAME", "[swin_transformer]"),
    ],
)
def test_wrong_type_names_the_key(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(key)):
        load_config(TINY, [key, text])


def test_wrong_type_names_file_and_value(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "MODEL: {SPEC: {WINDOW_SIZE: seven}}")
    with pytest.raises(UsageError, match=rf"'MODEL.SPEC.WINDOW_SIZE' takes a.* int .*{re.escape(str(file))}.*'seven'"):
        load_config(file)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (SPEC + "PATCH_SIZE", "0"),
        (SPEC + "WINDOW_SIZE", "0"),
        (SPEC + "DIM_EMBED", "0"),
        (SPEC + "IN_CHANS", "0"),
        (SPEC + "NUM_HEADS", "[0, 6, 12, 24]"),
        (SPEC + "NUM_HEADS", "[-3, 6, 12, 24]"),
        (SPEC + "DEPTHS", "[]"),
        (SPEC + "DROP_RATE", "2.0"),
        (SPEC + "DROP_PATH_RATE", "-0.1"),
        (SPEC + "DROP_PATH_RATE", "1.5"),
        ("MODEL.IMAGE_SIZE", "[0, 224]"),
    ],
)
def test_value_out_of_range_names_the_key(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(key)), torch.device("meta"):
        build_model("swin", load_config(TINY, [key, text]))


# --------------------------------------------------------------------------- unknown and unused keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.SPEC.WINDOWSIZE", "MODEL.SPEC.WINDOW_SIZE"),
        ("MODEL.SPEC.window_size", "MODEL.SPEC.WINDOW_SIZE"),
        ("MODEL.SPEC.NUM_HEAD", "MODEL.SPEC.NUM_HEADS"),
        ("MODEL.IMG_SIZE", "MODEL.IMAGE_SIZE"),
        ("INPUT.MEANS", "INPUT.MEAN"),
        ("WINDOW_SIZE", "MODEL.SPEC.WINDOW_SIZE"),
        ("MODEL.NAME.SWIN", "MODEL.NAME"),
    ],
)
def test_unknown_key_names_the_nearest(tmp_path: Path, key: str, nearest: str) -> None:
    wanted = rf"unknown config key '{re.escape(key)}'.*did you mean '{re.escape(nearest)}'\?"
    with pytest.raises(UsageError, match=wanted):
        load_config(TINY, [key, "7"])
    with pytest.raises(UsageError, match=wanted):
        load_config(write_yaml(tmp_path, f"{key}: 7"))


@pytest.mark.parametrize("content", ["MODEL: 5", "MODEL: {SPEC: 5}", "TRAINING: {LR: 1}", "1: 2", "TRAINX: 1"])
def test_key_that_is_no_leaf_of_the_schema(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="unknown config key"):
        load_config(write_yaml(tmp_path, content))


@pytest.mark.parametrize("key", PUBLISHED_UNUSED)
def test_published_key_without_effect(tmp_path: Path, log: pytest.LogCaptureFixture, key: str) -> None:
    nested = CfgNode({key: PUBLISHED_UNUSED[key]}).dump()
    file = write_yaml(tmp_path, nested)
    assert load_config(file) == load_config(None)
    assert [record.getMessage() for record in log.records] == [f"config {file}: keys without effect here: {key}"]


def test_published_file_is_reported_once(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    file = write_yaml(
        tmp_path, f"BASE: ['']\n{CfgNode(PUBLISHED_UNUSED).dump()}\nMODEL: {{SPEC: {{WINDOW_SIZE: 14}}}}\n"
    )
    for _ in range(3):
        assert load_config(file).MODEL.SPEC.WINDOW_SIZE == 14
    (record,) = log.records
    assert record.name == "esvit"
    assert record.getMessage().split(": ")[-1] == ", ".join(sorted(PUBLISHED_UNUSED))


@pytest.mark.parametrize("group", [key for key in PUBLISHED_UNUSED if "." not in key])
def test_any_key_of_an_unused_group_is_reported_and_not_fatal(
    tmp_path: Path, log: pytest.LogCaptureFixture, group: str
) -> None:
    """What the published files hold there is theirs to know: at any depth, with or without values."""
    file = write_yaml(tmp_path, f"{group}: {{NEVER_SEEN: 1, DEEP: {{ER: {{STILL: [1, a]}}}}, NOTHING: }}\n")
    assert load_config(file) == load_config(None)
    assert load_config(write_yaml(tmp_path, f"{group}:\n", "empty.yaml")) == load_config(None)
    messages = [record.getMessage() for record in log.records]
    assert [message.split(": ")[-1] for message in messages] == [group, group]  # once a file


@pytest.mark.parametrize(
    ("content", "nearest"),
    [
        ("MODEL: {NUM_CLASES: 10}", "MODEL.NUM_CLASSES"),
        ("MODEL: {SPEC: {DEPHTS: [2, 2]}}", "MODEL.SPEC.DEPTHS"),
        ("MODEL: {NAME: cvt_v4_transformer, SPEC: {QKV_BAIS: True}}", "MODEL.SPEC.QKV_BIAS"),
        ("MODEL: {NAME: vision_longformer, SPEC: {MSVIT: {SHAREW: True}}}", "MODEL.SPEC.MSVIT.SHARE_W"),
        ("MODEL: {NAME: vision_longformer, SPEC: {DROP_PAHT: 0.1}}", "MODEL.SPEC.DROP_PATH"),
        ("MODEL: {NAME: cvt_v4_transformer, SPEC: {KERNEL_QVK: 3}}", "MODEL.SPEC.KERNEL_QKV"),
        ("INPUT: {MAEN: [0.5, 0.5, 0.5]}", "INPUT.MEAN"),
        ("INPUT: {STDEV: [0.5, 0.5, 0.5]}", "INPUT.STD"),
        ("TRIAN: {LR: 0.1}", "TRAIN.LR"),
        ("TESTS: {BATCH_SIZE_PER_GPU: 8}", "TEST.BATCH_SIZE_PER_GPU"),
        ("PRINT_FREQUENCY: 10", "PRINT_FREQ"),
    ],
)
def test_a_mistyped_key_of_a_group_in_use_is_an_error(tmp_path: Path, content: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown config key .*did you mean '{re.escape(nearest)}'\?"):
        load_config(write_yaml(tmp_path, content))


def test_a_key_of_another_network_names_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'MODEL.SPEC.WINDOW_SIZE' .*cvt_.* and swin_.*MODEL.NAME is vision"):
        load_config(write_yaml(tmp_path, "MODEL: {NAME: vision_longformer, SPEC: {WINDOW_SIZE: 7}}"))


def test_the_image_size_of_published_files_counts(tmp_path: Path) -> None:
    """They have it in a group that is unused otherwise; what is set later wins, under either name."""
    file = write_yaml(tmp_path, "TRAIN: {IMAGE_SIZE: [96, 64], LR: 1.0}")
    assert load_config(file).MODEL.IMAGE_SIZE == [96, 64]
    assert load_config(file, ["MODEL.IMAGE_SIZE", "32"]).MODEL.IMAGE_SIZE == [32, 32]
    assert load_config(TINY, ["TRAIN.IMAGE_SIZE", "384"]).MODEL.IMAGE_SIZE == [384, 384]
    on_top = write_yaml(tmp_path, "BASE: [network.yaml]\nMODEL: {IMAGE_SIZE: [48, 48]}", "top.yaml")
    assert load_config(on_top).MODEL.IMAGE_SIZE == [48, 48]


def test_nothing_is_reported_without_unused_keys(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    load_config(write_yaml(tmp_path, "MODEL: {SPEC: {WINDOW_SIZE: 14}}"))
    assert not log.records


def test_unused_key_may_be_overridden(log: pytest.LogCaptureFixture) -> None:
    assert load_config(TINY, ["TRAIN.LR", "0.1"]) == load_config(TINY)


# --------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: [", "not valid yaml"),
        ("a: b: c", "not valid yaml"),
        ("\tMODEL: 1", "not valid yaml"),
        ("MODEL: \x00", "not valid yaml"),
        ("[1, 2]", "holds a list"),
        ("swin", "holds a str"),
        ("MODEL: {NAME: resmet}", "MODEL.NAME 'resmet' in .* is unknown; valid names: .*swin_transformer"),
        ("MODEL: {NAME: [swin_transformer]}", "MODEL.NAME"),
        ("MODEL: {NAME: }", "MODEL.NAME"),
    ],
)
def test_malformed_file(tmp_path: Path, content: str, message: str) -> None:
    file = write_yaml(tmp_path, content)
    with pytest.raises(UsageError, match=message) as caught:
        load_config(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "network.yaml"
    file.write_bytes(b"\x80\x02\xff\xfe")
    with pytest.raises(UsageError, match="not valid yaml"):
        load_config(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.yaml does not exist; check --cfg"):
        load_config(tmp_path / "absent.yaml")


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(write_yaml(tmp_path, "# nothing yet\n")) == load_config(None)


# --------------------------------------------------------------------------- the result


def test_result_is_frozen() -> None:
    config = load_config(TINY)
    for node, key in (
        (config, "MODEL"),
        (config.MODEL, "NAME"),
        (config.MODEL.SPEC, "WINDOW_SIZE"),
        (config.INPUT, "NEW"),
    ):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(node, key, 1)


def test_results_are_independent() -> None:
    first = load_config(TINY)
    before = first.dump()
    second = load_config(TINY)
    second.defrost()
    second.MODEL.SPEC.WINDOW_SIZE = 3
    second.MODEL.SPEC.DEPTHS.append(5)
    second.INPUT.MEAN[0] = 9.0
    second.MODEL.IMAGE_SIZE[0] = 32
    assert first.dump() == before
    assert load_config(TINY).dump() == before
    assert load_config(None, [SPEC + "WINDOW_SIZE", "7"]).dump() == before  # what the schema's defaults are


@pytest.mark.parametrize("is_teacher", [False, True])
def test_building_leaves_the_config_as_it_was(is_teacher: bool) -> None:
    config = load_config(ROOT / "experiments/demo/swin_micro.yaml")
    before = config.dump()
    build_model("swin", config, dense=True, is_teacher=is_teacher)
    assert config.dump() == before
    assert config.is_frozen()
    assert config.MODEL.SPEC.is_frozen()


def test_dump_loads_as_the_same_config(tmp_path: Path) -> None:
    config = load_config(TINY, [SPEC + "WINDOW_SIZE", "14", "MODEL.IMAGE_SIZE", "96"])
    assert load_config(write_yaml(tmp_path, config.dump())) == config


def test_config_loads_in_a_program_that_has_not_imported_models() -> None:
    program = f"from config import load_config; print(load_config({str(TINY)!r}).MODEL.SPEC.WINDOW_SIZE)"
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert output == "7\n"


def test_config_imports_neither_torch_nor_timm() -> None:
    """Programs parse their flags before they import these; what `utils` imports is not counted."""
    modules = ["torch", "timm", "models"]
    program = f"""
import sys, types
utils = types.ModuleType("utils")
utils.UsageError, utils.logger = ValueError, None
sys.modules["utils"] = utils
import config
assert not set(sys.modules) & set({modules!r})
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
