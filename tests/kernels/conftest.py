"""What the tests of several kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tilewright.kernels.cpu import build, native
from tilewright.kernels.dispatch import router


def forget_choice() -> None:
    """Choose library and instruction set anew, and let the router ask again."""
    native.reload()
    router.invalidate()


@pytest.fixture(params=build.isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Forces one instruction set; skips, with the reason, where this processor does not have it."""
    monkeypatch.setenv("TILEWRIGHT_CPU_ISA", request.param)
    forget_choice()
    try:
        reason = native.why_no_native()
    except ValueError as error:
        reason = f"needs {request.param}:{str(error).partition(':')[2]}"
    if reason is not None:
        forget_choice()
        pytest.skip(reason)
    assert native.isa() == request.param
    yield request.param
    forget_choice()
