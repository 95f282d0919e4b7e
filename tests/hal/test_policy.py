"""GLM5_BACKEND and its sisters: what may be written, what it means, and how a mistake is answered."""

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glm5_hal.errors import HalError
from glm5_hal.policy import (
    LOG_CHOICES,
    VARIABLES,
    LogSetting,
    Policy,
    Rule,
    Target,
    from_environment,
    parse,
    validate,
)

OPS = ("rms_norm", "rope", "mla_decode", "mla_prefill", "topk_indices")


def read(text: str) -> Policy:
    return parse(text, "GLM5_BACKEND")


def refused(text: str) -> HalError:
    with pytest.raises(HalError) as caught:
        read(text)
    assert caught.value.code == "POLICY"
    assert caught.value.fix
    assert repr(text) in str(caught.value)
    assert "GLM5_BACKEND" in str(caught.value)
    return caught.value


# The grammar


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("auto", [Rule(None, (Target("auto"),))]),
        ("acme", [Rule(None, (Target("acme"),))]),
        ("cpu:reference", [Rule(None, (Target("cpu", "reference"),))]),
        ("acme,cpu", [Rule(None, (Target("acme"), Target("cpu")))]),
        ("acme, auto", [Rule(None, (Target("acme"), Target("auto")))]),
        (
            "acme; topk_indices=acme:torch; mla_*=acme:triton,cpu",
            [
                Rule(None, (Target("acme"),)),
                Rule("topk_indices", (Target("acme", "torch"),)),
                Rule("mla_*", (Target("acme", "triton"), Target("cpu"))),
            ],
        ),
        ("rope=cpu; acme", [Rule("rope", (Target("cpu"),)), Rule(None, (Target("acme"),))]),
        ("rope=cpu", [Rule("rope", (Target("cpu"),))]),
        ("mla_[dp]*=cpu", [Rule("mla_[dp]*", (Target("cpu"),))]),
    ],
)
def test_what_may_be_written(text: str, rules: list[Rule]) -> None:
    assert read(text).rules == tuple(rules)
    assert read(str(read(text))).rules == tuple(rules)


def test_spaces_do_not_matter() -> None:
    assert read(" acme ,\tcpu ;\n rope = acme : torch ").rules == read("acme,cpu;rope=acme:torch").rules


def test_equal_text_gives_the_identical_object_and_provenance_tells_two_apart() -> None:
    assert parse("acme,cpu", "hal.use") is parse("acme,cpu", "hal.use")
    assert parse("acme,cpu", "hal.use") != parse("acme,cpu", "GLM5_BACKEND")
    assert parse("acme,cpu", "hal.use").provenance == "hal.use"
    assert parse(" acme", "hal.use").text == " acme"


@pytest.mark.parametrize(
    ("text", "piece", "says", "fix"),
    [
        ("", "", "nothing is named", "write auto"),
        ("  ", "  ", "nothing is named", "write auto"),
        ("acme;", "", "character 6", "stray ';'"),
        (";acme", "", "character 1", "stray ';'"),
        ("acme; ;rope=cpu", "", "a rule is expected", "stray ';'"),
        ("acme,", "", "character 6", "remove the ','"),
        ("acme,,cpu", "", "character 6", "remove the ','"),
        ("rope=", "", "a backend is expected", "backend:provider"),
        ("=acme", "", "an op is expected", "op's name or a glob"),
        ("a=b=c", "a=b=c", "a second '='", "';'"),
        ("acme:", "", "a provider is expected", "leave the ':' out"),
        (":torch", "", "a backend is expected", "lower-case"),
        ("acme:torch:x", "acme:torch:x", "a second ':'", "backend:provider"),
        ("acme; rope=cpu:9x", "9x", "character 16", "beginning with a letter"),
        ("auto:torch", "auto:torch", "auto takes no provider", "backend:torch"),
        ("acme; cpu", "cpu", "a second rule without an op", "acme,cpu"),
        ("acme; acme", "acme", "a second rule without an op", "keep one of the two"),
        ("acme,cpu; cpu,emca", "cpu,emca", "a second rule without an op", "acme,cpu,emca;"),
        ("rope=acme; rope=cpu", "rope=cpu", "a second rule for 'rope'", "keep one"),
        ("acme,cpu,acme", "acme", "character 10", "remove one"),
        ("ACME", "ACME", "a backend is expected", "acme"),
        ("acme:0", "0", "a provider is expected", "device's number"),
        ("acme|cpu", "acme|cpu", "a backend is expected", "','"),
        ("acme cpu", "acme cpu", "a backend is expected", "','"),
        ("acme.torch", "acme.torch", "a backend is expected", "':'"),
        ("mla.*=acme", "mla.*", "an op is expected", "'_'"),
        ("rope+rms_norm=acme", "rope+rms_norm", "an op is expected", "glob"),
    ],
)
def test_a_mistake_is_pointed_at_with_what_was_expected(text: str, piece: str, says: str, fix: str) -> None:
    error = refused(text)
    assert error.value == piece
    assert says in error.what
    assert fix in error.fix


def test_only_text_is_a_policy() -> None:
    with pytest.raises(HalError, match="a policy is text, this is list") as caught:
        parse(["acme"], "hal.use")  # type: ignore[arg-type]
    assert caught.value.code == "POLICY"


NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,6}", fullmatch=True).filter(lambda name: name != "auto")
TARGETS = st.one_of(st.just(Target("auto")), st.builds(Target, NAMES, st.none() | NAMES))
PATTERNS = st.none() | st.from_regex(r"[A-Za-z0-9_*?!\[\]-]{1,8}", fullmatch=True)
RULES = st.builds(Rule, PATTERNS, st.lists(TARGETS, min_size=1, max_size=3, unique=True).map(tuple))
POLICIES = st.lists(RULES, min_size=1, max_size=4, unique_by=lambda rule: rule.pattern).map(tuple)


@given(POLICIES)
def test_every_policy_can_be_written_and_read_back(rules: tuple[Rule, ...]) -> None:
    assert read(str(Policy(rules, "", "test"))).rules == rules


@given(st.text(st.sampled_from("ab:*=,; AÀ09_-.|[\t")) | st.text())
@example("a=:")
@example("İ")
def test_any_text_is_a_policy_or_a_hal_error(text: str) -> None:
    error = None
    try:
        policy = read(text)
    except HalError as caught:
        error = caught
    if error is None:
        assert read(str(policy)).rules == policy.rules
        return
    assert error.code == "POLICY"
    assert error.fix
    assert isinstance(error.value, str)
    assert error.value in text


# What it means


@pytest.mark.parametrize(
    ("text", "op", "targets"),
    [
        ("acme; rope=cpu", "rope", "cpu"),
        ("acme; rope=cpu", "rms_norm", "acme"),
        ("rope=cpu", "rms_norm", "auto"),
        ("rope=cpu; r*=acme", "rope", "cpu"),
        ("r*=acme; rope=cpu; *=auto", "rope", "cpu"),
        ("r*=acme; ro*=cpu", "rope", "cpu"),
        ("ro*=cpu; r*=acme", "rope", "acme"),
        ("acme; *=cpu", "rope", "cpu"),
        ("mla_[!d]*=cpu; acme", "mla_decode", "acme"),
        ("acme:torch,cpu", "rope", "acme:torch,cpu"),
        ("ROPE=cpu; acme", "rope", "acme"),
    ],
)
def test_the_exact_name_wins_then_the_last_glob_then_the_default(text: str, op: str, targets: str) -> None:
    assert ",".join(map(str, read(text).targets(op))) == targets


@pytest.mark.parametrize("rules", [*itertools.permutations(["acme", "rope=cpu", "r*=acme:triton"])])
def test_an_exact_name_wins_wherever_it_stands(rules: tuple[str, ...]) -> None:
    assert read(";".join(rules)).targets("rope") == (Target("cpu"),)


# Names must exist


def check(text: str, providers: tuple[str, ...] | None = ("torch", "triton")) -> None:
    validate(read(text), OPS, ("acme", "cpu"), lambda backend: providers)


@pytest.mark.parametrize("text", ["auto", "acme,cpu", "acme:torch; mla_*=cpu:triton; rope=auto", "acme; *=cpu"])
def test_names_that_exist_are_accepted(text: str) -> None:
    check(text)


@pytest.mark.parametrize(
    ("text", "value", "says", "fix"),
    [
        ("acne", "acne", "no backend is called 'acne'", "did you mean 'acme'"),
        ("acme,cpi", "cpi", "no backend is called 'cpi'", "did you mean 'cpu'"),
        ("aut", "aut", "no backend is called 'aut'", "did you mean 'auto'"),
        ("acme; rop=cpu", "rop", "no op is called 'rop'", "did you mean 'rope'"),
        ("acme; mls_*=cpu", "mls_*", "no op matches 'mls_*'", "rope"),
        ("acme:tritn", "tritn", "backend 'acme' has no provider 'tritn'", "did you mean 'triton'"),
        ("rope:acme", "rope", "no backend is called 'rope'", "write rope=acme"),
        ("acme=rope", "acme", "no op is called 'acme'", "op=acme"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_the_nearest(text: str, value: str, says: str, fix: str) -> None:
    with pytest.raises(HalError) as caught:
        check(text)
    assert caught.value.code == "UNKNOWN"
    assert caught.value.value == value
    assert says in caught.value.what
    assert f"{text!r} (GLM5_BACKEND)" in caught.value.what
    assert fix in caught.value.fix


def test_providers_that_cannot_be_known_yet_are_not_checked() -> None:
    check("acme:tritn", providers=None)


def test_no_backend_is_asked_for_its_providers_unless_the_policy_names_one() -> None:
    def ask(backend: str) -> tuple[str, ...]:
        raise AssertionError(f"{backend} was asked")

    validate(read("acme; rope=cpu,auto"), OPS, ("acme", "cpu"), ask)


# The environment


def test_an_empty_environment_means_auto_and_no_log() -> None:
    settings = from_environment({"PATH": "/bin"})
    assert settings.policy is parse("auto", "default")
    assert settings.log == LogSetting("off", "", "default")
    assert settings.foreign == ()


def test_every_setting_knows_where_it_came_from() -> None:
    settings = from_environment({"GLM5_BACKEND": "acme,cpu", "GLM5_LOG": "info"})
    assert settings.policy is parse("acme,cpu", "GLM5_BACKEND")
    assert settings.log == LogSetting("info", "", "GLM5_LOG")


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLM5_BACKEND", "acme:torch")
    assert from_environment().policy.text == "acme:torch"


def test_an_empty_backend_variable_is_a_mistake() -> None:
    with pytest.raises(HalError, match="unset it, or write auto"):
        from_environment({"GLM5_BACKEND": ""})


@pytest.mark.parametrize("level", ["off", "info", "debug"])
def test_log_levels(level: str) -> None:
    assert from_environment({"GLM5_LOG": level}).log == LogSetting(level, "", "GLM5_LOG")
    assert from_environment({"GLM5_LOG": f" {level} "}).log == LogSetting(level, "", "GLM5_LOG")


def test_jsonl_takes_a_file_in_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = from_environment({"GLM5_LOG": f"jsonl:{tmp_path}/a:b.jsonl"}).log
    assert log == LogSetting("jsonl", f"{tmp_path}/a:b.jsonl", "GLM5_LOG")
    monkeypatch.chdir(tmp_path)
    assert from_environment({"GLM5_LOG": "jsonl:events"}).log.path == os.path.join(os.getcwd(), "events")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_environment({"GLM5_LOG": "jsonl:~/events"}).log.path == f"{tmp_path}/events"


@pytest.mark.parametrize("text", ["", "on", "1", "verbose", "INFO", "json", "info:x", "off:", "json:x"])
def test_a_bad_log_value_lists_the_choices(text: str) -> None:
    with pytest.raises(HalError) as caught:
        from_environment({"GLM5_LOG": text})
    assert caught.value.code == "CONFIG"
    assert caught.value.value == text
    assert all(choice in caught.value.fix for choice in LOG_CHOICES)


def test_an_upper_case_log_level_is_recognised() -> None:
    with pytest.raises(HalError, match="did you mean 'info'"):
        from_environment({"GLM5_LOG": "INFO"})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "file is missing"),
        ("  ", "file is missing"),
        ("{tmp}/none/x", "no folder {tmp}/none"),
        ("{tmp}", "is a folder"),
    ],
)
def test_a_bad_jsonl_path_is_an_error(tmp_path: Path, path: str, says: str) -> None:
    with pytest.raises(HalError) as caught:
        from_environment({"GLM5_LOG": f"jsonl:{path.format(tmp=tmp_path)}"})
    assert caught.value.code == "CONFIG"
    assert says.format(tmp=tmp_path) in caught.value.what


@pytest.mark.parametrize("value", ["", "off"])
def test_shadow_may_be_off(value: str) -> None:
    assert from_environment({"GLM5_SHADOW": value}).foreign == ()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GLM5_BACKENDS", "GLM5_BACKEND"),
        ("GLM5_BACKED", "GLM5_BACKEND"),
        ("GLM5_BAKCEND", "GLM5_BACKEND"),
        ("GLM_BACKEND", "GLM5_BACKEND"),
        ("GLM5BACKEND", "GLM5_BACKEND"),
        ("GLM5_BACK_END", "GLM5_BACKEND"),
        ("GLM5HAL_BACKEND", "GLM5_BACKEND"),
        ("GLM5_HAL_BACKEND", "GLM5_BACKEND"),
        ("GLM_HAL_BACKEND", "GLM5_BACKEND"),
        ("GLM5-BACKEND", "GLM5_BACKEND"),
        ("GLM-5_BACKEND", "GLM5_BACKEND"),
        ("glm5_backend", "GLM5_BACKEND"),
        ("GLM5_LOGS", "GLM5_LOG"),
        ("GLM_LOG", "GLM5_LOG"),
        ("GLM5_SHADOWS", "GLM5_SHADOW"),
    ],
)
def test_a_near_miss_of_our_variables_is_an_error(name: str, meant: str) -> None:
    with pytest.raises(HalError, match=name) as caught:
        from_environment({name: "acme", meant: "off" if "BACKEND" not in meant else "acme"})
    assert caught.value.code == "UNKNOWN"
    assert caught.value.value == name
    assert meant in caught.value.fix


def test_other_variables_of_the_prefix_are_listed_and_no_one_elses_are() -> None:
    settings = from_environment(
        dict.fromkeys(["GLM5_WEIGHTS", "GLM5_LOG_DIR", "GLM5_LOGIN", "GLM4_BACKEND", "BACKEND", "HAL"], "x")
    )
    assert settings.foreign == ("GLM5_LOGIN", "GLM5_LOG_DIR", "GLM5_WEIGHTS")


@pytest.mark.parametrize("text", ["," * 100_000, "cpu," * 10_000, "x y" * 50_000])
def test_a_very_long_text_makes_no_very_long_message(text: str) -> None:
    with pytest.raises(HalError) as raised:
        parse(text, "GLM5_BACKEND")
    assert len(str(raised.value)) < 1000
