"""Which contract a Backend may speak, and what it may be called. What else it may do wrong: test_loading.py."""

import sys

import pytest

from glm5_hal.backend import HAL_API, Backend

from .site import Site, backend, hook


@pytest.mark.parametrize(
    ("api", "fix"),
    [
        (HAL_API[1] + 1, "pip install -U 'glm5-hal'"),
        ((HAL_API[1] + 1, HAL_API[1] + 3), "pip install -U 'glm5-hal'"),
        (HAL_API[0] - 1, "pip install -U 'acme-hal', or take it out: pip uninstall acme-hal"),
        ((HAL_API[0] - 2, HAL_API[0] - 1), "pip install -U 'acme-hal', or take it out: pip uninstall acme-hal"),
    ],
)
def test_a_contract_that_this_core_does_not_speak_says_which_side_to_upgrade(
    site: Site, api: int | tuple[int, int], fix: str
) -> None:
    site.install("acme", backend(hal_api=api))
    record = site.record("acme")
    assert (record.status, record.code, record.fix) == ("refused", "HAL_API", fix)
    assert f"this core speaks {HAL_API[0]}" in record.reason
    assert f"speaks hal_api {api if isinstance(api, int) else f'{api[0]} to {api[1]}'}," in record.reason


@pytest.mark.parametrize("api", [HAL_API[0], HAL_API[1], HAL_API, (HAL_API[0] - 1, HAL_API[0]), (HAL_API[1], 99)])
def test_a_range_that_meets_ours_is_spoken(site: Site, api: int | tuple[int, int]) -> None:
    site.install("acme", backend(hal_api=api))
    assert site.record("acme").status == "ok"


def test_a_name_that_a_policy_needs_cannot_be_a_backends(site: Site) -> None:
    site.install("auto")
    assert site.record("auto").code == "NAME"


#: fields of the Backend, as source; what the reason says after "Backend."
BAD_FIELDS: dict[str, tuple[str, str]] = {
    "a kind of int": (
        "priority=type('I', (int,), {'__neg__': lambda s: 1 // 0})(3)",
        "priority is I, it should be int",
    ),
    "a device": ("device_type='cpu:0'", "device_type is 'cpu:0', it should be a device type of torch's, without"),
    "no device type": ("device_type=''", "device_type is '', it should be"),
    "formats that are none": ("cache_formats=5", "cache_formats is int, it should be Mapping"),
    "a format for a list": ("cache_formats={'latent': 'latent_576'}", "cache_formats has str for 'latent', it should"),
    "a kind of its own": (
        "cache_formats={'laten': ()}",
        "cache_formats has the kind 'laten', the kinds are latent, index",
    ),
    "a format of its own": (
        "cache_formats={'latent': ('mine',)}",
        "cache_formats names 'mine', the formats of 'latent'",
    ),
    "another kind's": ("cache_formats={'latent': ('bf16_128',)}", "cache_formats names 'bf16_128', the formats of"),
    "no function": ("prepare=5", "prepare is int, it should be a function or None"),
    "no sizes": ("tuning='tuning.toml'", "tuning is str, it should be Tunable or None"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_a_field_that_would_fail_later_is_refused_at_once(site: Site, case: str) -> None:
    fields, says = BAD_FIELDS[case]
    site.install("acme", hook(f"Backend(**{{'name': NAME, 'device_type': 'cpu', **dict({fields})}}, **ASKED)"))
    source = site.folder / "acme_plugin.py"
    source.write_text(source.read_text() + "\nASKED = {'probe': probe, 'kernels': kernels}\n")
    record = site.record("acme")
    assert (record.status, record.code) == ("broken", "FIELD")
    assert record.reason.startswith(f"Backend.{says}")
    assert record.fix.startswith("correct ")


def test_formats_that_are_known_are_taken(site: Site) -> None:
    site.install("acme", backend(cache_formats={"latent": ["fp8_656", "latent_576"], "index": ()}))
    assert site.record("acme").status == "ok"


SUBCLASS = """
import sys
class Own(Backend):
    def __getattribute__(self, name):
        if name == "device_type" and {when}: raise RuntimeError("late")
        return object.__getattribute__(self, name)
"""


def test_a_subclass_of_backend_is_read_once(site: Site) -> None:
    late = "sys._getframe(1).f_code.co_name == 'load'"
    site.install("acme", SUBCLASS.format(when=late) + hook('Own(NAME, "cpu", probe, kernels)'))
    record = site.record("acme")
    assert record.status == "ok"
    assert type(record.backend) is Backend


def test_a_subclass_of_backend_that_cannot_be_read_is_told(site: Site) -> None:
    site.install("acme", SUBCLASS.format(when="True") + hook('Own(NAME, "cpu", probe, kernels)'))
    record = site.record("acme")
    assert (record.code, record.backend) == ("FIELD", None)
    assert record.reason.startswith("reading the Backend raised RuntimeError: late, at ")


def test_an_entry_point_without_a_name_is_told_the_backends(site: Site) -> None:
    site.install("acme", entry_points="[glm5_hal.backends]\n = acme_plugin\n")
    (record,) = site.records()
    assert (record.code, record.fix) == ("NAME", "call the entry point 'acme'")


@pytest.mark.parametrize("name", ["ACME", "my name"])
def test_no_fix_offers_a_name_that_no_backend_may_have(site: Site, name: str) -> None:
    site.install("acme", entry_points=f"[glm5_hal.backends]\n{name} = acme_plugin\n")
    (record,) = site.records()
    assert (record.code, record.fix) == ("NAME", "call the entry point 'acme'")
    site.folder.joinpath("acme_plugin.py").write_text("")
    sys.modules.pop("acme_plugin", None)
    (record,) = site.records()
    assert record.code == "HOOK_MISSING"
    assert "Backend(name='acme'" in record.fix
