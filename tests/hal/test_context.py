"""The policy in force: from the environment or from ``hal.use``, apart for threads and tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from toys import PAIR, installed, kernel_of, published, raised, stand_in, toy

import glm5_hal
from glm5_hal import context, hookspecs
from glm5_hal.backend import ATTRIBUTES, Kernel
from glm5_hal.errors import HalError


def now() -> tuple[str, str, frozenset[str], str]:
    policy, require, check = context.effective()
    return policy.text, policy.provenance, require, check


DEFAULT = ("auto", "default", frozenset[str](), "auto")


pytestmark = pytest.mark.usefixtures("fresh")


def test_without_any_setting() -> None:
    assert now() == DEFAULT


def test_the_environment_is_read_once(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("GLM5_BACKEND", "cpu:torch")
    assert now()[:2] == ("cpu:torch", "GLM5_BACKEND")
    fresh.setenv("GLM5_BACKEND", "cpu")
    assert now()[0] == "cpu:torch"
    context.reset()
    assert now()[0] == "cpu"


@pytest.mark.parametrize(
    ("name", "value", "code", "words"),
    [
        ("GLM5_BACKEND", "cpu:", "POLICY", "a provider is expected"),
        ("GLM5_BACKEND", "cqu", "UNKNOWN", "did you mean 'cpu'?"),
        ("GLM5_BACKEND", "cpu:troch", "UNKNOWN", "did you mean 'torch'?"),
        ("GLM5_BACKEND", "cpu; rms_nrom=cpu", "UNKNOWN", "did you mean 'rms_norm'?"),
        ("GLM5_BACKENDS", "cpu", "UNKNOWN", "GLM5_BACKEND was meant?"),
        ("GLM5_LOG", "loud", "CONFIG", "known: "),
    ],
)
def test_a_setting_that_is_wrong_is_an_error_at_the_first_call_and_at_every_other(
    fresh: pytest.MonkeyPatch, name: str, value: str, code: str, words: str
) -> None:
    fresh.setenv(name, value)
    for _ in range(2):
        problem = raised(context.effective)
        assert problem.code == code
        assert words in str(problem)


def test_use_sets_the_policy_and_puts_it_back() -> None:
    with glm5_hal.use("cpu:reference", require="deterministic", check="values"):
        assert now() == ("cpu:reference", "hal.use", frozenset({"deterministic"}), "values")
    assert now() == DEFAULT


def test_use_is_put_back_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="inside"), glm5_hal.use("cpu"):
        raise RuntimeError("inside")
    assert now() == DEFAULT


def test_inner_uses_keep_what_they_do_not_set_and_requirements_add_up() -> None:
    with glm5_hal.use("cpu", require="deterministic", check="metadata"):
        with glm5_hal.use(require=["batch_invariant", "graph_safe"]):
            wanted = frozenset({"deterministic", "batch_invariant", "graph_safe"})
            assert now() == ("cpu", "hal.use", wanted, "metadata")
            with glm5_hal.use("cpu:torch", check="auto"):
                assert now() == ("cpu:torch", "hal.use", wanted, "auto")
        assert now() == ("cpu", "hal.use", frozenset({"deterministic"}), "metadata")


def test_use_does_not_need_the_environment(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("GLM5_BACKEND", "no such thing!")
    with glm5_hal.use("cpu"):
        assert now()[0] == "cpu"
    assert raised(context.effective).code == "POLICY"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ({"policy": "cpu,"}, "POLICY", "a backend is expected"),
        ({"policy": "acme"}, "UNKNOWN", "no backend is called 'acme'"),
        ({"policy": "cpu:native"}, "UNKNOWN", "no provider 'native'"),
        ({"policy": 3}, "POLICY", "a policy is text"),
        ({"require": "determinstic"}, "UNKNOWN", "did you mean 'deterministic'?"),
        ({"require": ["deterministic", "fast"]}, "UNKNOWN", "no attribute 'fast'"),
        ({"check": "value"}, "UNKNOWN", "did you mean 'values'?"),
    ],
)
def test_a_use_that_is_wrong_changes_nothing(arguments: dict[str, str], code: str, words: str) -> None:
    def enter() -> None:
        with glm5_hal.use(**arguments):
            raise AssertionError("entered")

    problem = raised(enter)
    assert problem.code == code
    assert words in str(problem)
    assert now() == DEFAULT


def test_every_attribute_can_be_required() -> None:
    with glm5_hal.use(require=ATTRIBUTES):
        assert now()[2] == set(ATTRIBUTES)


def test_equal_uses_are_one_object_so_that_dispatch_tables_stay_small() -> None:
    seen = []
    for _ in range(2):
        with glm5_hal.use("cpu", require={"graph_safe", "deterministic"}):
            seen.append(context.active.get())
    assert seen[0] is seen[1] is not None


def test_threads_do_not_see_each_others_policy() -> None:
    seen: dict[str, str] = {}
    inside = threading.Barrier(2, timeout=10)

    def work(policy: str) -> None:
        with glm5_hal.use(policy):
            inside.wait()
            seen[policy] = now()[0]
            inside.wait()

    with glm5_hal.use("cpu"):
        threads = [threading.Thread(target=work, args=(p,)) for p in ("cpu:torch", "cpu:reference")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert now()[0] == "cpu"
    assert seen == {"cpu:torch": "cpu:torch", "cpu:reference": "cpu:reference"}


def test_tasks_inherit_the_policy_and_do_not_see_each_others() -> None:
    async def work(policy: str) -> tuple[str, str]:
        inherited = now()[0]
        with glm5_hal.use(policy):
            await asyncio.sleep(0)
            return inherited, now()[0]

    async def main() -> list[tuple[str, str]]:
        with glm5_hal.use("cpu"):
            return list(await asyncio.gather(work("cpu:torch"), work("cpu:reference")))

    assert asyncio.run(main()) == [("cpu", "cpu:torch"), ("cpu", "cpu:reference")]


def test_a_policy_cannot_be_changed_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "capturing", lambda: True)

    def enter() -> None:
        with glm5_hal.use("cpu"):
            raise AssertionError("entered")

    problem = raised(enter)
    assert problem.code == "CAPTURE"
    assert now() == DEFAULT


def test_reset_forgets_what_was_learnt() -> None:
    before = context.catalogue()
    with glm5_hal.use("cpu"):
        context.reset()
        assert now()[0] == "cpu", "but not the block that we are in"
    assert context.catalogue() is not before


def test_the_group_of_entry_points_is_what_the_docs_say() -> None:
    assert hookspecs.GROUP == "glm5_hal.backends"


def test_a_capture_is_seen_where_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own names, which exist on every build: `setattr` refuses one that does not."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert context.capturing()
    with pytest.raises(HalError) as caught, context.use("cpu"):
        pass
    assert caught.value.code == "CAPTURE"


def test_a_provider_of_a_backend_that_cannot_offer_its_kernels_is_not_checked() -> None:
    """Whether it is named or not, the backends before it serve."""

    def kernels() -> Sequence[Kernel]:
        raise OSError("no compiler")

    pair = toy(PAIR)
    with published(), installed(stand_in("good", [kernel_of(PAIR)]), stand_in("acme", kernels)):
        for policy in ("good,acme", "good,acme:torch"):
            with glm5_hal.use(policy):
                assert pair.choose(torch.ones(2, 3)).name == "good:native"
        with glm5_hal.use("acme:torch"):
            problem = raised(pair, torch.ones(2, 3))
    assert problem.code == "NO_KERNEL"
    assert "no compiler" in str(problem)


def test_a_capture_is_seen_on_an_accelerator_that_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = True
    quux = SimpleNamespace(is_initialized=lambda: begun, is_current_stream_capturing=lambda: True)
    monkeypatch.setattr(torch, "get_device_module", lambda: quux)
    assert context.capturing()
    begun = False
    assert not context.capturing(), "asking would start the device"
    monkeypatch.setattr(torch, "get_device_module", lambda: SimpleNamespace())
    assert not context.capturing()


def test_a_bad_policy_of_the_environment_spoils_no_call_that_does_not_use_it(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("GLM5_BACKEND", "acmee:native")
    x, w = torch.ones(2, 4), torch.ones(4)
    with context.use("cpu:torch"):
        assert glm5_hal.ops.rms_norm(x, w, eps=1e-5).shape == (2, 4)
    with pytest.raises(HalError, match="no backend is called 'acmee'"):
        glm5_hal.ops.rms_norm(x, w, eps=1e-5)
