"""Which contract a Backend may speak, and what it may be called. What else it may do wrong: test_loading.py."""

import pytest

from glm5_hal.backend import HAL_API

from .site import Site, backend


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
